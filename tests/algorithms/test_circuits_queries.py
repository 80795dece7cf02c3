"""Samples and most probable completions against enumeration; trees and grids; files; checks."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hmmlearn.hmm import CategoricalHMM
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.stats import chi2, kstest, norm
from tests.algorithms.circuits_reference import (
    DISCRETE,
    REAL,
    everything,
    generator,
    real_data,
    with_missing,
)
from torch import Tensor

from piste_algorithms.circuits import (
    Circuit,
    Leaf,
    Product,
    Structure,
    Sum,
    Table,
    chow_liu_tree,
    hclt,
    hmm,
    mutual_information,
    pd,
    pdhclt,
)
from piste_algorithms.circuits.structure import Region

ALL = {**DISCRETE, **REAL}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check_frequencies(samples: Tensor, rows: Tensor, probabilities: Tensor) -> None:
    """Pearson's test of samples against the probabilities of all rows, at a level of 1e-3."""
    counts = (samples[:, None, :] == rows[None]).all(-1).sum(0).double()
    expected = probabilities * len(samples)
    assert int(counts.sum()) == len(samples)
    common = expected >= 5
    statistic = ((counts - expected)[common] ** 2 / expected[common]).sum()
    rest = expected[~common].sum()
    degrees = int(common.sum()) - 1
    if float(rest) > 0:
        statistic += (counts[~common].sum() - rest) ** 2 / rest
        degrees += 1
    assert float(chi2.sf(float(statistic), degrees)) > 1e-3


@pytest.mark.parametrize("name", DISCRETE)
def test_samples_have_the_probabilities_of_the_circuit(name: str) -> None:
    circuit = DISCRETE[name]()
    rows = everything(circuit)
    samples = circuit.sample(4000, generator(1))
    assert samples.dtype == torch.int64
    check_frequencies(samples, rows, circuit.log_likelihood(rows).exp())
    assert torch.equal(samples, circuit.sample(4000, generator(1)))


@pytest.mark.parametrize("name", DISCRETE)
def test_conditional_samples_have_the_posterior_probabilities(name: str) -> None:
    circuit = DISCRETE[name]()
    row = everything(circuit)[-2].clone()
    row[::2] = -1
    ranges = (
        range(count) if value < 0 else [value]
        for value, count in zip(row.tolist(), circuit.structure.categories, strict=True)
    )
    completions = torch.tensor(list(itertools.product(*ranges)))
    samples = circuit.conditional_sample(row.repeat(3000, 1), generator(2))
    assert torch.equal(samples[:, 1::2], row[1::2].repeat(3000, 1))
    check_frequencies(samples, completions, circuit.log_likelihood(completions).softmax(0))


def test_samples_of_normal_densities_follow_their_mixture() -> None:
    circuit = hmm(3, 2, None, generator=generator(0), dtype=torch.float64)
    samples = circuit.sample(4000, generator(3))
    weights = circuit.parameters()["initial"]
    mean, variance = circuit.parameters()["emission"].unbind(-1)

    def distribution(values: Tensor) -> Tensor:
        parts = norm.cdf(torch.as_tensor(values)[:, None], mean, variance.sqrt())
        return torch.as_tensor(parts) @ weights

    assert kstest(samples[:, 0].numpy(), lambda values: distribution(values).numpy()).pvalue > 1e-3
    given = torch.full((4000, 3), math.nan, dtype=torch.float64)
    given[:, 1] = 0.7
    drawn = circuit.conditional_sample(given, generator(4))
    assert bool((drawn[:, 1] == 0.7).all())
    assert not bool(drawn.isnan().any())


@pytest.mark.parametrize("name", ALL)
def test_the_most_probable_completion_is_the_best_of_all(name: str) -> None:
    """Against the largest product of parameters over all completions and all choices of hidden states."""
    circuit = ALL[name]()
    x = real_data(3, circuit.variables, 1) if name in REAL else everything(circuit)[1:4]
    for row in with_missing(x, share=0.6):
        found = circuit.mpe(row[None])[0]
        observed = ~row.isnan() if name in REAL else row >= 0
        assert torch.equal(found[observed], row[observed])
        if name in REAL:
            # A normal density is largest at a mean of its leaf: all means of every missing variable.
            candidates = [
                torch.unique(circuit.parameters()["emission"][..., 0]) if missing else value[None]
                for value, missing in zip(row, row.isnan(), strict=True)
            ]
            completions = torch.cartesian_prod(*candidates)[:20000]
        else:
            candidates = [
                torch.arange(count) if value < 0 else value[None]
                for value, count in zip(row, circuit.structure.categories, strict=True)
            ]
            completions = torch.cartesian_prod(*candidates).reshape(-1, circuit.variables)
        best = max(largest_product(circuit, completion) for completion in completions[:300])
        assert largest_product(circuit, found) >= best - 1e-12


def largest_product(circuit: Circuit, row: Tensor) -> float:
    """Logarithm of the largest product of parameters over the choices of hidden states of a complete row."""
    tables = circuit.parameters()
    values: list[list[float]] = []
    for region in circuit.structure.regions:
        if isinstance(region, Product):
            values.append([sum(each) for each in zip(*(values[c] for c in region.children), strict=True)])
            continue
        table = tables[region.table]
        matrix = (
            table[region.index] if table.ndim == 3 else table if table.ndim == 2 else table[None]
        ).tolist()
        if isinstance(region, Sum):
            below = [value for child in region.children for value in values[child]]
            values.append([max(math.log(w) + v for w, v in zip(line, below, strict=True)) for line in matrix])
        elif circuit.structure.tables[region.table].kind == "gaussian":
            x = float(row[region.variable])
            values.append([-0.5 * ((x - m) ** 2 / s + math.log(2 * math.pi * s)) for m, s in matrix])
        else:
            values.append([math.log(line[int(row[region.variable])]) for line in matrix])
    return values[-1][0]


def test_the_most_probable_path_of_a_hidden_markov_model_is_viterbi() -> None:
    circuit = hmm(12, 4, 5, generator=generator(3), dtype=torch.float64, spread=4.0)
    x = torch.randint(5, (1, 12), generator=generator(1))
    start = circuit.parameters()
    peer = CategoricalHMM(4, n_features=5)
    peer.startprob_, peer.transmat_ = start["initial"].numpy(), start["transition"].numpy()
    peer.emissionprob_ = start["emission"].numpy()
    score, path = peer.decode(x.T.numpy())
    assert largest_product(circuit, x[0]) == pytest.approx(score, rel=1e-12)
    x[0, 8:] = -1  # the end of the path alone is open: its most probable continuation
    completed = circuit.mpe(x)[0]
    score_of_completed, path = peer.decode(completed[:, None].numpy())
    assert completed[8:].tolist() == start["emission"][path].argmax(-1)[8:].tolist()
    assert score_of_completed >= score


def test_a_row_that_cannot_be_completed_is_named() -> None:
    circuit = hmm(3, 2, 2, dtype=torch.float64)
    circuit.set_parameters({"emission": torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)})
    x = torch.tensor([[0, -1, -1], [-1, 1, -1]])
    for ask in (circuit.mpe, lambda x: circuit.conditional_sample(x, generator(0))):
        with pytest.raises(ValueError, match=r"x\[1\]: the observed part of this row has probability zero"):
            ask(x)


def test_nothing_observed_has_likelihood_one() -> None:
    for name, make in ALL.items():
        circuit = make()
        missing = torch.full((2, circuit.variables), -1)
        if name in REAL:
            missing = torch.full((2, circuit.variables), math.nan, dtype=torch.float64)
        torch.testing.assert_close(
            circuit.log_likelihood(missing), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-13
        )


# Trees and grids


@pytest.mark.parametrize("categories", [3, 20])  # fewer pairs of categories than rows, and more
def test_mutual_information_is_that_of_the_counts(categories: int) -> None:
    x = torch.randint(categories, (200, 4), generator=generator(0))
    x[:, 3] = x[:, 0]
    x[::7, 1] = -1
    found = mutual_information(x)
    for i, j in itertools.permutations(range(4), 2):
        there = (x[:, i] >= 0) & (x[:, j] >= 0)
        pairs = x[there]
        expected = 0.0
        for a, b in itertools.product(range(categories), repeat=2):
            joint = float(((pairs[:, i] == a) & (pairs[:, j] == b)).double().mean())
            if joint > 0:
                left, right = (pairs[:, i] == a).double().mean(), (pairs[:, j] == b).double().mean()
                expected += joint * math.log(joint / float(left * right))
        assert float(found[i, j]) == pytest.approx(expected, abs=1e-12)
    assert not found.diagonal().any()
    x[:, 2] = -1
    assert not mutual_information(x)[2].any()  # of no rows


def test_mutual_information_of_normal_values_is_that_of_their_correlation() -> None:
    x = real_data(300, 4)
    correlation = torch.corrcoef(x.T)
    expected = -0.5 * torch.log1p(-correlation.square().fill_diagonal_(0.0))
    torch.testing.assert_close(mutual_information(x), expected, rtol=1e-9, atol=1e-12)
    x[5, 2] = math.nan
    kept = torch.cat((x[:5], x[6:]))
    torch.testing.assert_close(
        mutual_information(x)[2, 1], mutual_information(kept)[2, 1], rtol=1e-9, atol=1e-12
    )


def test_the_tree_of_a_chain_is_the_chain_rooted_in_its_middle() -> None:
    draw = generator(0)
    x = torch.zeros((4000, 7), dtype=torch.int64)
    x[:, 0] = torch.randint(2, (4000,), generator=draw)
    for variable in range(1, 7):
        flipped = torch.rand(4000, generator=draw) < 0.2
        x[:, variable] = torch.where(flipped, 1 - x[:, variable - 1], x[:, variable - 1])
    assert chow_liu_tree(x) == [1, 2, 3, -1, 3, 4, 5]
    binned = x * 8 + torch.randint(8, x.shape, generator=draw)
    assert chow_liu_tree(binned, 16, bins=2) == [1, 2, 3, -1, 3, 4, 5]
    learned, information = hclt(x, 2).structure.description, mutual_information(x)
    assert learned["parents"] == [1, 2, 3, -1, 3, 4, 5]
    edges = [float(information[child, parent]) for child, parent in enumerate(learned["parents"])]
    assert learned["information"] == [*edges[:3], 0.0, *edges[4:]]
    boxes = pdhclt(x[:, :6], (6,), 2, split=3).structure.description
    for child, parent in enumerate(boxes["parents"]):
        assert boxes["information"][child] == (float(information[child, parent]) if parent >= 0 else 0.0)


def test_grids_have_the_boxes_of_their_cuts() -> None:
    """A square of 4 x 4 cells: 100 boxes, 84 of them with cuts; at most `max_cuts` of a box are used."""
    circuit = pd((8, 8), 2, 2, split=2, max_cuts=99)
    sums = [region for region in circuit.structure.regions if isinstance(region, Sum)]
    assert len(sums) == 84
    assert max(len(region.children) for region in sums) == 6
    few = pd((8, 8), 2, 2, split=2, max_cuts=3, generator=generator(0))
    assert max(len(r.children) for r in few.structure.regions if isinstance(r, Sum)) == 3
    assert pd((5,), 2, 3).variables == 5
    x = torch.randint(3, (50, 12), generator=generator(0))
    trees = pdhclt(x, (3, 4), 2, split=(3, 2))
    assert sum(parent < 0 for parent in trees.structure.description["parents"]) == 2


# Files


@pytest.mark.parametrize("name", ALL)
def test_a_saved_circuit_is_the_same_circuit(name: str, tmp_path: Path) -> None:
    circuit = ALL[name]()
    circuit.save(tmp_path / "circuit.safetensors")
    loaded = Circuit.load(tmp_path / "circuit.safetensors")
    assert loaded.structure == circuit.structure
    for table, value in circuit.parameters().items():
        assert torch.equal(loaded.parameters()[table], value)


def test_files_of_another_version_or_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "circuit.safetensors"
    DISCRETE["hclt"]().save(path)
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, {**metadata, "version": "2"})
    with pytest.raises(ValueError, match="circuit of format version '2', this code reads '1'"):
        Circuit.load(path)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="is a safetensors file, but no circuit of piste"):
        Circuit.load(path)
    broken = json.loads(metadata["structure"])
    del broken["tables"]
    save_file(tensors, path, {**metadata, "structure": json.dumps(broken)})
    with pytest.raises(ValueError, match="this is no structure of a circuit"):
        Circuit.load(path)
    path.write_bytes(b"some text")
    with pytest.raises(ValueError, match="is no circuit of piste, or broken"):
        Circuit.load(path)
    with pytest.raises(FileNotFoundError):
        Circuit.load(tmp_path / "absent")


# Checks

E, W = Table((2, 3), "categorical"), Table((1, 2), "weights")


@pytest.mark.parametrize(
    ("regions", "tables", "message"),
    [
        (
            (Leaf(0, "e"), Leaf(1, "e"), Sum((0, 1), "w")),
            {"e": E, "w": Table((1, 4), "weights")},
            r"region 2 \(sum over regions 0, 1, w\[0\]\) is not smooth: variables 0, 1 are below region 0 or",
        ),
        (
            (Leaf(0, "e"), Leaf(0, "e"), Product((0, 1)), Sum((2,), "w")),
            {"e": E, "w": W},
            r"region 2 \(product of regions 0, 1\) is not decomposable: variables 0 are below more than one",
        ),
        (
            (Leaf(0, "e"), Leaf(1, "f"), Product((0, 1)), Sum((2,), "w")),
            {"e": E, "f": Table((3, 3), "categorical"), "w": W},
            r"region 2 \(product of regions 0, 1\) has children of different widths \(0: 2, 1: 3\)",
        ),
        (
            (Leaf(0, "e"), Sum((0,), "w")),
            {"e": E, "w": Table((1, 3), "weights")},
            r"region 1 .* has 2 nodes below it, its weights are for 3",
        ),
        (
            (Leaf(0, "e"), Sum((0,), "w")),
            {"e": E, "w": Table((2, 2), "weights")},
            r"the root, region 1 .*, must be a single node, it has 2",
        ),
        (
            (Leaf(0, "e"), Leaf(0, "e"), Sum((1,), "w")),
            {"e": E, "w": W},
            r"region 0 \(leaf of variable 0, e\[0\]\) is no child of any region",
        ),
        ((Leaf(1, "e"), Sum((0,), "w")), {"e": E, "w": W}, "no region has variable 0"),
        ((Leaf(0, "e"), Sum((0,), "v")), {"e": E, "w": W}, "region 1 .* names a table that is not there"),
        ((Leaf(0, "w"), Sum((0,), "w")), {"w": W}, "region 0 .* cannot use a table of kind weights"),
        (
            (Leaf(0, "e", 1), Sum((0,), "w")),
            {"e": E, "w": W},
            r"region 0 .* index must be in \[0, 1\), got 1",
        ),
        (
            (Sum((1,), "w"), Leaf(0, "e")),
            {"e": E, "w": W},
            "region 0 .* must have children, all of them before it",
        ),
        (
            (Leaf(0, "e"), Leaf(0, "f"), Sum((0, 1), "w")),
            {"e": E, "f": Table((2, 4), "categorical"), "w": Table((1, 4), "weights")},
            "region 1 .* is categorical with 4 entries, another leaf of that variable is categorical with 3",
        ),
    ],
)
def test_a_broken_structure_names_the_region(
    regions: tuple[Region, ...], tables: dict[str, Table], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Structure(regions, tables)


def test_parameters_that_are_not_normalised_name_the_node() -> None:
    circuit = DISCRETE["hclt"]()
    before = circuit.parameters()
    broken = circuit.parameters()
    broken["transition"][2, 1, 0] += 0.5
    region = circuit.structure.regions.index(
        next(
            r
            for r in circuit.structure.regions
            if isinstance(r, Sum) and (r.table, r.index) == ("transition", 2)
        )
    )
    with pytest.raises(
        ValueError, match=rf"transition\[2, 1\], node 1 of region {region} \(sum .*sum to one.* 1\.5"
    ):
        circuit.set_parameters({**broken, "initial": torch.tensor([1.0, 0.0, 0.0])})
    for table, value in circuit.parameters().items():
        assert torch.equal(value, before[table])
    with pytest.raises(ValueError, match=r"initial must be of shape \(3,\), got \(2,\)"):
        circuit.set_parameters({"initial": torch.ones(2)})
    with pytest.raises(
        ValueError, match="there is no table 'final'; there are initial, transition, emission"
    ):
        circuit.set_parameters({"final": torch.ones(2)})
    with pytest.raises(ValueError, match="parameters must hold every table, transition, emission"):
        Circuit(circuit.structure, {"initial": before["initial"]})
    real = REAL["hmm of real values"]()
    emission = real.parameters()["emission"]
    emission[1, 1] = 0.0
    with pytest.raises(ValueError, match=r"emission\[1\], node 1 of .*a finite mean and a positive variance"):
        real.set_parameters({"emission": emission})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hmm(0, 2, 2), "length must be an integer >= 1, got 0"),
        (lambda: hmm(2, 2, 0), "num_categories must be an integer >= 1, got 0"),
        (lambda: hmm(2, 2, 2, spread=-1.0), "spread must be"),
        (lambda: hclt(torch.zeros(3, 2), 0), "num_latents must be an integer >= 1, got 0"),
        (lambda: hclt(torch.zeros(0, 2), 2), r"data must be a tensor \(samples, variables\)"),
        (
            lambda: hclt(torch.tensor([[0, 5]]), 2, 3),
            r"data\[0, 1\] \(row, column\) must be from 0 to 2, or -1",
        ),
        (lambda: hclt(torch.zeros(3, 2), 2, 4), "num_categories must be None for real values"),
        (lambda: pd((), 2, 2), "shape must have at least one axis"),
        (lambda: pd((4, 0), 2, 2), r"shape\[1\] must be an integer >= 1, got 0"),
        (lambda: pd((4, 4), 2, 2, split=(1,)), "split must be a number or 2 numbers"),
        (lambda: pd((4,), 2, 2, max_cuts=0), "max_cuts must be an integer >= 1, got 0"),
        (
            lambda: pdhclt(torch.zeros(3, 5), (2, 3), 2),
            r"data must have 6 columns for the shape \(2, 3\), got 5",
        ),
        (lambda: hmm(2, 2, 2).sample(0, generator(0)), "n must be a whole number of at least 1, got 0"),
    ],
)
def test_arguments_are_checked(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_data_are_checked() -> None:
    circuit, real = hmm(3, 2, 4), hmm(3, 2, None)
    with pytest.raises(
        ValueError, match=r"x\[1, 2\] \(row, column\) must be a whole number from 0 to 3.* got 4"
    ):
        circuit.log_likelihood(torch.tensor([[0, 1, 2], [0, 0, 4]]))
    with pytest.raises(ValueError, match=r"x\[0, 0\] .* got -2"):
        circuit.flows(torch.tensor([[-2, 1, 2]]))
    with pytest.raises(ValueError, match=r"whole numbers .* got torch.float32"):
        circuit.mpe(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"x must be a tensor \(batch, 3\)"):
        circuit.log_likelihood(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"x\[0, 1\] .* must be within 2.6e\+15 of 0, or missing, got inf"):
        real.log_likelihood(torch.tensor([[0.0, math.inf, 0.0]]))
    with pytest.raises(ValueError, match=r"x\[0, 2\] .* got -1e\+17"):
        real.flows(torch.tensor([[0.0, math.nan, -1e17]], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"floating-point .* got torch.int64"):
        real.log_likelihood(torch.zeros(1, 3, dtype=torch.int64))
    assert circuit.log_likelihood(torch.zeros(1, 3, dtype=torch.uint8)).shape == (1,)
