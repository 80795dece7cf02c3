"""Parameter groups by name: ordered regular expressions, first match wins, every parameter owned once."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

Rules = Sequence[tuple[str, Mapping[str, object]]]

# Names of parameters that are not hidden matrices although they have two dimensions or more.
EMBEDDING_NAMES = (
    r"(^|[._])(emb|embed|embeds|embedding|embeddings|wte|wpe)([._]|$)|(^|[._])(cls|mask|dist)_token$"
)
HEAD_NAMES = (
    r"(^|\.)(lm_head|output_head|classification_head|head|classifier|unembed|unembedding|logits|readout)(\.|$)"
    r"|(^|\.)(output|output_projection)\.weight$"
)


def named_param_groups(model: nn.Module, rules: Rules) -> list[dict[str, Any]]:
    r"""Split a model's trainable parameters into optimizer groups by their names.

    A rule is a pair of a regular expression, searched for in the name (`re.search`: anchor it with `^` and
    `$` where that matters), and the options of its group. The first rule that matches owns the parameter. A
    tied parameter has several names; it is matched by any of them and owned once. Frozen parameters are left
    out.

    Args:
        model: the model.
        rules: the rules in order of precedence, for example
            `[(r"\.bias$", {"weight_decay": 0.0}), (r"", {"weight_decay": 0.1})]`.

    Returns:
        One group a rule that owns a parameter, in the order of the rules: `params`, `param_names` (a key that
        torch knows) and the rule's options.

    Raises:
        ValueError: if there is no rule, a pattern is no regular expression or matches no parameter at all, or
            a trainable parameter is matched by none.
    """
    if not rules:
        raise ValueError("rules must hold at least one (pattern, options) pair, got none")
    owners, named = _owners(model, rules)
    missed = [names[0] for (names, _), owner in zip(named, owners, strict=True) if owner is None]
    if missed:
        raise ValueError(f"no rule matches the trainable parameter(s) {', '.join(missed)}")
    groups = []
    for index, (_, options) in enumerate(rules):
        members = [entry for entry, owner in zip(named, owners, strict=True) if owner == index]
        if members:
            groups.append(_group(members, options))
    return groups


def matrix_param_groups(
    model: nn.Module, rules: Rules = (), *, flag: str = "use_reg", convolutions: bool = True
) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into those for a matrix rule and those for AdamW.

    - hidden matrices (two or more dimensions): `flag` is True;
    - embeddings (weights of `nn.Embedding` and `nn.EmbeddingBag`, and names such as `pos_embed`) and the
      output head (names such as `lm_head`, `head`, `classifier`): `flag` is False;
    - gains, biases and all else of fewer than two dimensions: `flag` is False and `weight_decay` 0.

    An output head is known by its name only; name another by a rule: `[(r"^4[.]", {"use_reg": False})]`.

    Args:
        model: the model.
        rules: as for `named_param_groups`, but they need not match every parameter: a parameter that one
            matches keeps the classification above, with the rule's options on top of it.
        flag: the key that tells the optimizer which rule a group takes.
        convolutions: whether parameters of more than two dimensions count as matrices.

    Returns:
        Groups with `params`, `param_names` and `flag`, the matrices first; empty ones are left out.

    Raises:
        ValueError: if the model has no trainable parameter, or a pattern is no regular expression or matches
            no parameter.
    """
    owners, named = _owners(model, rules)
    if not named:
        raise ValueError("model has no trainable parameter")
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)
    }
    kinds = ({flag: True}, {flag: False}, {flag: False, "weight_decay": 0.0})
    members: dict[tuple[int, int], list[tuple[list[str], nn.Parameter]]] = {}
    for entry, owner in zip(named, owners, strict=True):
        names, parameter = entry
        if parameter.ndim < 2:
            kind = 2
        elif id(parameter) in embeddings or any(
            re.search(pattern, name) for name in names for pattern in (EMBEDDING_NAMES, HEAD_NAMES)
        ):
            kind = 1
        else:
            kind = 0 if parameter.ndim == 2 or convolutions else 1
        members.setdefault((kind, -1 if owner is None else owner), []).append(entry)
    return [
        _group(members[kind, owner], {**kinds[kind], **({} if owner < 0 else rules[owner][1])})
        for kind, owner in sorted(members)
    ]


def _owners(model: nn.Module, rules: Rules) -> tuple[list[int | None], list[tuple[list[str], nn.Parameter]]]:
    """The index of each trainable parameter's rule, and the parameters with all their names."""
    entries: dict[int, tuple[list[str], nn.Parameter]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        entries.setdefault(id(parameter), ([], parameter))[0].append(name)
    patterns = []
    for pattern, _ in rules:
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"rule pattern {pattern!r} is no regular expression: {error}") from error
        if not any(compiled.search(name) for names, _ in entries.values() for name in names):
            raise ValueError(f"rule pattern {pattern!r} matches no parameter of the model")
        patterns.append(compiled)
    named = [entry for entry in entries.values() if entry[1].requires_grad]
    owners = [
        next(
            (i for i, pattern in enumerate(patterns) if any(pattern.search(name) for name in names)),
            None,
        )
        for names, _ in named
    ]
    return owners, named


def _group(
    members: Sequence[tuple[list[str], nn.Parameter]], options: Mapping[str, object]
) -> dict[str, Any]:
    return {
        "params": [parameter for _, parameter in members],
        "param_names": [names[0] for names, _ in members],
        **options,
    }
