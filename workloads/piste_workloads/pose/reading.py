"""The examples of a recipe, in whatever format they are."""

from __future__ import annotations

from functools import lru_cache

from piste.errors import BadInput
from piste_workloads.pose.coco import read_coco
from piste_workloads.pose.config import Data
from piste_workloads.pose.deeplabcut import LABELED, read_project
from piste_workloads.pose.examples import Examples, Split, find, split
from piste_workloads.pose.frames import read_frames


@lru_cache(maxsize=1)
def open_examples(data: Data) -> tuple[Examples, Split]:
    """Reads the examples of `[data]` and splits them; what was read last is kept.

    A folder with `labeled-data` in it is a DeepLabCut project, another folder is in COCO's format, and a file
    is an `.npz` of frames.

    Raises:
        BadInput: There are none, or they cannot be read; there are too few to split.
    """
    place = find(data.path)
    if (place / LABELED).is_dir():
        examples = read_project(place, data)
    elif place.is_dir():
        examples = read_coco(place, data)
    else:
        examples = read_frames(place, data)
    for key in ("annotations", "images"):
        if getattr(data, key) and (place.is_file() or (place / LABELED).is_dir()):
            raise BadInput(f"data.{key}: for a folder in COCO's format, and {place} is not one: leave it out")
    return examples, split(examples, data)
