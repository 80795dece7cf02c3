"""Training: one loop for one worker or many, one optimizer pass or several, fresh or resumed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from piste.building import build_optimizer, state_bytes
from piste.checkpoints import MANIFEST, load, load_model
from piste.errors import BadInput, PisteError
from piste.workload import Run
from piste_workloads.hardware import no_sync, now, precision
from piste_workloads.llm.batches import global_batch, validation_starts, windows
from piste_workloads.llm.config import Config, TextRecipe
from piste_workloads.llm.model import GPT, LanguageModel, cross_entropy
from piste_workloads.llm.sample import generate_rows
from piste_workloads.llm.tokens import Corpus, open_corpus
from piste_workloads.schedule import lr_factor


def prepare_data(config: Config) -> str:
    """Makes text, tokenizer and tokens, once and before any worker.

    Returns:
        The hash of everything that the run starts from: the text, the tokenizer's settings, and the
        checkpoint of `init_from`.

    Raises:
        BadInput: The text cannot be read, is too short or supports no such vocabulary; `init_from` is no
            checkpoint of a language model.
    """
    _, corpus = _start(config)
    if config.init_from is None:
        return corpus.sha256
    manifest = hashlib.sha256((config.init_from / MANIFEST).read_bytes()).hexdigest()
    return hashlib.sha256(f"{corpus.sha256}{manifest}".encode()).hexdigest()


def _start(config: Config) -> tuple[dict[str, Any] | None, Corpus]:
    """The checkpoint that a fine-tuning run starts from, and the corpus in its tokens."""
    if config.init_from is None:
        return None, open_corpus(config)
    if not (config.init_from / MANIFEST).exists():
        raise BadInput(
            f"init_from: {config.init_from}: not a checkpoint's folder (runs/ID/checkpoints/step-N)"
        )
    state = load(config.init_from)
    if "tokenizer" not in state:
        raise BadInput(f"init_from: {config.init_from}: not a checkpoint of the workload llm")
    corpus = open_corpus(config, state["tokenizer"])
    if corpus.tokenizer.vocab_size != config.data.vocab_size:
        raise BadInput(
            f"data.vocab_size = {config.data.vocab_size}, but the checkpoint of init_from has "
            f"{corpus.tokenizer.vocab_size} tokens: set it to that"
        )
    return state, corpus


def train(config: Config, run: Run) -> None:
    """Trains a model from its start, or from a checkpoint of another run; leaves behind what `fit` does.

    Raises:
        BadInput: As `prepare_data`.
        PisteError: As `fit`.
        CheckpointError: The checkpoint of `init_from` is of another architecture.
    """
    pretrained, corpus = _start(config)
    model = GPT(config.model, corpus.tokenizer.vocab_size)
    if pretrained is not None:
        load_model(model, pretrained["model"], f"init_from: {config.init_from}")
    fit(config, run, model, corpus)


def fit(config: TextRecipe, run: Run, model: LanguageModel, corpus: Corpus) -> None:
    """Trains a language model on a text and leaves losses, samples and checkpoints behind.

    Logs `train/loss` (nats a token, mean over workers), `train/gradient_norm` (before clipping),
    `train/lr` (of the first group), `time/step_ms`, `time/optimizer_ms` (a step without its closures),
    `time/tokens_per_s` (all workers), and, every `validate_every` steps and at the end, `valid/loss` and
    `valid/bits_per_byte`.

    Raises:
        PisteError: The loss has not been finite for `train.non_finite_steps` steps.
    """
    optimizer = build_optimizer(config.optimizer, model)
    # The recipe's learning rate of each group; the schedule multiplies it.
    lrs = [group.get("lr", 0.0) for group in optimizer.param_groups]
    compiled: nn.Module = torch.compile(model) if config.train.compile else model  # type: ignore[assignment]
    network = run.prepare(compiled)

    start = run.resume(model, optimizer)

    steps = config.train.steps
    step_once = _Step(config, run, network, optimizer, corpus)
    non_finite = 0
    for step in range(start + 1, steps + 1):
        factor = lr_factor(config.train, step, steps)
        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
            if "lr" in group:
                group["lr"] = factor * lr
        metrics = step_once(step)
        run.log(metrics, step)
        if step == 1:
            run.log({"optimizer/state_bytes": state_bytes(optimizer)}, step)

        non_finite = 0 if math.isfinite(metrics["train/loss"]) else non_finite + 1
        if non_finite == config.train.non_finite_steps:
            raise PisteError(
                f"the loss has not been finite since step {step - non_finite + 1}: "
                "lower optimizer.lr, lengthen train.warmup_steps or set train.clip"
            )

        stop = run.mean(float(run.should_stop)) > 0.0  # asked on one worker, agreed on by all
        last = step == steps
        reported: dict[str, float] = {}
        if last or _every(config.train.validate_every, step):
            reported = validate(config, run, model, corpus)
        if config.train.samples and (last or _every(config.train.sample_every, step)) and run.rank == 0:
            rows = generate_rows(
                model, corpus.tokenizer, config.train.samples, config.train.sample_tokens, run.seed
            )
            run.table("samples" if last else f"samples-{step:06d}", rows, step)
        if stop or config.checkpoints.due(step, steps):
            run.report(reported, step, checkpoint=_state(model, optimizer, corpus))
        elif reported:
            run.report(reported, step)
        if stop:
            return


class _Step:
    """One optimizer step: the batch, the closure, and what is measured around them."""

    def __init__(
        self,
        config: TextRecipe,
        run: Run,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        corpus: Corpus,
    ) -> None:
        self._config = config
        self._run = run
        self._network = network
        self._optimizer = optimizer
        self._corpus = corpus
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._precision = precision(config.train.bf16, run.device)

    def __call__(self, step: int) -> dict[str, float]:
        """Takes one step and returns its metrics."""
        train, run = self._config.train, self._run
        started = now(run.device)
        context = self._config.context
        starts = global_batch(run.seed, step, train.batch, len(self._corpus.train) - context)
        micro_batches = [
            windows(self._corpus.train, part, context, run.device)
            for part in _split(run.shard(starts), train.accumulate)
        ]
        passes: list[tuple[Tensor, Tensor]] = []  # loss and gradient norm of every call of the closure
        closure_seconds = 0.0

        def closure() -> Tensor:
            nonlocal closure_seconds
            began = now(run.device)
            self._optimizer.zero_grad()
            loss = self._forward_and_backward(micro_batches)
            # g <- g min(1, clip / ||g||)
            norm = nn.utils.clip_grad_norm_(self._parameters, train.clip or math.inf)
            passes.append((loss, norm))
            closure_seconds += now(run.device) - began
            return loss

        self._network.train()
        stepping = now(run.device)
        self._optimizer.step(closure)  # type: ignore[arg-type]
        loss, norm = passes[0]  # where the step began
        optimizer_seconds = now(run.device) - stepping - closure_seconds
        mean_loss = run.mean(float(loss))
        seconds = now(run.device) - started
        return {
            "train/loss": mean_loss,
            "train/gradient_norm": float(norm),
            "train/lr": float(self._optimizer.param_groups[0].get("lr", 0.0)),
            "time/step_ms": 1e3 * seconds,
            "time/optimizer_ms": 1e3 * optimizer_seconds,
            "time/tokens_per_s": train.batch * context / seconds,
        }

    def _forward_and_backward(self, micro_batches: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Adds the gradients of this worker's part; returns its mean loss in nats a token."""
        total = torch.zeros((), device=self._run.device)
        for number, (inputs_bt, targets_bt) in enumerate(micro_batches, start=1):
            # Workers exchange gradients once a step, behind the last micro-batch.
            with no_sync(self._network) if number < len(micro_batches) else nullcontext():
                with self._precision:
                    logits_btv = self._network(inputs_bt)
                loss = cross_entropy(logits_btv, targets_bt) / len(micro_batches)
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total


@torch.no_grad()
def validate(config: TextRecipe, run: Run, model: LanguageModel, corpus: Corpus) -> dict[str, float]:
    """The loss on held-out windows, the same ones at every call, shared out over the workers.

    Returns:
        `valid/loss` in nats a token, and `valid/bits_per_byte`, which does not depend on the tokenizer.
    """
    context, size = config.context, config.train.batch
    starts = validation_starts(len(corpus.validation), context, config.train.validation_batches * size)
    mine = run.shard(starts)
    nats, count, text_bytes = 0.0, 0, 0
    model.eval()
    for first in range(0, len(mine), size):
        inputs_bt, targets_bt = windows(corpus.validation, mine[first : first + size], context, run.device)
        with precision(config.train.bf16, run.device):
            logits_btv = model(inputs_bt)
        nats += float(cross_entropy(logits_btv, targets_bt, reduction="sum"))
        count += targets_bt.numel()
        text_bytes += int(corpus.tokenizer.bytes_of[targets_bt.cpu().numpy()].sum())
    model.train()
    nats, tokens, total_bytes = (run.mean(value) for value in (nats, float(count), float(text_bytes)))
    # bits per byte = nats / ln 2 / bytes = loss / ln 2 * tokens / bytes
    return {"valid/loss": nats / tokens, "valid/bits_per_byte": nats / math.log(2.0) / total_bytes}


def _state(model: LanguageModel, optimizer: torch.optim.Optimizer, corpus: Corpus) -> dict[str, Any]:
    """A checkpoint's content; the data's position and the learning rate follow from the step."""
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "tokenizer": str(corpus.tokenizer),
    }


def _every(period: int, step: int) -> bool:
    return period > 0 and step % period == 0


def _split(starts: list[int], parts: int) -> Iterator[list[int]]:
    size = len(starts) // parts
    return (starts[first : first + size] for first in range(0, len(starts), size))
