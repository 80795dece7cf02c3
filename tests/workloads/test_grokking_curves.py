"""What is read off accuracy curves, on curves whose answer is plain."""

from __future__ import annotations

import numpy as np
import pytest

from piste_workloads.grokking.curves import Curves, epochs_key


def curves(train: list[float], validation: list[float], every: int = 1) -> Curves:
    made = Curves()
    for number, (first, second) in enumerate(zip(train, validation, strict=True), start=1):
        made.add(every * number, first, second, 0.5 * every * number)
    return made


MEMORISED_AT_3 = [0.1, 0.6, 0.96, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
GROKKED_AT_8 = [0.1, 0.1, 0.1, 0.1, 0.1, 0.3, 0.8, 0.95, 1.0, 1.0]


@pytest.mark.parametrize(
    ("train", "validation", "reached", "epochs", "plateau"),
    [
        pytest.param(MEMORISED_AT_3, GROKKED_AT_8, 1, 8, 5, id="grokked"),
        pytest.param(GROKKED_AT_8, GROKKED_AT_8, 1, 8, 0, id="both at once"),
        pytest.param([0.1] * 9 + [0.96], GROKKED_AT_8, 1, 8, 0, id="generalises before it memorises"),
        pytest.param(MEMORISED_AT_3, [0.2] * 10, 0, 10, 7, id="memorised, not grokked"),
        pytest.param([0.2] * 10, [0.1] * 10, 0, 10, 0, id="learns nothing"),
        pytest.param([1.0] * 10, [0.0, 0.95] + [0.0] * 8, 1, 2, 1, id="the first time counts"),
        pytest.param([1.0] * 10, [0.9499999] * 10, 0, 10, 9, id="a little less is not it"),
    ],
)
def test_when_it_grokked(
    train: list[float], validation: list[float], reached: int, epochs: int, plateau: int
) -> None:
    assert curves(train, validation).grokking(0.95) == {
        "grok/reached": reached,
        "grok/epochs_to_95": epochs,
        "grok/plateau_epochs": plateau,
        "time/seconds_to_95": epochs / 2,
    }


def test_epochs_are_the_validated_ones() -> None:
    found = curves(MEMORISED_AT_3, GROKKED_AT_8, every=10)
    assert found.grokking(0.95)["grok/epochs_to_95"] == 80
    assert found.grokking(0.95)["grok/plateau_epochs"] == 50
    assert found.reached(0.95) == 80
    assert found.reached(1.0) == 90
    assert curves(MEMORISED_AT_3, [0.0] * 10).reached(0.95) is None


def test_another_target_has_another_name() -> None:
    found = curves(MEMORISED_AT_3, GROKKED_AT_8).grokking(0.3)
    assert (found["grok/epochs_to_30"], found["grok/plateau_epochs"]) == (6, 4)
    assert [epochs_key(target) for target in (0.95, 0.85, 0.999)] == [
        f"grok/epochs_to_{percent}" for percent in ("95", "85", "99.9")
    ]


def test_what_a_checkpoint_keeps_is_all_of_it() -> None:
    first = curves(MEMORISED_AT_3[:6], GROKKED_AT_8[:6])
    state = first.state()
    first.add(7, 0.0, 0.0, 0.0)
    second = Curves(**state)
    for epoch in range(7, 11):
        second.add(epoch, MEMORISED_AT_3[epoch - 1], GROKKED_AT_8[epoch - 1], 0.5 * epoch)
    assert second == curves(MEMORISED_AT_3, GROKKED_AT_8)


def test_the_picture_shows_both_curves_against_the_logarithm_of_the_epochs() -> None:
    (axis,) = curves(MEMORISED_AT_3, GROKKED_AT_8).picture("addition, sgd", 0.95).axes
    assert axis.get_xscale() == "log"
    drawn = {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in axis.get_lines()}
    assert drawn["training"] == MEMORISED_AT_3
    assert drawn["validation"] == GROKKED_AT_8
    assert np.asarray(axis.get_lines()[-1].get_xdata()).tolist() == [8, 8]
