"""From `[optimizer]` to a torch optimizer: keywords, wrappers, parameter groups."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from piste.building import build_optimizer, check_optimizer, state_bytes
from piste.config import Optimizer
from piste.errors import BadInput


class Wrapper(torch.optim.Optimizer):
    """Wraps another optimizer, as SAM and its like do."""

    def __init__(self, base: torch.optim.Optimizer, rho: float = 0.05) -> None:
        super().__init__(base.param_groups, {"rho": rho})
        self.base = base


WRAPPER = f"{__name__}.Wrapper"


def section(**table: Any) -> Optimizer:
    return Optimizer.model_validate(table)


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """The names of each group's parameters."""
    known = {id(p): n for n, p in model.named_parameters()}
    return [[known[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def test_keywords_reach_the_optimizer(model: nn.Module) -> None:
    built = build_optimizer(section(name="adamw", lr=0.25, weight_decay=0.5, betas=[0.5, 0.75]), model)
    assert isinstance(built, torch.optim.AdamW)
    assert names(model, built) == [["0.weight", "2.weight"], ["0.bias", "1.weight", "1.bias", "2.bias"]]
    assert [g["weight_decay"] for g in built.param_groups] == [0.5, 0.0]
    assert [(g["lr"], tuple(g["betas"])) for g in built.param_groups] == [(0.25, (0.5, 0.75))] * 2


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"name": "sgd", "momentun": 0.9},
            "optimizer.momentun: sgd takes no 'momentun'; did you mean 'momentum'?",
        ),
        ({"name": "sgd", "lr": -1.0}, "optimizer sgd: Invalid learning rate: -1.0"),
        ({"name": "sgd", "nesterov": True}, "optimizer sgd: Nesterov momentum requires a momentum"),
        ({"name": "reg", "lr": -1.0}, "optimizer reg: "),
        ({"name": "sgd", "params": []}, "optimizer.params: sgd takes no 'params'"),
        ({"name": "sgd", "base": {"name": "sgd"}}, "sgd wraps no optimizer: remove [optimizer.base]"),
        ({"name": WRAPPER}, f"optimizer: {WRAPPER} wraps an optimizer: add [optimizer.base]"),
        ({"name": WRAPPER, "base": {"name": "sgd", "lrr": 1}}, "optimizer.lrr: sgd takes no 'lrr'"),
        ({"name": WRAPPER, "base": {"name": "sdg"}}, "unknown optimizer 'sdg'; did you mean 'sgd'?"),
    ],
)
def test_a_bad_section_is_one_line_before_and_at_the_start(
    table: dict[str, Any], message: str, model: nn.Module
) -> None:
    for act in (lambda s: build_optimizer(s, model), check_optimizer):
        with pytest.raises(BadInput) as caught:
            act(section(**table))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_wrapper_is_handed_its_base(model: nn.Module) -> None:
    built = build_optimizer(section(name=WRAPPER, rho=0.5, base={"name": "sgd", "lr": 0.125}), model)
    assert isinstance(built, Wrapper)
    assert isinstance(built.base, torch.optim.SGD)
    assert built.defaults["rho"] == 0.5
    assert {g["lr"] for g in built.base.param_groups} == {0.125}
    assert sorted(n for group in names(model, built.base) for n in group) == sorted(
        dict(model.named_parameters())
    )


def test_the_innermost_class_proposes_the_groups(model: nn.Module) -> None:
    bare = build_optimizer(section(name="reg"), model)
    wrapped = build_optimizer(section(name=WRAPPER, base={"name": "reg"}), model)
    assert isinstance(wrapped, Wrapper)
    assert names(model, wrapped.base) == names(model, bare)
    assert [g["use_reg"] for g in wrapped.base.param_groups] == [g["use_reg"] for g in bare.param_groups]


def test_the_first_group_that_matches_wins(model: nn.Module) -> None:
    rules = [
        {"match": r"^2\.", "lr": 0.5},
        {"match": "bias$", "weight_decay": 0.0},
        {"match": ".*"},
    ]
    built = build_optimizer(section(name="sgd", lr=0.1, weight_decay=0.2, groups=rules), model)
    assert names(model, built) == [["2.weight", "2.bias"], ["0.bias", "1.bias"], ["0.weight", "1.weight"]]
    assert [(g["lr"], g["weight_decay"]) for g in built.param_groups] == [(0.5, 0.2), (0.1, 0.0), (0.1, 0.2)]


def test_frozen_parameters_belong_to_no_group(model: nn.Module) -> None:
    model[0].requires_grad_(False)  # type: ignore[index]
    rules = [{"match": "weight"}, {"match": ".*"}]
    assert names(model, build_optimizer(section(name="sgd", groups=rules), model)) == [
        ["1.weight", "2.weight"],
        ["1.bias", "2.bias"],
    ]
    assert names(model, build_optimizer(section(name="sgd"), model)) == [
        ["2.weight"],
        ["1.weight", "1.bias", "2.bias"],
    ]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([{"match": "wieght"}, {"match": ".*"}], "match = 'wieght' matches no parameter that is still free"),
        ([{"match": ".*"}, {"match": "bias"}], "match = 'bias' matches no parameter that is still free"),
        ([{"match": "weight"}], "no pattern matches parameter '0.bias'; end with match = '.*'"),
        ([{"match": ".*", "lrr": 1.0}], "sgd takes no 'lrr' in a group; did you mean 'lr'?"),
    ],
)
def test_groups_that_do_not_fit_are_named(
    rules: list[dict[str, Any]], message: str, model: nn.Module
) -> None:
    for table in ({"name": "sgd"}, {"name": WRAPPER, "base": {"name": "sgd"}}):
        with pytest.raises(BadInput) as caught:
            build_optimizer(section(**table, groups=rules), model)
        assert str(caught.value).startswith("optimizer.groups: ")
        assert message in str(caught.value)


def test_state_bytes_counts_the_tensors(model: nn.Module) -> None:
    built = build_optimizer(section(name="adam"), model)
    assert state_bytes(built) == 0
    model(torch.ones(2, 3)).sum().backward()
    built.step()
    numbers = 3 * 4 + 4 + 4 + 4 + 4 * 2 + 2
    assert state_bytes(built) == 2 * 4 * numbers + 6 * 4  # two float32 moments each, one step counter each


def test_an_option_that_no_group_can_have_is_found_without_the_model() -> None:
    groups = [{"match": ".*", "weight_decya": 0.1}]
    section = Optimizer.model_validate({"name": "adamw", "groups": groups})
    with pytest.raises(BadInput, match="'weight_decya' in a group; did you mean 'weight_decay'"):
        check_optimizer(section)


def test_a_recipe_is_checked_without_torch_s_compiler() -> None:
    """Which torch imports for the first optimizer of a process, and which takes a second of every command."""
    program = (
        "import sys; from piste.building import check_optimizer; from piste.config import Optimizer;"
        "check_optimizer(Optimizer.model_validate({'name': 'adamw'}));"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_selection_by_name_is_checked_without_the_model(model: nn.Module) -> None:
    def wrapping(select: str) -> Optimizer:
        egd = {"name": "egd", "select": select, "base": {"name": "sgd", "lr": 0.1}}
        return section(name="grokfast", base=egd)

    check_optimizer(wrapping("blocks.*mlp"))  # which there is in the model that the recipe trains
    with pytest.raises(BadInput, match="matches none"):
        build_optimizer(wrapping("blocks.*mlp"), model)
    with pytest.raises(BadInput, match="is no regular expression"):
        check_optimizer(wrapping("blocks["))
