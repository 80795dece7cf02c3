"""The one sequential kernel of all detectors: evidence in, log-statistic out, up to the next alarm.

For evidence `z_t`, bets `lambda_j` and bounds `psi_j >= log E0[exp(lambda_j z)]`, in log space::

    log e_j = lambda_j z_t - psi_j
    PLAIN          log A_j <- log e_j + log A_j                              A_j(0) = 1
    HARMONIC       log A_j <- log e_j + log(A_j + 1 / (t (t + 1)))           A_j(0) = 0
    RESTARTED_SUM  log A_j <- log e_j + log(A_j + 1)                         A_j(0) = 0   (Shiryaev-Roberts)
    RESTARTED_MAX  log A_j <- log e_j + max(log A_j, 0)                      A_j(0) = 0   (CUSUM)
    statistic      mean_j A_j, and mean_j (A_j + 1 / (t + 1)) for HARMONIC

It takes events one by one, so that any batching of the same events gives the same bits. It is compiled on its
first call and kept on disk where numba finds a place to write, so that a process that takes over from a
killed one need not compile again.
"""

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

PLAIN, HARMONIC, RESTARTED_SUM, RESTARTED_MAX = 0, 1, 2, 3


def _compiled(function: Callable[..., Any]) -> Any:
    try:
        return numba.njit(cache=True)(function)
    except RuntimeError:  # numba's: nobody may write beside this file, nor into the user's own cache
        return numba.njit(function)


@_compiled
def advance(
    evidence: Any,
    start: int,
    sequence: int,
    clock: int,
    recursion: int,
    log_threshold: float,
    bets: Any,
    log_bounds: Any,
    log_values: Any,
    cusums: Any,
    onsets: Any,
) -> tuple[int, int, int, float, bool]:
    """Take events from `start` on, until an alarm or the end; the three last arrays are changed in place.

    Args:
        evidence: `(events,)` float64; events that are not finite are skipped.
        start: index of the first event to take.
        sequence: the number of the stream's event at index 0.
        clock: events since the last alarm, without skipped ones.
        recursion: `PLAIN`, `HARMONIC`, `RESTARTED_SUM` or `RESTARTED_MAX`.
        log_threshold: an alarm is raised where the log-statistic is at least this; at least 0.
        bets: `(bets,)`, lambda.
        log_bounds: `(bets,)`, psi.
        log_values: `(bets,)`, log A.
        cusums: `(bets,)`, the log-likelihood ratio since each bet's most likely onset.
        onsets: `(bets,)` int64, the numbers of these onsets.

    Returns:
        The index after the last event taken, the clock, how many events were skipped, the log-statistic, and
        whether it raised an alarm.
    """
    number = bets.shape[0]
    # The mean over bets is at most the largest, and 1 / (t + 1) at most half the threshold: below, no alarm.
    possible = log_threshold - math.log(2.0)
    skipped = 0
    index = start
    alarm = False
    while index < evidence.shape[0] and not alarm:
        z = evidence[index]
        index += 1
        if not math.isfinite(z):
            skipped += 1
            continue
        clock += 1
        prior = -math.inf
        if recursion == HARMONIC:
            # log 1 / (t (t + 1))
            prior = -math.log(clock * (clock + 1.0))
        elif recursion == RESTARTED_SUM:
            prior = 0.0
        largest = -math.inf
        for j in range(number):
            # log e_j = lambda_j z - psi_j
            log_e = bets[j] * z - log_bounds[j]
            if recursion == RESTARTED_MAX:
                log_values[j] = log_e + max(log_values[j], 0.0)
            else:
                # log(A_j + prior)
                high = max(log_values[j], prior)
                low = min(log_values[j], prior)
                log_values[j] = log_e + high + math.log1p(math.exp(low - high))
            largest = max(largest, log_values[j])
            # the onset that maximises the sum of log e_j since
            if cusums[j] <= 0.0:
                cusums[j] = log_e
                onsets[j] = sequence + index - 1
            else:
                cusums[j] += log_e
        if largest >= possible:
            alarm = _log_statistic(log_values, clock, recursion) >= log_threshold
    return index, clock, skipped, _log_statistic(log_values, clock, recursion), alarm


@_compiled
def _log_statistic(log_values: Any, clock: int, recursion: int) -> float:
    """The logarithm of mean_j H_j."""
    # HARMONIC: H_j = A_j + 1 / (t + 1); otherwise H_j = A_j
    rest = -math.log(clock + 1.0) if recursion == HARMONIC else -math.inf
    largest = max(np.max(log_values), rest)
    if largest == -math.inf:
        return -math.inf
    total = 0.0
    for value in log_values:
        total += math.exp(value - largest) + math.exp(rest - largest)
    return float(largest + math.log(total / log_values.shape[0]))
