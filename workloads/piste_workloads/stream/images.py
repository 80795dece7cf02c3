"""Streams of images that are corrupted for a while, and a classifier that is adapted once a shift is found.

Each stream is the same images in the same order with another adapter, so that one run compares them. Of a
data set, shuffled by the run's seed, one part trains the classifier, one is the reference of the score and
the source of the adapters, one calibrates the detector, and the rest is the stream: no image comes twice.

The classifier is the small convolutional network of the workload `images`; what an adapter changes are the
gains and shifts of its normalisation layers.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from piste.errors import BadInput
from piste.shards import Taken
from piste_algorithms.adaptation import AdaptiveStream, NormalizationPrompt, StepInfo
from piste_algorithms.adaptation.adapter import Adapter
from piste_algorithms.martingales import FisherScore
from piste_workloads.data import load
from piste_workloads.data._cache import cached
from piste_workloads.images.config import Model
from piste_workloads.images.networks import build_network
from piste_workloads.stream.config import Config
from piste_workloads.stream.coordinates import Twin
from piste_workloads.stream.processing import Saved, alarm_columns, log_statistic
from piste_workloads.stream.tally import Tally


@dataclass(frozen=True)
class Images:
    """Events: images `(n, channels, height, width)` float32 in [0, 1] and labels `(n,)`."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, part: slice) -> Images:
        return Images(self.x[part], self.y[part])


@dataclass(frozen=True)
class Material:
    """What the streams of a run share.

    Attributes:
        network: The trained classifier.
        reference: Images of the source, for the score and the adapters.
        calibration: Images of the source, for the detector.
        stream: The images of the stream, before any corruption.
        sha256: The hash of data and weights.
    """

    network: nn.Module
    reference: Tensor
    calibration: Tensor
    stream: Images
    sha256: str


def material(config: Config) -> Material:
    """What a run's streams share, made once in a process.

    Raises:
        BadInput: The data set cannot be had, or is too small.
    """
    facts = (config.images, config.source.calibration, config.source.events, config.seed)
    return _material(*facts)


@functools.lru_cache(maxsize=2)
def _material(section: Any, calibration: int, events: int, seed: int) -> Material:
    data = load(section.dataset)
    sizes = {"train": section.train, "reference": section.reference, "calibration": calibration}
    sizes["stream"] = events
    needed = sum(sizes.values())
    if needed > len(data):
        raise BadInput(
            f"{section.dataset} has {len(data)} images, {needed} are asked for: lower images.train, "
            "images.reference, source.calibration or source.events"
        )
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    x, y = data.x[order].float() / 255, data.y[order]
    parts = dict(zip(sizes, torch.split(torch.arange(needed), list(sizes.values())), strict=True))
    network = _trained(section, x[parts["train"]], y[parts["train"]], data.meta.sha256, seed)
    weights = b"".join(value.numpy().tobytes() for value in network.state_dict().values())
    return Material(
        network=network,
        reference=x[parts["reference"]],
        calibration=x[parts["calibration"]],
        stream=Images(x[parts["stream"]], y[parts["stream"]]),
        sha256=hashlib.sha256(data.meta.sha256.encode() + weights).hexdigest(),
    )


def _trained(section: Any, x: Tensor, y: Tensor, data: str, seed: int) -> nn.Module:
    """The classifier; its weights are kept, so that all processes of a run have the same."""
    classes = int(y.max()) + 1
    model = Model(name="conv", width=section.width)
    network = build_network(model, x.shape[1], x.shape[2], classes, torch.Generator().manual_seed(seed))
    facts = [data, section.train, section.epochs, section.width, seed, torch.__version__]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]

    def make() -> dict[str, Any]:
        _fit(network, x, y, section.epochs, torch.Generator().manual_seed(seed))
        return {name: value.numpy() for name, value in network.state_dict().items()}

    kept = cached(f"stream-{section.dataset}-{key}", make)
    network.load_state_dict({name: torch.from_numpy(np.asarray(value)) for name, value in kept.items()})
    return network.eval()


def _fit(network: nn.Module, x: Tensor, y: Tensor, epochs: int, generator: torch.Generator) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    network.train()
    for _ in range(epochs):
        for part in torch.split(torch.randperm(len(y), generator=generator), 64):
            optimizer.zero_grad()
            cross_entropy(network(x[part]), y[part]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def _noise(image: Any, severity: float, generator: np.random.Generator) -> Any:
    return image + 0.5 * severity * generator.standard_normal(image.shape)


def _blur(image: Any, severity: float, generator: np.random.Generator) -> Any:
    return ndimage.gaussian_filter(image, sigma=(0, 2 * severity, 2 * severity))


def _contrast(image: Any, severity: float, generator: np.random.Generator) -> Any:
    return image.mean() + (1 - 0.9 * severity) * (image - image.mean())


def _rotation(image: Any, severity: float, generator: np.random.Generator) -> Any:
    return ndimage.rotate(image, 60 * severity, axes=(2, 1), reshape=False, order=1)


CORRUPTIONS: dict[str, Callable[[Any, float, np.random.Generator], Any]] = {
    "noise": _noise,
    "blur": _blur,
    "contrast": _contrast,
    "rotation": _rotation,
}


class ImageSource:
    """The images of the streams, corrupted from `source.onset` up to `images.until`.

    Args:
        config: The recipe.
        numbers: The streams.
    """

    def __init__(self, config: Config, numbers: Sequence[int]) -> None:
        self._config, self._numbers = config, numbers
        self._images = material(config).stream

    def read(self, first: int, count: int) -> Mapping[int, Images]:
        """Images from sequence number `first` on, the same for each stream."""
        found = self._images[first : first + count]
        x = found.x.clone()
        for place in range(len(found)):
            if phase(self._config, first + place) == "during":
                x[place] = self._corrupted(x[place], first + place)
        return dict.fromkeys(self._numbers, Images(x, found.y))

    def _corrupted(self, image: Tensor, sequence: int) -> Tensor:
        section = self._config.images
        generator = np.random.default_rng(np.random.SeedSequence(self._config.seed, spawn_key=(sequence,)))
        changed = CORRUPTIONS[section.corruption](image.numpy(), section.severity, generator)
        return torch.from_numpy(np.clip(changed, 0.0, 1.0).astype(np.float32))


def phase(config: Config, sequence: int) -> str:
    """`before`, `during` or `after` the corruption."""
    if sequence < config.source.onset:
        return "before"
    return "during" if sequence < config.images.until else "after"


class Classified:
    """A stream of images: a score, a detector, and an adapter that acts after an alarm.

    Args:
        config: The recipe.
        number: The stream's.
        saved: What `origin` and `state` of an earlier one returned, to go on from.
    """

    def __init__(self, config: Config, number: int, saved: Saved | None) -> None:
        self._config = config
        shared = material(config)
        self._name, chosen = next(iter(config.detectors.items()))
        detector: Any = chosen.build()
        score = FisherScore(Monitored(shared.network), shared.reference, config.images.alpha)
        chosen_adapter = list(config.adapters.values())[number]
        adapter = chosen_adapter.build(shared.network, shared.reference[0]) or _Unadapted(shared.network)
        if saved is None:
            detector.calibrate(score(shared.calibration))
            adapter.fit_source(shared.reference)
        section = config.images
        self._stream = AdaptiveStream(
            detector,
            adapter,
            score,
            steps=section.steps,
            repeats=chosen_adapter.repeats,
            return_after=section.return_after,
        )
        self._network = NormalizationPrompt(shared.network)  # as it is, for what adaptation changes
        self._tally = Tally(None if saved is None else saved[1])
        if saved is not None:
            held = io.BytesIO(base64.b64decode(saved[1]["torch"]))
            self._stream.load_state_dict(torch.load(held, weights_only=True))
        self._parameters = detector.state_dict()["settings"]

    @property
    def skipped(self) -> int:
        """Images whose score was not finite."""
        return self._stream.detector.skipped

    @property
    def wealth(self) -> Mapping[str, float]:
        """The logarithm of the detector's statistic."""
        return {self._name: log_statistic(self._stream.detector)}

    def take(self, events: Images) -> Taken:
        """Classifies the stream's next images, in batches of `images.batch`."""
        had, right = len(self._stream.alarms), 0
        for first in range(0, len(events), self._config.images.batch):
            batch = events[first : first + self._config.images.batch]
            begun = self._stream.detector.sequence
            phases = [phase(self._config, begun + place) for place in range(len(batch))]
            logits = self._stream.process(batch.x)
            self._tally.stepped(phases[-1], self._stream.steps_taken)
            source = self._network(batch.x, self._network.initial())
            right += self._tally.add(phases, logits, source, batch.y)
        alarms = [alarm_columns(self._name, self._parameters, a) for a in self._stream.alarms[had:]]
        return Taken(len(events), alarms, {"accuracy": right / len(events)})

    def origin(self) -> dict[str, Any]:
        """Which adapter it is."""
        return {"adapter": type(self._stream.adapter).__name__}

    def state(self) -> dict[str, Any]:
        """All of the state: tensors, as `torch.save` writes them, and what became of the images."""
        held = io.BytesIO()
        torch.save(self._stream.state_dict(), held)
        text = base64.b64encode(held.getvalue()).decode()
        adapter = self._stream.adapter
        apart = {"differences": dict(adapter.differences)} if isinstance(adapter, Twin) else {}
        return {"torch": text, **self._tally.state(), **apart}


class Monitored(nn.Module):
    """A classifier whose features, for the score, are what its last layer is given."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        *body, self.head = network.children()
        self.body = nn.Sequential(*body)

    def features(self, x: Tensor) -> Tensor:
        """`(batch, width)`."""
        found: Tensor = self.body(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(batch, classes)`."""
        logits: Tensor = self.head(self.body(x))
        return logits


class _Unadapted(Adapter):
    """Nothing is ever adapted."""

    def __init__(self, network: nn.Module) -> None:
        model = NormalizationPrompt(network)
        super().__init__(model, model.initial(), "information_maximization")

    def adapt(self, batch: Tensor) -> StepInfo:
        """Changes nothing."""
        return StepInfo(False, float("nan"), float("nan"), 0.0, 0.0, 0)
