"""REG: is balancing rows and columns of the momentum as good as orthogonalising it, and closer to AdamW?

Only the paper's abstract is known here, which states no numbers: every `paper_figure` is None. A claim is the
abstract's where its source says so; its threshold is this project's reading of it, and so are the claims that
the abstract does not make.

Equal tuning means the same grid of learning rates and the same seeds for each optimizer; each has the rate
with the best mean, and seeds are compared in pairs. That the rate is chosen on these very seeds flatters all
of them alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from piste.running import load_recipe
from piste.studies import Claim, Lab
from piste_workloads.llm.config import Config, Data
from piste_workloads.llm.text import cache, read_text, write_atomically
from piste_workloads.studies._reg_operator import condition_ratios, cosines, operator_times, step_times

RECIPE, METRIC = "reg-small", "valid/loss"

# Hidden matrices scaled by their Frobenius norm alone: no row or column is below `eps` times the largest, so
# that `racs` divides all by the same number. What AdamW has in REG, it has here.
_FROBENIUS_GROUPS = (
    {"match": "norm", "use_reg": False, "weight_decay": 0.0, "eps": 1e-8},
    {"match": "token_embedding|head", "use_reg": False, "eps": 1e-8},
    {"match": "", "eps": 1 - 1e-15},
)
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw", "betas": [0.9, 0.95], "weight_decay": 0.1},
    "muon": {"name": "muon", "weight_decay": 0.1},
    "reg": {"name": "reg", "weight_decay": 0.1},
    "frobenius": {"name": "reg", "weight_decay": 0.1, "groups": _FROBENIUS_GROUPS},
}


class Scale(NamedTuple):
    """How large the study is.

    Attributes:
        seeds: Of every run and measurement.
        lrs: The grid from scratch, ascending by a factor of 3.
        tuning_lrs: The grid of fine-tuning.
        tuning_steps: How long fine-tuning lasts.
        pretraining_steps: How long AdamW pre-trains.
        overrides: Of the recipe, for every run.
    """

    seeds: int
    lrs: tuple[float, ...]
    tuning_lrs: tuple[float, ...]
    tuning_steps: int
    pretraining_steps: int
    overrides: dict[str, Any]


scales = {
    "small": Scale(5, (3e-3, 9e-3, 2.7e-2, 8.1e-2), (1e-3, 3e-3, 9e-3, 2.7e-2), 60, 300, {}),
    "full": Scale(
        5,
        (1e-3, 3e-3, 9e-3, 2.7e-2, 8.1e-2),
        (3e-4, 1e-3, 3e-3, 9e-3, 2.7e-2),
        300,
        3000,
        {
            "model__layers": 4,
            "model__width": 128,
            "model__context": 128,
            "data__vocab_size": 2048,
            "train__steps": 1500,
            "train__batch": 32,
        },
    ),
}


# -- what the operator does, and what it costs --------------------------------------------------------


def _cosines(lab: Lab) -> dict[str, list[float]]:
    settings = {"recipe": RECIPE, "seeds": lab.scale.seeds, "steps": 130, "every": 10}
    found: dict[str, list[float]] = lab.measured(cosines, **settings, overrides=_dotted(lab))
    return found


def _dotted(lab: Lab) -> dict[str, Any]:
    return {key.replace("__", "."): value for key, value in lab.scale.overrides.items()}


def closeness(lab: Lab) -> list[float]:
    """Cosine with AdamW's update."""
    return _cosines(lab)["racs"]


def closer_than_muon(lab: Lab) -> list[float]:
    """REG's cosine with AdamW's update less Muon's."""
    return _differences(_cosines(lab)["racs"], _cosines(lab)["muon"])


def operator_cost(lab: Lab) -> list[float]:
    """Of RACS over Newton-Schulz."""
    found: list[float] = lab.measured(operator_times, size=512, repeats=20)
    return found


def cost_against(optimizer: str) -> Callable[[Lab], list[float]]:
    """Of a step of REG over one of another optimizer."""

    def measure(lab: Lab) -> list[float]:
        found: list[float] = lab.measured(step_times, against=optimizer, repeats=20)
        return found

    return measure


def conditioning(lab: Lab) -> list[float]:
    """After one sweep over before it."""
    found: list[float] = lab.measured(condition_ratios, seeds=10, matrices=101)
    return found


# -- from scratch, and at three times the best learning rate ----------------------------------------


def scratch(lab: Lab, name: str) -> tuple[float, list[float]]:
    """An optimizer's best learning rate and the losses that it ends with there, one a seed."""
    losses = lab.grid(RECIPE, METRIC, {"optimizer.lr": lab.scale.lrs}, **_settings(lab, name))
    return _best({lr: values for (lr,), values in losses.items()})


def hot(lab: Lab, name: str) -> list[float]:
    """The same at three times that rate."""
    lr = float(f"{3 * scratch(lab, name)[0]:.6g}")
    return lab.grid(RECIPE, METRIC, {"optimizer.lr": [lr]}, **_settings(lab, name))[lr,]


def _settings(lab: Lab, name: str) -> dict[str, Any]:
    return {"seeds": lab.scale.seeds, "optimizer": OPTIMIZERS[name], **lab.scale.overrides}


def _best(losses: dict[float, list[float]]) -> tuple[float, list[float]]:
    """The learning rate with the lowest mean loss, and its losses."""
    return min(losses.items(), key=lambda item: sum(item[1]))


def scratch_against(other: str) -> Callable[[Lab], list[float]]:
    """REG's loss less another's, each at its best learning rate."""
    return lambda lab: _differences(scratch(lab, "reg")[1], scratch(lab, other)[1])


def close_to_adamw(lab: Lab) -> list[float]:
    """REG's loss over AdamW's, each at its best learning rate."""
    return [a / b for a, b in zip(scratch(lab, "reg")[1], scratch(lab, "adamw")[1], strict=True)]


def stable(lab: Lab) -> list[float]:
    """REG's loss at three times its best learning rate less that of the uniform guess."""
    config = load_recipe(RECIPE, _dotted(lab))
    assert isinstance(config, Config)
    return [loss - math.log(config.data.vocab_size) for loss in hot(lab, "reg")]


def more_stable_than_adamw(lab: Lab) -> list[float]:
    """What three times the best learning rate costs REG, less what it costs AdamW."""
    reg, adamw = (_differences(hot(lab, name), scratch(lab, name)[1]) for name in ("reg", "adamw"))
    return _differences(reg, adamw)


# -- fine-tuning a model that AdamW pre-trained -----------------------------------------------------


def texts() -> tuple[Path, Path]:
    """What a model is pre-trained on and fine-tuned on: the Old Testament, and the New with another grammar.

    In the second the words of every paragraph stand in reverse order, so that there is much to learn in few
    steps, and in the same words.
    """
    folder = cache() / "text"
    paths = folder / "kjv-old-testament.txt", folder / "kjv-new-testament-reversed.txt"
    if not all(path.exists() for path in paths):
        text = read_text(Data())
        cut = text.index("The book of the generation of Jesus Christ")
        reversed_words = "\n".join(" ".join(line.split(" ")[::-1]) for line in text[cut:].split("\n"))
        for path, part in zip(paths, (text[:cut], reversed_words), strict=True):
            write_atomically(path, iter([part]))
    return paths


def tuned(lab: Lab, name: str) -> dict[float, list[float]]:
    """By learning rate, the loss on the second text of each model that AdamW trained on the first."""
    old, new = texts()
    pretraining = {
        "optimizer": OPTIMIZERS["adamw"] | {"lr": scratch(lab, "adamw")[0]},
        "train__steps": lab.scale.pretraining_steps,
    }
    tuning = {"optimizer": OPTIMIZERS[name], "train__steps": lab.scale.tuning_steps}
    settings = lab.scale.overrides | {"data__source": "file"}
    made = lab.runs(RECIPE, METRIC, lab.scale.seeds, **settings | pretraining, data__path=str(old))
    checkpoints = [str(max((run.directory / "checkpoints").glob("step-*"))) for run in made]
    space: dict[str, Sequence[Any]] = {"optimizer.lr": lab.scale.tuning_lrs, "init_from": checkpoints}
    losses = lab.grid(RECIPE, METRIC, space, **settings | tuning, data__path=str(new))
    return {lr: [losses[lr, checkpoint][0] for checkpoint in checkpoints] for lr in lab.scale.tuning_lrs}


def tuned_against(other: str) -> Callable[[Lab], list[float]]:
    """REG's loss after fine-tuning less another's, each at its best learning rate."""
    return lambda lab: _differences(_best(tuned(lab, "reg"))[1], _best(tuned(lab, other))[1])


def tuned_at_small_rates(lab: Lab) -> list[float]:
    """REG's loss after fine-tuning less Muon's, the mean over the two smallest learning rates."""
    reg, muon = tuned(lab, "reg"), tuned(lab, "muon")
    first, second = (_differences(reg[lr], muon[lr]) for lr in lab.scale.tuning_lrs[:2])
    return [(a + b) / 2 for a, b in zip(first, second, strict=True)]


def _differences(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(first, second, strict=True)]


ABSTRACT = "the paper's abstract"
OWN = "this project's question; the abstract does not say so"

claims = (
    Claim(
        "operator-cost",
        "Balancing a 512 x 512 matrix takes at most a tenth of the time of Newton-Schulz.",
        f"{ABSTRACT} (simpler than the matrix sign); the factor is this project's",
        0.10,
        "below",
        "supported",
        operator_cost,
    ),
    Claim(
        "step-cost-muon",
        "A step of REG takes at most a quarter of the time of a step of Muon.",
        f"{ABSTRACT} (simpler than the matrix sign); the factor is this project's",
        0.25,
        "below",
        "supported",
        cost_against("muon"),
    ),
    Claim(
        "step-cost-adamw",
        "A step of REG takes at most 1.5 times as long as a step of AdamW (foreach).",
        OWN,
        1.5,
        "below",
        "supported",
        cost_against("adamw"),
        note="Much of AdamW's time on a CPU is page faults, so that the ratio depends on the allocator.",
    ),
    Claim(
        "conditioning",
        "One sweep lowers the median condition number of badly scaled matrices a hundredfold.",
        f"{ABSTRACT} (balancing a matrix); the factor is this project's",
        0.01,
        "below",
        "supported",
        conditioning,
    ),
    Claim(
        "closeness",
        "The cosine between AdamW's update and the balanced first moment is at least 0.9.",
        f"{ABSTRACT} (consistent with AdamW); the number is this project's",
        0.9,
        "above",
        "supported",
        closeness,
    ),
    Claim(
        "closer-than-muon",
        "REG's update is closer to AdamW's than Muon's is.",
        f"{ABSTRACT} (less drastic than the matrix sign)",
        0.0,
        "above",
        "supported",
        closer_than_muon,
    ),
    Claim(
        "better-than-adamw",
        "From scratch and equally tuned, REG ends with a lower loss than AdamW.",
        f"{ABSTRACT} (performance)",
        0.0,
        "below",
        "supported",
        scratch_against("adamw"),
        unit="nats",
        note="On a finer grid (factor 1.7) REG is 0.02 nats ahead as well, but the interval reaches 0.",
    ),
    Claim(
        "close-to-adamw",
        "From scratch and equally tuned, REG's loss is at most 1.04 times AdamW's.",
        OWN,
        1.04,
        "below",
        "supported",
        close_to_adamw,
    ),
    Claim(
        "better-than-muon",
        "From scratch and equally tuned, REG ends with a lower loss than Muon.",
        OWN,
        0.0,
        "below",
        "refuted",
        scratch_against("muon"),
        unit="nats",
    ),
    Claim(
        "balancing-helps",
        "From scratch and equally tuned, REG ends with a lower loss than without balancing.",
        f"{ABSTRACT} (what REG adds to normalised momentum)",
        0.0,
        "below",
        "supported",
        scratch_against("frobenius"),
        unit="nats",
    ),
    Claim(
        "stable",
        "At three times its best learning rate REG still ends below the loss of the uniform guess.",
        f"{ABSTRACT} (stability); how it is measured is this project's",
        0.0,
        "below",
        "supported",
        stable,
        unit="nats",
    ),
    Claim(
        "more-stable-than-adamw",
        "Three times the best learning rate costs REG less than it costs AdamW.",
        f"{ABSTRACT} (stability against AdamW)",
        0.0,
        "below",
        "inconclusive",
        more_stable_than_adamw,
        unit="nats",
        note="REG's best rate is three times AdamW's; at 8.1e-2 REG ends at 3.92 nats, AdamW at 4.83.",
    ),
    Claim(
        "fine-tuning-at-small-rates",
        "Fine-tuning what AdamW pre-trained at small learning rates, REG ends with a lower loss than Muon.",
        f"{ABSTRACT} (avoids the degradation seen with Muon)",
        0.0,
        "below",
        "supported",
        tuned_at_small_rates,
        unit="nats",
        note="1e-3 and 3e-3, as in specification B5.",
    ),
    Claim(
        "fine-tuning-better-than-muon",
        "Fine-tuning what AdamW pre-trained, REG ends with a lower loss than Muon, equally tuned.",
        f"{ABSTRACT} (avoids the degradation seen with Muon)",
        0.0,
        "below",
        "refuted",
        tuned_against("muon"),
        unit="nats",
        note="At 9e-3 and above Muon is ahead, at 3e-3 and below REG is.",
    ),
    Claim(
        "fine-tuning-close-to-adamw",
        "Fine-tuning what AdamW pre-trained, REG ends at most 0.05 nats above AdamW, equally tuned.",
        f"{ABSTRACT} (consistent with AdamW); the number is this project's",
        0.05,
        "below",
        "supported",
        tuned_against("adamw"),
        unit="nats",
    ),
)
