"""Upper bounds on what modules of a network give: a wrapper."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, StringConstraints, model_validator
from torch import Tensor, nn

from bdbench.errors import OptionError
from bdbench.models.classifier import Classifier
from bdbench.models.structure import outputs_of
from bdbench.models.wrappers import Wrapper

Site = Annotated[str, StringConstraints(min_length=1, max_length=200)]
BOUND = "upper_bound"
"""Name of the buffer that a bounded module has."""


class UpperBounds(Wrapper):
    """The outputs of some modules are cut at an upper bound, one for each channel or for each place of each channel.

    A bound is a buffer `upper_bound` of its module, at first infinite; later training leaves it as it is.
    """

    name: ClassVar[str] = "upper-bounds"

    sites: tuple[Site, ...] = Field(
        min_length=1, max_length=1000, description="Names of the modules, such as features.blocks.0.norm1."
    )
    per: Literal["channel", "place"] = Field("channel", description="What has a bound of its own.")

    @model_validator(mode="after")
    def _once_each(self) -> Self:
        if len(set(self.sites)) < len(self.sites):
            raise ValueError("sites must be different")
        return self

    def build(self, model: Classifier, image_shape: tuple[int, int, int]) -> None:
        """Give each of the modules a bound."""
        known = {name for name, _ in model.named_modules() if name.startswith("features.")}
        for site in self.sites:
            if site not in known:
                raise OptionError(f"the network has no module '{site}' in its features")
        found = outputs_of(model, self.sites, image_shape)
        for site in self.sites:
            shapes = found.get(site, [])
            if len(shapes) != 1 or len(shapes[0]) < 2:
                raise OptionError(
                    f"module '{site}' cannot be bounded: it gives {len(shapes)} tensors in a pass, and must give one"
                )
            shape = shapes[0][1:]
            if self.per == "channel":
                shape = (shape[0], *[1] * (len(shape) - 1))
            part = model.get_submodule(site)
            part.register_buffer(BOUND, torch.full(shape, torch.inf, device=model.mean.device))
            part.register_forward_hook(cut)


def cut(part: nn.Module, _: Any, output: Tensor) -> Tensor:  # noqa: ANN401 - what a module takes
    """Return what a module gives, at most its bound: a hook, which a copy of the module takes along."""
    bound: Tensor = getattr(part, BOUND)
    return torch.minimum(output, bound.to(output.dtype))
