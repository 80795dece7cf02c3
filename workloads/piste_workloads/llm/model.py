"""The model: a decoder-only transformer (GPT) with root-mean-square norms and rotary positions.

Shape suffixes: b batch, t time (positions), d width, h heads, e width of a head, f width of the MLP,
v vocabulary.

Names, for `[[optimizer.groups]]`: `token_embedding`, `head`, gains `*norm.weight`, and the hidden
matrices `blocks.N.attention.{query,key,value,projection}` and `blocks.N.mlp.{gate,up,down}`.

Sources: Radford et al., "Language models are unsupervised multitask learners" (2019): the block and the
smaller start of residual matrices; Vaswani et al. (arXiv:1706.03762), section 3.4: the embedding's scale;
Zhang and Sennrich (arXiv:1910.07467): RMSNorm; Su et al. (arXiv:2104.09864): rotary positions; Shazeer
(arXiv:2002.05202): SwiGLU; Press and Wolf (arXiv:1608.05859): the tied head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from piste_workloads.llm.config import Model

ROTARY_BASE = 10_000.0


def rotary_angles(time: int, head_width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle of each position and pair of coordinates.

    Args:
        time: How many positions.
        head_width: The width of a head, even.
        device: Where they are needed.

    Returns:
        Two tensors `(time, head_width / 2)` in float32.
    """
    # angle[t, i] = t * base^(-2i / e)
    pairs = torch.arange(0, head_width, 2, dtype=torch.float32, device=device)
    frequencies = ROTARY_BASE ** (-pairs / head_width)
    angles = torch.arange(time, dtype=torch.float32, device=device)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x_bhte: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turns each pair of coordinates `(i, i + e/2)` by its position's angle.

    A query and a key turned so have a scalar product that depends on the difference of their positions.
    """
    a, b = x_bhte.chunk(2, dim=-1)
    # (a, b) <- (a cos - b sin, a sin + b cos)
    return torch.cat((a * cosine - b * sine, a * sine + b * cosine), dim=-1).type_as(x_bhte)


class Attention(nn.Module):
    """Causal self-attention with several heads."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.query = nn.Linear(config.width, config.width, bias=False)
        self.key = nn.Linear(config.width, config.width, bias=False)
        self.value = nn.Linear(config.width, config.width, bias=False)
        self.projection = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x_btd: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Mixes each position with those before it: `(batch, time, width)` to the same."""
        q_bhte, k_bhte, v_bhte = (
            layer(x_btd).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        # softmax(q k^T / sqrt(e), over the positions up to this one) v
        mixed_bhte = functional.scaled_dot_product_attention(
            rotate(q_bhte, cosine, sine),
            rotate(k_bhte, cosine, sine),
            v_bhte,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
        )
        out_btd: Tensor = self.projection(mixed_bhte.transpose(1, 2).flatten(2))
        return out_btd


class MLP(nn.Module):
    """The position-wise network: SwiGLU (three matrices) or GELU (two)."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, config.width, bias=False)
        self.gate = nn.Linear(config.width, config.mlp_width, bias=False) if config.mlp == "swiglu" else None

    def forward(self, x_btd: Tensor) -> Tensor:
        """`(batch, time, width)` to the same."""
        hidden_btf = self.up(x_btd)
        if self.gate is None:
            hidden_btf = functional.gelu(hidden_btf)  # gelu(W_up x)
        else:
            hidden_btf = functional.silu(self.gate(x_btd)) * hidden_btf  # silu(W_gate x) * W_up x
        out_btd: Tensor = self.down(hidden_btf)
        return out_btd


class Block(nn.Module):
    """One layer: attention, then the MLP, each behind a norm and beside a residual."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_btd: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """`(batch, time, width)` to the same."""
        x_btd = x_btd + self.dropout(self.attention(self.attention_norm(x_btd), cosine, sine))
        out_btd: Tensor = x_btd + self.dropout(self.mlp(self.mlp_norm(x_btd)))
        return out_btd


class LanguageModel(nn.Module):
    """What the training loop and the sampler ask of a model: `(batch, time)` tokens to logits.

    Attributes:
        context: How many tokens it sees.
    """

    context: int

    @torch.no_grad()
    def generate(
        self, tokens_bt: Tensor, count: int, temperature: float, top_k: int, generator: torch.Generator
    ) -> Tensor:
        """Continues token sequences, one token at a time.

        Args:
            tokens_bt: The prompts `(batch, time)`, at least one token each; only the last `context` of
                them are seen.
            count: How many tokens to add.
            temperature: Divides the logits; 0 takes the likeliest token.
            top_k: Only the likeliest `top_k` tokens are drawn from; 0: all.
            generator: The source of randomness, on the device of the tokens.

        Returns:
            `(batch, time + count)`.
        """
        was_training = self.training
        self.eval()
        for _ in range(count):
            logits_bv = self(tokens_bt[:, -self.context :])[:, -1].float()
            if temperature == 0.0:
                chosen_b1 = logits_bv.argmax(dim=-1, keepdim=True)
            else:
                kept, index = logits_bv.topk(min(top_k or logits_bv.shape[1], logits_bv.shape[1]))
                drawn = torch.multinomial((kept / temperature).softmax(dim=-1), 1, generator=generator)
                chosen_b1 = index.gather(1, drawn)
            tokens_bt = torch.cat((tokens_bt, chosen_b1), dim=1)
        self.train(was_training)
        return tokens_bt


class GPT(LanguageModel):
    """The language model.

    Args:
        config: The recipe's `[model]`.
        vocab_size: How many tokens there are.
    """

    def __init__(self, config: Model, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.context = config.context
        self.token_embedding = nn.Embedding(vocab_size, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.final_norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.token_embedding.weight
        self._initialise()

    def _initialise(self) -> None:
        """Normal weights, gains at one.

        Standard deviations: embedding and head 0.02, so that the first guess is nearly uniform; matrices
        that read the stream `1 / sqrt(fan in)`, so that what they compute has variance one; the two
        matrices of a layer that write to it `0.02 / sqrt(2 layers)`, so that layers start near the
        identity and the stream does not grow with the depth (Radford et al., section 2.3).
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue
            std = 0.02
            if name.endswith(("projection.weight", "down.weight")):
                std = 0.02 / (2 * self.config.layers) ** 0.5
            elif name.startswith("blocks"):
                std = parameter.shape[1] ** -0.5
            nn.init.normal_(parameter, std=std)

    def forward(self, tokens_bt: Tensor) -> Tensor:
        """The logits of each position's next token.

        Args:
            tokens_bt: Token numbers `(batch, time)`.

        Returns:
            `(batch, time, vocabulary)`.
        """
        head_width = self.config.width // self.config.heads
        cosine, sine = rotary_angles(tokens_bt.shape[1], head_width, tokens_bt.device)
        # x = sqrt(d) E[token]: the stream starts at the scale of what the layers add (Vaswani et al., 3.4)
        x_btd = self.dropout(self.token_embedding(tokens_bt) * self.config.width**0.5)
        for block in self.blocks:
            x_btd = block(x_btd, cosine, sine)
        logits_btv: Tensor = self.head(self.final_norm(x_btd))
        return logits_btv


def cross_entropy(logits_btv: Tensor, targets_bt: Tensor, reduction: str = "mean") -> Tensor:
    """The loss in nats, `-log p(target)`: a token's mean, or their sum (`reduction="sum"`)."""
    return functional.cross_entropy(
        logits_btv.flatten(0, 1).float(), targets_bt.flatten(), reduction=reduction
    )


def parameter_count(config: Model, vocab_size: int) -> int:
    """How many parameters a model has.

    `V d (1 if tied else 2) + layers (4 d^2 + m d f + 2 d) + d`, with `m = 3` matrices for SwiGLU, 2 for GELU.
    """
    d, f = config.width, config.mlp_width
    matrices = 3 if config.mlp == "swiglu" else 2
    embeddings = vocab_size * d * (1 if config.tied else 2)
    return embeddings + config.layers * (4 * d**2 + matrices * d * f + 2 * d) + d
