"""The recipes of circuits say what they are, and their sweeps tune every rule alike."""

from __future__ import annotations

from collections import Counter

import pytest

from piste import catalog
from piste.running import load_recipe
from piste.sweeping import checked_section
from piste_workloads.circuits import Config

RECIPES = [name for name in catalog.members("recipes") if name.startswith("circuits-")]
SWEEPS = [name for name in RECIPES if load_recipe(name).sweep is not None]
UNTUNED = "circuits-rules"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_one_of_circuits(name: str) -> None:
    config = load_recipe(name)
    assert isinstance(config, Config)
    on_gpus = config.resources.gpus_per_worker > 0
    assert on_gpus == name.endswith("-gpu")
    assert ("never run by its authors" in catalog.members("recipes")[name].summary) == on_gpus
    assert config.resources.workers <= (8 if on_gpus else 2)


def test_there_are_sweeps_on_language_dna_and_images() -> None:
    kinds = set()
    for name in SWEEPS:
        config = load_recipe(name)
        assert isinstance(config, Config)
        kinds.add(config.data.kind)
    assert kinds == {"text", "dna", "images"}


@pytest.mark.parametrize("name", SWEEPS)
def test_every_rule_is_tuned_alike(name: str) -> None:
    section = checked_section(name, load_recipe(name))  # every point is a valid recipe
    rules = Counter(str(point["rule.name"]) for point in section.strata)
    assert set(rules) == {"full-batch-em", "mini-batch-em", "online-em", "anemone", "adam"}
    assert set(rules.values()) == {1 if name == UNTUNED else 4}
    assert section.repeats == 3
