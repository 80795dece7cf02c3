"""Turns the `[optimizer]` table of a recipe into a torch optimizer."""

from __future__ import annotations

import inspect
import re
from collections.abc import Set
from typing import Any

import torch

from piste import catalog
from piste.config import Optimizer
from piste.errors import BadInput, nearest

Groups = list[dict[str, Any]]


def build_optimizer(section: Optimizer, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Builds the optimizer that a recipe names, for a model's trainable parameters.

    The groups are those of `[[optimizer.groups]]`; without them what the class itself proposes
    (`default_param_groups(model)`), or the no-decay rule of `decay_groups` for a class that does not.

    Args:
        section: The recipe's `[optimizer]`.
        model: The model, before it is wrapped for distributed training.

    Raises:
        BadInput: A keyword that the optimizer does not take, a value that it refuses, a group's pattern
            that matches nothing.
    """
    return _build(section, parameter_groups(section, model), _group_options(section))


def _build(section: Optimizer, groups: Groups, group_options: Set[str]) -> torch.optim.Optimizer:
    cls = catalog.load_optimizer(section.name)
    accepted = list(inspect.signature(cls).parameters)[1:]
    for key in section.options:
        if key not in accepted:
            raise BadInput(f"optimizer.{key}: {section.name} takes no {key!r}{nearest(key, accepted)}")
    if (section.base is not None) != ("base" in inspect.signature(cls).parameters):
        verb = "wraps no optimizer: remove" if section.base else "wraps an optimizer: add"
        raise BadInput(f"optimizer: {section.name} {verb} [optimizer.base]")
    first: Any = groups if section.base is None else _build(section.base, groups, group_options)
    try:
        built: torch.optim.Optimizer = cls(first, **section.options)
    except (TypeError, ValueError) as error:
        raise BadInput(f"optimizer {section.name}: {error}") from error
    for key in sorted(group_options - built.defaults.keys()) if section.base is None else ():
        hint = nearest(key, built.defaults)
        raise BadInput(f"optimizer.groups: {section.name} takes no {key!r} in a group{hint}")
    return built


def check_optimizer(section: Optimizer) -> None:
    """Builds the optimizer for a small model, so that a bad recipe fails before anything starts."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    # torch would hide this function from its compiler, and import that for it: a second of every command.
    hidden: Any = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    hidden.__dynamo_disable = hidden
    try:
        groups = parameter_groups(section.model_copy(update={"groups": ()}), model)
        _build(section, groups, _group_options(section))
    finally:
        del hidden.__dynamo_disable


def _group_options(section: Optimizer) -> set[str]:
    return {key for group in section.groups for key in group.options}


def parameter_groups(section: Optimizer, model: torch.nn.Module) -> Groups:
    """The parameter groups that a recipe's optimizer has for a model.

    Raises:
        BadInput: A group's pattern matches nothing, or a parameter no pattern.
    """
    if section.groups:
        return _matched_groups(section, model)
    cls = catalog.load_optimizer(section.chain[-1].name)
    if hasattr(cls, "default_param_groups"):
        return list(cls.default_param_groups(model))
    return decay_groups(model)


def decay_groups(model: torch.nn.Module) -> Groups:
    """Two groups: matrices as the optimizer is set, gains and biases without weight decay."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    vectors = [p for p in trainable if p.ndim < 2]
    groups: Groups = [{"params": [p for p in trainable if p.ndim >= 2]}]
    return [g for g in [*groups, {"params": vectors, "weight_decay": 0.0}] if g["params"]]


def _matched_groups(section: Optimizer, model: torch.nn.Module) -> Groups:
    groups: Groups = [{"params": [], **group.options} for group in section.groups]
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        for rule, group in zip(section.groups, groups, strict=True):
            if re.search(rule.match, name):
                group["params"].append(parameter)
                break
        else:
            raise BadInput(f"optimizer.groups: no pattern matches parameter {name!r}; end with match = '.*'")
    for rule, group in zip(section.groups, groups, strict=True):
        if not group["params"]:
            raise BadInput(
                f"optimizer.groups: match = {rule.match!r} matches no parameter that is still free"
            )
    return groups


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """The bytes that the optimizer's state tensors hold (step counters included)."""
    tensors = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    return sum(t.numel() * t.element_size() for t in tensors)
