"""Adapters beside themselves in other coordinates, and what is counted of streams of images."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from piste import running
from piste.errors import BadInput
from piste.ledger import open_ledger
from piste.ledger.streams import coded, decoded
from piste_algorithms.adaptation import RewrittenPrompt, StepInfo
from piste_workloads.stream import Config, open_processor, open_source, summarize
from piste_workloads.stream.coordinates import Twin
from piste_workloads.stream.images import Classified
from piste_workloads.stream.tally import BINS, PHASES, Tally, metrics

pytest_plugins = ["tests.platform.fixtures"]

FISHER = {"kind": "fisher", "prompt": "additive", "condition": 1e4}
SGD = {**FISHER, "kind": "gradient", "optimizer": "sgd", "lr": 0.03}
TWINS: dict[str, Any] = {
    "workload": "stream",
    "source": {"name": "images", "events": 400, "calibration": 400, "onset": 100},
    "images": {
        "corruption": "noise",
        "alpha": 0.0,
        "dataset": "digits",
        "train": 500,
        "reference": 200,
        "epochs": 3,
        "until": 400,
    },
    "detectors": {"shift": {"two_sided": True, "false_alarm_rate": 0.1, "smallest_shift": 0.3}},
    "adapters": {
        "fisher": FISHER,
        "even": {**FISHER, "damped_by": "even", "step_size": 1.0},
        "identity": {
            "prompt": "additive",
            "kind": "fisher",
            "damped_by": "identity",
            "damping": 1e-3,
            "condition": 1e4,
        },
        "sgd": {"prompt": "additive", "kind": "gradient", "optimizer": "sgd", "lr": 0.03, "condition": 1e4},
        "same": {"prompt": "additive", "kind": "gradient", "optimizer": "sgd", "lr": 0.03, "condition": 1.0},
        "none": {"kind": "none"},
    },
    "stream": {"batch": 100},
    "tracking": {"system_metrics": False},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def twins(**sections: dict[str, Any]) -> Config:
    config = running.resolve({**TWINS, **sections}, "twins")
    assert isinstance(config, Config)
    return config


@pytest.fixture(scope="module")
def found() -> dict[str, float]:
    """The summary of a run."""
    config = twins()
    streams = list[dict[str, Any]]()
    for number, name in enumerate(config.adapters):
        processor = open_processor(config, number, None)
        assert processor.take(open_source(config, [number]).read(0, 400)[number]).alarms
        streams.append({"number": number, "name": name, "sequence": 400, "state": processor.state()})
    return summarize(config, streams, [])


def test_coordinates_have_the_condition_and_start_at_the_prompt() -> None:
    start = torch.arange(6, dtype=torch.float64).view(2, 3)

    def model(x: Tensor, prompt: Tensor) -> Tensor:
        return x @ prompt

    rewritten = RewrittenPrompt(model, start, 1e4, torch.Generator().manual_seed(3))
    values = np.linalg.svd(rewritten.matrix.numpy(), compute_uv=False)
    assert values.max() / values.min() == pytest.approx(1e4, rel=1e-6)
    assert values.max() * values.min() == pytest.approx(1.0, rel=1e-6)
    assert torch.equal(rewritten.prompt(rewritten.initial()), start)
    x = torch.ones(4, 2, dtype=torch.float64)
    moved = torch.linspace(-1, 1, 6, dtype=torch.float64)
    assert torch.equal(rewritten(x, moved), x @ (start + (rewritten.matrix @ moved).view(2, 3)))
    with pytest.raises(ValueError, match="condition must be"):
        RewrittenPrompt(model, start, 0.5, torch.Generator())


@pytest.mark.parametrize("name", ["fisher", "even"])
def test_a_fisher_prompt_is_the_same_in_other_coordinates(found: dict[str, float], name: str) -> None:
    assert 0.0 < found[f"prompt_difference/{name}"] <= 1e-3
    assert 0.0 < found[f"prediction_difference/{name}"] <= 1e-3


@pytest.mark.parametrize(("name", "least"), [("identity", 0.1), ("sgd", 1.0)])
def test_other_prompts_are_not(found: dict[str, float], name: str, least: float) -> None:
    assert found[f"prompt_difference/{name}"] > least
    assert found[f"prediction_difference/{name}"] > 0.1


def test_descent_is_the_same_in_rotated_coordinates(found: dict[str, float]) -> None:
    assert 0.0 < found["prompt_difference/same"] < 1e-9
    assert "prompt_difference/none" not in found


def prompts(processor: Classified) -> tuple[Tensor, Tensor]:
    twin = processor._stream.adapter
    assert isinstance(twin, Twin)
    return twin._plain.prompt, twin._rewritten.prompt


def test_saved_twins_go_on_bit_for_bit() -> None:
    config = twins()
    events = open_source(config, [0]).read(0, 400)[0]
    whole, part = (open_processor(config, 0, None) for _ in range(2))
    whole.take(events)
    for first in range(0, 400, 200):
        saved = json.loads(json.dumps([coded(part.origin()), coded(part.state())], allow_nan=False))
        part = open_processor(config, 0, tuple(decoded(saved)))
        part.take(events[first : first + 200])
    ours, theirs = ({k: v for k, v in each.state().items() if k != "torch"} for each in (part, whole))
    assert ours == theirs
    assert isinstance(part, Classified)
    assert isinstance(whole, Classified)
    for one, other in zip(prompts(part), prompts(whole), strict=True):
        assert torch.equal(one, other)
        assert one.any()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"kind": "none", "condition": 10.0}, "adapter 'none' has no prompt whose coordinates"),
        ({"kind": "tent", "condition": 0.5}, "greater than or equal to 1"),
        ({"kind": "fisher", "prompt": "batch_statistics"}, 'not prompt = "batch_statistics"'),
        ({"kind": "fisher", "repeats": 0}, "greater than or equal to 1"),
        ({"kind": "fisher", "damped_by": "nothing"}, "damped_by must be one of 'predicted', 'even'"),
    ],
)
def test_bad_adapters_are_refused_in_one_line(section: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput) as caught:
        twins(adapters={"a": section})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_calibration_error_is_that_of_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2.0 * torch.randn(300, 5, generator=generator)
    labels = torch.randint(5, (300,), generator=generator)
    tally = Tally()
    for part in torch.split(torch.arange(300), 40):
        tally.add(["during"] * len(part), logits[part], logits[part], labels[part])
    state = json.loads(json.dumps(tally.state()))
    confidence, chosen = logits.double().softmax(-1).max(-1)
    right = (chosen == labels).double().numpy()
    bins = np.digitize(confidence.numpy(), np.linspace(0, 1, BINS + 1)) - 1
    expected = sum(
        (bins == b).mean() * abs(right[bins == b].mean() - confidence.numpy()[bins == b].mean())
        for b in np.unique(bins)
    )
    said = metrics("a", state)
    assert said["ece_during/a"] == pytest.approx(expected, rel=1e-12)
    assert said["accuracy_during/a"] == pytest.approx(right.mean())
    assert said["change/a"] == 0.0
    assert "ece_before/a" not in said  # no image was seen then
    assert Tally(state).state() == tally.state()
    with pytest.raises(BadInput, match="begun by an older piste: begin anew with another --name"):
        Tally({"right": state["right"], "seen": state["seen"]})


def test_changes_and_updates_are_counted() -> None:
    tally = Tally()
    source = torch.tensor([[0.0, 0.0]])
    tally.add(["before"], source, source, torch.tensor([0]))
    assert metrics("a", tally.state())["change/a"] == 0.0
    tally.add(["after"], torch.tensor([[30.0, -30.0]]), source, torch.tensor([0]))
    assert metrics("a", tally.state())["change/a"] == pytest.approx(0.5)
    tally.add(["after"], torch.full((1, 2), torch.nan), source, torch.tensor([0]))
    assert metrics("a", tally.state())["change/a"] == 1.0  # what is no number is as far as can be
    steps = [StepInfo(accepted, 1.0, 1.0, 0.1, 1.0, 0) for accepted in (True, False, True)]
    for name in PHASES[:2]:
        tally.stepped(name, steps)
    assert metrics("a", tally.state())["updates_before/a"] == 2.0


def test_a_run_draws_its_accuracy(no_view: None, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = dict[str, Figure]()
    monkeypatch.setattr(
        "piste.workload.Run.figure", lambda run, name, figure, step: drawn.update({name: figure})
    )
    config = twins(adapters={"none": {"kind": "none"}, "fisher": {"kind": "fisher", "repeats": 2}})
    ledger = open_ledger()
    result = running.execute(ledger, running.plan(ledger, "drawn", config), local=True)
    shown = dict(result.history("accuracy/none"))
    assert list(shown) == [1, 2, 3, 4]
    (axes,) = drawn["adaptation"].axes
    lines = {str(line.get_label()): np.asarray(line.get_xydata()) for line in axes.get_lines()}
    assert set(lines) == {"none", "fisher", "first alarm"}
    first = {int(place): value for place, value in lines["none"]}
    assert list(first) == list(range(25, 401, 25))
    assert first[100] == pytest.approx(shown[1])  # a point is the mean of at most 200 images before it
    assert result.metrics["accuracy_before/none"] == shown[1]
    (band,) = axes.patches
    assert (band.get_x(), band.get_x() + band.get_width()) == (100.0, 400.0)  # type: ignore[attr-defined]
