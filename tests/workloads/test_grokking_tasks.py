"""The tasks of grokking against brute force, the networks against other implementations of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from piste.config import validate
from piste.errors import BadInput
from piste_workloads.data import load
from piste_workloads.grokking.config import Config, Digits, Modular, Parity
from piste_workloads.grokking.networks import Block, network
from piste_workloads.grokking.points import Dataset
from piste_workloads.grokking.tasks import correct, dataset, loss

CPU = torch.device("cpu")


NAMES = {"task": {"name": "addition"}, "model": {"name": "two-layer"}}  # what a recipe leaves out


def completed(tables: dict[str, Any]) -> dict[str, Any]:
    return {key: {**NAMES.get(key, {}), **table} for key, table in tables.items()}


def config_of(**tables: Any) -> Config:
    return Config.model_validate(completed(tables))


def points_of(seed: int = 0, **tables: Any) -> Dataset:
    return dataset(config_of(**tables), seed, CPU)


def rows(split: Any) -> list[bytes]:
    return [row.tobytes() for row in split.inputs.numpy()]


@pytest.mark.parametrize("p", [3, 5, 11])
@pytest.mark.parametrize("name", ["addition", "multiplication"])
@pytest.mark.parametrize("model", ["two-layer", "transformer"])
def test_modular_arithmetic_is_all_of_it_once(name: str, p: int, model: str) -> None:
    found = points_of(
        task={"name": name, "modulus": p, "validation_fraction": 0.4},
        model={"name": model},
        train={"batch": 0},
    )
    seen = {}
    for inputs, targets in found:
        for row, target in zip(inputs.tolist(), targets.tolist(), strict=True):
            if model == "transformer":
                a, operation, b, equals = row
                assert (operation, equals) == (p, p + 1)
            else:
                assert sorted(set(row)) == [0.0, 1.0]
                assert sum(row[:p]) == sum(row[p:]) == 1.0
                a, b = row[:p].index(1.0), row[p:].index(1.0)
            assert (a, b) not in seen
            seen[a, b] = target
    assert seen == {(a, b): (a + b if name == "addition" else a * b) % p for a in range(p) for b in range(p)}
    assert len(found.train.targets) == p * p // 2
    assert len(found.validation.targets) == int(0.4 * (p * p - p * p // 2))


def test_the_papers_setting() -> None:
    config = Config()
    assert isinstance(config.task, Modular)
    found = dataset(config, 0, CPU)
    assert [len(split.targets) for split in found] == [4704, 2352, 2353]
    assert (config.batches, config.batch) == (9, 512)
    weights = {name: tuple(value.shape) for name, value in network(config, 0).named_parameters()}
    assert weights == {"hidden.weight": (512, 194), "hidden.bias": (512,), "output.weight": (97, 512)}


@pytest.mark.parametrize("secret", [1, 2, 3, 4])
def test_parity_counts_the_secret_bits(secret: int) -> None:
    found = points_of(
        task={"name": "parity", "bits": 30, "secret": secret, "train_points": 500, "test_points": 700},
        train={"batch": 32},
    )
    assert [len(split.targets) for split in found] == [500, 2000, 700]
    for inputs, targets in found:
        assert set(inputs.flatten().tolist()) == {-1.0, 1.0}
        for row, target in zip(inputs.tolist(), targets.tolist(), strict=True):
            minus = sum(bit == -1.0 for bit in row[:secret])
            assert target == (-1.0 if minus % 2 else 1.0)
    bits = torch.cat([split.inputs for split in found])
    # Independent fair bits: the sum of each is about N(0, points); 4.5 standard deviations in 30 draws: 2e-4.
    assert float(bits.sum(0).abs().max()) < 4.5 * math.sqrt(len(bits))
    assert float((bits.T @ bits / len(bits) - torch.eye(30)).abs().max()) < 5.5 / math.sqrt(len(bits))


def test_no_long_parity_point_is_in_two_splits() -> None:
    found = points_of(
        task={"name": "parity", "train_points": 300, "validation_points": 300, "test_points": 300},
        train={"batch": 32},
    )
    assert len({row for split in found for row in rows(split)}) == 900


def test_digits_are_images_of_the_data_set_in_three_disjoint_parts() -> None:
    found = points_of(task={"name": "digits"}, model={"name": "deep"}, train={"batch": 200})
    assert [len(split.targets) for split in found] == [1000, 1000, 1000]
    everything = load("mnist5k")
    vectors = (everything.x.flatten(1).float() / 255.0).numpy()
    label_of = {row.tobytes(): label for row, label in zip(vectors, everything.y.tolist(), strict=True)}
    assert len(label_of) == 5000
    seen = [row for split in found for row in rows(split)]
    assert len(set(seen)) == 3000
    labels = torch.cat([split.targets for split in found]).tolist()
    assert [label_of[row] for row in seen] == labels


@pytest.mark.parametrize("name", ["addition", "parity", "digits"])
def test_a_seed_is_a_split(name: str) -> None:
    tables = {"task": {"name": name}, "train": {"batch": 32}}
    first, again, other = (points_of(seed, **tables) for seed in (3, 3, 4))
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one.inputs, two.inputs)
        assert torch.equal(one.targets, two.targets)
    assert not torch.equal(first.train.inputs, other.train.inputs)


def test_losses_and_right_answers_by_hand() -> None:
    outputs, targets = torch.tensor([2.0, -0.5, 0.25]), torch.tensor([1.0, 1.0, -1.0])
    squared, hinge = (
        config_of(task={"name": "parity", "loss": name}, train={"batch": 32}) for name in ("squared", "hinge")
    )
    toy = config_of(task={"name": "toy"}, model={"name": "linear"}, train={"batch": 0})
    mean = (1.0 + 2.25 + 1.5625) / 3
    assert float(loss(squared, outputs, targets)) == pytest.approx(mean)
    assert float(loss(toy, outputs, targets)) == pytest.approx(mean / 2)
    assert float(loss(hinge, outputs, targets)) == pytest.approx((0.0 + 1.5 + 1.25) / 3)
    assert correct(outputs, targets).tolist() == [True, False, False]

    logits, classes = torch.tensor([[0.0, math.log(3.0)], [1.0, 1.0 + math.log(4.0)]]), torch.tensor([1, 0])
    expected = -(math.log(0.75) + math.log(0.2)) / 2
    assert float(loss(Config(), logits, classes)) == pytest.approx(expected)
    assert correct(logits, classes).tolist() == [True, False]
    scores = torch.zeros(1, 10)
    scores[0, 3] = 0.5
    digits = config_of(task={"name": "digits"}, model={"name": "deep"}, train={"batch": 200})
    assert float(loss(digits, scores, torch.tensor([3]))) == pytest.approx(0.25 / 10)


class TestNetworks:
    @pytest.mark.parametrize("random_bias", [False, True])
    def test_the_first_weights_of_two_layers(self, random_bias: bool) -> None:
        config = config_of(
            task={"name": "parity"},
            model={"name": "two-layer", "width": 300, "random_bias": random_bias},
            train={"batch": 32},
        )
        weights = {name: value.detach().flatten() for name, value in network(config, 1).named_parameters()}
        deviations = {"hidden.weight": math.sqrt(2 / 400), "output.weight": math.sqrt(2 / 300)}
        if random_bias:
            deviations["hidden.bias"] = math.sqrt(2 / 400)
        else:
            assert not weights["hidden.bias"].any()
        for name, deviation in deviations.items():
            assert stats.kstest(weights[name].numpy(), "norm", (0.0, deviation)).pvalue > 1e-3, name

    def test_two_layers_are_the_papers_formula(self) -> None:
        config = config_of(model={"name": "two-layer", "width": 7}, task={"modulus": 5}, train={"batch": 4})
        made = network(config, 0)
        w1, b1, w2 = (value.detach().numpy() for value in made.parameters())
        x = np.random.default_rng(0).normal(size=(6, 10)).astype(np.float32)
        expected = np.maximum(x @ w1.T + b1, 0.0) @ w2.T
        np.testing.assert_allclose(made(torch.from_numpy(x)).detach().numpy(), expected, rtol=1e-5)

    def test_deep_layers_start_as_torch_times_the_scale(self) -> None:
        config = config_of(task={"name": "digits"}, model={"name": "deep"}, train={"batch": 200})
        made = network(config, 0)
        shapes = [tuple(value.shape) for value in made.parameters()]
        assert shapes == [(200, 784), (200,), (200, 200), (200,), (10, 200), (10,)]
        torch.manual_seed(0)
        for name, layer in made.named_modules():
            if isinstance(layer, nn.Linear):
                reference = nn.Linear(layer.in_features, layer.out_features)
                for ours, theirs in zip(layer.parameters(), reference.parameters(), strict=True):
                    same = stats.ks_2samp(ours.detach().flatten(), 8.0 * theirs.detach().flatten())
                    assert same.pvalue > 1e-3, name

    def test_attention_is_torchs_own(self) -> None:
        torch.manual_seed(0)
        block = Block(12, 3)
        reference = nn.MultiheadAttention(12, 3, batch_first=True)
        qkv, projection = block.qkv, block.projection
        with torch.no_grad():
            reference.in_proj_weight.copy_(qkv.weight)
            reference.in_proj_bias.copy_(qkv.bias)
            reference.out_proj.weight.copy_(projection.weight)
            reference.out_proj.bias.copy_(projection.bias)
        inputs = torch.randn(5, 4, 12)
        normed = block.attention_norm(inputs)
        mask = nn.Transformer.generate_square_subsequent_mask(4)
        mixed, _ = reference(normed, normed, normed, attn_mask=mask, need_weights=False)
        states = normed + mixed
        expected = states + block.down(nn.functional.gelu(block.up(block.mlp_norm(states))))
        torch.testing.assert_close(block(inputs), expected)

    def test_the_decoder_reads_all_four_tokens_and_their_order(self) -> None:
        config = config_of(task={"modulus": 7}, model={"name": "transformer"}, train={"batch": 4})
        made = network(config, 0)
        tokens = torch.tensor([[1, 7, 2, 8]])
        answer = made(tokens)
        assert answer.shape == (1, 7)
        for place in range(4):
            other = tokens.clone()
            other[0, place] = 3
            assert not torch.allclose(made(other), answer)
        assert not torch.allclose(made(tokens[:, [2, 1, 0, 3]]), answer)

    def test_what_there_is_to_train_in_the_decoder(self) -> None:
        made = network(config_of(model={"name": "transformer"}), 0)
        d, p = 128, 97
        block = (3 * d * d + 3 * d) + (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d) + 2 * 2 * d
        assert sum(value.numel() for value in made.parameters()) == (
            (p + 2) * d + 4 * d + 2 * block + 2 * d + d * p
        )

    @pytest.mark.parametrize("model", ["two-layer", "deep", "transformer"])
    def test_a_seed_is_a_start(self, model: str) -> None:
        config = config_of(task={"modulus": 7}, model={"name": model}, train={"batch": 4, "dtype": "float64"})
        first, again, other = (network(config, seed).state_dict() for seed in (0, 0, 1))
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not all(torch.equal(first[name], other[name]) for name in first)
        assert {value.dtype for value in first.values()} == {torch.float64}


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"task": {"modulus": 2}}, "modulus = 2: it must be at least 3, such as 97"),
        ({"task": {"name": "parity", "bits": 3, "secret": 4}}, "secret = 4 parity bits of bits = 3"),
        (
            {"task": {"modulus": 3, "validation_fraction": 0.1}},
            "of 9 pairs 4 are for training, 0 for validation",
        ),
        ({"task": {"name": "digits", "train_points": 3500}}, "are more than the 4000 images of mnist5k"),
        ({"task": {"name": "toy", "start": [1.0, 0.0]}}, "there is nothing to unlearn"),
        ({"task": {"name": "sums"}}, "task: Input tag 'sums' found using 'name' does not match"),
        ({"task": {"name": "parity"}, "model": {"name": "transformer"}}, 'cannot do parity: use "two-layer"'),
        ({"task": {"name": "toy"}}, 'model.name = "two-layer" cannot do toy: use "linear"'),
        ({"model": {"name": "linear"}}, 'model.name = "linear" cannot do addition'),
        ({"model": {"name": "transformer", "heads": 5}}, "width = 128 must be a multiple of heads = 5"),
        ({"train": {"batch": 4705}}, "train.batch = 4705 is more than the 4704 training points"),
        ({"resources": {"workers": 3}}, "a batch of 512 cannot be shared by resources.workers = 3"),
        ({"task": {"bits": 4}}, "unknown key 'task.addition.bits'"),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_do(tables: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput) as caught:
        validate(Config, completed(tables), "recipe")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sections_of_other_tasks_keep_to_their_own() -> None:
    parity = config_of(task={"name": "parity"}, train={"batch": 32})
    digits = config_of(task={"name": "digits"}, train={"batch": 32})
    assert isinstance(parity.task, Parity)
    assert isinstance(digits.task, Digits)
    assert (parity.batches, digits.batches) == (62, 31)
