"""Data sets by name, one a file: `load("digits")`.

A module of this package is a data set, and its name is the data set's. It holds `SIZES`, the number of
examples of each split, and one function a source that it can come from:

    def bundled(split: str | None, seed: int) -> Dataset           # an installed package
    def local(place: Path, split: str | None, skip_bad: bool) -> Dataset   # a file or folder of yours
    def hub(split: str | None) -> Dataset                          # the Hugging Face hub
"""

from piste_workloads.data._dataset import Dataset, Meta
from piste_workloads.data._loading import load, names, sizes
from piste_workloads.data._splits import hold_out, some

__all__ = ["Dataset", "Meta", "hold_out", "load", "names", "sizes", "some"]
