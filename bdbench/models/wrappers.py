"""What changes the structure of a network after it was made, by a registered name, so that its artifact can be loaded.

A wrapper is built around a fresh network before weights are loaded; what it adds has names of its own among them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from bdbench.errors import OptionError
from bdbench.models.classifier import Classifier
from bdbench.options import Options


class Wrapper(Options, ABC):
    """Base of wrappers: fields are options, which are stored with the model; `build` changes a network.

    Options come back from a file that may be damaged or hostile: each has a type and bounds.
    """

    name: ClassVar[str]
    """As it is registered."""

    @abstractmethod
    def build(self, model: Classifier, image_shape: tuple[int, int, int]) -> None:
        """Change a network in place. What is added has to be copied with it, and has no need of its weights' values.

        Args:
            model: the network, on any device.
            image_shape: (C, H, W) of what it takes.

        Raises:
            OptionError: the options do not fit the network.
        """


def wrap(model: Classifier, wrapper: Wrapper, image_shape: tuple[int, int, int]) -> Classifier:
    """Change a network in place by a wrapper, and return it; artifacts of it and of its copies say so.

    Raises:
        OptionError: the network has a wrapper, or the options do not fit it.
    """
    if model.wrapper is not None:
        raise OptionError(
            f"the network has the wrapper '{model.wrapper.name}' already, and can have one only; choose a suspect "
            "without one"
        )
    wrapper.build(model, image_shape)
    model.wrapper = wrapper
    return model
