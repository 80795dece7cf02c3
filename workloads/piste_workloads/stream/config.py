"""What a run of the workload `stream` is told; without adapters it is known without torch."""

from __future__ import annotations

import copy
import inspect
import sys
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from piste.config import Section
from piste.errors import nearest
from piste.shards import StreamRecipe
from piste_algorithms.martingales import ConformalDetector, Cusum, ShiftDetector, ShiryaevRoberts
from piste_algorithms.martingales.detector import Detector
from piste_workloads.stream.martingale_peers import Crepes, OnlineCp
from piste_workloads.stream.river_peers import Adwin, Kswin, PageHinkley

if TYPE_CHECKING:
    from torch import Tensor, nn

    from piste_algorithms.adaptation.adapter import Adapter

KINDS: dict[str, type[Any]] = {
    "shift": ShiftDetector,
    "conformal": ConformalDetector,
    "cusum": Cusum,
    "shiryaev_roberts": ShiryaevRoberts,
    "adwin": Adwin,
    "page_hinkley": PageHinkley,
    "kswin": Kswin,
    "online_cp": OnlineCp,
    "crepes": Crepes,
}
SIMULATED = ("gamma", "gaussian", "lognormal", "autoregressive")


class Source(Section):
    """`[source]`: where the events come from.

    Simulated ones are scores of a law that a shift moves by so many of its standard deviations; each stream
    is drawn by itself, with a calibration sample of its own. Recorded ones are series that are calibrated
    with their own first events, and so is the metric of a run.
    """

    name: Literal[
        "gamma",
        "gaussian",
        "lognormal",
        "autoregressive",
        "glucose",
        "water_flow",
        "trump_approval",
        "elec2",
        "nab",
        "images",
        "metric",
    ] = "gamma"
    run: str = Field(default="", description="the run that a metric is of")
    metric: str = Field(default="train/loss", min_length=1, description="a metric of a run in the ledger")
    until: Literal["end", "alarm"] = Field(
        default="end", description="of a metric: follow it to the end of its run, or to its first alarm"
    )
    streams: int = Field(default=8, ge=1, description="simulated ones; of images there is one an adapter")
    events: int = Field(default=10_000, ge=1, description="events of a stream")
    calibration: int = Field(default=2000, ge=2, description="events of the source before a stream begins")
    shift: float = Field(default=0.0, description="standard deviations that scores are moved by; 0: none")
    onset: int = Field(default=0, ge=0, description="the number of the first shifted event")
    score: Literal["value", "difference"] = Field(
        default="value", description="of recorded events: themselves, or each less the one before"
    )
    block: int = Field(default=1, ge=1, description="recorded events that are averaged into one")
    correlation: float = Field(
        default=0.5, gt=-1.0, lt=1.0, description="of neighbours; autoregressive alone"
    )


class ImageSection(Section):
    """`[images]`: which images, how they are corrupted from `source.onset` on, and the classifier."""

    dataset: str = "mnist5k"
    corruption: Literal["noise", "blur", "contrast", "rotation"] = "noise"
    severity: float = Field(default=1.0, gt=0.0, le=1.0)
    until: int = Field(default=1200, ge=0, description="the number of the first image that is whole again")
    batch: int = Field(default=25, ge=1, description="images that are classified, and adapted to, at once")
    alpha: float = Field(default=1.0, ge=0.0, description="weight of the features in the score")
    steps: int = Field(default=8, ge=1, description="batches that are adapted to after an alarm")
    return_after: int | None = Field(
        default=100, ge=1, description="images without an alarm upon which the first prompt is restored"
    )
    train: int = Field(default=2000, ge=1, description="images that train the classifier")
    reference: int = Field(default=400, ge=2, description="images of the score and of the adapters' source")
    epochs: int = Field(default=8, ge=1)
    width: int = Field(default=8, ge=1, description="channels of the network's first layer")


ADAPTERS = {
    "fisher": "FisherPrompt",
    "tent": "Tent",
    "entropy_matching": "EntropyMatching",
    "gradient": "GradientPrompt",
}


def _check_arguments(what: str, kind: str, known: dict[str, type[Any]], options: dict[str, Any]) -> None:
    """Refuses an unknown kind, and arguments that it does not take.

    Raises:
        ValueError: With the nearest that there is.
    """
    if kind not in known:
        raise ValueError(f"unknown kind of {what} {kind!r}{nearest(kind, known)}")
    accepted = list(inspect.signature(known[kind]).parameters)
    for key in options:
        if key not in accepted:
            raise ValueError(f"{what} {kind!r} takes no {key!r}{nearest(key, accepted)}")


class AdapterSection(BaseModel):
    """`[adapters.NAME]`: a kind of adapter of images and its keyword arguments.

    Kinds: `none`, and `fisher`, `tent`, `entropy_matching`, `gradient`, with the arguments of the classes
    `FisherPrompt`, `Tent`, `EntropyMatching`, `GradientPrompt` of `piste_algorithms.adaptation`. With a
    `condition` the same adapter runs beside itself in coordinates of that condition number, both in float64,
    and the summary says how far apart they come.
    """

    model_config = ConfigDict(frozen=True, extra="allow")
    kind: str = "none"
    prompt: Literal["normalization", "batch_statistics", "additive"] = Field(
        default="normalization",
        description="gains and shifts of normalisation layers, which from the first step on may normalise "
        "by each batch's own statistics, or added to images",
    )
    repeats: int = Field(default=1, ge=1, description="steps on each batch that is adapted to")
    condition: float | None = Field(default=None, ge=1.0, allow_inf_nan=False)

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments (the extra keys)."""
        return dict(self.model_extra or {})

    def build(self, network: nn.Module, image: Tensor) -> Adapter | None:
        """The adapter of a network for images like this one; None where it is left as it is.

        Raises:
            ValueError: There is no such kind, it takes no such argument, or not such a value.
        """
        if self.kind == "none" and not self.options:
            if self.condition is not None:
                raise ValueError("adapter 'none' has no prompt whose coordinates could have a condition")
            return None
        from piste_algorithms import adaptation

        known = {kind: getattr(adaptation, name) for kind, name in ADAPTERS.items()}
        _check_arguments("adapter", self.kind, known, self.options)
        from piste_workloads.stream.batch_statistics import OnceAdapted
        from piste_workloads.stream.coordinates import Twin

        if self.prompt == "batch_statistics":
            if self.kind == "fisher" or self.condition is not None:
                raise ValueError(
                    "a Fisher prompt, or one in other coordinates, needs predictions that do not depend on "
                    'the rest of their batch: not prompt = "batch_statistics"'
                )
            own = adaptation.NormalizationPrompt(network, batch_statistics=True)
            return OnceAdapted(network, known[self.kind](own, own.initial(), **self.options))
        if self.condition is not None:
            network, image = copy.deepcopy(network).double(), image.double()
        if self.prompt == "additive":
            model: Any = adaptation.AdditivePrompt(network)
            start = model.initial(image[None])
        else:
            model = adaptation.NormalizationPrompt(network)
            start = model.initial()

        def make(prompted: Any, first: Tensor) -> Adapter:
            made: Adapter = known[self.kind](prompted, first, **self.options)
            return made

        return make(model, start) if self.condition is None else Twin(model, start, make, self.condition)

    @model_validator(mode="after")
    def _can_be_built(self) -> Self:
        if self.kind != "none" or self.options or self.condition is not None:
            import torch

            self.build(torch.nn.LayerNorm(1), torch.zeros(1))
        return self


class DetectorSection(BaseModel):
    """`[detectors.NAME]`: a kind of detector and its keyword arguments.

    Kinds: `shift`, `conformal`, `cusum`, `shiryaev_roberts`, with the arguments of the classes of these names
    in `piste_algorithms.martingales`; `adwin`, `page_hinkley`, `kswin`, `online_cp`, `crepes`, with those of
    the classes in `river_peers.py` and `martingale_peers.py`.
    """

    model_config = ConfigDict(frozen=True, extra="allow")
    kind: str = "shift"

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments (the extra keys)."""
        return dict(self.model_extra or {})

    def build(self) -> Detector:
        """The detector, not calibrated.

        Raises:
            ValueError: There is no such kind, it takes no such argument, or not such a value.
        """
        _check_arguments("detector", self.kind, KINDS, self.options)
        built: Detector = KINDS[self.kind](**self.options)
        return built

    @model_validator(mode="after")
    def _can_be_built(self) -> Self:
        self.build()
        return self


class Config(StreamRecipe, frozen=True):
    """Everything that a run of the workload `stream` is told."""

    workload: str = "stream"
    source: Source = Source()
    detectors: dict[str, DetectorSection] = Field(
        default={"shift": DetectorSection()}, min_length=1, description="by names of one's own"
    )
    images: ImageSection = ImageSection()
    adapters: dict[str, AdapterSection] = Field(
        default={"none": AdapterSection()}, min_length=1, description="of images, by names of one's own"
    )

    @property
    def events(self) -> int:
        """How many events a stream is to have; a metric has as many as its run gives it."""
        return sys.maxsize if self.source.name == "metric" else self.source.events

    @property
    def watched(self) -> tuple[str, str] | None:
        """The run and the metric that is followed, where it is one of the ledger's."""
        return (self.source.run, self.source.metric) if self.source.name == "metric" else None

    @property
    def until_alarm(self) -> bool:
        """Whether a metric is followed to its first alarm, not to the end of its run."""
        return self.source.until == "alarm"

    @property
    def total_steps(self) -> int:
        """Where a run of this configuration ends, in batches."""
        return -(-self.source.events // self.stream.batch)

    @model_validator(mode="after")
    def _a_metric_ends_at_an_alarm(self) -> Self:
        if self.until_alarm and self.watched is None:
            raise ValueError(f"source.until = 'alarm' is for a metric, not for {self.source.name!r}")
        return self

    @model_validator(mode="after")
    def _images_are_batched(self) -> Self:
        if self.source.name == "images":
            if self.stream.batch % self.images.batch:
                raise ValueError(
                    f"stream.batch = {self.stream.batch} must be a multiple of "
                    f"images.batch = {self.images.batch}"
                )
            if len(self.detectors) > 1:
                raise ValueError("streams of images take one detector, whose alarms start adaptation")
        return self

    @model_validator(mode="after")
    def _calibration_suffices(self) -> Self:
        for name, section in self.detectors.items():
            needed = section.build().calibration_points  # type: ignore[attr-defined]
            if self.source.calibration < needed:
                raise ValueError(
                    f"source.calibration = {self.source.calibration}: detector {name!r} needs at least "
                    f"{needed} calibration events at this level"
                )
        return self
