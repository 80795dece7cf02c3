"""What circuits cost next to hmmlearn, spflow and cirkit, what Anemone's update costs, and what they hold.

Run: `python tests/bench/bench_circuits.py [--threads 1] [--repeats 5] [--sequences 4]`. One line a figure:
name, ours, peer, ratio, target, PASS or MISS; exit code 1 if one misses. The sides of a comparison alternate
in one process and medians are compared. hmmlearn's time is proportional to the number of sequences; it gets
`--sequences` of the 512 with its default implementation and four times as many with
`implementation="scaling"`, and the time is scaled.

spflow (1.1.0) and cirkit (the package libcirkit, 0.3.1, which pins an older scipy) are no dependencies: they
are compared where they can be imported (`pip install --no-deps --target PEERS spflow libcirkit`, with PEERS
in PYTHONPATH; `einops`, `opt_einsum`, `pydot` and `fast_pytorch_kmeans` may have to join them), and otherwise
the line says so. spflow gets the very parameters, and the likelihoods must agree; cirkit learns its tree from
the same data and has as many states, and the parameters are its own.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from hmmlearn.hmm import CategoricalHMM
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from piste_algorithms.circuits import Anemone, Circuit, FullBatchEM, Leaf, MiniBatchEM, Product, hclt, hmm

LATENTS, LENGTH, CATEGORIES, BATCH = 256, 128, 64, 512


def medians(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each side, after a call that is not measured."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for call in sides.values():
        call()
    for _ in range(repeats):
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


class Table:
    def __init__(self) -> None:
        self.missed = False
        print(f"{'figure':<82} {'ours':>12} {'peer':>12} {'ratio':>8} {'target':>8}")

    def row(
        self, name: str, ours: float, peer: float, unit: str, target: float | None, faster: bool = False
    ) -> None:
        """`peer / ours` at least the target if `faster`, else `ours / peer` at most it; None: no verdict."""
        ratio = peer / ours if faster else ours / peer
        verdict, bound = "", ""
        if target is not None:
            passed = ratio >= target if faster else ratio <= target
            self.missed |= not passed
            verdict, bound = ("PASS" if passed else "MISS"), f"{'>=' if faster else '<='} {target:g}"
        left, right = f"{ours:>8.3f} {unit:<3}", f"{peer:>8.3f} {unit:<3}"
        print(f"{name:<82} {left} {right} {ratio:>8.3g} {bound:>8} {verdict}", flush=True)


def peer_of(circuit: Circuit, implementation: str) -> Any:
    start = circuit.parameters()
    peer = CategoricalHMM(
        LATENTS,
        n_iter=1,
        tol=-1,
        init_params="",
        params="ste",
        n_features=CATEGORIES,
        implementation=implementation,
    )
    peer.startprob_, peer.transmat_ = start["initial"].numpy(), start["transition"].numpy()
    peer.emissionprob_ = start["emission"].numpy()
    return peer


def hidden_markov_models(table: Table, repeats: int, sequences: int) -> None:
    """An iteration of full-batch EM in float64, and whether it is hmmlearn's."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(CATEGORIES, (BATCH, LENGTH), generator=generator)
    circuit = hmm(LENGTH, LATENTS, CATEGORIES, generator=generator, dtype=torch.float64)
    few = x[: 4 * sequences]
    reference = Circuit(circuit.structure, circuit.parameters())
    scaling = peer_of(circuit, "scaling")
    flat, lengths = few.reshape(-1, 1).numpy(), [LENGTH] * len(few)

    ours = medians({"ours": functools.partial(FullBatchEM(circuit).step, x)}, repeats)["ours"]
    start = time.perf_counter()
    scaling.fit(flat, lengths)
    scaled = (time.perf_counter() - start) * BATCH / len(few)
    FullBatchEM(reference).step(few)
    found = float(reference.log_likelihood(few).sum())
    expected = scaling.score(flat, lengths)
    difference = abs(found / expected - 1)
    default = peer_of(reference, "log")
    start = time.perf_counter()
    default.fit(flat[: sequences * LENGTH], lengths[:sequences])
    logarithmic = (time.perf_counter() - start) * BATCH / sequences
    again = medians({"ours": functools.partial(FullBatchEM(circuit).step, x)}, repeats)["ours"]
    ours = max(ours, again)
    shape = f"{LATENTS} states, {LENGTH} steps, batch {BATCH}, float64"
    table.row(f"full-batch EM / hmmlearn (default), {shape}", ours, logarithmic, "s", 50, True)
    table.row(f"full-batch EM / hmmlearn (scaling), {shape}", ours, scaled, "s", 8, True)
    table.row("  relative difference of log-likelihoods after an iteration", difference, 1.0, "", 1e-8)


def updates(table: Table, repeats: int) -> None:
    """An update of Anemone next to one of mini-batch EM."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(CATEGORIES, (BATCH, LENGTH), generator=generator)
    data = torch.randint(4, (2000, 100), generator=generator)
    circuits: dict[str, tuple[Callable[[], Circuit], Tensor]] = {
        f"HMM, {LATENTS} states, {LENGTH} steps": (lambda: hmm(LENGTH, LATENTS, CATEGORIES), x),
        "HMM, 32 states, 32 steps": (lambda: hmm(32, 32, CATEGORIES), x[:, :32]),
        "HCLT, 100 variables, 16 states": (lambda: hclt(data, 16), data[:BATCH]),
        "HCLT, 100 variables, 64 states": (lambda: hclt(data, 64), data[:BATCH]),
    }
    for name, (make, batch) in circuits.items():
        anemone, mini = Anemone(make()), MiniBatchEM(make())
        found = medians(
            {"anemone": functools.partial(anemone.step, batch), "mini": functools.partial(mini.step, batch)},
            repeats,
        )
        label = f"Anemone's update / mini-batch EM, {name}, batch {BATCH}"
        table.row(label, found["anemone"] * 1e3, found["mini"] * 1e3, "ms", 1.5)
        held = sum(parameters.nbytes for parameters in anemone.circuit.tables.values())
        layer = BATCH * anemone.circuit._engine.layer_entries * anemone.circuit.dtype.itemsize
        peak = held + peak_bytes(functools.partial(anemone.step, batch))
        # What is left in cache, 4 MiB, is used whatever the model.
        target = 4.0 if held + layer > 2**20 else None
        label = "  memory / (parameters and the batch's activations in one layer)"
        table.row(label, peak / 2**20, (held + layer) / 2**20, "MiB", target)


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that torch holds at once during a call, beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    assert recorded.profiler is not None
    events = recorded.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def trees(table: Table, repeats: int) -> None:
    """Log-likelihoods of a hidden Chow-Liu tree."""
    generator = torch.Generator().manual_seed(2)
    data = torch.randint(4, (2000, 64), generator=generator)
    for variable in range(1, 64):
        copied = torch.rand(2000, generator=generator) < 0.5
        data[copied, variable] = data[copied, variable // 2]
    batch = data[:BATCH]
    for latents in (16, 64):
        circuit = hclt(data, latents)
        label = f"log-likelihood of an HCLT, 64 variables, {latents} states, batch {BATCH}"
        for peer, build, target in (("spflow", spflow_tree, 2.0), ("cirkit", cirkit_tree, 1.0)):
            if importlib.util.find_spec(peer) is None:
                print(f"{label}: {peer} is not installed, not compared")
                continue
            theirs = build(circuit, data)
            with torch.no_grad():
                if peer == "spflow":
                    torch.testing.assert_close(
                        theirs(batch), circuit.log_likelihood(batch), rtol=1e-4, atol=1e-3
                    )
                found = medians(
                    {
                        "ours": functools.partial(circuit.log_likelihood, batch),
                        peer: functools.partial(theirs, batch),
                    },
                    repeats,
                )
            table.row(f"{label} / {peer}", found["ours"] * 1e3, found[peer] * 1e3, "ms", target, True)


def spflow_tree(circuit: Circuit, data: Tensor) -> Callable[[Tensor], Tensor]:
    """The circuit in spflow, with its parameters: one module a region."""
    scope = importlib.import_module("spflow.meta").Scope
    leaf = importlib.import_module("spflow.modules.leaves").Categorical
    total = importlib.import_module("spflow.modules.sums").Sum
    product = importlib.import_module("spflow.modules.products").Product
    tables = circuit.parameters()
    modules: list[Any] = []
    for region in circuit.structure.regions:
        if isinstance(region, Leaf):
            probabilities = tables["emission"][region.variable][None, :, None, :]
            modules.append(leaf(scope([region.variable]), probs=probabilities))
        elif isinstance(region, Product):
            modules.append(product([modules[child] for child in region.children]))
        else:
            table = tables[region.table]
            weights = table[region.index] if table.ndim == 3 else table[None]
            # (features, children, nodes, repetitions)
            weights = weights.T[None, :, :, None].contiguous()
            modules.append(total(modules[region.children[0]], weights=weights))
    root = modules[-1]
    return lambda x: root.log_likelihood(x.float()).flatten()


def cirkit_tree(circuit: Circuit, data: Tensor) -> Callable[[Tensor], Tensor]:
    """cirkit's own hidden Chow-Liu tree of the data, folded and optimised."""
    modalities = importlib.import_module("cirkit.templates.data_modalities")
    pipeline = importlib.import_module("cirkit.pipeline")
    latents = circuit.structure.tables["initial"].entries
    symbolic = modalities.tabular_data(
        "chow-liu-tree",
        data=data,
        input_layers={"name": "categorical", "args": {"num_categories": 4}},
        num_input_units=latents,
        sum_product_layer="cp",
        num_sum_units=latents,
    )
    context = pipeline.PipelineContext(backend="torch", semiring="lse-sum", fold=True, optimize=True)
    compiled = context.compile(symbolic)
    return lambda x: compiled(x).flatten()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("hmmlearn").setLevel(logging.ERROR)
    load = os.getloadavg()[0]
    print(f"torch {torch.__version__}, {options.threads} thread(s), load {load:.1f} at the start")
    table = Table()
    trees(table, 3 * options.repeats)
    updates(table, options.repeats)
    hidden_markov_models(table, options.repeats, options.sequences)
    print(f"load {os.getloadavg()[0]:.1f} at the end")
    return int(table.missed)


if __name__ == "__main__":
    sys.exit(main())
