"""Data sets of the Hugging Face hub, by its own client: the only source that uses the network."""

from __future__ import annotations

import importlib

import numpy as np

from piste.errors import BadInput
from piste_workloads.data._cache import cached
from piste_workloads.data._dataset import Arrays


def read_hub(repository: str, image: str, label: str) -> Arrays:
    """Both splits of a data set of colour images; read once and then found in the cache.

    Args:
        repository: `owner/name` on the hub.
        image: The column of images.
        label: The column of labels.

    Returns:
        `x_train`, `x_test` `(n, 3, height, width)`, `y_train`, `y_test` `(n,)`, and `classes`, their names.

    Raises:
        BadInput: Hugging Face's `datasets` is missing, or the data set cannot be had.
    """
    return cached(f"hub-{repository}", lambda: _read(repository, image, label))


def _read(repository: str, image: str, label: str) -> Arrays:
    try:
        datasets = importlib.import_module("datasets")
    except ModuleNotFoundError:
        raise BadInput(
            "data.source = \"hub\" needs Hugging Face datasets: pip install 'piste[hub]'"
        ) from None
    found = {}
    try:
        for split in ("train", "test"):
            rows = datasets.load_dataset(repository, split=split)
            pictures = [np.asarray(row[image].convert("RGB"), np.uint8) for row in rows]
            found[f"x_{split}"] = np.stack(pictures).transpose(0, 3, 1, 2)
            found[f"y_{split}"] = np.array([row[label] for row in rows], np.int64)
            found["classes"] = np.array(rows.features[label].names)
    except Exception as error:  # whatever the hub's client raises: no network, no such data set, no access
        cause = str(error).strip().partition("\n")[0] or type(error).__name__
        raise BadInput(f"data.source: {repository} cannot be read from the hub: {cause}") from error
    return found
