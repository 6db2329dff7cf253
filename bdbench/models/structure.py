"""What a network is made of."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


BatchNorm = nn.modules.batchnorm._BatchNorm  # noqa: SLF001 - torch's only common base


def norms_of(model: nn.Module) -> list[BatchNorm]:
    """Return the batch norms of a module."""
    return [module for module in model.modules() if isinstance(module, BatchNorm)]


def frozen(module: Module) -> Module:
    """Return the module in evaluation mode, its parameters without gradients."""
    module.eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module
