"""Training circuits: every rule, against independent references and theorems."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hmmlearn.hmm import CategoricalHMM
from tests.workloads.local_runs import LocalRun, RunOf
from tests.workloads.small_recipes import SMALL_TEXT

from piste.checkpoints import CheckpointStore
from piste.config import override, validate
from piste.errors import BadInput, PisteError
from piste.running import resolve
from piste_algorithms.circuits import Circuit
from piste_workloads import circuits
from piste_workloads.circuits import Config, prepare_data
from piste_workloads.circuits.building import build_circuit
from piste_workloads.circuits.data import open_rows
from piste_workloads.circuits.pictures import tree
from piste_workloads.circuits.rows import Encoding
from piste_workloads.circuits.train import answering, restored

RULES = ["full-batch-em", "mini-batch-em", "online-em", "anemone", "adam"]
VERSE = "and the evening and the morning were the first day "
ConfigOf = Callable[..., Config]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PISTE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def config_of(tmp_path: Path) -> ConfigOf:
    """A small hidden Markov model on a small text; dotted overrides are given with double underscores."""
    text = tmp_path / "text.txt"
    text.write_text(SMALL_TEXT + VERSE * 40, encoding="utf-8")

    def build(**changes: Any) -> Config:
        table: dict[str, dict[str, Any]] = {
            "data": {"kind": "text", "source": "file", "path": str(text), "length": 8, "rows": 300},
            "model": {"name": "hmm", "latents": 3},
            "rule": {"name": "anemone"},
            "train": {"epochs": 4, "batch": 32, "samples": 0},
        }
        for key, value in changes.items():
            section, _, name = key.partition("__")
            table[section] = {**table.get(section, {}), name: value} if name else value
        return validate(Config, {"workload": "circuits", **table}, "test")

    return build


def values(run: LocalRun, key: str) -> list[float]:
    return [value for _, value in run.history(key)]


def state_of(run: LocalRun) -> dict[str, Any]:
    found = CheckpointStore(run.directory / "checkpoints").latest()
    assert found is not None
    return found[0]


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_learns_and_leaves_a_distribution(rule: str, config_of: ConfigOf, run_of: RunOf) -> None:
    run = run_of(circuits, config_of(rule={"name": rule}))
    likelihoods = values(run, "train/log_likelihood")
    assert len(likelihoods) == 4
    assert likelihoods[-1] > likelihoods[0]
    for name, table in state_of(run)["model"].items():
        torch.testing.assert_close(table.sum(-1), torch.ones(table.shape[:-1]), atol=1e-5, rtol=0.0)
        assert bool(torch.isfinite(table).all()), name
    rates = {key: values(run, f"rule/rate_{key}") for key in ("min", "mean", "max")}
    assert ([] in rates.values()) == (rule == "adam")
    for least, mean, largest in zip(rates["min"], rates["mean"], rates["max"], strict=True):
        assert 0.0 <= least <= mean <= largest <= 1.0


def test_full_batch_em_is_hmmlearns(config_of: ConfigOf, run_of: RunOf) -> None:
    config = config_of(rule={"name": "full-batch-em", "pseudocount": 0.0}, train__dtype="float64")
    run = run_of(circuits, config)
    rows = open_rows(config.data)
    train = rows.parts["train"].numpy()
    start = build_circuit(config, rows, config.seed).parameters()
    peer = CategoricalHMM(3, n_iter=1, tol=-math.inf, init_params="", params="ste")
    peer.n_features = rows.encoding.categories
    peer.startprob_ = start["initial"].numpy()
    peer.transmat_ = start["transition"].numpy()
    peer.emissionprob_ = start["emission"].numpy()
    wanted = []
    for _ in range(4):
        peer.fit(train.reshape(-1, 1), [8] * len(train))  # it keeps the likelihood before the step
        wanted.append(peer.monitor_.history[0] / len(train))
    assert values(run, "train/log_likelihood") == pytest.approx(wanted, rel=1e-10)
    model = state_of(run)["model"]
    np.testing.assert_allclose(model["transition"].numpy(), peer.transmat_, rtol=1e-8, atol=1e-12)


def test_full_batch_em_never_lowers_the_likelihood(config_of: ConfigOf, run_of: RunOf) -> None:
    rule = {"name": "full-batch-em", "pseudocount": 0.0}
    run = run_of(circuits, config_of(rule=rule, train__epochs=12, train__dtype="float64"))
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(values(run, "train/log_likelihood")))
    assert values(run, "cost/updates") == list(range(1, 13))


def test_what_is_told_is_what_the_circuit_says(config_of: ConfigOf, run_of: RunOf) -> None:
    config = config_of(data__units="characters")
    run, rows = run_of(circuits, config), open_rows(config.data)
    circuit = restored(state_of(run))
    for part in ("valid", "test"):
        x = rows.parts[part]
        mean = float(circuit.log_likelihood(x).double().mean())
        assert values(run, f"{part}/log_likelihood")[-1] == pytest.approx(mean, rel=1e-6)
        assert values(run, f"{part}/loss")[-1] == pytest.approx(-mean, rel=1e-6)
        bits = -mean * len(x) / (float((x >= 0).sum()) * math.log(2.0))
        assert values(run, f"{part}/bits_per_dimension")[-1] == pytest.approx(bits, rel=1e-6)
    assert len(values(run, "test/loss")) == 1


@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_run_goes_on_bit_for_bit(rule: str, config_of: ConfigOf, run_of: RunOf) -> None:
    config = config_of(rule={"name": rule})
    whole, part = run_of(circuits, config), run_of(circuits, config, stop_after=2)
    assert len(part.history("train/loss")) == 2
    resumed = part.resume()
    assert resumed.recomputed() == 0
    for key in ("train/loss", "valid/loss", "test/loss", "cost/updates", "rule/step_size"):
        assert resumed.history(key) == whole.history(key), key
    for name, table in state_of(whole)["model"].items():
        assert torch.equal(table, state_of(resumed)["model"][name])


def test_a_comparison_finds_its_curve(config_of: ConfigOf, run_of: RunOf) -> None:
    run = run_of(circuits, config_of(train__evaluate_every=2))
    steps, clock = (
        [step for step, _ in run.history(circuits.curve.metric)],
        dict(run.history(circuits.curve.seconds)),
    )
    assert steps == [2, 4]
    assert 0.0 < clock[2] < clock[4]


def test_a_run_tells_which_letters_count_as_missing(run_of: RunOf, tmp_path: Path) -> None:
    for name, content in (("a", "ACGTNNRRACGT" * 9), ("b", "ACGTACGT"), ("c", "ACGTACGA")):
        (tmp_path / f"{name}.fa").write_text(f">s\n{content}\n")
    paths = {
        p: [str(tmp_path / f"{n}.fa")] for p, n in zip(("train", "validation", "test"), "abc", strict=True)
    }
    table = {"workload": "circuits", "data": {"kind": "dna", "length": 4, **paths}, "train": {"epochs": 1}}
    table |= {"model": {"name": "hmm", "latents": 2}, "rule": {"name": "anemone"}}
    run = run_of(circuits, validate(Config, table, "test"))
    [line] = (run.directory / "artifacts" / "log.txt").read_text().splitlines()
    assert line.endswith(f"data: {paths['train'][0]}: letters beyond ACGTN count as missing: 18 R")


def test_updates_are_counted(config_of: ConfigOf, run_of: RunOf) -> None:
    config = config_of(rule={"name": "anemone", "updates_every": 3}, train__epoch_rows=200)
    run = run_of(circuits, config)
    assert values(run, "cost/updates") == [3, 6, 9, 12]  # 200 rows are 7 batches: 3 + 3 + 1
    assert values(run, "cost/rows") == [200, 400, 600, 800]
    assert config.updates(300) == 3


def test_the_step_size_follows_its_cosine(config_of: ConfigOf, run_of: RunOf) -> None:
    rule = {"name": "mini-batch-em", "step_size": 0.8, "minimum_ratio": 0.25, "flat_fraction": 0.5}
    run = run_of(circuits, config_of(rule=rule, train__batch=300))
    # Four updates: two flat ones, then 0.8 (1 + cos(pi k / 2)) / 2 for k = 0 and 1.
    assert values(run, "rule/step_size") == pytest.approx([0.8, 0.8, 0.8, 0.4])


def test_a_run_ends_when_validations_get_no_better(config_of: ConfigOf, run_of: RunOf) -> None:
    # With a single state one step of EM is the optimum, and all further ones stay there.
    rule = {"name": "full-batch-em", "pseudocount": 0.0}
    config = config_of(
        rule=rule, model__latents=1, train__epochs=50, train__patience=3, train__dtype="float64", data__rows=0
    )
    run = run_of(circuits, config)
    best = int(values(run, "best/epoch")[-1])
    assert len(run.history("train/loss")) == best + 3 < 50
    assert len(run.history("test/loss")) == 1
    assert values(run, "best/log_likelihood")[-1] == max(values(run, "valid/log_likelihood"))


def test_the_best_parameters_are_kept(config_of: ConfigOf, run_of: RunOf) -> None:
    # A large step on few rows: the last validations are not the best ones.
    rule = {"name": "anemone", "step_size": 1.0, "minimum_ratio": 1.0}
    config = config_of(
        rule=rule, data__rows=20, model__latents=8, train__batch=10, train__epochs=8, train__keep_best=True
    )
    whole, part = run_of(circuits, config), run_of(circuits, config, stop_after=7)
    found, last = values(whole, "valid/log_likelihood"), values(whole, "valid/log_likelihood")[-1]
    assert max(found) > last
    rows = open_rows(config.data)
    kept = answering(state_of(whole))
    for key, x in (("best", rows.parts["valid"]), ("test", rows.parts["test"])):
        mean = float(kept.log_likelihood(x).double().mean())
        assert values(whole, f"{key}/log_likelihood")[-1] == pytest.approx(mean, rel=1e-6)
    assert part.resume().history("test/loss") == whole.history("test/loss")


def test_splice_sites_are_told_from_decoys(run_of: RunOf) -> None:
    table = {
        "data": {"kind": "splice", "length": 24, "decoys": 1},
        "model": {"name": "hclt", "latents": 4},
        "train": {"epochs": 3, "batch": 64, "samples": 3},
    }
    run = run_of(circuits, validate(Config, table, "test"))
    assert values(run, "test/accuracy")[-1] > 0.8  # guessing: 0.5
    assert (run.directory / "artifacts" / "tree.png").exists()
    emission = state_of(run)["model"]["emission"]
    assert not bool(emission[-1, :, 2:].any())  # the last variable is the label: 0 or 1
    assert bool((emission[:-1] > 0).all())


@pytest.mark.parametrize(
    "model", [{"name": "hclt"}, {"name": "pd", "split": 4}, {"name": "pdhclt", "bins": 4}]
)
def test_images_are_drawn_and_completed(model: dict[str, Any], run_of: RunOf) -> None:
    table = {
        "data": {"kind": "images", "name": "digits", "levels": 4, "rows": 200},
        "model": {"latents": 2, **model},
        "train": {"epochs": 2, "samples": 4},
    }
    run = run_of(circuits, validate(Config, table, "test"))
    kept = {path.name for path in (run.directory / "artifacts").iterdir()}
    wanted = {"log-likelihood.png", "samples.png", "in-painting.png", "data.json"}
    assert kept - {"log.txt"} == wanted | ({"tree.png"} if model["name"] != "pd" else set())


@pytest.mark.parametrize("information", [None, [0.0, 0.0], [0.0, 0.5]])
def test_a_tree_is_drawn_whatever_its_edges_tell(information: list[float] | None, tmp_path: Path) -> None:
    figure = tree([-1, 0], Encoding("numbers", 2, (2,)), information)
    figure.savefig(tmp_path / "tree.png")
    assert len(figure.axes) == (1 if information is None else 2)  # the second is the scale
    tree([-1], Encoding("numbers", 2, (1,)), [0.0]).savefig(tmp_path / "alone.png")


def test_a_run_goes_on_from_a_file(config_of: ConfigOf, run_of: RunOf, tmp_path: Path) -> None:
    path = tmp_path / "circuit.safetensors"
    begun = config_of()
    first = run_of(circuits, begun)
    circuits.save(begun, first.directory / "checkpoints" / "step-000000004", str(path))
    config = config_of(model={"name": "file", "path": str(path)}, rule={"name": "full-batch-em"})
    second = run_of(circuits, config)
    train = open_rows(config.data).parts["train"]
    wanted = float(Circuit.load(path).log_likelihood(train).double().mean())
    assert values(second, "train/log_likelihood")[0] == pytest.approx(wanted, rel=1e-6)


def test_files_that_do_not_fit_are_bad_input(config_of: ConfigOf, run_of: RunOf, tmp_path: Path) -> None:
    path = tmp_path / "circuit.safetensors"
    config = config_of(model={"name": "file", "path": str(path)})
    with pytest.raises(BadInput, match=r"model.path: .*: no such file"):
        prepare_data(config)
    path.write_text("no circuit")
    with pytest.raises(BadInput, match=r"model.path: .* is no circuit of piste"):
        prepare_data(config)
    shorter = config_of(data__length=6)
    first = run_of(circuits, shorter)
    circuits.save(shorter, first.directory / "checkpoints" / "step-000000004", str(path))
    with pytest.raises(
        BadInput, match="a circuit of 6 variables with up to 27 categories, and the data have 8"
    ):
        prepare_data(config)


def test_rows_that_are_all_impossible_end_the_run(config_of: ConfigOf, run_of: RunOf, tmp_path: Path) -> None:
    config = config_of(rule={"name": "mini-batch-em", "pseudocount": 0.0})
    circuit = build_circuit(config, open_rows(config.data), 0)
    emission = torch.zeros(3, 27)
    emission[:, 16] = 1.0  # nothing but the letter q
    circuit.set_parameters({"emission": emission})
    circuit.save(tmp_path / "q.safetensors")
    with pytest.raises(PisteError, match=r"update 1: .* probability zero"):
        run_of(circuits, config_of(model={"name": "file", "path": str(tmp_path / "q.safetensors")}))


@pytest.mark.parametrize("rule", ["full-batch-em", "mini-batch-em", "online-em", "anemone"])
def test_rows_without_values_teach_nothing(rule: str, run_of: RunOf, tmp_path: Path) -> None:
    # The flows of a row that is all missing are those that the circuit expects: a fixed point of every EM.
    np.save(tmp_path / "a.npy", np.full((60, 4), -1))
    table = {
        "data": {"kind": "table", "path": str(tmp_path / "a.npy"), "categories": 3},
        "model": {"name": "hmm", "latents": 3},
        "rule": {"name": rule, "pseudocount": 0.0},
        "train": {"epochs": 2, "batch": 16, "samples": 0, "dtype": "float64"},
    }
    config = validate(Config, table, "test")
    run = run_of(circuits, config)
    assert values(run, "valid/log_likelihood") == pytest.approx([0.0, 0.0], abs=1e-12)
    assert all(math.isnan(value) for value in values(run, "valid/bits_per_dimension"))
    start = build_circuit(config, open_rows(config.data), 0).parameters()
    for name, tensor in state_of(run)["model"].items():
        torch.testing.assert_close(tensor, start[name], rtol=1e-10, atol=1e-12)


def test_the_hash_is_that_of_the_rows(config_of: ConfigOf) -> None:
    assert prepare_data(config_of()) == prepare_data(config_of(rule={"name": "adam"}))
    assert prepare_data(config_of()) != prepare_data(config_of(data__length=9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"name": "sgd", "lr": 0.1}}, r"a circuit learns by \[rule\]"),
        ({"rule": {"name": "sgd"}}, "rule"),
        ({"rule": {"name": "anemone", "step_size": 0.0}}, "step_size"),
        ({"rule": {"name": "anemone", "step_size": 1.5}}, "step_size"),
        ({"rule": {"name": "anemone", "momentum": 1.0}}, "momentum"),
        ({"rule": {"name": "adam", "step_size": 0.1}}, "adam takes no 'step_size'"),
        ({"rule": {"name": "anemone", "step": 0.1}}, "did you mean 'step_size'"),
        ({"train__batch": 1, "resources": {"workers": 2}}, "cannot be shared"),
        ({"model": {"name": "hmm", "latents": 0}}, "latents"),
    ],
)
def test_recipes_that_cannot_be_are_refused(
    changes: dict[str, Any], message: str, config_of: ConfigOf
) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        config_of(**changes)
    assert "\n" not in str(caught.value)


def test_a_sweep_chooses_the_rule_and_its_step_size(config_of: ConfigOf) -> None:
    # As a sweep does: from the resolved recipe, with what it has chosen.
    base = config_of(rule={"name": "anemone"}).model_dump(mode="json")
    for chosen in (
        {"rule.name": "adam", "rule.lr": 0.1},
        {"rule.name": "mini-batch-em", "rule.step_size": 0.3},
    ):
        rule = resolve(override(base, chosen), "test").model_dump()["rule"]
        assert rule == {key.removeprefix("rule."): value for key, value in chosen.items()}


def test_a_split_that_does_not_fit_is_bad_input(run_of: RunOf) -> None:
    table = {"data": {"kind": "images"}, "model": {"name": "pd", "split": [1, 2, 3]}}
    with pytest.raises(BadInput, match="model: split must be"):
        run_of(circuits, validate(Config, table, "test"))
