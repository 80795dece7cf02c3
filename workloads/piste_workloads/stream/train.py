"""Streams in one process, as a run with checkpoints: what sweeps and studies take, and `piste run`.

`piste stream` follows the same streams through the ledger, on actors. torch, and what images need, are
imported where they are used: an actor that was killed is to be back soon.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from piste.errors import BadInput
from piste.shards import Processor, Source
from piste_workloads.stream import recorded, simulated
from piste_workloads.stream.config import Config
from piste_workloads.stream.processing import Saved, Scores
from piste_workloads.stream.recorded import RECORDED, RecordedSource
from piste_workloads.stream.self_calibrated import SelfCalibrated
from piste_workloads.stream.simulated import SimulatedSource
from piste_workloads.stream.summary import summarize

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from piste.workload import Run


def stream_names(config: Config) -> Sequence[str]:
    """The streams' names, by number."""
    if config.source.name == "images":
        return list(config.adapters)
    if config.source.name == "metric":
        return [config.source.metric]
    if config.source.name in RECORDED:
        return list(recorded.scores(config))
    return [f"{config.source.name}-{number}" for number in range(config.source.streams)]


def prepare_data(config: Config) -> str:
    """Reads what was recorded, and trains the classifier of images, once, before any worker.

    Returns:
        The hash of the series, or of the images and the weights; nothing for simulated streams.

    Raises:
        BadInput: They cannot be had, or are too few; or no such adapter can be made of the classifier.
    """
    if config.source.name == "metric" and not config.source.run:
        raise BadInput("source.run is missing: piste stream --watch RUN --metric KEY")
    if config.source.name == "images":
        from piste_workloads.stream.images import material

        shared = material(config)
        for name, section in config.adapters.items():
            try:
                section.build(shared.network, shared.reference[0])
            except ValueError as error:
                raise BadInput(f"adapters.{name}: {error}") from error
        return shared.sha256
    return recorded.data_hash(config) if config.source.name in RECORDED else ""


def open_source(config: Config, numbers: Sequence[int]) -> Source:
    """Where the events of some streams come from."""
    if config.source.name == "images":
        from piste_workloads.stream.images import ImageSource

        return ImageSource(config, numbers)
    if config.source.name in RECORDED:
        return RecordedSource(config, numbers)
    return SimulatedSource(config, numbers)


def open_processor(config: Config, number: int, saved: Saved | None) -> Processor:
    """What the events of a stream go through, from its beginning or from a saved state."""
    if config.source.name == "images":
        import torch

        from piste_workloads.stream.images import Classified

        torch.set_num_threads(config.resources.cpus_per_worker)
        return Classified(config, number, saved)
    if config.source.name == "metric":
        return SelfCalibrated(config, saved)
    if saved is not None:
        return Scores(config, None, saved)
    calibration = recorded.calibration if config.source.name in RECORDED else simulated.calibration
    return Scores(config, calibration(config, number), None)


def train(config: Config, run: Run) -> None:
    """Follows all streams to their end, a batch a step.

    Logs `train/loss`, the mean over the streams of what the bets of the first detector have cost, minus its
    log-wealth in nats, what streams say of themselves, and at the end what `summarize` says;
    of images it draws how many are right as the stream goes on.

    Raises:
        BadInput: There are several workers, or the stream is a metric of a run.
    """
    if config.source.name == "metric":
        raise BadInput("a metric of a run is followed by `piste stream --watch RUN --metric KEY`")
    if run.world_size > 1:
        raise BadInput("`piste run` follows streams in one process: `piste stream` spreads them over workers")
    names = stream_names(config)
    source = open_source(config, range(len(names)))
    found = run.restore() or {
        "step": 0,
        "streams": [None] * len(names),
        "alarms": [],
        "taken": [0] * len(names),
    }
    processors = [open_processor(config, number, saved) for number, saved in enumerate(found["streams"])]
    alarms: list[dict[str, Any]] = found["alarms"]
    counts: list[int] = found["taken"]
    steps = config.total_steps
    for step in range(found["step"] + 1, steps + 1):
        for number, events in source.read((step - 1) * config.stream.batch, config.stream.batch).items():
            if len(events) == 0:  # it has ended early
                continue
            taken = processors[number].take(events)
            if taken.failure is not None:
                raise BadInput(f"stream {names[number]}: {taken.failure}")
            counts[number] += taken.count
            alarms += [{"number": number, **alarm} for alarm in taken.alarms]
            run.log({f"{key}/{names[number]}": v for key, v in (taken.metrics or {}).items()}, step)
        run.log({"train/loss": -statistics.fmean(_first_wealth(p) for p in processors)}, step)
        stop = run.should_stop
        if stop or config.checkpoints.due(step, steps):
            states = [(processor.origin(), processor.state()) for processor in processors]
            state = {"model": _wealth(processors), "streams": states, "alarms": alarms, "taken": counts}
            run.report({}, step, checkpoint=state)
        if stop and step < steps:
            return
    ends = [
        {"number": number, "name": names[number], "sequence": counts[number], "state": processor.state()}
        for number, processor in enumerate(processors)
    ]
    alarms.sort(key=lambda alarm: (alarm["number"], alarm["detector"], alarm["sequence"]))
    metrics = {"stream/alarms": float(len(alarms))}
    metrics["stream/alarmed"] = float(len({alarm["number"] for alarm in alarms}))
    run.log(metrics | summarize(config, ends, alarms), steps)
    for name, figure in figures(config, ends, alarms).items():
        run.figure(name, figure, steps)


def figures(
    config: Config, streams: Sequence[Mapping[str, Any]], alarms: Sequence[Mapping[str, Any]]
) -> Mapping[str, Figure]:
    """The pictures of a whole run: of images, how many were right as the streams went on."""
    if config.source.name != "images":
        return {}
    from piste_workloads.stream.pictures import adaptation

    return {"adaptation": adaptation(config, streams, alarms)}


def _wealth(processors: Sequence[Processor]) -> dict[str, torch.Tensor]:
    """The log-wealth of each stream by detector: what a run of streams has instead of a model."""
    import torch

    return {
        name: torch.tensor([processor.wealth[name] for processor in processors], dtype=torch.float64)
        for name in processors[0].wealth
    }


def _first_wealth(processor: Processor) -> float:
    return next(iter(processor.wealth.values()))
