"""Learned step sizes against the paper's formulas, its own pseudocode and torch's kernel."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from piste.building import build_optimizer
from piste.config import Optimizer
from piste_workloads.quantization.lsq import (
    SMALLEST,
    QuantizedConv2d,
    QuantizedLinear,
    Quantizer,
    first_step,
    levels,
    quantize,
    quantize_model,
    weight_bytes,
)

DOUBLE = torch.float64
every_width = pytest.mark.parametrize(
    ("bits", "signed"), [(8, True), (4, True), (2, True), (4, False), (2, False)]
)


def scalar(value: float, learned: bool = False) -> Tensor:
    return torch.tensor(value, dtype=DOUBLE, requires_grad=learned)


def values(count: int = 500, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator, dtype=DOUBLE, requires_grad=True)


def gradients(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    return torch.autograd.grad((output * weights).sum(), inputs)


def appendix(v: Tensor, s: Tensor, bits: int, signed: bool, scale: float) -> Tensor:
    """The pseudocode of the paper's appendix: gradients by `detach`."""

    def gradscale(x: Tensor, factor: float) -> Tensor:
        return (x - x * factor).detach() + x * factor

    def roundpass(x: Tensor) -> Tensor:
        return (x.round() - x).detach() + x

    q_n, q_p = (2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    s = gradscale(s, scale)
    return roundpass(torch.clip(v / s, -q_n, q_p)) * s


@every_width
def test_equals_the_papers_pseudocode(bits: int, signed: bool) -> None:
    v, s = values(), scalar(0.3, learned=True)
    q_n, q_p = levels(bits, signed)
    scale = (v.numel() * q_p) ** -0.5
    own, theirs = quantize(v, s, scalar(0.0), q_n, q_p, scale), appendix(v, s, bits, signed, scale)
    torch.testing.assert_close(own, theirs, rtol=1e-13, atol=1e-13)
    for mine, paper in zip(gradients(own, v, s), gradients(theirs, v, s), strict=True):
        torch.testing.assert_close(mine, paper, rtol=1e-12, atol=1e-12)


def test_bfloat16_values_are_rounded_as_exactly_as_others() -> None:
    v = values().detach().bfloat16().requires_grad_()
    s = torch.tensor(0.011, requires_grad=True)
    weights = torch.randn(v.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    half, whole = (quantize(x, s, torch.tensor(0.0), 128, 127, 0.1) for x in (v, v.float()))
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, whole.bfloat16())
    by_half = torch.autograd.grad((half * weights).sum(), (v, s))
    by_whole = torch.autograd.grad((whole * weights.float()).sum(), (v, s))
    assert torch.equal(by_half[0], by_whole[0])
    torch.testing.assert_close(by_half[1], by_whole[1])


@every_width
def test_equals_torchs_kernel(bits: int, signed: bool) -> None:
    s = torch.tensor(0.3, requires_grad=True)
    q_n, q_p = levels(bits, signed)
    v = values().detach().float()
    # What is outside by less than half a step is inside for torch, which rounds before it clips.
    ratio = v / 0.3
    v = v[((ratio < q_p) | (ratio > q_p + 0.5)) & ((ratio > -q_n) | (ratio < -q_n - 0.5))].requires_grad_()
    assert len(v) > 400
    own = quantize(v, s, torch.tensor(0.0), q_n, q_p, 0.5)
    theirs = torch._fake_quantize_learnable_per_tensor_affine(v, s[None], torch.zeros(1), -q_n, q_p, 0.5)
    torch.testing.assert_close(own, theirs, rtol=1e-6, atol=1e-7)
    for mine, torchs in zip(gradients(own, v, s), gradients(theirs, v, s), strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("v", "rounded", "to_step", "to_value"),
    [
        (0.20, 0.0, -0.4, 1.0),  # round(0.4) = 0
        (0.30, 0.5, 0.4, 1.0),  # round(0.6) = 1
        (-0.70, -0.5, 0.4, 1.0),  # round(-1.4) = -1
        (5.00, 0.5, 1.0, 0.0),  # Q_P
        (-9.00, -1.0, -2.0, 0.0),  # -Q_N
    ],
)
def test_two_bits_by_hand(v: float, rounded: float, to_step: float, to_value: float) -> None:
    value, step = scalar(v, learned=True), scalar(0.5, learned=True)
    output = quantize(value, step, scalar(0.0), *levels(2, signed=True))
    assert output.item() == rounded
    by_value, by_step = torch.autograd.grad(output, (value, step))
    assert float(by_step) == pytest.approx(to_step, abs=1e-15)
    assert float(by_value) == to_value


def test_clipped_values_have_the_true_gradient() -> None:
    # Outside, v_hat = -Q_N s or Q_P s: smooth, and the estimator is exact.
    v, step = torch.tensor([7.0, -7.0, 3.0], dtype=DOUBLE, requires_grad=True), scalar(0.4, learned=True)
    assert torch.autograd.gradcheck(lambda v, s: quantize(v, s, scalar(0.0), 4, 3), (v, step))


@every_width
def test_the_estimator_is_homogeneous(bits: int, signed: bool) -> None:
    """Quantizing scales with its arguments, so `v dv_hat/dv + s dv_hat/ds = v_hat` (Euler)."""
    v, s, bounds = values(), scalar(0.3, learned=True), levels(bits, signed)
    output = quantize(v, s, scalar(0.0), *bounds)
    torch.testing.assert_close(quantize(4.0 * v, 4.0 * s, scalar(0.0), *bounds), 4.0 * output)
    by_value, by_step = torch.autograd.grad(output.sum(), (v, s))
    torch.testing.assert_close((v * by_value).sum() + s * by_step, output.sum(), rtol=1e-12, atol=0.0)


def test_levels() -> None:
    assert levels(8, signed=True) == (128, 127)
    assert levels(8, signed=False) == (0, 255)
    assert levels(2, signed=True) == (2, 1)
    with pytest.raises(ValueError, match="bits must be at least 2, got 1"):
        levels(1, signed=False)


def test_first_step_and_gradient_scale() -> None:
    v = values(1000).detach()
    quantizer = Quantizer(4, float(v.abs().mean()), signed=True, like=v)
    # 2 <|v|> / sqrt(Q_P), <|v|> = sqrt(2 / pi) for a normal variable
    expected = 2.0 * math.sqrt(2.0 / math.pi) / math.sqrt(7.0)
    assert quantizer.step.item() == pytest.approx(expected, rel=0.1)
    step = scalar(quantizer.step.item(), learned=True)
    for count in (1000, 10):
        unscaled = torch.autograd.grad(quantize(v, step, scalar(0.0), 8, 7).sum(), step)[0]
        scaled = torch.autograd.grad(quantizer(v, count).sum(), quantizer.step)[0]
        assert float(scaled) == pytest.approx(float(unscaled) / math.sqrt(count * 7.0), rel=1e-12)
    assert first_step(0.0, 7) == 1.0


class Net(nn.Module):
    """Registered in another order than that in which it is run."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, 3)
        self.middle = nn.Conv2d(6, 8, 3, padding=1, groups=2, bias=False)
        self.block = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.middle(self.block(x)))
        output: Tensor = self.last(hidden.mean((2, 3)))
        return output


def net(seed: int = 0) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net()


def images(count: int = 16) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def test_a_model_is_quantized_in_place() -> None:
    model = net()
    before, buffers = dict(model.named_parameters()), copy.deepcopy(dict(model.named_buffers()))
    quantize_model(model, 2, images())
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert len(after) == len(before) + 2 * 3
    assert all(torch.equal(model.get_buffer(name), buffer) for name, buffer in buffers.items())
    assert model.training

    layers: list[Any] = [model.block[0], model.middle, model.last]
    assert [type(layer) for layer in layers] == [QuantizedConv2d, QuantizedConv2d, QuantizedLinear]
    assert [layer.weight_quantizer.bits for layer in layers] == [8, 2, 8]
    assert [layer.input_quantizer.bits for layer in layers] == [8, 2, 8]
    # Only the network's own input can be negative: the others are behind a ReLU.
    assert [bool(layer.input_quantizer.signed) for layer in layers] == [True, False, False]
    for layer in layers:
        mean = float(layer.weight.detach().abs().mean())
        q_p = levels(layer.weight_quantizer.bits, signed=True)[1]
        assert layer.weight_quantizer.step.item() == pytest.approx(2.0 * mean / q_p**0.5, rel=1e-6)
    expected = 2.0 * float(images().abs().mean()) / 127**0.5
    assert layers[0].input_quantizer.step.item() == pytest.approx(expected, rel=1e-6)


def test_a_quantized_layer_computes_with_few_values() -> None:
    model = net()
    quantize_model(model, 2, images())
    seen: dict[str, Tensor] = {}
    layer: Any = model.middle
    layer.input_quantizer.register_forward_hook(lambda _m, _i, output: seen.update(inputs=output))
    layer.weight_quantizer.register_forward_hook(lambda _m, _i, output: seen.update(weights=output))
    layer.register_forward_hook(lambda _m, _i, output: seen.update(output=output))
    model(images())
    for name, quantizer in (("inputs", layer.input_quantizer), ("weights", layer.weight_quantizer)):
        integers = seen[name] / quantizer.step
        torch.testing.assert_close(integers, integers.round(), rtol=0.0, atol=1e-5)
        lowest, highest = (0, 3) if name == "inputs" else (-2, 1)
        assert lowest <= int(integers.min().round()) <= int(integers.max().round()) <= highest
    torch.testing.assert_close(
        seen["output"], nn.functional.conv2d(seen["inputs"], seen["weights"], padding=1, groups=2)
    )


def test_many_bits_are_nearly_full_precision() -> None:
    model, exact = net(), net()
    quantize_model(model, 12, images(), ends=12)
    model.eval(), exact.eval()
    gap = (model(images()) - exact(images())).abs().max() / exact(images()).std()
    assert gap.item() < 0.05


def test_what_cannot_be_quantized_is_named() -> None:
    with pytest.raises(ValueError, match="model must have a Conv2d or Linear layer, got ReLU with none"):
        quantize_model(nn.ReLU(), 4, images())
    model = net()
    model.unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="unused is not reached"):
        quantize_model(model, 4, images())


def test_steps_have_no_weight_decay() -> None:
    model = net()
    quantize_model(model, 4, images())
    section = Optimizer.model_validate({"name": "sgd", "lr": 0.1, "weight_decay": 0.5})
    built = build_optimizer(section, model)
    decayed = {
        name for group in built.param_groups for name in group["param_names"] if group["weight_decay"] > 0.0
    }
    assert decayed == {"block.0.weight", "middle.weight", "last.weight"}


def test_a_state_brings_its_signs_and_steps_along() -> None:
    first, second = net(), net(1)
    quantize_model(first, 4, images())
    quantize_model(second, 4, -images().abs())
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(images()), first(images()))
    third = net(1)
    quantize_model(third, 4, images().abs())  # takes its inputs for non-negative
    assert not third.get_buffer("block.0.input_quantizer.signed")
    third.load_state_dict(first.state_dict())
    assert torch.equal(third(images()), first(images()))


def test_a_step_at_or_below_zero_counts_as_the_smallest_and_comes_back() -> None:
    v = values().detach()
    quantizer = Quantizer(4, float(v.abs().mean()), signed=True, like=v)
    first = quantizer.step.item()
    for low in (0.0, -1.0):
        with torch.no_grad():
            quantizer.step.fill_(low)
        rounded = quantizer(v, v.numel())
        assert rounded.isfinite().all()
        torch.testing.assert_close(rounded.abs().max(), torch.tensor(8 * SMALLEST * first, dtype=DOUBLE))
    optimizer = torch.optim.SGD([quantizer.step], lr=1.0, momentum=0.9)
    for _ in range(200):
        optimizer.zero_grad()
        (quantizer(v, v.numel()) - v).square().mean().backward()
        optimizer.step()
    best = min(
        float((quantize(v, scalar(s), scalar(0.0), 8, 7) - v).square().mean()) for s in (0.2, 0.3, 0.4)
    )
    assert (quantizer(v, v.numel()) - v).square().mean().item() < 1.3 * best
    assert quantizer.step.item() > 0.0


def test_bytes_of_the_weights() -> None:
    model = net()
    full = 4 * sum(p.numel() for p in model.parameters())
    assert weight_bytes(model) == full
    quantize_model(model, 2, images())
    # 3 x 6 x 9 weights and 8 x 3 of a byte each, 3 x 8 x 9 of two bits, the rest and six steps in float32
    whole = 162 + 24
    assert weight_bytes(model) == whole + 216 / 4 + (full - 4 * (whole + 216)) + 4 * 6
