"""Test martingales over p-values: bets against their being uniform, one a class.

Each has `update(p) -> log wealth`. Under independent uniform p-values (exact online conformal p-values are)
the wealth is a martingale that begins at one, so it ever reaches c with probability at most 1 / c. All work
in log space.

Sources: Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World" (2nd ed., chapter 8; the Simple
Jumper is its algorithm 8.1); Vovk, Nouretdinov and Gammerman (ICML 2003) for power martingales and their
mixture; Fedorova et al. (ICML 2012, arXiv:1204.3251) for the plug-in idea, there with a kernel density, here
with a histogram, whose update costs the same however long the stream.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np

from piste_algorithms._checks import check_integer, check_range
from piste_algorithms.martingales.detector import Array


class PValueMartingale:
    """The base: a wealth that begins at one, and a state that continues bit for bit.

    Attributes:
        log_wealth: the logarithm of the wealth.
        memory: names of the attributes that are the state, beside `log_wealth`: numbers and lists of them.
    """

    memory: ClassVar[tuple[str, ...]]

    def __init__(self) -> None:
        self.log_wealth = 0.0

    def update(self, p: float) -> float:
        """Take one p-value.

        Args:
            p: in (0, 1].

        Returns:
            The log-wealth.

        Raises:
            ValueError: if `p` is not in (0, 1], NaN included; nothing has changed then.
        """
        if not 0.0 < p <= 1.0:
            raise ValueError(f"p must be in (0, 1], got {p!r}")
        self._bet(float(p))
        return self.log_wealth

    def update_many(self, p_values: Iterable[float]) -> Array:
        """Take p-values in their order; the log-wealth after each, `(n,)`.

        Raises:
            ValueError: if one is not in (0, 1]; those before it have been taken.
        """
        return np.array([self.update(float(p)) for p in p_values], dtype=np.float64)

    def state_dict(self) -> dict[str, Any]:
        """The state: numbers and lists of them, exact."""
        held = {name: getattr(self, name) for name in ("log_wealth", *self.memory)}
        return {name: list(value) if isinstance(value, list) else value for name, value in held.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned, bit for bit."""
        for name in ("log_wealth", *self.memory):
            value = state_dict[name]
            setattr(self, name, list(value) if isinstance(value, list) else value)

    def _bet(self, p: float) -> None:
        """Change `log_wealth` by the bet on p, then the state by p."""
        raise NotImplementedError


class SimpleJumper(PValueMartingale):
    """Three accounts that bet on small, no and large p-values; a share of the wealth jumps between them.

    With epsilon in (-1, 0, 1)::

        C_e <- (1 - jump) C_e + jump mean(C);  C_e <- C_e (1 + e (p - 1/2));  wealth = sum_e C_e

    Args:
        jump: the share that is spread anew before each bet, in (0, 1).

    Raises:
        ValueError: if `jump` is outside its range.
    """

    memory = ("shares",)

    def __init__(self, jump: float = 0.01) -> None:
        check_range("jump", jump, low=0.0, high=1.0, low_open=True)
        super().__init__()
        self.jump = float(jump)
        self.shares = [1 / 3, 1 / 3, 1 / 3]  # of the wealth, by account

    def _bet(self, p: float) -> None:
        # C_e <- (1 - jump) C_e + jump mean(C), relative to the wealth
        mixed = [(1 - self.jump) * share + self.jump / 3 for share in self.shares]
        # C_e <- C_e (1 + e (p - 1/2))
        grown = [share * (1 + e * (p - 0.5)) for share, e in zip(mixed, (-1, 0, 1), strict=True)]
        total = sum(grown)
        self.log_wealth += math.log(total)
        self.shares = [share / total for share in grown]


class PowerMartingale(PValueMartingale):
    """Multiplies the wealth by `kappa p^(kappa - 1)`: a bet on small p-values.

    Args:
        kappa: in (0, 1); the smaller, the bolder.

    Raises:
        ValueError: if `kappa` is outside its range.
    """

    memory = ()

    def __init__(self, kappa: float) -> None:
        check_range("kappa", kappa, low=0.0, high=1.0, low_open=True)
        super().__init__()
        self.kappa = float(kappa)

    def _bet(self, p: float) -> None:
        # log M <- log M + log kappa + (kappa - 1) log p
        self.log_wealth += math.log(self.kappa) + (self.kappa - 1) * math.log(p)


class PowerMixture(PValueMartingale):
    """The exact integral of all power martingales over kappa in (0, 1).

    With `L = -sum log p` after n p-values::

        M = integral of kappa^n exp((1 - kappa) L) over (0, 1) = e^L gamma(n + 1, L) / L^(n + 1)

    where gamma is the lower incomplete gamma function.
    """

    memory = ("count", "surprise")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.surprise = 0.0  # L

    def _bet(self, p: float) -> None:
        self.count += 1
        self.surprise -= math.log(p)
        self.log_wealth = _log_power_integral(self.count, self.surprise)


def _log_power_integral(n: int, x: float) -> float:
    """The logarithm of e^x gamma(n + 1, x) / x^(n + 1)."""
    if x < n + 2:
        # sum_k x^k / ((n + 1) (n + 2) ... (n + 1 + k)), all terms positive, from the largest down
        term = total = 1.0 / (n + 1)
        k = n + 1
        while term > 1e-17 * total:
            k += 1
            term *= x / k
            total += term
        return math.log(total)
    # gamma(n + 1, x) = n! - Gamma(n + 1, x); by Lentz's continued fraction Gamma(n + 1, x) = e^-x x^(n + 1) /
    # b
    tiny = 1e-300
    b = x - n
    c, d = 1 / tiny, 1 / b
    fraction = d
    for i in range(1, 100_000):
        a = i * (n + 1 - i)
        b += 2.0
        d = a * d + b
        d = 1 / (d if abs(d) > tiny else tiny)
        c = b + a / c
        c = c if abs(c) > tiny else tiny
        fraction *= d * c
        if abs(d * c - 1) < 1e-16:
            break
    # log(e^x n! / x^(n + 1) - fraction)
    log_whole = x + math.lgamma(n + 1) - (n + 1) * math.log(x)
    return log_whole + math.log1p(-fraction * math.exp(-log_whole))


class PluginMartingale(PValueMartingale):
    """Bets with a density of the p-values so far, a histogram that begins with virtual p-values.

    After n p-values, of which `n_k` lie in the k-th of `bins` equal bins::

        density(p in bin k) = bins (n_k + prior) / (n + bins prior)

    It finds any change of the p-values' law that the bins resolve, with no say of what to look for.

    Args:
        bins: number of bins, at least 2.
        prior: virtual p-values in each bin, above 0; 1/2 is the Krichevsky-Trofimov estimate.

    Raises:
        ValueError: if an argument is outside its range.
    """

    memory = ("counts",)

    def __init__(self, bins: int = 10, prior: float = 0.5) -> None:
        check_integer("bins", bins, low=2)
        check_range("prior", prior, low=0.0, low_open=True)
        super().__init__()
        self.bins = bins
        self.prior = float(prior)
        self.counts = [0] * bins

    def _bet(self, p: float) -> None:
        k = min(int(p * self.bins), self.bins - 1)
        # density = bins (n_k + prior) / (n + bins prior)
        expected = sum(self.counts) + self.bins * self.prior
        self.log_wealth += math.log(self.bins * (self.counts[k] + self.prior) / expected)
        self.counts[k] += 1
