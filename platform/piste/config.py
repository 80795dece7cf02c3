"""The recipe: a TOML file with overrides, validated into a frozen, typed configuration.

A workload's `Config` is a subclass of `Recipe` that adds the workload's own typed sections:

    class Config(Recipe, frozen=True):
        model: Model = Model()

The file is canonical; the command line overrides single fields (`--optimizer.lr 3e-3`).
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar, get_args

import tomli_w
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from piste.errors import BadInput, nearest
from piste.section import Section as Section
from piste.space import Sweep


class ParameterGroup(BaseModel):
    """One entry of `[[optimizer.groups]]`: the options of the parameters whose name matches."""

    model_config = ConfigDict(frozen=True, extra="allow")
    match: str = Field(description="a regular expression, searched in the parameter's name")

    @field_validator("match")
    @classmethod
    def _regular_expression(cls, match: str) -> str:
        try:
            re.compile(match)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return match

    @property
    def options(self) -> dict[str, Any]:
        """The options of this group (its extra keys)."""
        return dict(self.model_extra or {})


class Optimizer(BaseModel):
    """`[optimizer]`: a name and the keyword arguments of the optimizer that it names.

    The name is a member of `piste_algorithms.optimizers`, a class of `torch.optim`, or a dotted path.
    `[optimizer.base]` is the optimizer that this one wraps. `[[optimizer.groups]]` are parameter groups
    by ordered regular expressions, first match wins; without them the optimizer class chooses.
    """

    model_config = ConfigDict(frozen=True, extra="allow")
    name: str = "adamw"
    base: Optimizer | None = None
    groups: tuple[ParameterGroup, ...] = ()

    @property
    def chain(self) -> tuple[Optimizer, ...]:
        """This optimizer and, innermost last, those that it wraps."""
        return (self, *(self.base.chain if self.base is not None else ()))

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments (the extra keys)."""
        return dict(self.model_extra or {})


class Resources(Section):
    """`[resources]`: where and on how much a run computes."""

    workers: int = Field(default=1, ge=1, description="Ray Train workers, one process each")
    cpus_per_worker: int = Field(default=1, ge=1, description="CPUs and torch threads of a worker")
    gpus_per_worker: float = Field(default=0.0, ge=0.0, description="GPUs of a worker; NCCL when > 0")
    address: str | None = Field(default=None, description="a Ray cluster's address; none: a local Ray")
    one_host: bool = Field(default=False, description="all nodes of the cluster are this host")
    max_failures: int = Field(default=3, ge=0, description="workers replaced before the run fails")
    max_preemptions: int = Field(
        default=-1, ge=-1, description="hosts taken away before the run fails; -1: no limit"
    )
    grace_seconds: float = Field(
        default=30.0, ge=0.0, description="from SIGTERM to the end: time for a step and a checkpoint"
    )


class Tracking(Section):
    """`[tracking]`: where a run is shown. Not part of its identity."""

    experiment: str = Field(default="piste", min_length=1, description="MLflow experiment")
    uri: str | None = Field(default=None, description="MLflow tracking URI; none: the one in use")
    system_metrics: bool = Field(default=True, description="sample CPU and memory every two seconds")


_KEEP = re.compile(r"all|(last|trajectory) [1-9]\d*")


class Checkpoints(Section):
    """`[checkpoints]`: when a run's state is kept."""

    every: int = Field(default=0, ge=0, description="steps between checkpoints; 0: the last step alone")
    keep: str = Field(default="last 2", description='"last N", "all", or "trajectory N" (N evenly spaced)')

    @model_validator(mode="after")
    def _known_policy(self) -> Self:
        if not _KEEP.fullmatch(self.keep):
            raise ValueError(f'keep = {self.keep!r}: use "last N", "all" or "trajectory N"')
        return self

    def due(self, step: int, last: int) -> bool:
        """Whether a checkpoint is due after `step` of `last` steps (always after the last)."""
        if step >= last:
            return True
        if self.keep.startswith("trajectory"):
            count = int(self.keep.split()[1])
            if step * count // last > (step - 1) * count // last:  # the next of `count` equal parts is done
                return True
        return self.every > 0 and step % self.every == 0


def _seed(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a seed is a whole number")
    return value


class Recipe(Section):
    """What every workload's configuration has."""

    workload: str
    seed: Annotated[int, BeforeValidator(_seed)] = Field(default=0, ge=0, lt=2**31)
    optimizer: Optimizer = Optimizer()
    resources: Resources = Resources()
    tracking: Tracking = Tracking()
    checkpoints: Checkpoints = Checkpoints()
    sweep: Sweep | None = Field(default=None, description="what `piste sweep` searches")


def read_toml(path: Path) -> dict[str, Any]:
    """Reads a TOML file.

    Raises:
        BadInput: The file is missing, unreadable or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"{path}: not valid TOML: {error}") from None


def parse_value(text: str) -> Any:
    """A command-line value: TOML where it is TOML (`3e-3`, `true`, `[1, 2]`), else the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        return text


def method_of(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a recipe works with: its `[rule]` or `[detectors]` where it has such, or its `[optimizer]`."""
    if "detectors" in table:
        return {"name": ", ".join(table["detectors"])}
    found: Mapping[str, Any] = table.get("rule", table["optimizer"])
    return found


def override(table: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`table` with dotted keys set; the result shares with it what no key leads through.

    Raises:
        BadInput: A dotted key goes through something that is not a table.
    """
    result = dict(table)
    for dotted, value in overrides.items():
        *path, leaf = dotted.split(".")
        node = result
        for part in path:
            child = {} if node.get(part) is None else node[part]
            if not isinstance(child, Mapping):
                raise BadInput(f"--{dotted}: {part!r} is a value, not a section")
            node[part] = dict(child)
            node = node[part]
        node[leaf] = value
    return result


R = TypeVar("R", bound=Recipe)


def validate(model: type[R], table: Mapping[str, Any], source: str) -> R:
    """Validates a table against a workload's `Config`.

    Args:
        model: The workload's configuration class.
        table: What TOML and overrides gave.
        source: What to call it in a message (a path or a name).

    Raises:
        BadInput: The first thing that is wrong, on one line, with the nearest valid key.
    """
    try:
        return model.model_validate(table)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"] if part != "") or "recipe"
        if first["type"] == "extra_forbidden":
            owner = _owner(model, first["loc"])
            hint = nearest(str(first["loc"][-1]), owner.model_fields) if owner else ""
            raise BadInput(f"{source}: unknown key {where!r}{hint}") from None
        message = first["msg"].removeprefix("Value error, ")
        given = f" (given: {first['input']!r})" if not isinstance(first["input"], Mapping) else ""
        raise BadInput(f"{source}: {where}: {message}{given}") from None


def _owner(model: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel] | None:
    """The section in which the last part of `location` was looked for."""
    owner: type[BaseModel] = model
    for part in location[:-1]:
        field = owner.model_fields.get(str(part))
        annotation = field.annotation if field else None
        sections = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type)]
        inner = next((a for a in sections if issubclass(a, BaseModel)), None)
        if inner is None:
            return None
        owner = inner
    return owner


def to_toml(recipe: Recipe) -> str:
    """The resolved recipe as TOML; `None` is left out, as TOML has no such value."""
    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))
