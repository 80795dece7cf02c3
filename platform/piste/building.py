"""Turns the `[optimizer]` table of a recipe into a torch optimizer."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Set
from typing import Any

import torch

from piste import catalog
from piste.config import Optimizer
from piste.errors import BadInput, nearest

Groups = list[dict[str, Any]]


def build_optimizer(
    section: Optimizer, model: torch.nn.Module, total_steps: int | None = None
) -> torch.optim.Optimizer:
    """Builds the optimizer that a recipe names, for a model's trainable parameters.

    The groups are those of `[[optimizer.groups]]`; without them what the class itself proposes
    (`default_param_groups(model)`), or the no-decay rule of `decay_groups` for a class that does not. A
    class that takes `model` or `total_steps` is given them.

    Args:
        section: The recipe's `[optimizer]`.
        model: The model, before it is wrapped for distributed training.
        total_steps: How many steps the optimizer will take, where that is known.

    Raises:
        BadInput: A keyword that the optimizer does not take, a value that it refuses, a group's pattern
            that matches nothing.
    """
    given = {"model": model, "total_steps": total_steps}
    return _build(section, parameter_groups(section, model), _group_options(section), given)


def _build(
    section: Optimizer, groups: Groups, group_options: Set[str], given: Mapping[str, Any]
) -> torch.optim.Optimizer:
    cls = catalog.load_optimizer(section.name)
    taken = list(inspect.signature(cls).parameters)[1:]
    accepted = [key for key in taken if key != "model"]
    for key in section.options:
        if key not in accepted:
            raise BadInput(f"optimizer.{key}: {section.name} takes no {key!r}{nearest(key, accepted)}")
    if (section.base is not None) != ("base" in inspect.signature(cls).parameters):
        verb = "wraps no optimizer: remove" if section.base else "wraps an optimizer: add"
        raise BadInput(f"optimizer: {section.name} {verb} [optimizer.base]")
    first: Any = groups if section.base is None else _build(section.base, groups, group_options, given)
    known = {key: value for key, value in given.items() if key in taken and value is not None}
    try:
        built: torch.optim.Optimizer = cls(first, **known | section.options)
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
        given = {"model": model, "total_steps": 1}
        _build(_selecting_all(section), groups, _group_options(section), given)
    finally:
        del hidden.__dynamo_disable


def _selecting_all(section: Optimizer) -> Optimizer:
    """The section, its patterns of parameters' names (`select`) such that they match any model's.

    One that is no regular expression stays one.
    """
    changed: dict[str, Any] = {"base": section.base and _selecting_all(section.base)}
    if isinstance(section.options.get("select"), str):
        changed["select"] = f"{section.options['select']}|"
    return section.model_copy(update=changed)


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
    groups: Groups = [{"params": [], "param_names": []} for _ in range(2)]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            _add(groups[0 if parameter.ndim >= 2 else 1], name, parameter)
    groups[1]["weight_decay"] = 0.0
    return [group for group in groups if group["params"]]


def _add(group: dict[str, Any], name: str, parameter: torch.nn.Parameter) -> None:
    group["params"].append(parameter)
    group["param_names"].append(name)


def _matched_groups(section: Optimizer, model: torch.nn.Module) -> Groups:
    groups: Groups = [{"params": [], "param_names": [], **group.options} for group in section.groups]
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        for rule, group in zip(section.groups, groups, strict=True):
            if re.search(rule.match, name):
                _add(group, name, parameter)
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
    """The bytes of the state tensors of an optimizer and of those that it wraps (step counters included)."""
    tensors = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    base: torch.optim.Optimizer | None = getattr(optimizer, "base", None)
    return sum(t.numel() * t.element_size() for t in tensors) + (state_bytes(base) if base else 0)
