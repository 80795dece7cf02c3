"""Streams of scores and detectors of their shifts, whose false-alarm rate holds at any time."""

from piste_workloads.stream.config import Config
from piste_workloads.stream.summary import summarize
from piste_workloads.stream.train import (
    figures,
    open_processor,
    open_source,
    prepare_data,
    stream_names,
    train,
)

__all__ = [
    "Config",
    "figures",
    "headline",
    "open_processor",
    "open_source",
    "prepare_data",
    "stream_names",
    "summarize",
    "test_settings",
    "train",
]

headline = ("stream/alarmed", "false_alarm_rate/shift", "detected/shift", "delay/shift", "delay_ratio/shift")

# For the contract battery: six batches of two streams, a checkpoint every two.
test_settings = {
    "source.streams": 2,
    "source.events": 600,
    "source.shift": 1.0,
    "source.onset": 250,
    "source.calibration": 400,
    "stream.batch": 100,
    "checkpoints.every": 2,
}
