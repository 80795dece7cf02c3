"""Parameter groups by ordered regular expressions, and the groups of matrix optimizers."""

from typing import Any

import pytest
import torch
from tests.algorithms.small_language_model import build_model
from torch import nn

from piste_algorithms.optimizers import REG, matrix_param_groups, named_param_groups


def names(group: dict[str, Any]) -> list[str]:
    return list(group["param_names"])


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def test_the_first_matching_rule_owns_a_parameter() -> None:
    model = small()
    groups = named_param_groups(model, [("bias$", {"weight_decay": 0.0}), ("^0", {"lr": 0.1}), ("", {})])
    assert [names(group) for group in groups] == [
        ["0.bias", "1.bias", "2.bias"],
        ["0.weight"],
        ["1.weight", "2.weight"],
    ]
    assert [group.get("weight_decay") for group in groups] == [0.0, None, None]
    assert [group.get("lr") for group in groups] == [None, 0.1, None]
    for group in groups:
        for name, parameter in zip(names(group), group["params"], strict=True):
            assert parameter is model.get_parameter(name)


def test_torch_takes_the_groups() -> None:
    optimizer = torch.optim.AdamW(named_param_groups(small(), [("weight", {"lr": 0.5}), ("", {})]), lr=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([], "rules must hold at least one"),
        ([("", {}), ("attention", {})], "pattern 'attention' matches no parameter"),
        ([("weight", {})], "no rule matches the trainable parameter.* 0.bias, 1.bias, 2.bias"),
        ([("(", {})], r"pattern '\(' is no regular expression"),
    ],
)
def test_rules_are_checked(rules: list[tuple[str, dict[str, object]]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        named_param_groups(small(), rules)


def tied() -> nn.ModuleDict:
    model = nn.ModuleDict({"tokens": nn.Embedding(7, 4), "middle": nn.Linear(4, 4), "out": nn.Linear(4, 7)})
    model["out"].weight = model["tokens"].weight
    return model


def test_a_tied_parameter_is_owned_once_and_known_by_every_name() -> None:
    rules = [(r"^out\.", {"lr": 1.0}), ("^tokens", {"lr": 2.0}), ("", {"lr": 3.0})]
    groups = named_param_groups(tied(), rules)
    assert [(names(group), group["lr"]) for group in groups] == [
        (["tokens.weight", "out.bias"], 1.0),
        (["middle.weight", "middle.bias"], 3.0),
    ]


def test_frozen_parameters_are_left_out() -> None:
    model = small()
    model[0].requires_grad_(False)
    groups = named_param_groups(model, [("^0", {"lr": 1.0}), ("^[12]", {})])
    assert [names(group) for group in groups] == [["1.weight", "1.bias", "2.weight", "2.bias"]]


def test_matrices_are_the_hidden_ones() -> None:
    matrices, others, vectors = matrix_param_groups(build_model(0))
    assert names(matrices) == [
        f"blocks.{block}.{layer}.weight" for block in (0, 1) for layer in ("qkv", "projection", "up", "down")
    ]
    assert names(others) == ["token_embedding.weight", "position_embedding.weight", "head.weight"]
    assert all(parameter.ndim == 1 for parameter in vectors["params"])
    assert len(vectors["params"]) == 2 * (4 + 4) + 2
    assert [group["use_reg"] for group in (matrices, others, vectors)] == [True, False, False]
    assert "weight_decay" not in others
    assert vectors["weight_decay"] == 0.0


def test_an_embedding_is_known_by_its_type_even_when_tied() -> None:
    groups = matrix_param_groups(tied())
    assert names(groups[0]) == ["middle.weight"]
    assert names(groups[1]) == ["tokens.weight"]


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("lm_head.weight", False),
        ("classifier.weight", False),
        ("pos_embed", False),
        ("transformer.wte.weight", False),
        ("cls_token", False),
        ("output.weight", False),
        ("layers.0.attention.output.dense.weight", True),
        ("layers.0.heads.weight", True),
        ("layers.0.out_proj.weight", True),
        ("remember.weight", True),
    ],
)
def test_names_of_embeddings_and_heads(name: str, hidden: bool) -> None:
    root = nn.Module()
    *path, last = name.split(".")
    module = root
    for part in path:
        module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    module.register_parameter(last, nn.Parameter(torch.zeros(3, 3)))
    assert [group["use_reg"] for group in matrix_param_groups(root)] == [hidden]


def test_a_rule_changes_the_classification_or_adds_options() -> None:
    groups = matrix_param_groups(small(), [(r"^2\.weight", {"use_reg": False}), ("^0", {"lr": 0.5})])
    assert {name: (group["use_reg"], group.get("lr")) for group in groups for name in names(group)} == {
        "0.weight": (True, 0.5),
        "2.weight": (False, None),
        "0.bias": (False, 0.5),
        "1.weight": (False, None),
        "1.bias": (False, None),
        "2.bias": (False, None),
    }
    REG(groups)


def test_other_flags_and_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.Linear(4, 4, bias=False))
    assert [names(group) for group in matrix_param_groups(model)] == [["0.weight", "1.weight"]]
    groups = matrix_param_groups(model, flag="use_muon", convolutions=False)
    assert [(group["use_muon"], names(group)) for group in groups] == [
        (True, ["1.weight"]),
        (False, ["0.weight"]),
    ]


def test_matrix_groups_are_checked() -> None:
    with pytest.raises(ValueError, match="pattern 'attention' matches no parameter"):
        matrix_param_groups(small(), [("attention", {})])
    with pytest.raises(ValueError, match="no trainable parameter"):
        matrix_param_groups(small().requires_grad_(False))
