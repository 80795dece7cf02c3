"""What delay to expect of a detector, before it runs."""

from __future__ import annotations

import math

import numpy as np

from piste_algorithms._checks import check_range
from piste_algorithms.martingales.detector import Scores, as_scores

LARGEST_BET = 50.0


def expected_delay(
    scores_before: Scores,
    scores_after: Scores,
    false_alarm_rate: float,
    *,
    clip: float = 4.0,
) -> tuple[float, float]:
    """The information a shifted event gives against the null, and the delay that it allows.

    With z the scores, standardised by `scores_before` and clipped::

        gain  = max over lambda of  lambda E1[z] - log E0[exp(lambda z)]     (at most KL(P1 || P0))
        delay = log(2 / false_alarm_rate) / gain

    The gain is the bound of Donsker and Varadhan. The delay is what the best fixed bet would need, were the
    null law known and the onset too: what a detector needs beyond is the price of its calibration, its
    mixture over bets and its mixture over onsets (about `log(t (t + 1)) / gain` for a shift after t events).

    Args:
        scores_before: `(n,)`, scores of the source.
        scores_after: `(m,)`, scores after the shift.
        false_alarm_rate: in (0, 1).
        clip: see `ShiftDetector`.

    Returns:
        The gain in nats an event and the delay in events. A shift to smaller scores gives nothing to a bet on
        larger ones: 0 and infinity. Bets are sought up to 50, which bounds the gain where the laws do not
        overlap.

    Raises:
        ValueError: if a sample is empty, not finite or does not vary, or a number is out of its range.
    """
    check_range("false_alarm_rate", false_alarm_rate, low=0.0, high=1.0, low_open=True)
    check_range("clip", clip, low=0.0, high=100.0, low_open=True)
    before = as_scores("scores_before", scores_before, finite=True)
    after = as_scores("scores_after", scores_after, finite=True)
    if len(before) == 0 or len(after) == 0 or not before.std() > 0.0:
        raise ValueError("scores_before must vary and scores_after hold at least one score")
    null = np.clip((before - before.mean()) / before.std(), -clip, clip)
    shifted = float(np.clip((after - before.mean()) / before.std(), -clip, clip).mean())

    low, high = 0.0, LARGEST_BET
    for _ in range(60):  # the gain is concave in lambda: bisect its slope
        bet = 0.5 * (low + high)
        weights = np.exp(bet * (null - null.max()))
        # d gain / d lambda = E1[z] - E0[z exp(lambda z)] / E0[exp(lambda z)]
        rising = shifted > float((weights * null).sum() / weights.sum())
        low, high = (bet, high) if rising else (low, bet)
    largest = float(null.max())
    # gain = lambda E1[z] - log E0[exp(lambda z)]
    gain = low * (shifted - largest) - math.log(float(np.exp(low * (null - largest)).mean()))
    if shifted <= float(null.mean()) or gain <= 0.0:
        return 0.0, math.inf
    return gain, math.log(2 / false_alarm_rate) / gain
