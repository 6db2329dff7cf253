"""Networks that make triggers: kept in an attack's state, and applied so that the batch plays no part."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bdbench.attacks.base import State
from bdbench.models.structure import Module, frozen
from bdbench.seeds import scoped

CHUNK = 16
"""Images of 32x32 that a generator sees at once; fewer of larger ones."""

PIXELS = CHUNK * 32 * 32


def fresh(factory: Callable[[], Module], seed: int, purpose: str, device: torch.device) -> Module:
    """Build a network on a device; equal seeds and purposes give equal weights."""
    with scoped(seed, "generator", purpose):
        return factory().to(device).to(memory_format=torch.channels_last)


def weights_of(network: nn.Module, prefix: str) -> State:
    """Return copies of a network's parameters and buffers, on the CPU, under names with a prefix such as "encoder."."""
    weights = network.state_dict().items()
    return {prefix + name: value.detach().cpu().contiguous().clone() for name, value in weights}


def restored(factory: Callable[[], Module], state: State, prefix: str) -> Module:
    """Return the network whose weights a state holds under a prefix: in evaluation mode, without gradients.

    Args:
        factory: builds the network; what it draws is thrown away.
        state: with what `weights_of` made; is not changed.
        prefix: of its names.
    """
    with torch.device("meta"):
        network = factory()
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    network.load_state_dict(own, assign=True)
    return frozen(network.to(memory_format=torch.channels_last))


def in_equal_batches(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Apply a function of single images in batches of one size, the last filled up with zeros.

    The last bits of a convolution depend on the size of its batch, and rounding to bytes may turn them into a gray
    level: with equal batches an image gives the same result in any company.

    Args:
        function: maps (b, C, H, W) float to (b, ...).
        images: (B, C, H, W) float.

    Returns:
        (B, ...), without gradient.
    """
    count, _, height, width = images.shape
    size = max(1, min(CHUNK, PIXELS // (height * width)))
    room = max(1, math.ceil(count / size)) * size
    filled = torch.zeros(room, *images.shape[1:]).contiguous(memory_format=torch.channels_last)
    filled[:count] = images
    with torch.inference_mode():
        made = torch.cat([function(part) for part in filled.split(size)])[:count]
    return made.clone()


def step_along(leader: torch.optim.Optimizer, follower: torch.optim.Optimizer) -> None:
    """Let one optimiser take its step right after another's, on the gradients of the same loss."""

    def step(*_: object) -> None:
        follower.step()
        follower.zero_grad(set_to_none=True)

    leader.register_step_post_hook(step)
