"""`[sweep]`: what is wrong with it on one line; cells, strata and conditions against brute force."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piste.config import Recipe, read_toml, to_toml, validate
from piste.errors import BadInput
from piste.search import suggest, sweep_key
from piste.space import Entry, Sweep
from piste.sweeping import checked_section

LR = {"optimizer.lr": {"log_uniform": [1e-3, 1.0]}}
NAME = {"optimizer.name": {"choice": ["adamw", "sgd"]}}
KINDS = "choice, grid, uniform, log_uniform, int, normal, repeats"
PLAIN = "a value is a finite number, text, true or false, or a list of these"


def section(space: dict[str, Any], **table: Any) -> Sweep:
    return Sweep.model_validate({"metric": "loss", "space": space} | table)


def refusal(**table: Any) -> str:
    """What is said of a recipe with this `[sweep]`."""
    sweep = {"metric": "loss", "trials": 6} | table
    with pytest.raises(BadInput) as caught:
        validate(Recipe, {"workload": "w", "sweep": sweep}, "r")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    return str(caught.value)


# -- what is wrong, on one line


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"log_unifrom": [1, 2]}, "unknown key 'log_unifrom'; did you mean 'log_uniform'?"),
        ({"uniform": [0, 1], "wehn": {}}, "unknown key 'wehn'; did you mean 'when'?"),
        ({"integer": [1, 3]}, "unknown key 'integer'; did you mean 'int'?"),
        ({}, f"none is given: use one of {KINDS}"),
        ({"when": {"optimizer.name": "sgd"}}, f"none is given: use one of {KINDS}"),
        ({"choice": [1], "grid": [1]}, f"choice and grid are given: use one of {KINDS}"),
        ({"uniform": [2, 1]}, "[2.0, 1.0]: the lower end comes first"),
        ({"int": [3, 3]}, "[3, 3]: the lower end comes first"),
        ({"log_uniform": [0, 1]}, "log_uniform begins at 0.0: both ends are above 0"),
        ({"log_uniform": [-1, 1]}, "log_uniform begins at -1.0: both ends are above 0"),
        ({"normal": [0, 0]}, "the standard deviation 0.0 must be above 0"),
        ({"normal": [0, -2]}, "the standard deviation -2.0 must be above 0"),
        ({"choice": ["a", "b", "a"]}, "'a' is given twice"),
        ({"grid": [1, True]}, "True is given twice"),
    ],
)
def test_a_wrong_entry_is_named(entry: dict[str, Any], message: str) -> None:
    assert refusal(space={"optimizer.lr": entry}) == f"r: sweep.space.optimizer.lr: {message}"


@pytest.mark.parametrize(
    ("entry", "where", "message"),
    [
        ({"choice": []}, "choice", "at least 1 item"),
        ({"grid": []}, "grid", "at least 1 item"),
        ({"uniform": [1]}, "uniform.1", "Field required"),
        ({"uniform": [1, 2, 3]}, "uniform", "at most 2 items"),
        ({"uniform": [math.nan, 1]}, "uniform.0", "finite number"),
        ({"normal": [0, math.inf]}, "normal.1", "finite number"),
        ({"int": [1.5, 3]}, "int.0", "valid integer"),
        ({"choice": [1, [2, [3]]]}, "choice.1", PLAIN),
        ({"choice": [math.nan]}, "choice.0", PLAIN),
        ({"uniform": [0, 1], "when": 3}, "when", "valid dictionary"),
        ({"uniform": [0, 1], "when": {"a": {"b": 1}}}, "when.a", PLAIN),
        ([[1]], "value", PLAIN),
        (math.inf, "value", PLAIN),
    ],
)
def test_a_wrong_part_of_an_entry_is_named(entry: Any, where: str, message: str) -> None:
    said = refusal(space={"x": entry})
    assert said.startswith(f"r: sweep.space.x.{where}: ")
    assert message in said


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"x": {"repeats": 3}}, "space.x: repeats is for seed alone"),
        ({"workload": {"choice": ["a", "b"]}}, "space.workload: all trials of a sweep have it in common"),
        ({"sweep.batch": 3}, "space.sweep.batch: all trials of a sweep have it in common"),
        (
            NAME | {"x": {"uniform": [0, 1], "when": {"optimizer.nam": "sgd"}}},
            "space.x: when: 'optimizer.nam' is not searched; did you mean 'optimizer.name'?",
        ),
        (
            {"optimizer.name": "sgd", "x": {"uniform": [0, 1], "when": {"optimizer.name": "sgd"}}},
            "space.x: when: 'optimizer.name' is not searched; there are: x",
        ),
        (
            NAME | {"x": {"uniform": [0, 1], "when": {"optimizer.name": ["sgd", "adamv"]}}},
            "space.x: when: 'optimizer.name' is never 'adamv'; did you mean 'adamw'?",
        ),
        (
            {"n": {"int": [1, 4]}, "x": {"uniform": [0, 1], "when": {"n": 5}}},
            "space.x: when: 'n' is never 5",
        ),
        (
            LR | {"x": {"uniform": [0, 1], "when": {"optimizer.lr": 0.1}}},
            "space.x: when: 'optimizer.lr' is a continuum: hardly a trial has the value 0.1",
        ),
        (
            {"a": {"choice": [1, 2], "when": {"b": 1}}, "b": {"choice": [1, 2], "when": {"a": 1}}, **LR},
            "space: the conditions of a and b go round in circles",
        ),
        (
            {"a": {"choice": [1, 2], "when": {"a": 1}}},
            "space: the conditions of a go round in circles",
        ),
        (
            {"a": {"choice": [1, 2]}, "b": {"grid": [1, 2], "when": {"a": 1}}},
            "space.b: a grid entry's condition must be on a grid entry, not 'a'",
        ),
        (
            LR | {"seed": {"repeats": 4}},
            "trials = 6 is no multiple of 4 seeds x 1 grid points = 4: use 4 or 8",
        ),
        (
            LR | {"n": {"grid": [1, 2, 3, 4]}, "seed": {"repeats": 2}},
            "trials = 6 is no multiple of 2 seeds x 4 grid points = 8: use 8",
        ),
    ],
)
def test_entries_that_do_not_fit_together(space: dict[str, Any], message: str) -> None:
    assert refusal(space=space) == f"r: sweep: {message}"


def test_seeds_have_no_condition() -> None:
    space = NAME | {"seed": {"repeats": 2, "when": {"optimizer.name": "sgd"}}}
    assert refusal(space=space) == "r: sweep.space.seed: repeats has no condition"
    assert "sweep.space.seed.repeats: " in refusal(space={"seed": {"repeats": 0}})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"searchr": "x"}, "unknown key 'sweep.searchr'; did you mean 'searcher'?"),
        ({"baselin": {}}, "unknown key 'sweep.baselin'; did you mean 'baseline'?"),
        ({"asha": {"grac_steps": 3}}, "unknown key 'sweep.asha.grac_steps'; did you mean 'grace_steps'?"),
        ({"budget": {"secnds": 3}}, "unknown key 'sweep.budget.secnds'; did you mean 'seconds'?"),
        ({"retries": {"dead": 3}}, "unknown key 'sweep.retries.dead'; did you mean 'died'?"),
        (
            {"searcher": "bisect", "bisect": {"parameter": "a", "tolerence": 1}},
            "unknown key 'sweep.bisect.tolerence'; did you mean 'tolerance'?",
        ),
        ({"searcher": "rndom"}, "sweep.searcher: Input should be 'grid', 'random', "),
        ({"budget": {"plateau": 0}}, "sweep.budget.plateau: Input should be greater than or equal to 1"),
        ({"retries": {"nan": -1}}, "sweep.retries.nan: Input should be greater than or equal to 0"),
        ({"asha": {"reduction_factor": 1}}, "sweep.asha.reduction_factor: Input should be greater than 1"),
        ({"bisect": {}}, "sweep.bisect.parameter: Field required"),
        ({"metric": ""}, "sweep.metric: String should have at least 1 character"),
        ({"space": 3}, "sweep.space: Input should be a valid dictionary (given: 3)"),
        ({"trials": None, "space": LR}, "sweep: trials is missing: how many there are to be"),
        ({"bisect": {"parameter": "x"}}, "sweep: bisect is for searcher = 'bisect'"),
        (
            {"searcher": "grid", "trials": None, "space": LR},
            "sweep: searcher = 'grid' needs finite entries; 'optimizer.lr' has infinitely many values",
        ),
        (
            {"searcher": "grid", "space": {"n": {"int": [1, 4]}}},
            "sweep: trials = 6, but the grid has 4: leave it out",
        ),
        (
            {"searcher": "cmaes", "space": NAME | {"x": {"int": [0, 1], "when": {"optimizer.name": "sgd"}}}},
            "sweep: searcher = 'cmaes' needs a number that every trial has; 'tpe' takes any space",
        ),
        (
            {"space": NAME, "baseline": {"optimizer.nam": "sgd"}},
            "sweep: baseline: 'optimizer.nam' is not in the space; did you mean 'optimizer.name'?",
        ),
        (
            {"space": NAME, "baseline": {"optimizer.name": "adamv"}},
            "sweep: baseline: 'optimizer.name' is never 'adamv'; did you mean 'adamw'?",
        ),
        (
            {"space": LR, "baseline": {"optimizer.lr": 0.01}},
            "sweep: baseline: 'optimizer.lr' is a continuum: hardly a trial has the value 0.01",
        ),
        (
            {"space": NAME | {"steps": 60}, "baseline": {"steps": 6}},
            "sweep: baseline: 'steps' is 60 in every trial",
        ),
        ({"baseline": {"a": {"b": 1}}}, f"sweep.baseline.a: {PLAIN}"),
    ],
)
def test_a_wrong_section_is_named(table: dict[str, Any], message: str) -> None:
    assert refusal(**table).startswith(f"r: {message}")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"bisect": None}, "searcher = 'bisect' needs [sweep.bisect] with parameter = a key of the space"),
        ({"trials": 6}, "trials: the searcher 'bisect' decides how many: leave it out"),
        (
            {"bisect": {"parameter": "optimizer.l"}},
            "bisect.parameter = 'optimizer.l': no uniform, log_uniform or int entry; "
            "did you mean 'optimizer.lr'?",
        ),
        (
            {"space": LR | {"n": {"grid": [1, 2]}}, "bisect": {"parameter": "n"}},
            "bisect.parameter = 'n': no uniform, log_uniform or int entry; there are: optimizer.lr",
        ),
        (
            {"space": LR | {"x": {"uniform": [0, 1]}}},
            "space.x: beside the bisected entry there are grid entries and repeats alone",
        ),
        (
            {"space": {"n": {"grid": [1, 2]}, "optimizer.lr": {"int": [1, 2], "when": {"n": 1}}}},
            "space.optimizer.lr: the bisected entry has no condition",
        ),
    ],
)
def test_a_bisection_that_cannot_be_made(table: dict[str, Any], message: str) -> None:
    given = {"searcher": "bisect", "trials": None, "space": LR, "bisect": {"parameter": "optimizer.lr"}}
    assert refusal(**given | table) == f"r: sweep: {message}"


# -- cells and strata


def test_a_point_has_an_entry_where_its_condition_is_met() -> None:
    found = section(
        {"a": {"grid": [1, 2]}, "b": {"grid": [3], "when": {"a": 2}}, "c": {"grid": [4], "when": {"b": 3}}},
        searcher="grid",
    )
    assert all(found.has(stratum) for stratum in found.strata)
    assert [dict(stratum) for stratum in found.strata] == [{"a": 1}, {"a": 2, "b": 3, "c": 4}]
    for point in ({"a": 2}, {"a": 1, "b": 3}, {"a": 1, "b": 3, "c": 4}, {"a": 2, "b": 3}, {}):
        assert not found.has(point)


@pytest.mark.parametrize("searcher", ["grid", "random"])
@pytest.mark.parametrize("names", [("sgd", "adamw"), ("adamw", "sgd")])
def test_the_options_of_one_optimizer_are_not_tried_on_another(searcher: str, names: tuple[str, str]) -> None:
    space: dict[str, Any] = {
        "optimizer.name": {"grid": names},
        "optimizer.lr": {"grid": [0.1, 0.2], "when": {"optimizer.name": "sgd"}},
        "optimizer.momentum": {"grid": [0.9], "when": {"optimizer.name": "sgd"}},
        "optimizer.betas": {"grid": [[0.9, 0.95]], "when": {"optimizer.name": "adamw"}},
    }
    trials = {} if searcher == "grid" else {"trials": 6}
    sweep = {"metric": "train/loss", "searcher": searcher, "space": space} | trials
    config = validate(Recipe, {"workload": "w", "optimizer": {"name": names[0]}, "sweep": sweep}, "r")
    assert len(checked_section("r", config).strata) == 3
    wrong = copy.deepcopy(space)
    wrong["optimizer.betas"]["when"] = {"optimizer.name": "sgd"}
    config = validate(
        Recipe, {"workload": "w", "optimizer": {"name": names[0]}, "sweep": sweep | {"space": wrong}}, "r"
    )
    with pytest.raises(BadInput, match=r"sgd takes no 'betas'.*\(at optimizer.name = sgd"):
        checked_section("r", config)


def test_kinds_constants_seeds_and_cells() -> None:
    space = {
        "a": {"choice": ["x", [1, 2]]},
        "b": {"grid": [1.5, 2]},
        "c": {"uniform": [0, 1]},
        "d": {"log_uniform": [1, 2]},
        "e": {"int": [-1, 2]},
        "f": {"normal": [0, 1]},
        "seed": {"repeats": 3},
        "train.steps": 60,
        "optimizer.betas": [0.9, 0.95],
    }
    found = section(space, trials=24)
    assert [entry.kind for entry in found.entries.values()] == [
        "choice", "grid", "uniform", "log_uniform", "int", "normal",
    ]  # fmt: skip
    assert [entry.finite and list(entry.finite) for entry in found.entries.values()] == [
        ["x", (1, 2)], [1.5, 2], None, None, [-1, 0, 1, 2], None,
    ]  # fmt: skip
    assert found.constants == {"train.steps": 60, "optimizer.betas": (0.9, 0.95)}
    assert (found.repeats, found.strata, found.cells) == (3, ({"b": 1.5}, {"b": 2}), 8)
    assert section({}, trials=5).cells == 5
    seeds = section({"seed": {"choice": [1, 5]}}, trials=5)  # a seed that is searched is a value like any
    assert (seeds.repeats, list(seeds.entries)) == (1, ["seed"])


def test_a_wide_range_of_integers_takes_no_memory() -> None:
    finite = Entry.model_validate({"int": [0, 10**15]}).finite
    assert finite is not None
    assert len(finite) == 10**15 + 1
    assert 10**15 in finite


@given(repeats=st.integers(1, 4), points=st.integers(1, 5), trials=st.integers(1, 60))
def test_trials_are_whole_cells_of_all_strata(repeats: int, points: int, trials: int) -> None:
    space = LR | {"n": {"grid": list(range(points))}, "seed": {"repeats": repeats}}
    if trials % (repeats * points) == 0:
        assert section(space, trials=trials).cells == trials // repeats
        return
    said = refusal(space=space, trials=trials)
    *_, use = said.partition(": use ")
    for offered in use.split(" or "):
        assert section(space, trials=int(offered)).trials == int(offered)
        assert abs(int(offered) - trials) < repeats * points


def test_a_condition_on_a_list_is_on_any_of_its_values_or_on_itself() -> None:
    space = {
        "betas": {"grid": [[0, 1], [0, 2], 3, 4]},
        "itself": {"choice": [1], "when": {"betas": [0, 1]}},
        "any": {"choice": [1], "when": {"betas": [3, 4]}},
    }
    points = section(space, searcher="grid").strata
    assert points == (
        {"betas": (0, 1), "itself": 1}, {"betas": (0, 2)}, {"betas": 3, "any": 1}, {"betas": 4, "any": 1},
    )  # fmt: skip


def holds(entry: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    for other, wanted in entry.get("when", {}).items():
        if other not in values or values[other] not in (wanted if isinstance(wanted, list) else [wanted]):
            return False
    return True


def brute_strata(space: Mapping[str, Mapping[str, Any]], chosen: list[str]) -> list[dict[str, Any]]:
    """Every assignment of the chosen entries, without those whose conditions fail; each once."""

    def all_values(entry: Mapping[str, Any]) -> list[Any]:
        if "int" in entry:
            return [*range(entry["int"][0], entry["int"][1] + 1)]
        found: list[Any] = entry.get("grid") or entry["choice"]
        return found

    found: list[dict[str, Any]] = []
    for values in itertools.product(*(all_values(space[key]) for key in chosen)):
        point = dict(zip(chosen, values, strict=True))
        while (kept := {k: v for k, v in point.items() if holds(space[k], point)}) != point:
            point = kept
        if point not in found:
            found.append(point)
    return found


_numbers = st.floats(-1e100, 1e100)


def _bounds(number: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.lists(number, min_size=2, max_size=2, unique=True).map(sorted)


_continuous = st.one_of(
    st.fixed_dictionaries({"uniform": _bounds(_numbers)}),
    st.fixed_dictionaries({"log_uniform": _bounds(st.floats(1e-300, 1e300))}),
    st.fixed_dictionaries({"normal": st.tuples(_numbers, st.floats(1e-9, 1e9)).map(list)}),
    st.fixed_dictionaries({"int": _bounds(st.integers(-(2**62), 2**62))}),
)
_listed = st.lists(st.sampled_from(["a", "b", 3, 0.5, True]), min_size=1, max_size=3, unique=True)
_choices = st.fixed_dictionaries({"choice": _listed})
_grids = st.fixed_dictionaries({"grid": _listed})
_integers = st.fixed_dictionaries({"int": _bounds(st.integers(-2, 2))})


@st.composite
def spaces(draw: st.DrawFn, finite: bool = False) -> dict[str, Any]:
    """Entries with conditions on those before them, in any order."""
    kinds = [_choices, _grids, _integers] + ([] if finite else [_continuous])
    space: dict[str, Any] = {}
    for place in range(draw(st.integers(1, 5))):
        entry: dict[str, Any] = dict(draw(st.one_of(kinds)))
        asked = [
            key
            for key, other in space.items()
            if "grid" in other or ("choice" in other and (finite or "grid" not in entry))
        ]
        for other in draw(st.lists(st.sampled_from(asked), max_size=2, unique=True)) if asked else ():
            listed = space[other].get("grid") or space[other]["choice"]
            wanted = draw(st.lists(st.sampled_from(listed), min_size=1, max_size=2, unique=True))
            alone = len(wanted) == 1 and draw(st.booleans())
            entry.setdefault("when", {})[other] = wanted[0] if alone else wanted
        space[f"k{place}"] = entry
    return {key: space[key] for key in draw(st.permutations(list(space)))}


def assert_in_space(values: Mapping[str, Any], space: Mapping[str, Any]) -> None:
    assert values.keys() == {key for key, entry in space.items() if holds(entry, values)}
    for key, value in values.items():
        entry = space[key]
        if listed := entry.get("grid") or entry.get("choice"):
            assert value in listed
        elif "normal" in entry:
            assert isinstance(value, float)
            assert math.isfinite(value)
        else:
            [low, high] = next(entry[kind] for kind in ("uniform", "log_uniform", "int") if kind in entry)
            assert low <= value <= high
            assert isinstance(value, int if "int" in entry else float)


@settings(max_examples=150)
@given(space=spaces())
def test_every_suggestion_lies_in_the_space_and_has_what_its_conditions_ask_for(
    space: dict[str, Any],
) -> None:
    grids = brute_strata(space, [key for key in space if "grid" in space[key]])
    found = section(space, trials=10 * len(grids))
    assert sorted(map(repr, map(sorted_items, found.strata))) == sorted(map(repr, map(sorted_items, grids)))
    key = sweep_key(found, 0)
    for cell in range(3 * len(grids)):
        suggestion = suggest(found, key, cell, [])
        assert suggestion is not None
        assert_in_space(suggestion.values, space)
        stratum = found.strata[cell % len(grids)]
        assert stratum.items() <= suggestion.values.items()


def sorted_items(point: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return sorted(point.items())


@given(space=spaces(finite=True))
def test_a_grid_is_every_point_once(space: dict[str, Any]) -> None:
    found = section(space, searcher="grid")
    points = [suggestion.values for n in range(found.cells or 0) if (suggestion := suggest(found, "", n, []))]
    expected = brute_strata(space, list(space))
    assert len(points) == len(expected)
    assert all(point in points for point in expected)
    for point in points:
        assert_in_space(point, space)


@settings(max_examples=50)
@given(space=spaces())
def test_a_section_survives_json_and_toml(space: dict[str, Any], tmp_path_factory: Any) -> None:
    grids = len(brute_strata(space, [key for key in space if "grid" in space[key]]))
    table = {"metric": "loss", "trials": 2 * grids, "space": space | {"seed": {"repeats": 2}}}
    recipe = validate(Recipe, {"workload": "w", "sweep": table}, "drawn")
    path = tmp_path_factory.getbasetemp() / "space.toml"
    path.write_text(to_toml(recipe), encoding="utf-8")
    assert validate(Recipe, read_toml(path), "again") == recipe
    assert recipe.sweep is not None
    again = Sweep.model_validate_json(recipe.sweep.model_dump_json())
    assert (again, again.strata) == (recipe.sweep, recipe.sweep.strata)
    assert sweep_key(again, 3) == sweep_key(recipe.sweep, 3)


def test_a_chain_of_conditions_is_followed_in_any_order() -> None:
    links = {f"k{n}": {"choice": [0, 1], "when": {f"k{n - 1}": 1}} for n in range(1, 30)}
    found = section(dict(reversed(links.items())) | {"k0": {"choice": [0, 1]}}, trials=100)
    assert found.order == tuple(f"k{n}" for n in range(30))
    for cell in range(100):
        suggestion = suggest(found, "key", cell, [])
        assert suggestion is not None
        *ones, last = suggestion.values.values()
        assert list(suggestion.values) == [f"k{n}" for n in range(len(ones) + 1)]
        assert all(value == 1 for value in ones)
        assert last == 0 or len(ones) == 29


def test_what_is_derived_follows_a_copy_and_is_no_field() -> None:
    grid = section(NAME | {"n": {"int": [1, 3]}, "steps": 60}, searcher="grid")
    assert (len(grid.strata), grid.order) == (6, ("optimizer.name", "n"))
    random = grid.model_copy(update={"searcher": "random", "trials": 4})
    assert random.strata == ({},)
    assert grid.model_copy(update={"space": {}}).entries == {}
    fresh = section(NAME | {"n": {"int": [1, 3]}, "steps": 60}, searcher="grid")
    for same in (grid.model_copy(), copy.deepcopy(grid), pickle.loads(pickle.dumps(grid))):
        assert same == grid == fresh
        assert same.model_dump() == fresh.model_dump()
        assert same.strata == fresh.strata
    assert repr(grid) == repr(fresh)
    with pytest.raises(ValueError, match="frozen"):
        grid.trials = 3  # type: ignore[misc]
