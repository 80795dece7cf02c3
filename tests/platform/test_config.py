"""Recipes: what is wrong on one line, overrides, the round trip, when a checkpoint is due."""

from __future__ import annotations

import datetime
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, model_validator

from piste.config import (
    Checkpoints,
    Recipe,
    Section,
    method_of,
    override,
    parse_value,
    read_toml,
    to_toml,
    validate,
)
from piste.errors import BadInput, nearest


class Model(Section):
    layers: int = Field(default=4, ge=1)
    dropout: float = 0.0
    kind: str = "plain"


class Config(Recipe, frozen=True):
    model: Model = Model()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.model.layers == 13:
            raise ValueError("13 layers bring bad luck")
        return self


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"model": {"layes": 3}}, "r.toml: unknown key 'model.layes'; did you mean 'layers'?"),
        ({"optimiser": {}}, "r.toml: unknown key 'optimiser'; did you mean 'optimizer'?"),
        (
            {"tracking": {"zzz": 1}},
            "r.toml: unknown key 'tracking.zzz'; there are: experiment, system_metrics",
        ),
        ({"model": {"layers": "many"}}, "r.toml: model.layers: Input should be a valid integer"),
        ({"model": {"layers": 0}}, "model.layers: Input should be greater than or equal to 1 (given: 0)"),
        ({"model": 7}, "r.toml: model: "),
        ({"model": {"dropout": math.nan}}, "model.dropout: Input should be a finite number"),
        ({"seed": True}, "seed: a seed is a whole number (given: True)"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0"),
        ({"seed": 2**31}, "seed: Input should be less than 2147483648"),
        ({"seed": 0.5}, "seed: Input should be a valid integer"),
        ({"resources": {"workers": 0}}, "resources.workers: Input should be greater than or equal to 1"),
        ({"checkpoints": {"keep": "last 0"}}, 'use "last N", "all" or "trajectory N"'),
        ({"optimizer": {"groups": [{"match": "("}]}}, "optimizer.groups.0.match: not a regular expression"),
        ({"optimizer": {"groups": [{"lr": 1.0}]}}, "optimizer.groups.0.match: Field required"),
        ({"model": {"layers": 13}}, "r.toml: recipe: 13 layers bring bad luck"),
    ],
)
def test_what_is_wrong_is_said_on_one_line(table: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput) as caught:
        validate(Config, {"workload": "w", **table}, "r.toml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_missing_workload_is_named() -> None:
    with pytest.raises(BadInput, match=r"^r\.toml: workload: Field required$"):
        validate(Config, {}, "r.toml")


def test_nearest_ignores_case_and_lists_what_is_far() -> None:
    assert nearest("AdamV", ["AdamW", "sgd"]) == "; did you mean 'AdamW'?"
    assert nearest("q", ["sgd", "reg"]) == "; there are: reg, sgd"
    assert nearest("q", []) == ""


def test_overrides_set_dotted_keys_in_a_copy() -> None:
    table = {"model": {"layers": 2, "kind": "plain"}, "seed": 1}
    changed = override(table, {"model.layers": 8, "optimizer.base.lr": 0.1, "seed": 5})
    assert changed == {
        "model": {"layers": 8, "kind": "plain"},
        "optimizer": {"base": {"lr": 0.1}},
        "seed": 5,
    }
    assert table == {"model": {"layers": 2, "kind": "plain"}, "seed": 1}


def test_an_override_makes_the_section_that_a_recipe_leaves_out() -> None:
    assert override({"optimizer": {"name": "sam", "base": None}}, {"optimizer.base.lr": 0.1}) == {
        "optimizer": {"name": "sam", "base": {"lr": 0.1}}
    }


@pytest.mark.parametrize("dotted", ["seed.x", "model.layers.deep"])
def test_an_override_through_a_value_is_an_error(dotted: str) -> None:
    with pytest.raises(BadInput, match=rf"^--{dotted}: '(seed|layers)' is a value, not a section$"):
        override({"seed": 0, "model": {"layers": 2}}, {dotted: 1})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-3", 0.003),
        ("12", 12),
        ("-1", -1),
        ("true", True),
        ("True", "True"),
        ("[1, 2.5]", [1, 2.5]),
        ('"12"', "12"),
        ("adamw", "adamw"),
        ("last 2", "last 2"),
        ("sqlite:///a.db", "sqlite:///a.db"),
        ("", ""),
        ("{ a = 1 }", {"a": 1}),
        ("2020-01-02", datetime.date(2020, 1, 2)),
    ],
)
def test_parse_value_is_toml_where_it_is_toml(text: str, value: object) -> None:
    parsed = parse_value(text)
    assert (type(parsed), parsed) == (type(value), value)


def test_nested_optimizers_are_read(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(
        'workload = "w"\n[optimizer]\nname = "outer"\nrho = 0.05\n[optimizer.base]\nname = "sgd"\nlr = 0.1\n'
        '[[optimizer.groups]]\nmatch = "bias"\nweight_decay = 0.0\n'
    )
    optimizer = validate(Config, read_toml(path), "r").optimizer
    assert (optimizer.name, optimizer.options) == ("outer", {"rho": 0.05})
    assert optimizer.base is not None
    assert (optimizer.base.name, optimizer.base.options) == ("sgd", {"lr": 0.1})
    assert [(g.match, g.options) for g in optimizer.groups] == [("bias", {"weight_decay": 0.0})]


def test_a_file_that_is_no_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none\.toml: no such file$"):
        read_toml(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(BadInput, match=r"bad\.toml: not valid TOML: .*line 1"):
        read_toml(tmp_path / "bad.toml")
    (tmp_path / "latin.toml").write_bytes(b'a = "\xe9"')
    with pytest.raises(BadInput, match=r"latin\.toml: cannot be read"):
        read_toml(tmp_path / "latin.toml")
    with pytest.raises(BadInput, match=r"cannot be read: .*directory"):
        read_toml(tmp_path)


_finite = st.floats(allow_nan=False, allow_infinity=False)
_scalars = st.one_of(st.booleans(), st.integers(-(2**63), 2**63 - 1), _finite, st.text())
_keys = st.text("abcxyz_- .é\"'", min_size=1, max_size=5)
_values = st.recursive(
    _scalars,
    lambda v: st.one_of(st.lists(v, max_size=3), st.dictionaries(_keys, v, max_size=3)),
    max_leaves=6,
)
_options = st.dictionaries(_keys, _values, max_size=3)
_groups = st.lists(
    st.builds(lambda m, o: {**o, "match": m}, st.sampled_from(["bias", ".*"]), _options), max_size=2
)
_optimizers = st.recursive(
    st.builds(lambda o, g: {**o, "name": "sgd", "groups": g}, _options, _groups),
    lambda base: st.builds(lambda o, b: {**o, "name": "outer", "base": b}, _options, base),
    max_leaves=2,
)
_tables = st.fixed_dictionaries(
    {
        "workload": st.text(max_size=8),
        "seed": st.integers(0, 2**31 - 1),
        "model": st.fixed_dictionaries(
            {"layers": st.integers(14, 10**9), "dropout": _finite, "kind": st.text()}
        ),
        "optimizer": _optimizers,
        "tracking": st.fixed_dictionaries({"uri": st.none() | st.text()}),
        "checkpoints": st.fixed_dictionaries({"keep": st.sampled_from(["all", "last 3", "trajectory 12"])}),
    }
)


@settings(max_examples=60)
@given(table=_tables)
def test_a_resolved_recipe_survives_toml(table: dict[str, Any], tmp_path_factory: Any) -> None:
    recipe = validate(Config, table, "drawn")
    path = tmp_path_factory.getbasetemp() / "round-trip.toml"
    path.write_text(to_toml(recipe), encoding="utf-8")
    again = validate(Config, read_toml(path), "again")
    assert again == recipe
    assert again.optimizer.options == {
        k: v for k, v in table["optimizer"].items() if k not in {"name", "base", "groups"}
    }


def due_steps(keep: str, every: int, last: int) -> list[int]:
    policy = Checkpoints(keep=keep, every=every)
    return [step for step in range(1, last + 1) if policy.due(step, last)]


@given(keep=st.sampled_from(["last 1", "last 7", "all"]), every=st.integers(0, 40), last=st.integers(1, 60))
def test_a_checkpoint_is_due_every_so_many_steps_and_after_the_last(keep: str, every: int, last: int) -> None:
    expected = set(range(every, last + 1, every)) if every else set()
    assert due_steps(keep, every, last) == sorted(expected | {last})


@given(count=st.integers(1, 40), last=st.integers(1, 120))
def test_a_trajectory_is_so_many_evenly_spaced_checkpoints(count: int, last: int) -> None:
    steps = due_steps(f"trajectory {count}", 0, last)
    assert len(steps) == min(count, last)
    assert steps[-1] == last
    gaps = [b - a for a, b in zip([0, *steps], steps, strict=False)]
    assert max(gaps) - min(gaps) <= 1


@given(count=st.integers(1, 10), every=st.integers(1, 20), last=st.integers(1, 60))
def test_a_trajectory_also_keeps_what_every_asks_for(count: int, every: int, last: int) -> None:
    spaced = set(due_steps(f"trajectory {count}", 0, last))
    assert due_steps(f"trajectory {count}", every, last) == sorted(
        spaced | set(range(every, last + 1, every))
    )


def test_a_recipe_learns_with_its_rule_or_its_optimizer() -> None:
    optimizer = {"name": "adamw", "lr": 1e-3}
    assert method_of({"optimizer": optimizer}) == optimizer
    assert method_of({"optimizer": optimizer, "rule": {"name": "anemone"}}) == {"name": "anemone"}
    detectors = {"shift": {"kind": "shift"}, "plain": {"kind": "cusum"}}
    assert method_of({"optimizer": optimizer, "detectors": detectors}) == {"name": "shift, plain"}
