import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.workloads.local_runs import LocalRun, RunOf

from piste.building import build_optimizer
from piste.checkpoints import CheckpointError, load
from piste.config import Optimizer, override, validate
from piste.errors import BadInput, PisteError
from piste.running import load_recipe
from piste_workloads import llm
from piste_workloads.llm.batches import global_batch, windows
from piste_workloads.llm.config import Config, Train
from piste_workloads.llm.model import GPT, cross_entropy, parameter_count
from piste_workloads.llm.tokens import open_corpus
from piste_workloads.llm.train import _Step
from piste_workloads.schedule import lr_factor

VERSE = "In the beginning was the word, and the word was with the reader. "
ADAMW = {"name": "adamw", "lr": 3e-3}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PISTE_HOME", str(tmp_path / "home"))


@pytest.fixture
def config_of(tmp_path: Path) -> Callable[..., Config]:
    """A tiny recipe on plain bytes, with dotted overrides."""
    path = tmp_path / "text.txt"
    path.write_text(VERSE * 60)
    table: dict[str, Any] = {
        "workload": "llm",
        "model": {"layers": 2, "heads": 2, "width": 16, "context": 16},
        "data": {"source": "file", "path": str(path), "vocab_size": 256, "validation_fraction": 0.1},
        "optimizer": ADAMW,
        "train": {"steps": 8, "batch": 8, "warmup_steps": 2, "validate_every": 3, "validation_batches": 2}
        | {"samples": 2, "sample_tokens": 5},
    }

    def build(overrides: Mapping[str, Any] | None = None) -> Config:
        return validate(Config, override(table, overrides or {}), "test")

    return build


def weights(run: LocalRun) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load(newest(run))["model"]
    return found


def newest(run: LocalRun) -> Path:
    return max((run.directory / "checkpoints").glob("step-*"))


def values(run: LocalRun, key: str) -> list[float]:
    return [value for _, value in run.history(key)]


def computed(run: LocalRun) -> dict[str, list[tuple[int, float]]]:
    """All metrics but those of the clock."""
    keys = run.ledger.keys("run")
    return {key: run.history(key) for key in keys if not key.startswith(("time/", "system/"))}


def assert_same_weights(a: LocalRun, b: LocalRun) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_the_loop_equals_plain_torch(run_of: RunOf, config_of: Callable[..., Config]) -> None:
    config = config_of()
    run = run_of(llm, config)

    corpus = open_corpus(config)
    torch.manual_seed(config.seed)
    model = GPT(config.model, 256)
    optimizer = build_optimizer(config.optimizer, model)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    losses, norms = [], []
    for step in range(1, config.train.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * lr_factor(config.train, step, config.train.steps)
        starts = global_batch(config.seed, step, 8, len(corpus.train) - 16)
        inputs, targets = windows(corpus.train, starts, 16, torch.device("cpu"))
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, config.train.clip).item())
        optimizer.step()
        losses.append(loss.item())
    assert values(run, "train/loss") == losses
    assert values(run, "train/gradient_norm") == norms
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights(run)[name], tensor), name


def test_what_a_run_leaves_behind(run_of: RunOf, config_of: Callable[..., Config]) -> None:
    config = config_of({"train.sample_every": 4})
    run = run_of(llm, config)
    per_step = ["train/loss", "train/gradient_norm", "train/lr", "time/step_ms", "time/optimizer_ms"]
    for key in [*per_step, "time/tokens_per_s"]:
        assert [step for step, _ in run.history(key)] == list(range(1, 9)), key
    for key in ("valid/loss", "valid/bits_per_byte"):
        assert [step for step, _ in run.history(key)] == [3, 6, 8], key
    for (_, nats), (_, bits) in zip(
        run.history("valid/loss"), run.history("valid/bits_per_byte"), strict=True
    ):
        assert bits == pytest.approx(nats / math.log(2.0))  # a byte a token
    parameters = sum(tensor.numel() for name, tensor in weights(run).items() if name != "head.weight")
    tensors = len(weights(run)) - 1
    # AdamW: two moments a parameter, and a step counter a tensor, of 4 bytes each.
    assert run.history("optimizer/state_bytes") == [(1, 4.0 * (2 * parameters + tensors))]
    assert run.history("train/lr")[0][1] == pytest.approx(3e-3 / 2)
    for (_, whole), (_, part) in zip(
        run.history("time/step_ms"), run.history("time/optimizer_ms"), strict=True
    ):
        assert 0.0 < part < whole
    tables = {artifact.name for artifact in run.ledger.artifacts("run") if artifact.kind == "table"}
    assert tables == {"samples.json", "samples-000004.json"}
    table = json.loads((run.directory / "artifacts" / "samples.json").read_text())
    assert table["columns"] == ["prompt", "text"]
    assert len(table["data"]) == 2


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_accumulated_micro_batches_equal_the_full_batch(
    clip: float, run_of: RunOf, config_of: Callable[..., Config]
) -> None:
    # Plain gradient descent: Adam would turn a rounding error of a tiny gradient into a whole step.
    settings = {"optimizer": {"name": "sgd", "lr": 0.1}, "train.clip": clip}
    full = run_of(llm, config_of(settings))
    parts = run_of(llm, config_of(settings | {"train.accumulate": 4}))
    for name, tensor in weights(full).items():
        torch.testing.assert_close(weights(parts)[name], tensor, rtol=0, atol=1e-6, msg=name)
    for key in ("train/loss", "train/gradient_norm"):
        expected = values(full, key)
        assert values(parts, key) == pytest.approx(expected, abs=1e-5)


def test_two_workers_see_the_batch_and_the_mean_gradient_of_one(
    run_of: RunOf, config_of: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of({"optimizer": {"name": "sgd", "lr": 0.1}, "train.clip": 0.0})
    corpus = open_corpus(config)

    class Worker:
        seed, device, world_size = 0, torch.device("cpu"), 2

        def __init__(self, rank: int) -> None:
            self.rank = rank

        def shard(self, items: list[int]) -> list[int]:
            return items[self.rank :: self.world_size]

        def mean(self, value: float) -> float:
            return value

    def gradients(worker: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = GPT(config.model, 256)
        _Step(config, worker, model, build_optimizer(config.optimizer, model), corpus)(3)
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    both = [gradients(Worker(rank)) for rank in (0, 1)]
    alone = Worker(0)
    alone.world_size = 1
    for name, expected in gradients(alone).items():
        mean = (both[0][name] + both[1][name]) / 2
        torch.testing.assert_close(mean, expected, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "optimizer",
    [
        ADAMW,
        {"name": "sgd", "lr": 0.1, "momentum": 0.9},
        {"name": "muon", "lr": 3e-3},
        {"name": "reg", "lr": 3e-3},
    ],
    ids=lambda optimizer: str(optimizer["name"]),
)
def test_a_stopped_run_goes_on_bit_for_bit(
    optimizer: dict[str, Any], run_of: RunOf, config_of: Callable[..., Config]
) -> None:
    config = config_of({"optimizer": optimizer, "model.dropout": 0.1, "train.schedule": "cosine"})
    whole = run_of(llm, config)
    stopped = run_of(llm, config, stop_after=4)
    assert newest(stopped).name == "step-000000004"
    assert len(stopped.history("train/loss")) == 4
    resumed = stopped.resume()
    assert computed(resumed) == computed(whole)
    assert_same_weights(resumed, whole)
    samples = [(run.directory / "artifacts" / "samples.json").read_text() for run in (resumed, whole)]
    assert samples[0] == samples[1]


def test_steps_behind_the_checkpoint_are_recomputed_to_the_same_bits(
    run_of: RunOf, config_of: Callable[..., Config]
) -> None:
    config = config_of({"checkpoints": {"every": 3}})
    whole = run_of(llm, config)
    run = run_of(llm, config, stop_after=5)
    shutil.rmtree(newest(run))  # as if killed after step 5, with a checkpoint of step 3
    assert newest(run).name == "step-000000003"
    assert computed(run.resume()) == computed(whole)
    assert run.recomputed() == 0
    assert_same_weights(run, whole)


def test_another_seed_is_another_run(run_of: RunOf, config_of: Callable[..., Config]) -> None:
    losses = [run_of(llm, config_of({"seed": seed})).history("train/loss") for seed in (0, 0, 1)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_schedules_in_closed_form(schedule: str) -> None:
    train = Train.model_validate(
        {
            "steps": 101,
            "warmup_steps": 10,
            "schedule": schedule,
            "minimum_lr_ratio": 0.1,
            "decay_fraction": 0.5,
        }
    )
    assert [lr_factor(train, step, train.steps) for step in range(1, 11)] == pytest.approx(
        [k / 10 for k in range(1, 11)]
    )
    assert lr_factor(train, 11, train.steps) == pytest.approx(1.0)
    closed_forms: dict[str, dict[int, float]] = {
        "constant": {50: 1.0, 101: 1.0},
        # half-way between t = 10 and t = 100: m + (1 - m) / 2
        "cosine": {56: 0.55, 101: 0.1, 33 + 8: 0.1 + 0.9 * (1 + math.cos(math.pi / 3)) / 2},
        # the last half of 101 steps, t = 50 .. 100, in a straight line
        "wsd": {40: 1.0, 51: 1.0, 76: 0.55, 101: 0.1},
    }
    for step, factor in closed_forms[schedule].items():
        assert lr_factor(train, step, train.steps) == pytest.approx(factor), step
    factors = [lr_factor(train, step, train.steps) for step in range(11, 102)]
    assert factors == sorted(factors, reverse=True)


def test_the_schedule_multiplies_each_groups_own_lr(run_of: RunOf, config_of: Callable[..., Config]) -> None:
    groups = [{"match": "norm", "lr": 0.5}, {"match": "", "lr": 0.01}]
    config = config_of({"optimizer": {"name": "sgd", "groups": groups}})
    run = run_of(llm, config)
    groups_after = load(newest(run))["optimizer"]["param_groups"]
    factor = lr_factor(config.train, 8, config.train.steps)
    assert [group["lr"] for group in groups_after] == pytest.approx([0.5 * factor, 0.01 * factor])
    assert run.history("train/lr")[3][1] == pytest.approx(
        0.5 * lr_factor(config.train, 4, config.train.steps)
    )


def test_fine_tuning_starts_from_the_checkpoint(run_of: RunOf, config_of: Callable[..., Config]) -> None:
    longer = config_of({"train.steps": 60, "train.validate_every": 0})
    pretrained = run_of(llm, longer)
    tuned = run_of(
        llm, config_of({"init_from": str(newest(pretrained)), "seed": 7, "train.validate_every": 1})
    )
    start = pretrained.history("valid/loss")[-1][1]
    assert tuned.history("train/loss")[0][1] == pytest.approx(start, abs=0.3)
    assert tuned.history("train/loss")[0][1] < 4.5 < math.log(256)


def test_fine_tuning_another_architecture_names_the_first_difference(
    run_of: RunOf, config_of: Callable[..., Config]
) -> None:
    folder = str(newest(run_of(llm, config_of())))
    wider = config_of({"init_from": folder, "model.width": 32})
    message = (
        r"init_from: .*another architecture: 'token_embedding.weight' is \(256, 16\) there, \(256, 32\) here"
    )
    with pytest.raises(CheckpointError, match=message):
        run_of(llm, wider)
    with pytest.raises(CheckpointError, match=r"it has no 'blocks.2.attention_norm.weight'"):
        run_of(llm, config_of({"init_from": folder, "model.layers": 3}))
    with pytest.raises(BadInput, match="vocab_size = 270, but the checkpoint of init_from has 256 tokens"):
        llm.prepare_data(config_of({"init_from": folder, "data.vocab_size": 270}))


def test_fine_tuning_keeps_the_checkpoints_tokens(
    run_of: RunOf, config_of: Callable[..., Config], tmp_path: Path
) -> None:
    pretrained = run_of(llm, config_of({"data.vocab_size": 270}))
    other = tmp_path / "other.txt"
    other.write_text("Quite another text, of other words; never seen before by anyone. " * 60)
    settings = {"data.vocab_size": 270, "data.path": str(other)}
    scratch = config_of(settings)
    tuned = config_of({**settings, "init_from": str(newest(pretrained))})
    run_of(llm, tuned)
    tokenizer = load(newest(pretrained))["tokenizer"]
    assert str(open_corpus(tuned, tokenizer).tokenizer) == tokenizer
    assert str(open_corpus(scratch).tokenizer) != tokenizer
    assert llm.prepare_data(tuned) != llm.prepare_data(scratch)


def test_a_missing_checkpoint_is_found_before_any_worker(
    config_of: Callable[..., Config], tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match="nowhere: not a checkpoint's folder"):
        llm.prepare_data(config_of({"init_from": str(tmp_path / "nowhere")}))


def test_a_loss_that_stays_non_finite_ends_the_run(run_of: RunOf, config_of: Callable[..., Config]) -> None:
    settings = {"optimizer": {"name": "sgd", "lr": 1e30}, "train.clip": 0.0, "train.warmup_steps": 0}
    diverging = config_of({**settings, "train.non_finite_steps": 3, "train.samples": 0})
    with pytest.raises(PisteError, match=r"not been finite since step [2-5]: lower optimizer.lr") as caught:
        run_of(llm, diverging)
    assert "\n" not in str(caught.value)


def test_a_non_finite_loss_is_logged_and_training_goes_on(
    run_of: RunOf, config_of: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = _Step.__call__

    def stumbles(self: _Step, step: int) -> dict[str, float]:
        metrics = original(self, step)
        return metrics | ({"train/loss": math.nan} if step in (2, 3, 5, 6) else {})

    monkeypatch.setattr(_Step, "__call__", stumbles)
    run = run_of(llm, config_of({"train.non_finite_steps": 3}))
    values = dict(run.history("train/loss"))
    assert len(values) == 8
    assert [step for step, value in values.items() if math.isnan(value)] == [2, 3, 5, 6]


def test_an_optimizer_of_two_passes_runs_in_the_same_loop(
    run_of: RunOf, config_of: Callable[..., Config]
) -> None:
    config = config_of({"optimizer": {"name": f"{__name__}.TwoPasses", "lr": 0.1}, "train.clip": 0.0})
    one = config_of({"optimizer": {"name": "sgd", "lr": 0.1}, "train.clip": 0.0})
    two_passes, one_pass = run_of(llm, config), run_of(llm, one)
    assert two_passes.history("train/loss") == one_pass.history("train/loss")
    assert_same_weights(two_passes, one_pass)


class TwoPasses(torch.optim.Optimizer):
    """Gradient descent that asks for the gradient twice."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
            closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(parameter.grad, alpha=-group["lr"])
        return loss


def test_the_loss_falls_below_the_unigram_entropy(run_of: RunOf, config_of: Callable[..., Config]) -> None:
    config = config_of({"train.steps": 80, "train.batch": 16, "optimizer.lr": 1e-2, "model.width": 32})
    run = run_of(llm, config)
    counts = np.bincount(open_corpus(config).validation)
    frequencies = counts[counts > 0] / counts.sum()
    entropy = -float((frequencies * np.log(frequencies)).sum())
    assert 2.0 < entropy < 3.0
    assert run.history("valid/loss")[-1][1] < 0.8 * entropy


def test_samples_of_a_checkpoint(run_of: RunOf, config_of: Callable[..., Config]) -> None:
    config = config_of()
    run = run_of(llm, config)
    rows = llm.verbs["sample"](config, newest(run), prompt="In the ", tokens=7, seed=3, count=2)
    assert [row["prompt"] for row in rows] == ["In the ", "In the "]
    assert rows == llm.sample(config, newest(run), prompt="In the ", tokens=7, seed=3, count=2)
    assert rows != llm.sample(config, newest(run), prompt="In the ", tokens=7, seed=4, count=2)
    assert all(row["text"] for row in rows)
    with pytest.raises(BadInput, match="sample: tokens = 0 must be at least 1"):
        llm.sample(config, newest(run), tokens=0)
    with pytest.raises(CheckpointError, match="no such file"):
        llm.sample(config, run.directory)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train.batch": 6, "train.accumulate": 4}, "batch = 6 must be a multiple of .* = 1 x 4 = 4"),
        ({"resources.workers": 3}, "batch = 8 must be a multiple of .* = 3 x 1 = 3"),
        ({"train.warmup_steps": 8}, "warmup_steps = 8 must be below steps = 8"),
        ({"train.schedule": "linear"}, "'cosine', 'wsd' or 'constant'"),
        ({"model.mlp": "relu"}, "'swiglu' or 'gelu'"),
        ({"train.stepz": 8}, "unknown key 'train.stepz'; did you mean 'steps'?"),
    ],
)
def test_settings_that_cannot_be_trained(
    overrides: dict[str, Any], message: str, config_of: Callable[..., Config]
) -> None:
    with pytest.raises(BadInput, match=message):
        config_of(overrides)


def test_bf16_trains_on_this_device(run_of: RunOf, config_of: Callable[..., Config]) -> None:
    exact = run_of(llm, config_of())
    rounded = run_of(llm, config_of({"train.bf16": True}))
    assert rounded.history("train/loss") != exact.history("train/loss")
    expected = values(exact, "train/loss")
    assert values(rounded, "train/loss") == pytest.approx(expected, abs=0.02)
    assert all(tensor.dtype == torch.float32 for tensor in weights(rounded).values())


def test_the_defaults_are_a_valid_recipe() -> None:
    assert Config().train.batch % Config().resources.workers == 0
    assert isinstance(Config().optimizer, Optimizer)


def test_the_demo_recipes_differ_in_their_optimizer_alone() -> None:
    recipes = {name: load_recipe(name) for name in ("llm-adamw", "llm-muon", "llm-reg")}
    assert [recipe.optimizer.name for recipe in recipes.values()] == ["adamw", "muon", "reg"]
    tables = [recipe.model_dump(exclude={"optimizer", "sweep"}) for recipe in recipes.values()]
    assert tables[0] == tables[1] == tables[2]


def test_the_recipe_for_gpus_is_valid_and_of_the_size_it_states() -> None:
    recipe = load_recipe("llm-gpu")
    assert isinstance(recipe, Config)
    assert parameter_count(recipe.model, recipe.data.vocab_size) == pytest.approx(123.6e6, rel=1e-3)
