"""Any classifier of torchvision, its last linear layer replaced by bdbench's head; weights are always fresh."""

from __future__ import annotations

from types import ModuleType
from typing import cast

import torch
from torch import Tensor, nn

from bdbench.errors import BdbenchError, OptionError, unknown_name


class TorchvisionFeatures(nn.Module):
    """The network `name` of `torchvision.models` up to its last linear layer; gray images get three equal channels.

    Args:
        name: such as ``"mobilenet_v3_small"``.
        image_shape: (C, H, W).
    """

    def __init__(self, name: str, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        models = _import_models()
        if name not in models.list_models(module=models):
            raise unknown_name("torchvision model", name, models.list_models(module=models))
        settings: dict[str, int] = {"aux_logits": 0, "init_weights": 1} if name in ("googlenet", "inception_v3") else {}
        if name.startswith("vit_"):
            settings["image_size"] = image_shape[1]
        network = models.get_model(name, weights=None, **settings)
        self.size = _remove_last_linear(network, name)
        self.gray = image_shape[0] == 1
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, D)."""
        return cast("Tensor", self.network(images.repeat(1, 3, 1, 1) if self.gray else images)).flatten(1)


def _import_models() -> ModuleType:
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:
        raise BdbenchError(
            f"torchvision cannot be imported ({error}); install the one that belongs to torch {torch.__version__}"
        ) from error
    return cast("ModuleType", models)


def _remove_last_linear(network: nn.Module, name: str) -> int:
    linear = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise OptionError(f"torchvision model '{name}' has no linear layer to replace; choose another model")
    parent_path, _, attribute = linear[-1].rpartition(".")
    parent = network.get_submodule(parent_path)
    size = cast("nn.Linear", network.get_submodule(linear[-1])).in_features
    setattr(parent, attribute, nn.Identity())
    return size
