"""A network with some of its parameters replaced by functions of other tensors, through which gradients flow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from bdbench.models.classifier import Classifier


def called(model: Classifier, changed: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Return the logits (B, K) of images (B, C, H, W) with some parameters replaced.

    Running statistics of norms in training mode move as in an ordinary pass; see `untracked_norms`. Phases with it
    are not compiled: `Engine.fit(..., compiled=False)`.

    Args:
        model: the network; its own parameters stay.
        changed: what takes the place of parameters, by name.
        images: in [0, 1].
    """
    return cast("Tensor", torch.func.functional_call(model, dict(changed), (images,)))
