"""What a run of the workload `stream` is told."""

from __future__ import annotations

import inspect
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from piste.config import Section
from piste.errors import nearest
from piste.shards import StreamRecipe
from piste_algorithms.martingales import ConformalDetector, Cusum, ShiftDetector, ShiryaevRoberts
from piste_algorithms.martingales.detector import Detector

KINDS: dict[str, type[Any]] = {
    "shift": ShiftDetector,
    "conformal": ConformalDetector,
    "cusum": Cusum,
    "shiryaev_roberts": ShiryaevRoberts,
}
SIMULATED = ("gamma", "gaussian", "lognormal", "autoregressive")


class Source(Section):
    """`[source]`: where the events come from.

    Simulated ones are scores of a law that a shift moves by so many of its standard deviations; each stream
    is drawn by itself, with a calibration sample of its own.
    """

    name: Literal["gamma", "gaussian", "lognormal", "autoregressive"] = "gamma"
    streams: int = Field(default=8, ge=1)
    events: int = Field(default=10_000, ge=1, description="events of a stream")
    calibration: int = Field(default=2000, ge=2, description="events of the source before a stream begins")
    shift: float = Field(default=0.0, description="standard deviations that scores are moved by; 0: none")
    onset: int = Field(default=0, ge=0, description="the number of the first shifted event")
    correlation: float = Field(
        default=0.5, gt=-1.0, lt=1.0, description="of neighbours; autoregressive alone"
    )


class DetectorSection(BaseModel):
    """`[detectors.NAME]`: a kind of detector and its keyword arguments.

    Kinds: `shift`, `conformal`, `cusum`, `shiryaev_roberts`, with the arguments of the classes of these names
    in `piste_algorithms.martingales`.
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
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind of detector {self.kind!r}{nearest(self.kind, KINDS)}")
        accepted = list(inspect.signature(KINDS[self.kind]).parameters)
        for key in self.options:
            if key not in accepted:
                raise ValueError(f"a detector {self.kind!r} takes no {key!r}{nearest(key, accepted)}")
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

    @property
    def events(self) -> int:
        """How many events a stream is to have."""
        return self.source.events

    @property
    def total_steps(self) -> int:
        """Where a run of this configuration ends, in batches."""
        return -(-self.source.events // self.stream.batch)

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
