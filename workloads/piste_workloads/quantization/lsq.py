"""Learned step size quantization (LSQ): rounding to integers whose step is trained with the network.

With `v` a weight or an activation, `s` the step of its tensor, and `-Q_N ... Q_P` the integers of `b` bits:

    v_bar = round(clip(v / s, -Q_N, Q_P))                                      (1)
    v_hat = v_bar s                                                            (2)
                 -v/s + round(v/s)   where -Q_N < v/s < Q_P
    dv_hat/ds = {-Q_N                where v/s <= -Q_N                         (3)
                 Q_P                 where v/s >= Q_P
    dv_hat/dv =  1 where -Q_N < v/s < Q_P, else 0                              (straight through)

    weights, and activations that can be negative:   Q_N = 2^(b-1),  Q_P = 2^(b-1) - 1
    activations that cannot (behind a ReLU):         Q_N = 0,        Q_P = 2^b - 1

The gradient of a step is multiplied by `g = 1 / sqrt(N Q_P)`, `N` the number of weights of the layer or of
features of one example, and a step starts at `2 mean|v| / sqrt(Q_P)`, of the weights or of a first batch.

Source: Esser, McKinstry, Bablani, Appuswamy and Modha, "Learned step size quantization", ICLR 2020
(arXiv:1902.08153), equations 1-3 and section 2.2. Not in the paper, and decided here:

- *a step stays positive.* An optimizer may carry a step to zero or below it, and so may SAM, whose second
  gradient is taken at perturbed steps. A step below a thousandth of its first value counts as that
  thousandth, and its gradient goes straight through to it, so that it can come back.
- a tensor of zeros, which every step represents exactly, starts with the step 1.
- an activation counts as one that can be negative where the first batch has a negative value, as the
  network's own input usually has.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

SMALLEST = 1e-3  # of a step's first value


def levels(bits: int, signed: bool) -> tuple[int, int]:
    """The largest magnitudes below and above zero, `(Q_N, Q_P)`.

    Raises:
        ValueError: Fewer than 2 bits, which leave a signed tensor no positive integer.
    """
    if bits < 2:
        raise ValueError(f"bits must be at least 2, got {bits}")
    return (2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def first_step(mean_magnitude: float, q_p: int) -> float:
    """Where a step starts.

    Args:
        mean_magnitude: The mean of |v|.
        q_p: The largest integer.
    """
    # s = 2 <|v|> / sqrt(Q_P)
    return 2.0 * mean_magnitude / q_p**0.5 if mean_magnitude > 0.0 else 1.0


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, step: Tensor, smallest: Tensor, lower: float, upper: float, scale: float
    ) -> Tensor:
        step = torch.maximum(step, smallest)
        ratio = values.to(step.dtype) / step  # bfloat16 could not tell 8 bits apart
        # v_bar = round(clip(v / s, -Q_N, Q_P))
        integers = ratio.clamp(lower, upper).round_()
        ctx.save_for_backward(ratio, integers)
        ctx.lower, ctx.upper, ctx.scale = lower, upper, scale
        # v_hat = v_bar s
        return (integers * step).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        ratio, integers = ctx.saved_tensors
        inside = (ratio > ctx.lower) & (ratio < ctx.upper)
        # dv_hat/ds = round(v/s) - v/s inside, the nearest end outside
        slope = torch.where(inside, integers - ratio, integers)
        step_gradient = ctx.scale * (gradient.to(slope.dtype) * slope).sum()
        # dv_hat/dv = 1 inside, 0 outside
        return gradient * inside, step_gradient, None, None, None, None


def quantize(
    values: Tensor, step: Tensor, smallest: Tensor, q_n: int, q_p: int, scale: float = 1.0
) -> Tensor:
    """Rounds to multiples of a step that is learned.

    Args:
        values: What is rounded, of any shape.
        step: The step, a scalar tensor; what is divided by it is so in its dtype.
        smallest: What a smaller step counts as, a scalar tensor.
        q_n: The integers begin at `-q_n`.
        q_p: And end at `q_p`.
        scale: Multiplies the gradient of the step.

    Returns:
        The rounded values, in the shape of `values`.
    """
    bounds = (float(-q_n), float(q_p))
    rounded: Tensor = _Quantize.apply(values, step, smallest, *bounds, scale)  # type: ignore[no-untyped-call]
    return rounded


class Quantizer(nn.Module):
    """Quantizes one tensor of a network.

    Attributes:
        step: The step, a scalar parameter.
        smallest: What a smaller step counts as.
        signed: Whether there are negative integers.

    Args:
        bits: The width of an integer.
        mean_magnitude: The mean of |v| from which the step starts.
        signed: Whether there are negative integers.
        like: A tensor of the same dtype and device.
    """

    step: nn.Parameter
    smallest: Tensor
    signed: Tensor

    def __init__(self, bits: int, mean_magnitude: float, signed: bool, like: Tensor) -> None:
        super().__init__()
        self.bits = bits
        _, q_p = levels(bits, signed)
        self.step = nn.Parameter(like.new_tensor(first_step(mean_magnitude, q_p)))
        self.register_buffer("smallest", SMALLEST * self.step.detach())
        self.register_buffer("signed", torch.tensor(signed, device=like.device))
        self._signed = signed
        self.register_load_state_dict_post_hook(_read_sign)  # type: ignore[no-untyped-call]

    def forward(self, values: Tensor, count: int) -> Tensor:
        """Rounds a tensor.

        Args:
            values: Of any shape.
            count: How many weights, or features of one example, share the step.
        """
        q_n, q_p = levels(self.bits, self._signed)
        # g = 1 / sqrt(N Q_P)
        return quantize(values, self.step, self.smallest, q_n, q_p, (count * q_p) ** -0.5)

    def extra_repr(self) -> str:
        """Bits and sign, for `print(model)`."""
        return f"bits={self.bits}, signed={self._signed}"


def _read_sign(module: Quantizer, _incompatible: Any) -> None:
    module._signed = bool(module.signed)  # read once: a step would wait for the device


class Seen(NamedTuple):
    """What a layer was given in the first batch.

    Attributes:
        mean_magnitude: The mean of |v|.
        negative: Whether any is below zero.
    """

    mean_magnitude: float
    negative: bool


class QuantizedConv2d(nn.Conv2d):
    """A convolution of rounded inputs and weights; it shares the parameters of the one it is made of."""

    def __init__(self, layer: nn.Conv2d, bits: int, seen: Seen) -> None:
        super().__init__(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            layer.groups,
            layer.bias is not None,
            layer.padding_mode,
            device="meta",
        )
        self.weight, self.bias = layer.weight, layer.bias
        self.weight_quantizer, self.input_quantizer = _quantizers(layer.weight, bits, seen)

    def forward(self, input: Tensor) -> Tensor:
        """`(batch, channels, height, width)`, as `torch.nn.Conv2d`."""
        weight: Tensor = self.weight_quantizer(self.weight, self.weight.numel())
        inputs: Tensor = self.input_quantizer(input, input.shape[1:].numel())
        output: Tensor = self._conv_forward(inputs, weight, self.bias)
        return output


class QuantizedLinear(nn.Linear):
    """A product of rounded inputs and weights; it shares the parameters of the layer it is made of."""

    def __init__(self, layer: nn.Linear, bits: int, seen: Seen) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.weight_quantizer, self.input_quantizer = _quantizers(layer.weight, bits, seen)

    def forward(self, input: Tensor) -> Tensor:
        """`(batch, ..., features)`, as `torch.nn.Linear`."""
        weight: Tensor = self.weight_quantizer(self.weight, self.weight.numel())
        inputs: Tensor = self.input_quantizer(input, input.shape[1:].numel())
        return nn.functional.linear(inputs, weight, self.bias)


def _quantizers(weight: Tensor, bits: int, seen: Seen) -> tuple[Quantizer, Quantizer]:
    magnitude = float(weight.detach().abs().mean())
    own = Quantizer(bits, magnitude, signed=True, like=weight)
    return own, Quantizer(bits, seen.mean_magnitude, seen.negative, like=weight)


@torch.no_grad()
def quantize_model(model: nn.Module, bits: int, inputs: Tensor, ends: int = 8) -> None:
    """Replaces every `Conv2d` and `Linear` of a model by a quantized one, in place; biases stay as they are.

    The parameters stay the same objects under the same names; each layer has two steps more,
    `weight_quantizer.step` and `input_quantizer.step`. The first and the last layer that the model reaches
    get `ends` bits, as in the paper.

    Args:
        model: The network, at its start or trained in full precision.
        bits: The width of weights and activations.
        inputs: A first batch; the model is run on it once, in training mode, and its buffers are restored.
        ends: The width in the first and the last layer.

    Raises:
        ValueError: There is no such layer, or one that the model does not reach from `inputs`.
    """
    layers = {name: module for name, module in model.named_modules() if type(module) in _QUANTIZED}
    if not layers:
        raise ValueError(f"model must have a Conv2d or Linear layer, got {type(model).__name__} with none")
    seen = _first_batch(model, layers, inputs)
    if unreached := layers.keys() - seen.keys():
        raise ValueError(f"model must reach every layer from inputs, but {min(unreached)} is not reached")
    order = list(seen)
    for name, module in layers.items():
        width = ends if name in (order[0], order[-1]) else bits
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], _QUANTIZED[type(module)](module, width, seen[name]))


def _first_batch(model: nn.Module, layers: dict[str, nn.Module], inputs: Tensor) -> dict[str, Seen]:
    """What each layer is given first, in the order in which the model reaches them."""
    seen: dict[str, Seen] = {}

    def look(name: str) -> Any:
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            values = arguments[0]
            seen.setdefault(name, Seen(float(values.abs().mean()), bool((values < 0).any())))

        return hook

    handles = [layer.register_forward_pre_hook(look(name)) for name, layer in layers.items()]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    training = model.training
    try:
        model.train()
        model(inputs)
    finally:
        model.train(training)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        for handle in handles:
            handle.remove()
    return seen


_QUANTIZED: dict[type[nn.Module], Any] = {nn.Conv2d: QuantizedConv2d, nn.Linear: QuantizedLinear}


def weight_bytes(model: nn.Module) -> float:
    """The bytes of a model's parameters: quantized weights by their bits, the others by their dtype."""
    widths = {
        id(layer.weight): layer.weight_quantizer.bits
        for layer in model.modules()
        if isinstance(layer, QuantizedConv2d | QuantizedLinear)
    }
    return sum(p.numel() * widths.get(id(p), 8 * p.element_size()) for p in model.parameters()) / 8
