"""The networks for images, and what is done to images and labels before a network sees them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from piste_workloads.images.augmentation import Draws, augment, draw
from piste_workloads.images.config import Augmentation, Config, Model
from piste_workloads.images.networks import ResNet, WideResNet, build_network
from piste_workloads.images.task import Classification, noisy, statistics

CPU = torch.device("cpu")


def network(side: int = 32, channels: int = 3, classes: int = 10, seed: int = 0, **section: Any) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    return build_network(Model.model_validate(section), channels, side, classes, generator)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("section", "classes", "parameters"),
    [
        # The counts that the field knows these networks by.
        ({"name": "resnet18"}, 10, 11_173_962),
        ({"name": "resnet18"}, 100, 11_220_132),
        ({"name": "resnet", "depth": 20}, 10, 272_474),
        ({"name": "resnet", "depth": 56}, 10, 855_770),
        ({"name": "wide_resnet", "depth": 28, "width": 10}, 10, 36_479_194),
        ({"name": "wide_resnet", "depth": 16, "width": 4}, 10, 2_748_890),
        ({"name": "mlp"}, 10, 3072 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10),
        ({"name": "conv", "width": 8}, 10, 9 * (3 * 8 + 8 * 16 + 16 * 32) + 2 * 56 + 32 * 10 + 10),
    ],
)
def test_parameter_counts(section: dict[str, Any], classes: int, parameters: int) -> None:
    assert count(network(classes=classes, **section)) == parameters


@pytest.mark.parametrize("name", ["mlp", "conv", "resnet", "wide_resnet", "resnet18"])
@pytest.mark.parametrize(("side", "channels"), [(8, 1), (28, 1), (32, 3)])
def test_images_of_all_data_sets_give_logits(name: str, side: int, channels: int) -> None:
    width = {"conv": 4, "resnet": 4, "wide_resnet": 1}.get(name)
    depth = {"wide_resnet": 10}.get(name)
    model = network(side, channels, classes=7, name=name, width=width, depth=depth)
    logits = model(torch.randn(2, channels, side, side))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("section", "kind", "shapes"),
    [
        ({"name": "resnet18"}, ResNet, [(64, 32)] * 2 + [(128, 16)] * 2 + [(256, 8)] * 2 + [(512, 4)] * 2),
        ({"name": "resnet", "depth": 14}, ResNet, [(16, 32)] * 2 + [(32, 16)] * 2 + [(64, 8)] * 2),
        ({"name": "wide_resnet", "depth": 10, "width": 2}, WideResNet, [(32, 32), (64, 16), (128, 8)]),
    ],
)
def test_every_stage_but_the_first_halves_the_image(
    section: dict[str, Any], kind: type[ResNet] | type[WideResNet], shapes: list[tuple[int, int]]
) -> None:
    model = network(**section)
    assert isinstance(model, kind)
    found = []
    for block in model.stages:
        block.register_forward_hook(lambda _module, _inputs, output: found.append(tuple(output.shape[1:3])))
    model(torch.randn(1, 3, 32, 32))
    assert found == shapes


@pytest.mark.parametrize("section", [{"name": "resnet"}, {"name": "wide_resnet", "depth": 16, "width": 1}])
def test_blocks_without_their_residue_are_their_shortcut(section: dict[str, Any]) -> None:
    model = network(**section)
    model.eval()
    blocks: Any = model.stages
    x = torch.rand(2, 16, 8, 8)
    block = blocks[0] if section["name"] == "resnet" else blocks[1]
    with torch.no_grad():
        assert not torch.equal(block(x), x)
        for layer in (block.norm2, block.conv2):
            layer.weight.zero_()
        torch.testing.assert_close(block(x), x, rtol=0, atol=0)


def test_first_weights_come_from_the_generator_alone() -> None:
    state = torch.get_rng_state()
    first = network(name="resnet", depth=14)
    torch.manual_seed(1)
    same, other = network(name="resnet", depth=14), network(name="resnet", depth=14, seed=1)
    torch.set_rng_state(state)
    for (name, a), b in zip(first.state_dict().items(), same.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    weight, another = (each.state_dict()["stages.3.conv2.weight"] for each in (first, other))
    assert not torch.equal(weight, another)
    # N(0, 2 / fan_out), fan_out = 9 x 32: the deviation of 9,216 draws is known to 1 / sqrt(2 n), 5 times.
    expected = math.sqrt(2 / (9 * 32))
    assert float(weight.std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * weight.numel()))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "resnet", "depth": 10}, r"depth = 10 of a resnet must be 6 n \+ 2: 8, 14, ..."),
        ({"name": "resnet", "depth": 2}, "depth = 2 of a resnet must be"),
        ({"name": "wide_resnet", "depth": 8}, r"depth = 8 of a wide_resnet must be 6 n \+ 4: 10, 16"),
        ({"name": "conv", "depth": 8}, 'depth is for resnet and wide_resnet, and name is "conv"'),
        (
            {"name": "resnet18", "width": 8},
            'width is for conv and resnet and wide_resnet, and name is "resnet18"',
        ),
        ({"name": "conv", "hidden": [8]}, 'hidden is for mlp, and name is "conv"'),
        ({"name": "mlp", "hidden": [0]}, r"hidden = \(0,\) must be widths of at least 1"),
    ],
)
def test_networks_that_do_not_exist(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Model.model_validate(section)


# -- augmentation -----------------------------------------------------------------------------------


def images(batch: int = 200, side: int = 6) -> Tensor:
    """All pixels differ, and none is 0."""
    return torch.arange(1, batch * 2 * side * side + 1).reshape(batch, 2, side, side).float()


def draws_for(section: Augmentation, batch: int, side: int = 6, seed: int = 0) -> Draws:
    return draw(section, batch, side, side, torch.Generator().manual_seed(seed))


def test_nothing_is_done_where_nothing_is_asked_for() -> None:
    section = Augmentation()
    assert torch.equal(augment(images(), section, draws_for(section, 200)), images())


def test_a_crop_is_a_window_of_the_padded_image_and_every_window_occurs() -> None:
    section = Augmentation(crop=2)
    draws = draws_for(section, 200)
    found = augment(images(), section, draws)
    padded = nn.functional.pad(images(), (2, 2, 2, 2))
    for number, (row, column) in enumerate(draws.shift.tolist()):
        window = padded[number, :, row : row + 6, column : column + 6]
        assert torch.equal(found[number], window)
    assert {tuple(shift) for shift in draws.shift.tolist()} == {(r, c) for r in range(5) for c in range(5)}


def test_half_of_the_images_are_mirrored() -> None:
    section = Augmentation(flip=True)
    found = augment(images(), section, draws_for(section, 200))
    same = [bool(torch.equal(a, b)) for a, b in zip(found, images(), strict=True)]
    mirrored = [bool(torch.equal(a, b.flip(2))) for a, b in zip(found, images(), strict=True)]
    assert [a != b for a, b in zip(same, mirrored, strict=True)] == [True] * 200
    assert abs(sum(same) - 100) < 6 * math.sqrt(200 / 4)


@pytest.mark.parametrize("side", [1, 2, 3, 6, 40])
def test_a_square_around_any_pixel_is_blanked_out(side: int) -> None:
    section = Augmentation(cutout=side)
    draws = draws_for(section, 200)
    found = augment(images(), section, draws)
    blank = found == 0.0
    assert torch.equal(found[~blank], images()[~blank])
    for number, (row, column) in enumerate(draws.centre.tolist()):
        top, left = row - side // 2, column - side // 2
        expected = torch.zeros(6, 6, dtype=torch.bool)
        expected[max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)] = True
        assert torch.equal(blank[number], expected.expand(2, 6, 6))
    assert {tuple(centre) for centre in draws.centre.tolist()} == {(r, c) for r in range(6) for c in range(6)}


def test_a_worker_augments_its_share_as_a_lone_worker_would() -> None:
    section = Augmentation(crop=2, flip=True, cutout=3)
    whole = augment(images(), section, draws_for(section, 200))
    state = torch.get_rng_state()
    for rank in range(3):
        mine = torch.arange(200)[rank::3]
        part = augment(images()[mine], section, draws_for(section, 200).of(mine))
        assert torch.equal(part, whole[mine])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(augment(images(), section, draws_for(section, 200, seed=1)), whole)


# -- labels, parts and normalisation ----------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_noise_draws_a_fraction_of_the_labels_anew(fraction: float) -> None:
    labels = torch.arange(10).repeat(400)
    found = noisy(labels, fraction, 10, seed=0)
    assert torch.equal(labels, torch.arange(10).repeat(400))
    # A new label is the old one in one of ten cases.
    drawn = round(fraction * 4000)
    assert abs(int((found != labels).sum()) - 0.9 * drawn) <= 6 * math.sqrt(0.09 * drawn)
    if fraction:
        assert not torch.equal(found, noisy(labels, fraction, 10, seed=1))
    if fraction == 1.0:
        counts = found.bincount(minlength=10)
        assert (counts - 400).abs().max() < 6 * math.sqrt(4000 * 0.09)


def task(**sections: Any) -> Classification:
    return Classification(Config.model_validate({"data": {"name": "digits"}, **sections}), CPU)


def everything(found: Classification, part: str) -> tuple[Tensor, Tensor]:
    return found.examples(part, torch.arange(found.sizes[part]))


def test_noise_is_on_the_training_labels_alone_and_has_its_own_seed() -> None:
    clean = task()
    drawn = []
    for seed in (0, 1):
        found = task(data={"name": "digits", "label_noise": 0.5, "noise_seed": seed})
        assert found.sizes == clean.sizes == {"train": 900, "valid": 100, "test": 797}
        for part in found.sizes:
            inputs, labels = everything(found, part)
            assert torch.equal(inputs, everything(clean, part)[0])
            changed = int((labels != everything(clean, part)[1]).sum())
            assert changed == 0 if part != "train" else 0.3 * 900 < changed < 450
        drawn.append(everything(found, "train")[1])
    assert not torch.equal(*drawn)


def test_inputs_are_normalised_by_the_training_images() -> None:
    found = task()
    images, _ = everything(found, "train")
    assert float(images.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(images.std()) == pytest.approx(1.0, rel=1e-4)
    images, _ = everything(task(data={"name": "digits", "normalise": False}), "train")
    assert (float(images.min()), float(images.max())) == (0.0, 1.0)


def test_statistics_are_those_of_the_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (50, 3, 4, 4), generator=generator, dtype=torch.uint8)
    pixels[:, 2] = 7
    mean, deviation = statistics(pixels)
    values = pixels.double() / 255.0
    torch.testing.assert_close(mean.double(), values.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        deviation[:2].double(), values.std((0, 2, 3), correction=0)[:2], rtol=1e-5, atol=0
    )
    assert float(deviation[2]) == 1.0


def test_fewer_samples_keep_the_shares_of_the_classes() -> None:
    found = task(data={"name": "digits", "samples": 100, "validation_fraction": 0.2})
    assert found.sizes == {"train": 80, "valid": 20, "test": 797}
    assert everything(found, "train")[1].bincount().tolist() == [8] * 10
    assert task(data={"name": "digits", "validation_fraction": 0.0}).sizes == {"train": 1000, "test": 797}


def test_label_smoothing_is_that_of_the_training_loss() -> None:
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 2, 3, 4])
    found = task(train={"label_smoothing": 0.1})
    # - sum_k q_k log p_k,  q = (1 - s) one-hot + s / classes
    q = 0.9 * nn.functional.one_hot(labels, 10) + 0.01
    expected = -(q * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(found.loss(logits, labels), expected)
    plain = nn.functional.cross_entropy(logits, labels)
    assert float(found.scores(logits, labels)["loss"].mean()) == pytest.approx(float(plain))
