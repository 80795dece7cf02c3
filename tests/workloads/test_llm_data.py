import math
import multiprocessing
import os
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from piste.config import validate
from piste.errors import BadInput
from piste_workloads import llm
from piste_workloads.llm import text, tokens
from piste_workloads.llm.batches import global_batch, validation_starts, windows
from piste_workloads.llm.config import Config
from piste_workloads.llm.tokens import BYTES, Corpus, Tokenizer, open_corpus, split_text, train_tokenizer

SENTENCES = "In the beginning was the word, and the word was “piste” – naïve café.\n"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PISTE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def config_of(tmp_path: Path) -> Callable[..., Config]:
    def build(content: str | bytes = SENTENCES * 100, context: int = 8, **data: Any) -> Config:
        path = tmp_path / "text.txt"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        table = {"model": {"context": context}, "data": {"source": "file", "path": str(path), **data}}
        return validate(Config, {"workload": "llm", **table}, "test")

    return build


@pytest.mark.parametrize("vocab_size", [256, 280])
def test_tokens_decode_to_the_text(vocab_size: int) -> None:
    tokenizer = train_tokenizer(SENTENCES * 20, vocab_size)
    sample = "  Naïve “words”,\n\n\tunseen: 雪 \x00 end "
    assert tokenizer.vocab_size == vocab_size
    assert tokenizer.decode(tokenizer.encode(sample).tolist()) == sample
    assert Tokenizer(str(tokenizer)).encode(sample).tolist() == tokenizer.encode(sample).tolist()


def test_a_bpe_needs_fewer_tokens_than_bytes() -> None:
    assert len(train_tokenizer(SENTENCES * 20, 280).encode(SENTENCES)) < len(SENTENCES.encode()) / 2


def test_a_tokenizer_trains_to_the_same_bits() -> None:
    assert str(train_tokenizer(SENTENCES * 20, 280)) == str(train_tokenizer(SENTENCES * 20, 280))


@pytest.mark.parametrize("vocab_size", [256, 280])
def test_bytes_of_tokens_add_up_to_the_bytes_of_the_text(vocab_size: int) -> None:
    tokenizer = train_tokenizer(SENTENCES * 20, vocab_size)
    sample = SENTENCES + "unseen: 雪"
    assert tokenizer.bytes_of[tokenizer.encode(sample)].sum() == len(sample.encode())


def test_a_text_longer_than_a_piece_is_encoded_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_tokenizer(SENTENCES * 20, 280)
    monkeypatch.setattr(tokens, "PIECE", 50)
    for sample in (SENTENCES * 7, "x" * 333):
        assert tokenizer.decode(tokenizer.encode(sample).tolist()) == sample


@pytest.mark.parametrize("vocab_size", [256, 280])
def test_validation_is_the_held_out_end(vocab_size: int, config_of: Callable[..., Config]) -> None:
    content = SENTENCES * 90 + "zebra " * 100
    corpus = open_corpus(config_of(content, vocab_size=vocab_size, validation_fraction=0.1))
    parts = [corpus.tokenizer.decode(part.tolist()) for part in (corpus.train, corpus.validation)]
    assert "".join(parts) == content
    assert len(parts[1]) == pytest.approx(0.1 * len(content), rel=0.12)
    assert "zebra" not in str(corpus.tokenizer)  # nor did the tokenizer see it


def test_a_split_falls_behind_a_line_where_one_is_near() -> None:
    train, validation = split_text("a line of the text\n" * 50, 0.2)
    assert train.endswith("\n")
    assert train + validation == "a line of the text\n" * 50
    train, validation = split_text("x" * 100, 0.2)
    assert (len(train), len(validation)) == (80, 20)


def test_a_cached_corpus_is_not_made_again(
    config_of: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(vocab_size=280)
    first = open_corpus(config)

    def fail(*_: object) -> Tokenizer:
        raise AssertionError("trained again")

    monkeypatch.setattr(tokens, "train_tokenizer", fail)
    second = open_corpus(config)
    assert second.sha256 == first.sha256
    assert np.array_equal(second.train, first.train)
    assert isinstance(second.train, np.memmap)
    with pytest.raises(AssertionError, match="trained again"):
        open_corpus(config_of(SENTENCES * 101, vocab_size=280))


def test_the_hash_follows_the_text_and_the_settings_and_not_the_path(
    config_of: Callable[..., Config], tmp_path: Path
) -> None:
    base = llm.prepare_data(config_of(vocab_size=280))
    assert llm.prepare_data(config_of(vocab_size=281)) != base
    assert llm.prepare_data(config_of(vocab_size=280, validation_fraction=0.2)) != base
    assert llm.prepare_data(config_of(SENTENCES * 99, vocab_size=280)) != base
    (tmp_path / "other.txt").write_text(SENTENCES * 100)
    config = config_of(vocab_size=280)
    moved = config.data.model_copy(update={"path": tmp_path / "other.txt"})
    assert llm.prepare_data(config.model_copy(update={"data": moved})) == base


def set_home(path: str) -> None:
    os.environ["PISTE_HOME"] = path


def test_four_processes_prepare_one_cache_at_once(config_of: Callable[..., Config], home: Path) -> None:
    config = config_of(SENTENCES * 2000, vocab_size=280)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["piste_workloads.llm"])
    with context.Pool(4, set_home, (str(home),)) as pool:
        hashes = set(pool.map(llm.prepare_data, [config] * 4, chunksize=1))
    assert len(hashes) == 1
    folders = [path for path in (home / "cache" / "tokens").iterdir() if path.is_dir()]
    assert len(folders) == 1  # and nothing half-made beside it
    assert llm.prepare_data(config) == hashes.pop()


def test_an_interrupted_preparation_leaves_nothing(
    config_of: Callable[..., Config], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            open_corpus(config_of(vocab_size=256))
    assert [path for path in (home / "cache" / "tokens").iterdir() if path.is_dir()] == []
    assert len(open_corpus(config_of(vocab_size=256)).train) > 0


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        (b"caf\xe9 " * 100, {"vocab_size": 256}, r"text.txt: not UTF-8 \(byte 3 is 0xe9\): convert it"),
        (
            "",
            {"vocab_size": 256},
            "the training part has 0 tokens, and model.context = 8 needs 9: use more text",
        ),
        (
            "ab" * 40,
            {"vocab_size": 256},
            "the validation part has 4 tokens, and model.context = 8 needs 9: use",
        ),
        (
            SENTENCES * 10,
            {"vocab_size": 4096},
            r"vocab_size = 4096: the text supports 297 tokens: lower it",
        ),
    ],
)
def test_a_text_that_no_run_can_use(
    content: str | bytes, settings: dict[str, Any], message: str, config_of: Callable[..., Config]
) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        llm.prepare_data(config_of(content, **settings))
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder(config_of: Callable[..., Config], tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "none.txt", "none.txt: no such file"),
        (tmp_path, "cannot be read: Is a dir"),
    ):
        config = config_of()
        data = config.data.model_copy(update={"path": path})
        with pytest.raises(BadInput, match=message):
            llm.prepare_data(config.model_copy(update={"data": data}))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"source": "file"}, 'source = "file" needs data.path'),
        ({"source": "hub"}, 'source = "hub" needs data.name'),
        ({"path": "x.txt"}, 'path is for source = "file", and source is "kjv"'),
        ({"vocab_size": 100}, "greater than or equal to 256"),
    ],
)
def test_settings_that_contradict_each_other(data: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        validate(Config, {"workload": "llm", "data": data}, "test")


def test_the_hub_without_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    config = validate(Config, {"workload": "llm", "data": {"source": "hub", "name": "a/b"}}, "test")
    with pytest.raises(BadInput, match=r"pip install 'piste\[hub\]'"):
        llm.prepare_data(config)


def test_the_hub_is_streamed_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    served = 0

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        assert (name, config, split, streaming) == ("a/b", "c", "test", True)
        nonlocal served
        for number in range(10**6):
            served += 1
            yield {"body": f"Text number {number}."}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    table = {"source": "hub", "name": "a/b", "config": "c", "split": "test", "column": "body"}
    table |= {"max_characters": 1000}  # type: ignore[dict-item]
    config = validate(Config, {"workload": "llm", "data": table}, "test")
    content = text.read_text(config.data)
    assert len(content) == 1000
    assert content.startswith("Text number 0.\n\nText number 1.\n\n")
    assert text.read_text(config.data) == content
    assert served < 100  # not read to its end, nor a second time
    wrong = config.data.model_copy(update={"column": "bod"})
    with pytest.raises(BadInput, match=r"data.column: a/b has no 'bod'; did you mean 'body'\?"):
        text.read_text(wrong)


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    def load_dataset(*_: object, **__: object) -> Any:
        raise ConnectionError("Couldn't reach 'a/b' on the Hub\n(a long tale)")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    config = validate(Config, {"workload": "llm", "data": {"source": "hub", "name": "a/b"}}, "test")
    with pytest.raises(BadInput, match=r"a/b cannot be read from the hub: Couldn't reach 'a/b' on the Hub$"):
        llm.prepare_data(config)
    assert not list((home / "cache" / "text").glob("*.txt"))


def test_the_king_james_bible(home: Path) -> None:
    content = text.read_text(Config().data)
    assert content.startswith(
        "In the beginning God created the heaven and the earth. And the earth was without form"
    )
    assert "and darkness was upon the face of the deep" in content  # `[was]` in the source
    assert content.endswith("The grace of our Lord Jesus Christ be with you all. Amen.\n")
    assert len(content) == 4_138_978
    assert len(list((home / "cache" / "text").glob("kjv-*.txt"))) == 1


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    torch.manual_seed(5)
    first = global_batch(seed=1, step=10, size=6, starts=1000)
    torch.manual_seed(6)
    assert global_batch(seed=1, step=10, size=6, starts=1000) == first
    assert global_batch(seed=2, step=10, size=6, starts=1000) != first
    assert global_batch(seed=1, step=11, size=6, starts=1000) != first
    assert all(0 <= start < 1000 for start in first)


def test_every_window_can_be_drawn_and_no_other() -> None:
    drawn = {start for step in range(50) for start in global_batch(seed=0, step=step, size=20, starts=7)}
    assert drawn == set(range(7))


def test_targets_are_the_tokens_after_the_inputs() -> None:
    inputs, targets = windows(np.arange(20, dtype=np.uint16), [0, 15], 4, CPU)
    assert inputs.tolist() == [[0, 1, 2, 3], [15, 16, 17, 18]]
    assert targets.tolist() == [[1, 2, 3, 4], [16, 17, 18, 19]]


def test_validation_windows_share_no_target_and_stay_inside() -> None:
    for count in (1, 7, 12, 10**6):
        starts = validation_starts(tokens=100, context=8, windows=count)
        assert len(starts) == min(count, 12)
        assert all(b - a >= 8 for a, b in pairwise(starts))
        assert starts[-1] + 8 + 1 <= 100


@pytest.mark.parametrize("vocab_size", [256, 280])
def test_a_uniform_model_needs_log2_of_the_vocabulary_bits_a_token(
    vocab_size: int, config_of: Callable[..., Config]
) -> None:
    from piste.workload import Run
    from piste_workloads.llm.model import GPT
    from piste_workloads.llm.train import validate as validation

    config = config_of(vocab_size=vocab_size)
    corpus: Corpus = open_corpus(config)
    model = GPT(config.model, vocab_size)
    with torch.no_grad():
        model.head.weight.zero_()
    alone: Any = SimpleNamespace(device=CPU, shard=lambda items: items, mean=lambda value: value)
    run: Run = alone
    found = validation(config, run, model, corpus)
    assert found["valid/loss"] == pytest.approx(math.log(vocab_size), rel=1e-6)

    # By hand: the bytes of the windows' targets, decoded.
    count = config.train.validation_batches * config.train.batch
    starts = validation_starts(len(corpus.validation), 8, count)
    predicted = [corpus.validation[start + 1 : start + 9] for start in starts]
    size = sum(len(bytes_of(corpus.tokenizer, window.tolist())) for window in predicted)
    bits = 8 * len(starts) * math.log2(vocab_size)
    assert found["valid/bits_per_byte"] == pytest.approx(bits / size, rel=1e-6)
    if vocab_size == 256:
        assert found["valid/bits_per_byte"] == pytest.approx(8.0, rel=1e-6)


def bytes_of(tokenizer: Tokenizer, window: list[int]) -> bytes:
    if str(tokenizer) == BYTES:
        return bytes(window)
    from tokenizers import Tokenizer as BytePairEncoding

    # The byte-level alphabet writes printable bytes as themselves and the others, in order, from U+0100 on.
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in kept]
    alphabet = {chr(byte): byte for byte in kept} | {chr(256 + n): byte for n, byte in enumerate(others)}
    bpe = BytePairEncoding.from_str(str(tokenizer))
    return bytes(alphabet[character] for token in window for character in bpe.id_to_token(token) or "")
