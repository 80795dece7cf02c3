"""A two-layer transformer on an order-2 Markov chain: small, yet it tells optimizers apart."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim._muon import _zeropower_via_newtonschulz

from piste_algorithms.optimizers import matrix_param_groups, racs

VOCABULARY, CONTEXT, WIDTH, HEADS = 32, 32, 64, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.projection = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, time, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + self.projection(mixed.transpose(1, 2).reshape(batch, time, WIDTH))
        x = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return x


class SmallLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position_embedding = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """`(batch, time)` int64 -> logits `(batch, time, vocabulary)`."""
        x = self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def markov_chain(
    generator: torch.Generator, shifted_from: Tensor | None = None, share: float = 0.5
) -> Tensor:
    """`(previous, last, next)` probabilities `(vocabulary,) * 3`, or another's with a share replaced."""
    rows = torch.softmax(2 * torch.randn(VOCABULARY, VOCABULARY, VOCABULARY, generator=generator), dim=-1)
    if shifted_from is None:
        return rows
    replaced = torch.rand(VOCABULARY, VOCABULARY, 1, generator=generator) < share
    return torch.where(replaced, rows, shifted_from)


def sample(chain: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """`(batch, CONTEXT + 1)` tokens."""
    tokens = torch.randint(VOCABULARY, (batch, 2), generator=generator)
    for _ in range(CONTEXT - 1):
        drawn = torch.multinomial(chain[tokens[:, -2], tokens[:, -1]], 1, generator=generator)
        tokens = torch.cat([tokens, drawn], dim=1)
    return tokens


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def build_model(seed: int) -> SmallLanguageModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SmallLanguageModel()


def train(
    model: nn.Module,
    optimizer: Optimizer,
    chain: Tensor,
    *,
    steps: int,
    seed: int,
    after_step: Callable[[int], None] | None = None,
) -> float:
    """Train with linear decay to 0 and return the loss on held-out sequences, nats a token."""
    generator = torch.Generator().manual_seed(seed)
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        loss_of(model, sample(chain, 32, generator)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if after_step is not None:
            after_step(step)
    return evaluate(model, chain)


def evaluate(model: nn.Module, chain: Tensor) -> float:
    with torch.no_grad():
        return loss_of(model, sample(chain, 512, torch.Generator().manual_seed(10_000))).item()


def consistency_with_adamw(steps: int, seed: int, every: int) -> dict[str, float]:
    """Mean cosine, along an AdamW run, between AdamW's update and other preconditioners of the same momentum.

    The population is the eight hidden matrices of the model at every `every`-th step; weight decay is left
    out. All preconditioners see AdamW's own first moment, so only they are compared. `"REG (own momentum)"`
    is the whole optimizer: its own Nesterov momentum of the same gradients.
    """
    model = build_model(seed)
    groups = matrix_param_groups(model, flag="use_matrix")
    matrices = groups[0]["params"]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    averages = [torch.zeros_like(matrix) for matrix in matrices]
    cosines: dict[str, list[float]] = {"REG": [], "REG (own momentum)": [], "Muon": [], "momentum": []}

    def compare(step: int) -> None:
        for matrix, average in zip(matrices, averages, strict=True):
            assert matrix.grad is not None
            average.lerp_(matrix.grad, 0.05)
            if step % every:
                continue
            state = optimizer.state[matrix]
            reference = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)
            candidates = {
                "REG": racs(state["exp_avg"]),
                "REG (own momentum)": racs(matrix.grad.lerp(average, 0.95)),
                "Muon": _zeropower_via_newtonschulz(
                    state["exp_avg"], (3.4445, -4.7750, 2.0315), 5, 1e-7
                ).float(),
                "momentum": state["exp_avg"],
            }
            for name, candidate in candidates.items():
                cosine = functional.cosine_similarity(candidate.float().flatten(), reference.flatten(), dim=0)
                cosines[name].append(cosine.item())

    train(
        model,
        optimizer,
        markov_chain(torch.Generator().manual_seed(seed)),
        steps=steps,
        seed=seed,
        after_step=compare,
    )
    return {name: sum(values) / len(values) for name, values in cosines.items()}
