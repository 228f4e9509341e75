"""Whether two checkpoints can be run as the two sets of weights of one engine.

Why so much must be equal: both read the same ids at the same positions, under one layout of the KV cache, and what
differs unnoticed would make another text and no error.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from snpatch.errors import SnpatchError
from snpatch.models.pretrained import load_pretrained

# Of a model's config: what two checkpoints of one engine may differ in, as none of it changes what is computed.
MAY_DIFFER = (
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "max_position_embeddings",
    "pad_token_id",
    "pretraining_tp",
    "torch_dtype",
    "transformers_version",
    "unk_token_id",
    "use_cache",
    "vocab_size",
    "attention_dropout",
    "initializer_range",
)
# Parts of a tokenizer that make ids; what follows them (truncation, padding, a post-processor) is not asked for ids.
MAKES_IDS = ("normalizer", "pre_tokenizer", "model", "post_processor")


def check_pair(model: str | Path, second: str | Path, tokenizer, other_tokenizer) -> None:
    """An error that names the first difference between two checkpoints that one engine cannot run both of."""
    own, other = (load_pretrained(AutoConfig, name) for name in (model, second))
    if own.model_type != other.model_type:
        raise SnpatchError(
            f"{second} is a {other.model_type} and {model} a {own.model_type}: two models of one engine have one "
            "architecture; run each in an engine of its own"
        )
    mine, theirs = _plain(own), _plain(other)
    for key in sorted(mine.keys() | theirs.keys()):
        if mine.get(key) != theirs.get(key):
            raise SnpatchError(
                f"{second}: its config has {key} = {theirs.get(key)}, and {model} has {mine.get(key)}: the two models "
                "of an engine must be of one shape; run each in an engine of its own"
            )
    check_tokenizers(tokenizer, other_tokenizer, str(model), str(second))


def are_equal(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules hold the same weights, of their own and not of the modules in them."""
    own, theirs = (dict(m.named_parameters(recurse=False)) for m in (one, other))
    return own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """What they hold."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def check_tokenizers(own, other, model: str, second: str) -> None:
    """Two tokenizers must give the same ids for every text."""
    mine, theirs = own.get_vocab(), other.get_vocab()
    if mine != theirs:
        token = min(
            (t for t in mine.keys() | theirs.keys() if mine.get(t) != theirs.get(t)),
            key=lambda t: (mine.get(t, theirs.get(t)), t),
        )
        raise _difference(model, second, f"the token {token!r}", mine.get(token), theirs.get(token))
    for name in (own, other):
        if getattr(name, "backend_tokenizer", None) is None:
            return  # of a slow tokenizer the tokens are all that can be compared
    parts = [json.loads(one.backend_tokenizer.to_str()) for one in (own, other)]
    added = [{t["content"]: t for t in part["added_tokens"]} for part in parts]
    for token in added[0]:
        if added[0][token] != added[1].get(token):
            raise _difference(model, second, f"the added token {token!r}", added[0][token], added[1].get(token))
    for part in MAKES_IDS:
        if parts[0].get(part) != parts[1].get(part):
            raise _difference(model, second, f"the {part}", *(_short(one.get(part)) for one in parts))


def _difference(model: str, second: str, what: str, mine: object, theirs: object) -> SnpatchError:
    return SnpatchError(
        f"the tokenizers of {model} and {second} differ in {what}: {mine} and {theirs}; both models of an engine must "
        "read the same ids"
    )


def _short(part: object) -> str:
    text = json.dumps(part)
    return text if len(text) <= 200 else text[:200] + " ..."


def _plain(config) -> dict:
    """What of a config must be equal."""
    return {key: value for key, value in config.to_dict().items() if key not in MAY_DIFFER}
