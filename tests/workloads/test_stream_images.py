"""Streams of images: corrupted for a while, adapted to after the alarm alone, continued bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from piste import running, streams
from piste.errors import BadInput
from piste.ledger import open_ledger
from piste.ledger.streams import coded, decoded
from piste_algorithms.adaptation import NormalizationPrompt
from piste_workloads.stream import Config, open_processor, open_source
from piste_workloads.stream.images import CORRUPTIONS, Classified, Images, material

pytest_plugins = ["tests.platform.fixtures"]

SMALL: dict[str, Any] = {
    "workload": "stream",
    "source": {"name": "images", "events": 500, "calibration": 400, "onset": 200},
    "images": {
        "corruption": "blur",
        "alpha": 0.0,
        "dataset": "digits",
        "train": 500,
        "reference": 200,
        "epochs": 3,
        "until": 350,
    },
    "detectors": {"shift": {"two_sided": True, "false_alarm_rate": 0.1, "smallest_shift": 0.3}},
    "adapters": {
        "none": {"kind": "none"},
        "fisher": {"kind": "fisher"},
        "sgd": {"kind": "gradient", "optimizer": "sgd", "momentum": 0.5},
        "tent": {"kind": "tent", "prompt": "batch_statistics"},
        "matching": {"kind": "entropy_matching"},
    },
    "stream": {"batch": 50},
    "tracking": {"system_metrics": False},
}


def small(**sections: dict[str, Any]) -> Config:
    table = {key: {**SMALL.get(key, {}), **section} for key, section in sections.items()}
    config = running.resolve({**SMALL, **table}, "small")
    assert isinstance(config, Config)
    return config


def test_images_are_corrupted_for_a_while_and_the_same_from_any_number_on() -> None:
    for corruption in CORRUPTIONS:
        config = small(images={"corruption": corruption})
        clean, source = material(config).stream, open_source(config, [0, 3])
        whole: Images = source.read(0, 500)[3]
        changed = (whole.x != clean.x).flatten(1).any(1)
        assert changed.nonzero().flatten().tolist() == list(range(200, 350))
        assert torch.equal(whole.y, clean.y)
        assert 0.0 <= whole.x.min() <= whole.x.max() <= 1.0
        part = source.read(180, 60)[0]
        assert torch.equal(part.x, whole.x[180:240])


def test_no_image_is_used_twice() -> None:
    shared = material(small())
    parts = [shared.reference, shared.calibration, shared.stream.x]
    assert [len(part) for part in parts] == [200, 400, 500]
    rows = torch.cat(parts).flatten(1)
    assert len(torch.unique(rows, dim=0)) == len(rows)  # and no digit is there twice


@pytest.mark.parametrize("number", range(5))
def test_a_saved_classifier_goes_on_bit_for_bit(number: int) -> None:
    config = small()
    events = open_source(config, [number]).read(0, 500)[number]
    whole, part = (open_processor(config, number, None) for _ in range(2))
    taken = whole.take(events)
    alarms = list[Any]()
    for first in range(0, 500, 50):
        saved = json.loads(json.dumps([coded(part.origin()), coded(part.state())], allow_nan=False))
        part = open_processor(config, number, tuple(decoded(saved)))
        alarms += part.take(events[first : first + 50]).alarms
    assert alarms == taken.alarms
    assert alarms  # so that there was something to adapt to
    assert part.wealth == whole.wealth
    assert isinstance(part, Classified)
    assert isinstance(whole, Classified)
    ours, theirs = part._stream.adapter, whole._stream.adapter
    assert torch.equal(ours.prompt, theirs.prompt)
    initial = NormalizationPrompt(material(config).network).initial()
    assert torch.equal(ours.prompt, initial) == (number == 0)  # it is adapted, where it is to be
    assert torch.equal(ours.predict(events.x), theirs.predict(events.x))
    assert (part.state()["right"], part.state()["seen"]) == (whole.state()["right"], whole.state()["seen"])


def test_nothing_is_adapted_before_the_alarm_and_the_run_says_how_many_were_right(no_view: None) -> None:
    config = small()
    ledger = open_ledger()
    run_id = streams.plan(ledger, "images", config)
    result = running.execute(ledger, run_id, local=True)
    names = list(config.adapters)
    first = {a.sequence for a in ledger.streams.alarms(run_id) if a.details["segment"] == 1}
    assert len(first) == 1  # the detector watches the classifier as it was: the same for all
    before = {result.metrics[f"accuracy_before/{name}"] for name in names}
    assert len(before) == 1
    assert before.pop() > 0.5  # of ten digits: it has learnt them
    for name in names:
        shown = dict(ledger.history(run_id, f"accuracy/{name}"))
        assert list(shown) == list(range(50, 501, 50))
        of_phase = [result.metrics[f"accuracy_{phase}/{name}"] for phase in ("before", "during", "after")]
        assert sum(50 * value for value in shown.values()) == pytest.approx(
            sum(n * value for n, value in zip((200, 150, 150), of_phase, strict=True))
        )
    drawn = Path(ledger.run(run_id).directory) / "artifacts" / "adaptation.png"
    assert drawn.stat().st_size > 1000


def test_an_unadapted_stream_is_the_classifier_itself() -> None:
    config = small()
    events = open_source(config, [0]).read(0, 500)[0]
    processor = open_processor(config, 0, None)
    taken = processor.take(events)
    logits = torch.cat([material(config).network(part).detach() for part in torch.split(events.x, 25)])
    accuracy = float((logits.argmax(-1) == events.y).double().mean())
    assert taken.metrics == {"accuracy": accuracy}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"stream": {"batch": 30}}, "stream.batch = 30 must be a multiple of images.batch = 25"),
        ({"detectors": {"a": {}}}, "streams of images take one detector"),
        ({"adapters": {"a": {"kind": "fish"}}}, "unknown kind of adapter 'fish'; did you mean 'fisher'"),
        ({"adapters": {"a": {"kind": "tent", "rate": 1.0}}}, "adapter 'tent' takes no 'rate'"),
        ({"adapters": {"a": {"kind": "tent", "lr": -1.0}}}, "lr must be"),
    ],
)
def test_bad_recipes_of_images_are_refused_in_one_line(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput) as caught:
        small(**sections)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_more_images_than_there_are_cannot_be_had() -> None:
    with pytest.raises(BadInput, match=r"digits has 1797 images, 3100 are asked for: lower images\.train"):
        material(small(source={"events": 2000}))
