"""What became of a stream's images: how many were right, how sure the classifier was, what was changed.

Each image belongs to a phase, `before`, `during` or `after` the corruption.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from piste.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

    from piste_algorithms.adaptation import StepInfo

PHASES = ("before", "during", "after")
BINS = 15  # of confidence; Guo et al. (arXiv:1706.04599) take as many


class Tally:
    """Counts.

    Attributes:
        right: By phase, images whose most probable class is their label.
        seen: By phase, images.

    Args:
        saved: What `state` of an earlier one returned, to go on from.

    Raises:
        BadInput: It is of an older piste, which counted less.
    """

    def __init__(self, saved: Mapping[str, Any] | None = None) -> None:
        if saved is None:
            saved = {
                "right": dict.fromkeys(PHASES, 0),
                "seen": dict.fromkeys(PHASES, 0),
                "bins": {name: [[0, 0, 0.0] for _ in range(BINS)] for name in PHASES},
                "batches": [],
                "change": 0.0,
                "updates": dict.fromkeys(PHASES, 0),
            }
        elif "bins" not in saved:
            raise BadInput("streams of images were begun by an older piste: begin anew with another --name")
        self.right, self.seen = dict(saved["right"]), dict(saved["seen"])
        self._bins = {name: [list(each) for each in bins] for name, bins in saved["bins"].items()}
        self._batches = [list(each) for each in saved["batches"]]
        self._change = float(saved["change"])
        self._updates = dict(saved["updates"])

    def add(self, phases: Sequence[str], logits: Tensor, source: Tensor, labels: Tensor) -> int:
        """Counts a batch.

        Args:
            phases: Of each image.
            logits: `(batch, classes)`, the adapted classifier's.
            source: `(batch, classes)`, those of the classifier as it was.
            labels: `(batch,)`.

        Returns:
            How many are right.
        """
        probabilities = logits.double().softmax(-1)
        # What is no number is as unsure, and as far from what it was, as can be.
        confidences = probabilities.amax(-1).nan_to_num(0.0).tolist()
        gaps = (probabilities - source.double().softmax(-1)).abs().nan_to_num(1.0)
        self._change = max(self._change, float(gaps.max()))
        hits = ((logits.argmax(-1) == labels) & ~logits.isnan().any(-1)).tolist()
        for name, hit, confidence in zip(phases, hits, confidences, strict=True):
            self.seen[name] += 1
            self.right[name] += hit
            bin_ = self._bins[name][min(int(confidence * BINS), BINS - 1)]
            bin_[0] += 1
            bin_[1] += hit
            bin_[2] += confidence
        self._batches.append([len(hits), sum(hits)])
        return sum(hits)

    def stepped(self, phase: str, infos: Sequence[StepInfo]) -> None:
        """Counts the steps of adaptation to a batch that have changed the prompt."""
        self._updates[phase] += sum(info.accepted for info in infos)

    def state(self) -> dict[str, Any]:
        """All of it: numbers, lists and dicts of them."""
        return {
            "right": dict(self.right),
            "seen": dict(self.seen),
            "bins": {name: [list(each) for each in bins] for name, bins in self._bins.items()},
            "batches": [list(each) for each in self._batches],
            "change": self._change,
            "updates": dict(self._updates),
        }


def metrics(name: str, state: Mapping[str, Any]) -> dict[str, float]:
    """What `Tally.state` says of a stream, as metrics.

    Args:
        name: The stream's.
        state: The state; more in it does no harm.
    """
    found = {f"change/{name}": state["change"], f"updates_before/{name}": float(state["updates"]["before"])}
    for phase in (phase for phase in PHASES if state["seen"][phase]):
        found[f"accuracy_{phase}/{name}"] = state["right"][phase] / state["seen"][phase]
        # sum_b n_b / n |right_b / n_b - confidence_b / n_b|
        gaps = (abs(right - confidence) for _, right, confidence in state["bins"][phase])
        found[f"ece_{phase}/{name}"] = sum(gaps) / state["seen"][phase]
    found |= {f"{part}_difference/{name}": gap for part, gap in state.get("differences", {}).items()}
    return found


def accuracies(state: Mapping[str, Any]) -> tuple[list[int], list[float]]:
    """Of each batch the number of its last image, and the part of it that was right."""
    sizes, right = np.array(state["batches"], dtype=np.int64).reshape(-1, 2).T
    return sizes.cumsum(0).tolist(), (right / sizes).tolist()
