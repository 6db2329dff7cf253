"""What a network is made of: its batch norms, what feeds them, its stages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bdbench.errors import OptionError

if TYPE_CHECKING:
    from bdbench.models.classifier import Classifier

Module = TypeVar("Module", bound=nn.Module)


BatchNorm = nn.modules.batchnorm._BatchNorm  # noqa: SLF001 - torch's only common base


class Pair(NamedTuple):
    """Names of a convolution and of the batch norm that takes its output, and nothing else's."""

    conv: str
    norm: str


def norms_of(model: nn.Module) -> list[BatchNorm]:
    """Return the batch norms of a module."""
    return [module for module in model.modules() if isinstance(module, BatchNorm)]


def named_norms(model: nn.Module, method: str) -> dict[str, BatchNorm]:
    """Return the batch norms that have a weight for each channel, by name, in the order of registration.

    Args:
        model: the network.
        method: whose need it is, for the message of the error.

    Raises:
        OptionError: there are none.
    """
    found = {name: part for name, part in model.named_modules() if isinstance(part, BatchNorm) and part.affine}
    if not found:
        raise OptionError(
            f"method '{method}' works on batch norms, and this network has none; choose a network that has them, such "
            "as wrn-16-1, preact-resnet-18, resnet-18 or convnet"
        )
    return found


def frozen(module: Module) -> Module:
    """Return the module in evaluation mode, its parameters without gradients."""
    module.eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module


@contextmanager
def untracked_norms(model: nn.Module) -> Iterator[None]:
    """Keep the running statistics of batch norm in training mode, while batches are normalised by their own."""
    norms = norms_of(model)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def pairs(model: Classifier, image_shape: tuple[int, int, int]) -> list[Pair]:
    """Return which convolution feeds which batch norm, in the order of the data.

    Found by data flow: the norm's input is the convolution's output itself, unchanged. The order of registration would
    mislead: in pre-activation networks the first norm of a block takes a sum.
    """
    outputs: dict[int, tuple[str, Tensor, int]] = {}
    found: list[Pair] = []

    def leaves(name: str, output: Tensor) -> None:
        outputs[id(output)] = (name, output, output._version)  # noqa: SLF001 - what is changed in place is another thing

    def enters(name: str, taken: Tensor) -> None:
        conv, output, version = outputs.get(id(taken), ("", taken, -1))
        if output is taken and version == taken._version:  # noqa: SLF001 - see above
            found.append(Pair(conv, name))

    with ExitStack() as hooks:
        for name, part in model.named_modules():
            if isinstance(part, nn.Conv2d):
                handle = part.register_forward_hook(lambda _, __, output, name=name: leaves(name, output))
                hooks.callback(handle.remove)
            elif isinstance(part, BatchNorm):
                handle = part.register_forward_pre_hook(lambda _, inputs, name=name: enters(name, inputs[0]))
                hooks.callback(handle.remove)
        _try(model, image_shape)
    return found


def convolutions(model: Classifier, image_shape: tuple[int, int, int]) -> list[str]:
    """Return the names of the convolutions of all channels with all, in the order of the data."""
    found: list[str] = []
    with ExitStack() as hooks:
        for name, part in model.named_modules():
            if isinstance(part, nn.Conv2d) and part.groups == 1:
                handle = part.register_forward_hook(lambda _, __, ___, name=name: found.append(name))
                hooks.callback(handle.remove)
        _try(model, image_shape)
    return found


def stages_of(model: Classifier, image_shape: tuple[int, int, int]) -> list[str]:
    """Return the names of the modules that end a stage: those that the network declares in `stages`, else by data flow.

    By data flow they are, of the outermost modules of the features with maps (B, C, h, w) of more than one place, the
    last at each resolution.
    """
    declared = getattr(model.features, "stages", None)
    if declared is not None:
        return [f"features.{name}" for name in declared]
    last: dict[tuple[int, int], str] = {}

    def leaves(name: str, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] * output.shape[3] > 1:
            last.pop((output.shape[2], output.shape[3]), None)
            last[output.shape[2], output.shape[3]] = name

    with ExitStack() as hooks:
        for name, part in _outermost(model.features):
            handle = part.register_forward_hook(lambda _, __, output, name=name: leaves(name, output))
            hooks.callback(handle.remove)
        _try(model, image_shape)
    return list(last.values())


def embed_with_stages(model: Classifier, stages: Sequence[str], images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the embeddings (B, D) of images (B, C, H, W) in [0, 1], and the maps (B, c, h, w) that end each stage."""
    maps: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for stage in stages:
            part = model.get_submodule(stage)
            hooks.callback(
                part.register_forward_hook(lambda _, __, output, stage=stage: maps.update({stage: output})).remove
            )
        embedding = model.embed(images)
    return embedding, [maps[stage] for stage in stages]


def rectified(model: Classifier, image_shape: tuple[int, int, int]) -> list[str]:
    """Return the names of modules of the features that give what a ReLU gives or what it takes, in the order of data.

    Of each ReLU it is the innermost module whose output is that of the ReLU itself, else the one whose output goes into
    it: an upper bound that is not negative does the same before a ReLU as after it. A module that is passed twice, such
    as one ReLU for all of a block, has no output of its own; a ReLU that no module's output goes into, or comes from,
    has no name, and is left out.
    """
    outputs: list[tuple[str, Tensor, int]] = []

    def leaves(name: str, output: object) -> None:
        if isinstance(output, Tensor):
            outputs.append((name, output, output._version))  # noqa: SLF001 - see `pairs`

    with ExitStack() as hooks, _Rectifying() as rectifying:
        for name, part in model.named_modules():
            if name.startswith("features."):
                handle = part.register_forward_hook(lambda _, __, output, name=name: leaves(name, output))
                hooks.callback(handle.remove)
        _try(model, image_shape)
    passes = Counter(name for name, _, _ in outputs)
    found = []
    for taken, given in rectifying.calls:
        own = (
            name
            for wanted, version in (given, taken)
            for name, output, at in outputs
            if output is wanted and at == version and passes[name] == 1
        )
        found.append(next(own, ""))
    return list(dict.fromkeys(filter(None, found)))


class _Rectifying(TorchFunctionMode):
    """Notes what ReLUs take and give while it is entered: tensors, with their versions at that time."""

    FUNCTIONS = (F.relu, F.relu6, F.hardtanh, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[tuple[Tensor, int], tuple[Tensor, int]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        if func not in self.FUNCTIONS:
            return func(*args, **(kwargs or {}))
        taken = args[0] if args else kwargs["input"]
        before = (taken, taken._version)  # noqa: SLF001 - see `pairs`
        given = func(*args, **(kwargs or {}))
        self.calls.append((before, (given, given._version)))  # noqa: SLF001
        return given


def outputs_of(
    model: Classifier, names: Sequence[str], image_shape: tuple[int, int, int]
) -> dict[str, list[tuple[int, ...]]]:
    """Return the shapes (B, ...) of what modules give, by name, one for each time that a blank image passes them."""
    found: dict[str, list[tuple[int, ...]]] = {}

    def leaves(name: str, output: object) -> None:
        shape = tuple(output.shape) if isinstance(output, Tensor) and output.is_floating_point() else ()
        found.setdefault(name, []).append(shape)

    with ExitStack() as hooks:
        for name in names:
            handle = model.get_submodule(name).register_forward_hook(
                lambda _, __, output, name=name: leaves(name, output)
            )
            hooks.callback(handle.remove)
        _try(model, image_shape)
    return found


def _outermost(features: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Give the modules that a network is made of at first sight, by name."""
    name, children = "features", list(features.named_children())
    while len(children) == 1 and list(children[0][1].children()):
        name, children = f"{name}.{children[0][0]}", list(children[0][1].named_children())
    for key, child in children:
        yield from _unpacked(f"{name}.{key}", child)


def _unpacked(name: str, part: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Give a module, or what is in it where it is a sequence."""
    if not isinstance(part, nn.Sequential):
        yield name, part
        return
    for key, child in part.named_children():
        yield from _unpacked(f"{name}.{key}", child)


def _try(model: Classifier, image_shape: tuple[int, int, int]) -> None:
    """Pass one blank image through a network in evaluation mode, and leave the mode as it was."""
    training = [part.training for part in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            model(torch.zeros(1, *image_shape, device=model.mean.device))
    finally:
        for part, mode in zip(model.modules(), training, strict=True):
            part.training = mode
