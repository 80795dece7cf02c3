"""Training on images: the loop against plain torch, what it measures, resume, several workers, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tests.workloads.local_runs import LocalRun, RunOf
from torch import Tensor, nn

from piste.catalog import members
from piste.checkpoints import CheckpointError, load
from piste.config import override, validate
from piste.errors import BadInput, PisteError
from piste.running import load_recipe
from piste_workloads import images
from piste_workloads.images.augmentation import augment, draw
from piste_workloads.images.config import Config
from piste_workloads.images.networks import build_network
from piste_workloads.images.task import Classification
from piste_workloads.images.train import network_of
from piste_workloads.schedule import lr_factor
from piste_workloads.supervised.loop import _Training
from piste_workloads.supervised.randomness import generator_at, order_of

CPU = torch.device("cpu")
SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.9}
ConfigOf = Callable[..., Config]


def config_of(overrides: Mapping[str, Any] | None = None) -> Config:
    """Three epochs of two steps of a tiny MLP on digits, with dotted overrides."""
    table: dict[str, Any] = {
        "workload": "images",
        "model": {"name": "mlp", "hidden": [16]},
        "data": {"name": "digits", "samples": 64},
        "optimizer": SGD,
        "train": {"epochs": 3, "batch": 24},
    }
    return validate(Config, override(table, overrides or {}), "test")


CONVOLUTIONAL = {"model": {"name": "conv", "width": 2}, "augmentation": {"crop": 1, "cutout": 2}}


def newest(run: LocalRun) -> Path:
    return max((run.directory / "checkpoints").glob("step-*"))


def weights(run: LocalRun) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load(newest(run))["model"]
    return found


def computed(run: LocalRun) -> dict[str, list[tuple[int, float]]]:
    """All metrics but those of the clock."""
    keys = run.ledger.keys("run")
    return {key: run.history(key) for key in keys if not key.startswith(("time/", "system/"))}


def assert_same_weights(a: LocalRun, b: LocalRun) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_the_loop_equals_plain_torch(run_of: RunOf) -> None:
    config = config_of({"augmentation.crop": 1, "train.warmup_steps": 2, "train.label_smoothing": 0.1})
    run = run_of(images, config)

    task = Classification(config, CPU)
    model = network_of(config, task, config.seed)
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.SGD([{"params": decayed}, {"params": others}], lr=0.1, momentum=0.9)
    losses, accuracies = [], []
    for step in range(1, 7):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * lr_factor(config.train, step, 6)
        order = order_of((step - 1) // 2, config.seed, 58)
        chosen = order[:24] if step % 2 else order[24:48]
        inputs, labels = task.examples("train", chosen)
        draws = draw(config.augmentation, 24, 8, 8, generator_at(step, config.seed, CPU))
        optimizer.zero_grad()
        logits = model(augment(inputs, config.augmentation, draws))
        loss = nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append((step, loss.item()))
        accuracies.append((step, (logits.argmax(1) == labels).float().mean().item()))
    assert run.history("train/loss") == losses
    assert run.history("train/accuracy") == accuracies
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights(run)[name], tensor), name
    with torch.no_grad():
        inputs, labels = task.examples("test", torch.arange(797))
        expected = (model(inputs).argmax(1) == labels).double().mean().item()
    ((_, found),) = run.history("test/accuracy")
    assert found == pytest.approx(expected)


def test_what_a_run_leaves_behind(run_of: RunOf) -> None:
    run = run_of(images, config_of({"train.sharpness_examples": 8, "train.sharpness_every": 2}))
    for key in ("train/loss", "train/accuracy", "train/lr"):
        assert [step for step, _ in run.history(key)] == [1, 2, 3, 4, 5, 6], key
    per_epoch = ["valid/loss", "valid/accuracy", "cost/gradient_evaluations", "time/epoch_s"]
    per_epoch += ["cost/gradient_evaluations_per_step", "time/epoch_cpu_s", "time/cpu_s"]
    for key in per_epoch:
        assert [step for step, _ in run.history(key)] == [2, 4, 6], key
    for key in ("test/loss", "test/accuracy"):
        assert [step for step, _ in run.history(key)] == [6], key
    assert [step for step, _ in run.history("sharpness/top_eigenvalue")] == [4, 6]
    assert [value for _, value in run.history("cost/gradient_evaluations")] == [2, 4, 6]
    seconds = [value for _, value in run.history("time/epoch_cpu_s")]
    assert [value for _, value in run.history("time/cpu_s")] == pytest.approx(np.cumsum(seconds).tolist())
    names = {artifact.name for artifact in run.ledger.artifacts("run") if artifact.kind == "figure"}
    assert names == {"accuracy-gradient-evaluations.png", "accuracy-seconds.png"}
    table = json.loads((run.directory / "artifacts" / "data.json").read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [(row["split"], row["source"], row["n"]) for row in rows] == [
        ("train", "scikit-learn", 1000),
        ("test", "scikit-learn", 797),
    ]


WRAPPED = ("sam", "looksam", "aesam", "arsam")


@pytest.mark.parametrize("name", WRAPPED)
def test_every_gradient_evaluation_is_counted(
    name: str, run_of: RunOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = 0
    original = _Training._forward_and_backward

    def counted(self: _Training, micro_batches: Any) -> Any:
        nonlocal passes
        passes += 1
        return original(self, micro_batches)

    monkeypatch.setattr(_Training, "_forward_and_backward", counted)
    optimizer = {"name": name, "base": SGD}
    run = run_of(images, config_of({"optimizer": optimizer, "train.epochs": 12}))
    (_, spent), *_ = reversed(run.history("cost/gradient_evaluations"))
    assert spent == passes
    assert passes == 48 if name == "sam" else 24 < passes < 48
    each = [value for _, value in run.history("cost/gradient_evaluations_per_step")]
    assert 2 * sum(each) == pytest.approx(spent)
    (_, fraction), *_ = reversed(run.history("optimizer/sam_fraction"))
    assert fraction == pytest.approx(passes / 24 - 1)
    assert all(value > 0.0 for _, value in run.history("optimizer/psf_norm"))
    names = {artifact.name for artifact in run.ledger.artifacts("run")}
    assert "psf-norm.png" in names


def test_accumulated_micro_batches_equal_the_full_batch(run_of: RunOf) -> None:
    full, parts = (run_of(images, config_of({"train.accumulate": parts})) for parts in (1, 4))
    for name, tensor in weights(full).items():
        torch.testing.assert_close(weights(parts)[name], tensor, rtol=0, atol=1e-6, msg=name)
    for key in ("train/loss", "train/accuracy"):
        expected = [value for _, value in full.history(key)]
        assert [value for _, value in parts.history(key)] == pytest.approx(expected, abs=1e-5)


class Worker:
    """One of some workers, without the others."""

    seed, device = 0, CPU

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size

    def prepare(self, model: nn.Module) -> nn.Module:
        return model

    def shard(self, items: list[int]) -> list[int]:
        return items[self.rank :: self.world_size]

    def mean(self, value: float) -> float:
        return value


def test_two_workers_see_the_batch_and_the_mean_gradient_of_one() -> None:
    config = config_of({"augmentation": {"crop": 1, "flip": True, "cutout": 2}})
    task = Classification(config, CPU)

    def gradients(worker: Any) -> dict[str, Tensor]:
        model = network_of(config, task, 0)
        training = _Training(config, worker, model, torch.optim.SGD(model.parameters(), lr=0.1), task)
        training.step(3, order_of(1, 0, 58)[:24])
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    both = [gradients(Worker(rank, 2)) for rank in (0, 1)]
    for name, expected in gradients(Worker(0, 1)).items():
        mean = (both[0][name] + both[1][name]) / 2
        torch.testing.assert_close(mean, expected, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("name", "stop_after"), [("sgd", 4), *((name, 3) for name in ("sgd", "adamw", "egd", *WRAPPED))]
)
def test_a_stopped_run_goes_on_bit_for_bit(name: str, stop_after: int, run_of: RunOf) -> None:
    optimizer = {"name": name, "lr": 0.05} if name in {"sgd", "adamw"} else {"name": name, "base": SGD}
    config = config_of({"optimizer": optimizer, **CONVOLUTIONAL})
    whole = run_of(images, config)
    stopped = run_of(images, config, stop_after=stop_after)
    assert newest(stopped).name == f"step-00000000{stop_after}"
    assert not stopped.history("test/accuracy")
    resumed = stopped.resume()
    assert computed(resumed) == computed(whole)
    assert_same_weights(resumed, whole)
    assert resumed.recomputed() == 0


def test_another_seed_is_another_start_and_another_order(run_of: RunOf) -> None:
    losses = [run_of(images, config_of({"seed": seed})).history("train/loss") for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert not torch.equal(order_of(0, 0, 50), order_of(0, 1, 50))
    assert not torch.equal(order_of(0, 0, 50), order_of(1, 0, 50))


def test_the_test_part_is_not_looked_at_before_the_end(
    run_of: RunOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[str] = []
    original = Classification.examples

    def watched(self: Classification, part: str, indices: Tensor) -> tuple[Tensor, Tensor]:
        parts.append(part)
        return original(self, part, indices)

    monkeypatch.setattr(Classification, "examples", watched)
    run_of(images, config_of())
    assert parts == 2 * ["train", "train", "valid"] + ["train", "train", "valid", "test", "test"]
    run = run_of(images, config_of({"train.test_every": 1, "data.validation_fraction": 0.0}))
    assert [step for step, _ in run.history("test/accuracy")] == [2, 4, 6]
    assert not run.history("valid/accuracy")


class Told(torch.optim.SGD):
    """Gradient descent that is told the validation accuracy."""

    heard: list[float]

    def notify(self, accuracy: float) -> None:
        Told.heard.append(accuracy)


def test_an_optimizer_is_told_the_validation_accuracy_alone(run_of: RunOf) -> None:
    Told.heard = []
    run = run_of(images, config_of({"optimizer": {"name": f"{__name__}.Told", "lr": 0.1}}))
    assert Told.heard == [value for _, value in run.history("valid/accuracy")]
    run_of(
        images,
        config_of(
            {
                "optimizer": {"name": f"{__name__}.Told", "lr": 0.1},
                "data.validation_fraction": 0.0,
                "train.test_every": 1,
            }
        ),
    )
    assert len(Told.heard) == 3


def test_the_sharpness_is_the_hessians_largest_eigenvalue(run_of: RunOf) -> None:
    from torch.autograd.functional import hessian
    from torch.func import functional_call

    config = config_of({"model.hidden": [2], "train.sharpness_examples": 20})
    run = run_of(images, config)
    task = Classification(config, CPU)
    inputs, labels = task.examples("train", torch.arange(20) * 58 // 20)
    model = network_of(config, task, 0).double()
    names, tensors = zip(*weights(run).items(), strict=True)

    def loss_of(vector: Tensor) -> Tensor:
        parts = vector.split([tensor.numel() for tensor in tensors])  # type: ignore[no-untyped-call]
        shaped = {name: part.view_as(t) for name, part, t in zip(names, parts, tensors, strict=True)}
        outputs = functional_call(model, shaped, (inputs.double(),))
        return nn.functional.cross_entropy(outputs, labels)

    matrix = hessian(loss_of, torch.cat([t.flatten().double() for t in tensors]))  # type: ignore[no-untyped-call]
    explicit = np.linalg.eigvalsh(matrix.numpy())[-1]
    ((_, found),) = run.history("sharpness/top_eigenvalue")
    assert found == pytest.approx(explicit, rel=0.02)


@pytest.mark.parametrize(
    "settings", [{"train.epochs": 12}, {"model": {"name": "conv", "width": 4}, "train.epochs": 6}]
)
def test_learns(settings: dict[str, Any], run_of: RunOf) -> None:
    run = run_of(images, config_of({"data.samples": 0, **settings}))
    (_, accuracy), *_ = reversed(run.history("test/accuracy"))
    assert accuracy > 0.9


def test_bf16_trains_on_this_device(run_of: RunOf) -> None:
    exact, rounded = (run_of(images, config_of({"train.bf16": bf16})) for bf16 in (False, True))
    expected = [value for _, value in exact.history("train/loss")]
    found = [value for _, value in rounded.history("train/loss")]
    assert found != expected
    assert found == pytest.approx(expected, abs=0.05)
    assert all(tensor.dtype == torch.float32 for tensor in weights(rounded).values())


def test_a_loss_that_stays_non_finite_ends_the_run(run_of: RunOf) -> None:
    config = config_of({"optimizer": {"name": "sgd", "lr": 1e30}, "train.non_finite_steps": 3})
    with pytest.raises(PisteError, match=r"not been finite since step [2-4]: lower optimizer.lr") as caught:
        run_of(images, config)
    assert "\n" not in str(caught.value)


# -- the verb ---------------------------------------------------------------------------------------


def digit(number: int) -> NDArray[np.uint8]:
    from piste_workloads.data import load as load_data

    return load_data("digits", split="test").x[number, 0].numpy()


def test_predictions_are_the_networks(run_of: RunOf, tmp_path: Path) -> None:
    config = config_of()
    run = run_of(images, config)
    task = Classification(config, CPU)
    model = network_of(config, task, 1)
    model.load_state_dict(weights(run))
    with torch.no_grad():
        expected = model(task.examples("test", torch.arange(3))[0]).softmax(1)
    for number in range(3):
        Image.fromarray(digit(number)).save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    rows = images.verbs["predict"](config, newest(run), images=str(tmp_path), top=0)
    assert [row["image"] for row in rows] == [f"{number}.png" for number in range(3) for _ in range(10)]
    for number in range(3):
        mine = rows[10 * number : 10 * number + 10]
        found = {row["class"]: row["probability"] for row in mine}
        assert [found[str(label)] for label in range(10)] == pytest.approx(
            expected[number].tolist(), rel=1e-5
        )
        assert [row["probability"] for row in mine] == sorted(found.values(), reverse=True)
    (best,) = images.predict(config, newest(run), images=str(tmp_path / "1.png"), top=1)
    assert best == {**rows[10], "image": "1.png"}
    Image.fromarray(digit(0)).resize((40, 24)).convert("RGB").save(tmp_path / "large.png")
    assert len(images.predict(config, newest(run), images=str(tmp_path / "large.png"))) == 3


def test_pictures_that_cannot_be_predicted(run_of: RunOf, tmp_path: Path) -> None:
    config = config_of()
    checkpoint = newest(run_of(images, config))
    (tmp_path / "broken.png").write_bytes(b"junk")
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ({}, "--images: a picture, or a folder of pictures"),
        ({"images": str(tmp_path / "none.png")}, "none.png: no such file"),
        ({"images": str(tmp_path / "empty")}, "no picture in this folder"),
        ({"images": str(tmp_path / "broken.png")}, "broken.png cannot be read: cannot identify image file"),
        ({"top": -1}, "top = -1 must be at least 0"),
    ):
        with pytest.raises(BadInput, match=message):
            images.predict(config, checkpoint, **arguments)
    with pytest.raises(CheckpointError, match="another architecture"):
        images.predict(config_of({"model.hidden": [8]}), checkpoint, images=str(tmp_path / "broken.png"))


# -- data and bad input -----------------------------------------------------------------------------


def test_the_hash_is_that_of_the_images_and_labels() -> None:
    first = images.prepare_data(config_of())
    assert images.prepare_data(config_of({"seed": 5, "train.epochs": 9, "optimizer.lr": 1.0})) == first
    others: list[dict[str, Any]] = [
        {"data.seed": 1},
        {"data.label_noise": 0.5},
        {"data.samples": 65},
        {"data.name": "mnist5k"},
    ]
    hashes = {images.prepare_data(config_of(each)) for each in others}
    hashes.add(images.prepare_data(config_of({"data.label_noise": 0.5, "data.noise_seed": 1})))
    assert len(hashes | {first}) == 6


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"train.batch": 59},
            "train.batch = 59, but there are 58 training examples: lower it or use more",
        ),
        ({"train.warmup_steps": 6}, "train.warmup_steps = 6 must be below the run's 6 steps"),
        ({"data.samples": 5000}, "data.samples = 5000: digits has 1000 training images"),
        ({"data.samples": 4, "train.batch": 1}, "the valid part is empty"),
        ({"data.name": "cifar10", "data.samples": 0}, "cifar10 is not to be had: set PISTE_DATA"),
    ],
)
def test_images_that_cannot_be_trained_on_are_found_before_any_worker(
    overrides: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PISTE_DATA", raising=False)
    with pytest.raises(BadInput, match=message) as caught:
        images.prepare_data(config_of(overrides))
    assert "\n" not in str(caught.value)


def test_a_part_must_have_an_example_for_every_worker() -> None:
    config = config_of({"data.samples": 20, "train.batch": 18, "resources.workers": 3})
    with pytest.raises(BadInput, match=r"the valid part has 2 examples for resources.workers = 3"):
        images.prepare_data(config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train.accumulate": 5}, "train.batch = 24 must be a multiple of .* = 1 x 5 = 5"),
        ({"resources.workers": 7}, "train.batch = 24 must be a multiple of .* = 7 x 1 = 7"),
        ({"data.name": "cifar"}, "data.name: unknown data set; did you mean 'cifar10'?"),
        ({"data.validation_fraction": 1.0}, "less than 1"),
        ({"data.skip-bad": True}, "unknown key 'data.skip-bad'; did you mean 'skip_bad'?"),
        ({"model.name": "resnet50"}, "'mlp', 'conv', 'resnet'"),
    ],
)
def test_settings_that_cannot_be_trained(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        config_of(overrides)


@pytest.mark.parametrize("name", ["digits", "mnist5k", "photo_patches"])
@pytest.mark.parametrize("data", [{}, {"samples": 700}, {"validation_fraction": 0.0}])
def test_the_length_of_a_run_is_known_without_its_images(name: str, data: dict[str, Any]) -> None:
    config = config_of({"data": {"name": name, **data}})
    assert config.examples == Classification(config, CPU).sizes["train"]
    assert config.total_steps == 3 * (config.examples // 24)


def test_the_demo_recipes_differ_in_their_optimizer_alone() -> None:
    recipes = {name: load_recipe(f"images-{name}") for name in ("sgd", "sam", "arsam")}
    assert [recipe.optimizer.chain[-1] for recipe in recipes.values()] == 3 * [recipes["sgd"].optimizer]
    assert [recipe.optimizer.name for recipe in recipes.values()] == ["sgd", "sam", "arsam"]
    tables = [recipe.model_dump(exclude={"optimizer", "sweep"}) for recipe in recipes.values()]
    assert tables[0] == tables[1] == tables[2]


def test_the_label_noise_bench_is_the_specified_one() -> None:
    recipe = load_recipe("digits-noise")
    assert isinstance(recipe, Config)
    task = Classification(recipe, CPU)
    assert task.sizes == {"train": 1000, "test": 797}
    shapes = [tuple(p.shape) for p in network_of(recipe, task, 0).parameters() if p.ndim == 2]
    assert shapes == [(256, 64), (256, 256), (10, 256)]
    assert (recipe.total_steps, recipe.data.label_noise) == (60 * 15, 0.4)


def test_the_recipe_for_gpus_is_valid_and_of_the_size_it_states() -> None:
    recipe = load_recipe("cifar10-arsam-gpu")
    assert isinstance(recipe, Config)
    assert "never run by its authors" in members("recipes")["cifar10-arsam-gpu"].summary
    assert recipe.total_steps == 200 * 390
    assert recipe.optimizer.options["warmup_steps"] == 3 * 390
    with torch.device("meta"):
        model = build_network(recipe.model, 3, 32, 10, torch.Generator("cpu"))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(36.5e6, rel=1e-3)
