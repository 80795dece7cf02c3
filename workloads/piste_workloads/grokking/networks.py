"""The networks: one hidden layer, several, a small decoder, and two weights for the toy.

Names, for `select` of `egd` and for `[[optimizer.groups]]`: `hidden` and `output` of `two-layer`;
`layers.N` and `output` of `deep`; `layers.N.{qkv,projection,up,down}`, `token_embedding`,
`position_embedding` and `head` of `transformer`; `output` of `linear`.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from piste_workloads.grokking.config import Config, Deep, Modular, Toy, Transformer, TwoLayer
from piste_workloads.grokking.points import seeded
from piste_workloads.grokking.toy import equalizer, training_points

TOKENS = 4  # a, the operation, b, =


def network(config: Config, seed: int) -> nn.Module:
    """The network of a run at its start, in `train.dtype`.

    Args:
        config: The recipe.
        seed: The run's.
    """
    model, task, generator = config.model, config.task, seeded(seed, "network")
    made: nn.Module
    if isinstance(model, TwoLayer):
        made = TwoLayerNetwork(model, task.inputs, task.outputs, generator)
    elif isinstance(model, Deep):
        made = DeepNetwork(model, task.inputs, task.outputs, generator)
    elif isinstance(model, Transformer):
        assert isinstance(task, Modular)
        made = Decoder(model, task.modulus, generator)
    else:
        assert isinstance(task, Toy)
        made = LinearNetwork(task, seeded(seed, "points"))
    return made.to(getattr(torch, config.train.dtype))


class TwoLayerNetwork(nn.Module):
    """`f(x) = W_2 relu(W_1 x + b_1)` with He's initialisation.

    `W_1 ~ N(0, 2 / inputs)`, `W_2 ~ N(0, 2 / width)`, `b_1 = 0` or, with `random_bias`, `N(0, 2 / inputs)`.
    """

    def __init__(self, model: TwoLayer, inputs: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, model.width)
        self.output = nn.Linear(model.width, outputs, bias=False)
        with torch.no_grad():
            for layer in (self.hidden, self.output):
                layer.weight.normal_(0.0, math.sqrt(2.0 / layer.in_features), generator=generator)
            self.hidden.bias.zero_()
            if model.random_bias:
                self.hidden.bias.normal_(0.0, math.sqrt(2.0 / inputs), generator=generator)

    def forward(self, inputs: Tensor) -> Tensor:
        """`(points, inputs)` to `(points, outputs)`, or `(points,)` where there is one output."""
        return _single(self.output(functional.relu(self.hidden(inputs))))


class DeepNetwork(nn.Module):
    """ReLU layers with torch's default initialisation times `scale`.

    Source: Liu, Michaud and Tegmark, "Omnigrok" (arXiv:2210.01117).
    """

    def __init__(self, model: Deep, inputs: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        widths = (inputs, *(model.width,) * (model.layers - 1))
        self.layers = nn.ModuleList(nn.Linear(m, n) for m, n in pairwise(widths))
        self.output = nn.Linear(model.width, outputs)
        for layer in (*self.layers, self.output):
            _initialise(layer, generator, model.scale)

    def forward(self, inputs: Tensor) -> Tensor:
        """`(points, inputs)` to `(points, outputs)`, or `(points,)` where there is one output."""
        for layer in self.layers:
            inputs = functional.relu(layer(inputs))
        return _single(self.output(inputs))


class Block(nn.Module):
    """Causal attention, then a GELU layer of four times the width, each beside a residual.

    As in the code of Grokfast and EGD the first residual starts behind the norm.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, inputs: Tensor) -> Tensor:
        """`(points, tokens, width)` to the same."""
        inputs = self.attention_norm(inputs)
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(inputs).chunk(3, -1)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        inputs = inputs + self.projection(mixed.transpose(1, 2).flatten(2))
        outputs: Tensor = inputs + self.down(functional.gelu(self.up(self.mlp_norm(inputs))))
        return outputs


class Decoder(nn.Module):
    """A decoder-only transformer that answers behind the last token, `=`.

    Embeddings from N(0, 1), the rest as torch's default for linear layers. Source of the architecture: Power
    et al., "Grokking" (arXiv:2201.02177), appendix A.1.2.
    """

    def __init__(self, model: Transformer, modulus: int, generator: torch.Generator) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(modulus + 2, model.width)
        self.position_embedding = nn.Embedding(TOKENS, model.width)
        self.layers = nn.ModuleList(Block(model.width, model.heads) for _ in range(model.layers))
        self.norm = nn.LayerNorm(model.width)
        self.head = nn.Linear(model.width, modulus, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, generator=generator)
            elif isinstance(module, nn.Linear):
                _initialise(module, generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """`(points, 4)` tokens to `(points, p)`."""
        states = self.token_embedding(tokens) + self.position_embedding.weight
        for layer in self.layers:
            states = layer(states)
        logits: Tensor = self.head(self.norm(states[:, -1]))
        return logits


class LinearNetwork(nn.Module):
    """`f(z) = w . z` from the toy's first weights, in the coordinates of its points.

    `generator` is in the state in which it draws those.
    """

    def __init__(self, task: Toy, generator: torch.Generator) -> None:
        super().__init__()
        self.output = nn.Linear(2, 1, bias=False, dtype=torch.float64)
        start = torch.tensor(task.start, dtype=torch.float64)
        with torch.no_grad():
            self.output.weight.copy_(equalizer(task, training_points(task, generator).inputs) @ start)

    def forward(self, inputs: Tensor) -> Tensor:
        """`(points, 2)` to `(points,)`."""
        return _single(self.output(inputs))


def _initialise(layer: nn.Linear, generator: torch.Generator, scale: float = 1.0) -> None:
    """Weights and biases from `scale U(-1, 1) / sqrt(inputs)`, which is torch's default for scale 1."""
    bound = scale * layer.in_features**-0.5
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=generator)


def _single(outputs: Tensor) -> Tensor:
    return outputs[..., 0] if outputs.shape[-1] == 1 else outputs
