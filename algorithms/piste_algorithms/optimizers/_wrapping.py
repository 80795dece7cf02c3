"""What the optimizers that wrap another one share."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import LBFGS
from torch.optim.optimizer import Optimizer, StateDict

from piste_algorithms.optimizers._adamw import gradients_of


class Wrapper(Optimizer):
    """An optimizer that chooses the gradients with which another one, its base, takes the step.

    The parameter groups are the base's own, so that a scheduler of the learning rate may be given either.
    `state` holds what the wrapper itself keeps of each parameter, the base's state stays the base's.

    Attributes:
        base: the optimizer that takes the step.
        memory: names of the attributes that a subclass keeps over all parameters: numbers, strings, tensors
            and lists of them, which `state_dict` saves.

    Args:
        base: a built optimizer.

    Raises:
        ValueError: if `base` is no optimizer, or one that calls a closure itself.
    """

    memory: ClassVar[tuple[str, ...]] = ()

    def __init__(self, base: Optimizer) -> None:
        if not isinstance(base, Optimizer):
            raise ValueError(f"base must be a built torch optimizer, got {base!r}")
        if getattr(base, "needs_closure", False) or isinstance(base, LBFGS):
            raise ValueError(f"base must step without a closure, but {type(base).__name__} needs one")
        self.base = base
        super().__init__(base.param_groups, base.defaults)
        self.param_groups = base.param_groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base, as `torch.optim.Optimizer.add_param_group`."""
        if any(param_group is group for group in self.base.param_groups):  # while this one is constructed
            super().add_param_group(param_group)
        else:
            self.base.add_param_group(param_group)

    def state_dict(self) -> StateDict:
        """The state of this optimizer, with `memory` and, nested under `base`, the base's."""
        kept = {name: copy.deepcopy(getattr(self, name)) for name in self.memory}
        return {**super().state_dict(), "memory": kept, "base": self.base.state_dict()}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load what `state_dict` returned; the next step is the one that would have followed."""
        own = {key: value for key, value in state_dict.items() if key not in {"memory", "base"}}
        super().load_state_dict(own)
        self.base.load_state_dict(state_dict["base"])
        self.param_groups = self.base.param_groups
        for name in self.memory:
            setattr(self, name, copy.deepcopy(state_dict["memory"][name]))

    def __getstate__(self) -> dict[str, Any]:
        # torch's own would leave out the base and all that a subclass keeps; hooks stay behind, as there, and
        # so does the `step` with which a scheduler of the learning rate covers the class's: it is this one's.
        return {
            name: value
            for name, value in vars(self).items()
            if not name.endswith("_hooks") and name != "step"
        }

    def _parameters(self) -> list[Tensor]:
        """The parameters that have a gradient, in the order of the groups.

        Raises:
            RuntimeError: if a gradient is sparse.
        """
        return [parameter for group in self.param_groups for parameter in gradients_of(self, group)[0]]

    @contextmanager
    def _gradients_kept(self) -> Iterator[list[Tensor]]:
        """The parameters that have a gradient; those gradients are theirs again at the end."""
        parameters = self._parameters()
        gradients = [parameter.grad for parameter in parameters]
        try:
            yield parameters
        finally:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
