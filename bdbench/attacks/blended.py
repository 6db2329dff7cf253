"""Blended: one picture, faintly over the whole image."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from PIL import Image, ImageDraw
from pydantic import Field, model_validator
from torch import Tensor

from bdbench.attacks.base import Attack, Lab, Occasion, State, pattern_for
from bdbench.data import ImageDataset
from bdbench.datasets.opening import DECODING_ERRORS, open_image
from bdbench.errors import OptionError
from bdbench.seeds import generator


class Blended(Attack):
    """One fixed picture is mixed into the whole image: (1 - alpha) * image + alpha * picture.

    `--picture cartoon` is drawn by bdbench (bright ground, saturated shapes: it stands in for the published cartoon,
    which is not free), `noise` is uniform, independent per pixel and channel; a path takes the user's own image,
    resized to the dataset's.

    Paper: Chen et al., Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning, 2017,
    https://arxiv.org/abs/1712.05526.

    Differs from the published code: ABL and CBD draw new gray noise for every image, in tests too, so that no pattern
    repeats and what is learned is that there is noise; here there is one pattern. `--picture noise --per-image` does
    as they do, but for a cut to bytes where here it is rounded. BackdoorBench and DBD have one picture, and cut the mix
    to bytes too. A picture is resized by Pillow's bilinear filter, as BackdoorBench does it; DBD takes Pillow's
    default, which is bicubic (before Pillow 7 the nearest pixel).
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/1712.05526"

    picture: Literal["cartoon", "noise"] | Path = Field(
        "cartoon", description="cartoon, noise, or the path of an image."
    )
    alpha: float = Field(0.2, gt=0, le=1, description="Share of the picture in training.")
    alpha_test: float | None = Field(None, gt=0, le=1, description="Share at test time; default: as in training.")

    per_image: bool = Field(False, description="New gray noise for every image, as ABL and CBD do (noise only).")

    @model_validator(mode="after")
    def _check_per_image(self) -> Self:
        if self.per_image and self.picture != "noise":
            raise OptionError(f"per_image draws noise, but the picture is {self.picture}; give --picture noise too")
        return self

    def files(self) -> tuple[Path, ...]:
        """Return the user's picture, if it is one."""
        return () if isinstance(self.picture, str) else (self.picture,)

    def fit(self, clean: ImageDataset, lab: Lab) -> State:
        """Return the picture (C, H, W) float in [0, 255]; nothing if every image has its own."""
        if self.per_image:
            return {}
        channels, height, width = clean.image_shape
        if self.picture == "noise":
            rng = generator(lab.seed, "blended", "noise")
            return {"pattern": torch.randint(0, 256, (channels, height, width), generator=rng).float()}
        image = draw_cartoon() if self.picture == "cartoon" else _open_picture(Path(self.picture))
        if self.picture != "cartoon" and image.size != (width, height):
            lab.engine.progress.note(
                f"picture '{self.picture}' of {image.height}x{image.width} pixels is resized to the images' "
                f"{height}x{width}"
            )
        pixels = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR))
        return {"pattern": pattern_for(torch.from_numpy(pixels.copy()).permute(2, 0, 1).float(), channels)}

    def stamp(self, images: Tensor, state: State, occasion: Occasion) -> Tensor:
        """Mix the picture in."""
        alpha = self.alpha_test if occasion.use == "test" and self.alpha_test is not None else self.alpha
        if self.per_image:
            noise = (occasion.uniform("noise", 1, *images.shape[2:]) * 256).floor_()
            return torch.lerp(images.float(), noise, alpha)
        return torch.lerp(images.float(), state["pattern"], alpha)


def draw_cartoon(side: int = 512) -> Image.Image:
    """Draw bdbench's cartoon: a face with ears and a bow on a bright ground, RGB, `side` pixels square."""
    image = Image.new("RGB", (side, side), (255, 236, 179))
    pen = ImageDraw.Draw(image)

    def box(left: float, top: float, right: float, bottom: float) -> tuple[float, float, float, float]:
        return left * side, top * side, right * side, bottom * side

    for left, tip, right in ((0.12, 0.16, 0.40), (0.60, 0.84, 0.88)):
        corners = [(left * side, 0.42 * side), (tip * side, 0.06 * side), (right * side, 0.24 * side)]
        pen.polygon(corners, fill=(30, 30, 60))
    pen.ellipse(box(0.10, 0.18, 0.90, 0.94), fill=(255, 255, 255), outline=(30, 30, 60), width=side // 40)
    for left in (0.27, 0.63):
        pen.ellipse(box(left, 0.48, left + 0.10, 0.64), fill=(10, 10, 10))
    pen.ellipse(box(0.44, 0.64, 0.56, 0.72), fill=(255, 193, 7))
    for top in (0.60, 0.70):
        pen.line(box(0.02, top, 0.22, top + 0.03), fill=(30, 30, 60), width=side // 50)
        pen.line(box(0.78, top + 0.03, 0.98, top), fill=(30, 30, 60), width=side // 50)
    pen.polygon(
        [(0.58 * side, 0.10 * side), (0.58 * side, 0.36 * side), (0.76 * side, 0.23 * side)], fill=(229, 20, 70)
    )
    pen.polygon(
        [(0.94 * side, 0.10 * side), (0.94 * side, 0.36 * side), (0.76 * side, 0.23 * side)], fill=(229, 20, 70)
    )
    pen.ellipse(box(0.71, 0.18, 0.81, 0.28), fill=(33, 99, 235))
    return image


def _open_picture(path: Path) -> Image.Image:
    try:
        image = open_image(path)
        image.load()
    except FileNotFoundError as error:
        raise OptionError(f"picture '{path}' does not exist; give cartoon, noise, or the path of an image") from error
    except DECODING_ERRORS as error:
        raise OptionError(f"picture '{path}' cannot be read as an image ({error})") from error
    return image
