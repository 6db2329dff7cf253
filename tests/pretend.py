"""A pretended accelerator: the CPU computes, but a tensor that lies `THERE` refuses to meet one that lies here.

It finds without a GPU what fails only on one: a mask on the CPU used there, a generator of the wrong device, `.numpy()`
of a tensor there. And it finds where the host waits for the device. The device has the type `lazy`: torch knows the
name, and has nothing else behind it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

import bdbench
from bdbench.defenses.base import Defense
from bdbench.training.loop import Batch, Phase
from bdbench.training.recipe import Recipe

THERE = torch.device("lazy", 0)
PACKAGE = str(Path(bdbench.__file__).parent)

INDEXES = ("index", "index_put", "index_put_", "_index_put_impl_")
"""What is indexed may lie there and its indices here; never the other way round."""
COPIES = ("copy_", "_to_copy", "set_", "equal")
"""These may see both places."""
SHAPED_BY_VALUES = (
    "nonzero",
    "masked_select",
    "unique",
    "_unique2",
    "unique_dim",
    "bincount",
    "equal",
    "_local_scalar_dense",
)
"""The shape of the answer, or the answer itself, is known on the host only when the device has come so far."""


SMALL = {"epochs": 1, "steps": 2, "steps_per_epoch": 2, "batch_size": 16, "rounds": 1}
"""What options are set to whose names end so: two steps or more in every phase, and little else."""


def small(method: type[Defense]) -> dict[str, Any]:
    """Return settings that make every phase of a defense short."""
    names = [*Recipe.model_fields, *method.model_fields]
    return {name: value for name in names for end, value in SMALL.items() if name == end or name.endswith(f"_{end}")}


class There(Tensor):
    """A tensor on the pretended device; `inner` is where its values really are."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls: type[There], inner: Tensor) -> There:  # noqa: PYI034
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=THERE, requires_grad=inner.requires_grad,
        )  # fmt: skip
        made.inner = inner.detach()
        return made

    def __repr__(self, **_: Any) -> str:
        return f"There({tuple(self.shape)})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], *_: Any) -> There:
        return There(parts["inner"])

    def numpy(self, **_: Any) -> Any:
        raise TypeError("numpy cannot read a tensor that lies there; use .cpu() first")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Pretended.current.run(func, args, kwargs or {})


class Pretended(TorchDispatchMode):
    """While it is entered, there is a second device.

    Attributes:
        steps: of training that were taken.
        waits: of the host for the device, inside of the steps of training: operation and place in the code.
    """

    current: Pretended

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self.waits: list[str] = []
        Pretended.current = self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Do an operation where its tensors are; refuse it where they are not in one place."""
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [tensor for tensor in tensors if isinstance(tensor, There)]
        here = [tensor for tensor in tensors if not isinstance(tensor, There) and tensor.dim() > 0]
        if name in INDEXES:
            here = [part for part in tree_leaves((args[0], args[2:])) if isinstance(part, Tensor) and part.dim() > 0]
            here = [part for part in here if not isinstance(part, There)]
        if there and here and name not in COPIES:
            raise RuntimeError(f"{func}: {there} meets {[tuple(tensor.shape) for tensor in here]} on the CPU")
        wanted, first = kwargs.get("device"), args[0] if args else None
        goes_there = torch.device(wanted) == THERE if wanted is not None else bool(there)
        if name == "copy_":
            goes_there = isinstance(first, There)
        if kwargs.get("generator") is not None and goes_there:
            raise RuntimeError(f"{func} draws there from a generator of the CPU")
        if there or goes_there:
            self._look_for_a_wait(name, args, kwargs, goes_there)
        given = {**kwargs, "device": torch.device("cpu")} if wanted is not None else kwargs
        given = {**given, "pin_memory": False} if given.get("pin_memory") else given
        inner_args, inner_kwargs = tree_map(lambda leaf: leaf.inner if isinstance(leaf, There) else leaf, (args, given))
        out = func(*inner_args, **inner_kwargs)
        if not goes_there:
            return out
        out = tree_map(lambda leaf: There(leaf) if type(leaf) is Tensor else leaf, out)
        with suppress(RuntimeError, AttributeError, KeyError, AssertionError):
            return return_and_correct_aliasing(func, args, kwargs, out)
        return first if name.endswith("_") else out

    def _look_for_a_wait(self, name: str, args: Any, kwargs: Any, goes_there: bool) -> None:
        blocking = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        source = args[1] if name == "copy_" else args[0] if args else None
        moves = name in ("copy_", "_to_copy") and isinstance(source, There) != goes_there
        indices = [leaf for leaf in tree_leaves(args[1:2]) if isinstance(leaf, Tensor)] if name in INDEXES else []
        by_index = any(index.dtype == torch.bool or not isinstance(index, There) for index in indices)
        counted = name == "repeat_interleave" and len(args) == 1
        known = isinstance(source, Tensor) and source.dim() == 0 and not isinstance(source, There)
        waits = (moves and blocking and not known) or by_index or counted or name in SHAPED_BY_VALUES
        if waits and (place := step_place()):
            self.waits.append(f"{name} at {place}")


def step_place() -> str:
    """Return the place in the package where a step of training is now, "" outside of steps."""
    frame, place = sys._getframe(1), ""
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(PACKAGE):
            if code.co_name == "_epoch":
                return place
            if code.co_name == "_has_finite_weights":
                return ""
            place = place or f"{code.co_filename[len(PACKAGE) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


@contextmanager
def pretended(patch: pytest.MonkeyPatch) -> Iterator[Pretended]:
    """Let `--device auto` be the pretended one, in float32, with room for a gigabyte of images."""
    real = torch.autocast

    class Autocast(real):  # type: ignore[misc, valid-type]
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__("cpu" if device_type == THERE.type else device_type, *args, **kwargs)

    make = torch.tensor

    def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        made = make(data, *args, **kwargs)
        return made if device is None else made.to(device)

    patch.setattr(torch, "autocast", Autocast)
    patch.setattr(torch, "tensor", tensor)
    for stage in ("datasets", "models", "judging"):
        patch.setattr(f"bdbench.stages.{stage}.resolve_device", lambda _: THERE)
        patch.setattr(f"bdbench.stages.{stage}.use_bf16", lambda *_: False)
    patch.setattr("bdbench.training.engine.memory_for_images", lambda _: 10**9)
    take_step = Phase._update
    with Pretended() as mode:

        def update(phase: Phase[Any], batch: Batch, lr: float) -> Tensor:
            mode.steps += 1
            return take_step(phase, batch, lr)

        patch.setattr(Phase, "_update", update)
        yield mode
