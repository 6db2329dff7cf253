"""Random views of images for contrastive learning, as SimCLR draws them: per sample, in batches, wherever they are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bdbench.training.devices import sent

CROP_AREA = 0.2
CROP_TRIES = 10
BLUR_SIGMA = (0.1, 2.0)
JITTERED, GRAYED, BLURRED = 0.8, 0.2, 0.5
GRAY_WEIGHTS = (0.2989, 0.587, 0.114)


def contrastive_view(images: Tensor, *, least_area: float = CROP_AREA, mirror: bool = True) -> Tensor:
    """Draw one random view of every image.

    In this order, drawn for each sample: a crop of `least_area` to 1 of the area and an aspect ratio of 3/4 to 4/3,
    resized to the whole (bicubic); a horizontal flip (half of them, none without `mirror`); colour jitter (8 of 10:
    brightness, contrast and saturation times 0.6 to 1.4, hue by up to 0.1 of the circle); grey (2 of 10); Gaussian blur
    of 0.1 to 2 pixels (half). Images of one channel have no saturation, hue or grey to change.

    Paper: https://arxiv.org/abs/2002.05709, appendix A (SimCLR); https://arxiv.org/abs/2202.03423 (DBD).
    Code: SCLBD/DBD config/defense/simclr/badnets/cifar10_resnet18/example.yaml:14-31, data/utils.py:13-24 (4acfdc3).
    Differs from the code: nothing is rounded to bytes in between; the order of the four jitters is drawn once for the
    batch, not for each image; the blur is an exact Gaussian over the mirrored image, where Pillow repeats the edge
    pixel and approximates with boxes.

    Args:
        images: (B, C, H, W) float32 in [0, 1], C of 1 or 3; the default generator of the CPU says which images are
            changed, in which order, that of their device by how much.
        least_area: share of the image that the smallest crop shows.
        mirror: flip half of the views; off where a mirrored image is another thing, such as a digit.

    Returns:
        (B, C, H, W) float32 in [0, 1], also under autocast, without gradient.
    """
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        view_CBHW = _crop_and_flip(images, least_area, 0.5 if mirror else 0.0)
        rows = _chosen(images, JITTERED)
        view_CBHW.index_copy_(1, rows, _jitter(view_CBHW.index_select(1, rows)))
        if len(view_CBHW) == 3:
            rows = _chosen(images, GRAYED)
            view_CBHW.index_copy_(1, rows, _gray(view_CBHW.index_select(1, rows)).expand(3, -1, -1, -1))
        rows = _chosen(images, BLURRED)
        view_CBHW.index_copy_(1, rows, _blur(view_CBHW.index_select(1, rows), _uniform(rows, *BLUR_SIGMA)))
        return view_CBHW.transpose(0, 1)


def _uniform(samples: Tensor, low: float, high: float) -> Tensor:
    """Draw a number in [low, high) for every sample (first dimension), on the samples' device."""
    return low + (high - low) * torch.rand(len(samples), device=samples.device)


def _chosen(images: Tensor, share: float) -> Tensor:
    """Draw on the CPU, so that nobody waits for their number, the rows of the images that an operation changes."""
    return sent((torch.rand(len(images)) < share).nonzero().squeeze(1), images.device)


def _crop_and_flip(images: Tensor, least_area: float = CROP_AREA, mirrored_share: float = 0.5) -> Tensor:
    """Return (C, B, H, W): colours outermost, so that formulas of red, green and blue read adjacent memory."""
    _, _, height, width = images.shape
    (top, left), (box_height, box_width) = _boxes(len(images), height, width, images.device, least_area)
    mirrored = _uniform(images, 0, 1) < mirrored_share
    left, box_width = torch.where(mirrored, left + box_width, left), torch.where(mirrored, -box_width, box_width)
    rows, columns = _resize_matrix(top, box_height, height), _resize_matrix(left, box_width, width)
    return _separable(images.transpose(0, 1).contiguous(), rows, columns).clamp_(0, 1)


def _boxes(
    count: int, height: int, width: int, device: torch.device, least_area: float = CROP_AREA
) -> tuple[Tensor, Tensor]:
    """Draw boxes to crop to: corners (2, B) and sides (2, B), vertical first, in whole pixels.

    The area is uniform and the aspect ratio log-uniform. A box larger than the image is drawn again, up to `CROP_TRIES`
    in all, as in torchvision; then it is the largest of an allowed ratio, anywhere (in torchvision: at the centre).
    """
    area_share, log_ratio = torch.rand(2, CROP_TRIES, count, device=device)
    side = (height * width * (least_area + (1 - least_area) * area_share)).sqrt()
    stretch = torch.exp(math.log(4 / 3) * (log_ratio - 0.5))
    limit = sent(torch.tensor([[height], [width]]), device)
    largest = torch.minimum(limit, (limit.flip(0) * 4 / 3).round()).expand(1, 2, count)
    tries = torch.cat([torch.stack([side / stretch, side * stretch], 1).round(), largest])
    first = (tries <= limit).all(1).int().argmax(0)
    sides = tries[first, :, torch.arange(count, device=device)].T
    return (torch.rand(2, count, device=device) * (limit - sides + 1)).floor(), sides


def _resize_matrix(start: Tensor, length: Tensor, size: int) -> Tensor:
    """Return (B, size, size): bicubic (a = -1/2, as Pillow's) from pixels [start, start + length) to `size` pixels.

    Pixels outside do not count. A negative length reads [start + length, start) backwards.
    """
    start, length = start[:, None, None], length[:, None, None]
    end = start + length
    source = start + (torch.arange(size, device=start.device)[:, None] + 0.5) * (length / size) - 0.5
    pixel = source.floor() + torch.arange(-1, 3, device=start.device)
    x = (pixel - source).abs()
    weight = (1 - x) * torch.where(x < 1, 1 + x - 1.5 * x**2, 0.5 * (2 - x) ** 2)
    weight *= (pixel >= torch.minimum(start, end)) & (pixel < torch.maximum(start, end))
    weight /= weight.sum(2, keepdim=True)
    matrix = torch.zeros(len(start), size, size, device=start.device)
    return matrix.scatter_add_(2, pixel.long().clamp_(0, size - 1), weight)


def _separable(view_CBHW: Tensor, rows_BHH: Tensor, columns_BWW: Tensor) -> Tensor:
    """Return every image of every colour times its matrix of rows from the left and of columns from the right."""
    moved, columns_BWW = torch.empty_like(view_CBHW), columns_BWW.mT.contiguous()
    for before_BHW, after_BHW in zip(view_CBHW, moved, strict=True):
        torch.bmm(rows_BHH @ before_BHW, columns_BWW, out=after_BHW)
    return moved


def _jitter(view_CBHW: Tensor) -> Tensor:
    changes = ((_brightness, 0.6, 1.4), (_contrast, 0.6, 1.4), (_saturation, 0.6, 1.4), (_hue, -0.1, 0.1))
    usable = len(changes) if len(view_CBHW) == 3 else 2
    for index in torch.randperm(usable).tolist():
        change, low, high = changes[index]
        view_CBHW = change(view_CBHW, _uniform(view_CBHW[0], low, high)[:, None, None])
    return view_CBHW


def _brightness(view_CBHW: Tensor, factor_B11: Tensor) -> Tensor:
    return (view_CBHW * factor_B11).clamp_(0, 1)


def _contrast(view_CBHW: Tensor, factor_B11: Tensor) -> Tensor:
    return torch.lerp(_gray(view_CBHW).mean((2, 3), keepdim=True), view_CBHW, factor_B11).clamp_(0, 1)


def _saturation(view_CBHW: Tensor, factor_B11: Tensor) -> Tensor:
    return torch.lerp(_gray(view_CBHW), view_CBHW, factor_B11).clamp_(0, 1)


def _hue(view_CBHW: Tensor, turn_B11: Tensor) -> Tensor:
    """Turn the hue by a share of the circle in [-1/2, 1/2]; HSV's value and saturation stay."""
    red, green, blue = view_CBHW
    low = view_CBHW.amin(0)
    chroma = view_CBHW.amax(0) - low
    # With a pixel's channels stretched to R, G, B in [0, 1], pure red is 1 - R + G + B sixths of the circle away, in
    # every sector, on the side of green or of blue. Selecting the sector instead takes four times as long.
    away = (green + blue).sub_(red).sub_(low).div_(chroma.clamp(min=1e-12)).add_(1)
    hue = away.copysign_(green - blue).add_(6 * turn_B11)
    hue -= 6 * (hue / 6).round_()
    turned = torch.empty_like(view_CBHW)
    for colour, pure in zip(turned, (0, 2, -2), strict=True):
        # 1 within a sixth of the pure colour, 0 beyond two: | |x| - 3 | is 3 less the way round the circle
        torch.sub(hue, pure, out=colour).abs_().sub_(3).abs_().sub_(1).clamp_(0, 1).mul_(chroma).add_(low)
    return turned


def _gray(view_CBHW: Tensor) -> Tensor:
    """Return the luma, (1, B, H, W)."""
    if len(view_CBHW) == 1:
        return view_CBHW
    luma = view_CBHW[:1] * GRAY_WEIGHTS[0]
    return luma.add_(view_CBHW[1:2], alpha=GRAY_WEIGHTS[1]).add_(view_CBHW[2:], alpha=GRAY_WEIGHTS[2])


def _blur(view_CBHW: Tensor, sigma_B: Tensor) -> Tensor:
    rows, columns = (_blur_matrix(sigma_B, side) for side in view_CBHW.shape[2:])
    return _separable(view_CBHW, rows, columns)


def _blur_matrix(sigma: Tensor, size: int) -> Tensor:
    """Return (B, size, size): a Gaussian over a line and its mirror images on both sides, edge pixel not repeated."""
    exponent = -0.5 * (torch.arange(2 * size - 1, device=sigma.device) / sigma[:, None]) ** 2
    # nothing below e^-30 counts beside 1, and denormal numbers are slow
    weight = exponent.masked_fill_(exponent < -30, -torch.inf).exp_()
    # [i, k] of these windows is the weight at distance |i - k|, then at i + k, where pixel k's mirror image before the
    # start is; turned round, the latter serve the mirror images beyond the end
    matrix = torch.cat([weight[:, 1:size].flip(1), weight[:, :size]], 1).unfold(1, size, 1).flip(1)
    mirrored = weight.unfold(1, size, 1)
    matrix[:, :, 1:] += mirrored[:, :, 1:]
    matrix[:, :, :-1] += mirrored.flip(1, 2)[:, :, :-1]
    return matrix.div_(matrix.sum(2, keepdim=True))
