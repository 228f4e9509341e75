"""Whether two checkpoints can be run as the two sets of weights of one engine.

Why they are compared by what their config's class declares: both read the same ids at the same positions, under one
layout of the KV cache, and what differs in what is computed would make another text and no error. What nobody computes
with (other tools' keys, a window that no layer has) differs between most public pairs.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig

from snpatch.errors import SnpatchError, shown
from snpatch.models.notes import Notes
from snpatch.models.pretrained import load_pretrained

# What a config's class declares, and what is computed when texts are read does not hang on.
MAY_DIFFER = (
    "attention_dropout",
    "bos_token_id",
    "embd_pdrop",
    "eos_token_id",
    "initializer_range",
    "max_position_embeddings",
    "pad_token_id",
    "pretraining_tp",
    "resid_pdrop",
    "unk_token_id",
    "use_cache",
    "vocab_size",
)
# What vLLM or transformers read of a config although its class does not declare it.
UNDECLARED = (
    "attention_bias",
    "bias",
    "compression_config",
    "dual_chunk_attention_config",
    "mlp_bias",
    "quantization_config",
    "tie_word_embeddings",
)
WINDOW = ("sliding_window", "use_sliding_window", "max_window_layers")
ROPE = ("rope_parameters", "original_max_position_embeddings")
ROPE_KEYS = {  # of rope_parameters, what each type computes with besides its base; all keys of other types count
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# Parts of a tokenizer that make ids besides its tokens. What is put around a text may differ: each model reads as its
# own tokenizer does.
SPLITS = ("normalizer", "pre_tokenizer")


def check_compatible(model: str | Path, second: str | Path, tokenizer, other_tokenizer, notes: Notes) -> None:
    """Raise an error that names the first difference between two checkpoints that one engine cannot run both of."""
    own, other = (load_pretrained(AutoConfig, name) for name in (model, second))
    if own.model_type != other.model_type:
        raise SnpatchError(
            f"{second} is a {other.model_type} and {model} a {own.model_type}: two models of one engine have one "
            "architecture; run each in an engine of its own"
        )
    context = min(own.max_position_embeddings, other.max_position_embeddings)
    mine, theirs = computed_with(own, context), computed_with(other, context)
    for key in sorted(mine.keys() | theirs.keys()):
        if mine.get(key) != theirs.get(key):
            raise SnpatchError(
                f"{second}: its config has {key} = {shown(theirs.get(key))}, and {model} has {shown(mine.get(key))}: "
                "the two models of an engine must be of one shape; run each in an engine of its own"
            )
    unread = sorted(key for key in _extra(own) | _extra(other) if _value(own, key) != _value(other, key))
    if unread:
        notes.add(
            f"config {second}",
            f"{model} and {second} differ in keys that a {own.model_type} does not compute with: {', '.join(unread)}",
        )
    sizes = own.vocab_size, other.vocab_size
    check_tokenizers(tokenizer, other_tokenizer, str(model), str(second), sizes, notes)


def computed_with(config, context: int) -> dict[str, object]:
    """Return what a model computes with of its config, for texts of at most `context` tokens.

    Keys at their defaults are like absent ones. A window counts where a layer has it and a text can be longer, a key of
    rotary positions where their type uses it.
    """
    kept = {name: getattr(config, name) for name in _declared(config) - {*MAY_DIFFER, *WINDOW, *ROPE}}
    kept |= {name: value for name in UNDECLARED if (value := getattr(config, name, None)) not in (None, False)}
    kept["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    is_windowed = window is not None and window < context and (layers is None or "sliding_attention" in layers)
    kept["sliding_window"] = window if is_windowed else None
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer = {kind: _rope(one) for kind, one in rope.items() if isinstance(one, dict)}
    kept["rope_parameters"] = by_layer or _rope(rope)
    if layers is not None:
        in_use = {kind: (kept["sliding_window"] if kind == "sliding_attention" else None) for kind in layers}
        kept["layer_types"] = [(in_use[kind], by_layer.get(kind)) for kind in layers]
        kept["rope_parameters"] = None if by_layer else kept["rope_parameters"]
    return {name: _plain(value) for name, value in kept.items()}


def _rope(parameters: Mapping) -> dict[str, object]:
    """Return what rotary positions are computed with."""
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "linear" and parameters.get("factor") == 1:
        kind = "default"
    names = ROPE_KEYS.get(kind, parameters.keys() - {"type"})
    read = {name: value for name in names if (value := parameters.get(name)) is not None}
    share = parameters.get("partial_rotary_factor")
    return {"rope_theta": parameters.get("rope_theta"), "share": 1.0 if share is None else share, **read} | {
        "rope_type": kind
    }


def _plain(value: object) -> object:
    return value.to_dict() if hasattr(value, "to_dict") else value


def _declared(config) -> set[str]:
    """Return the keys that a config's own class declares."""
    return {f.name for f in fields(config)} - {f.name for f in fields(PreTrainedConfig)}


def _extra(config) -> set[str]:
    """Return the keys of a config that its class does not declare, or that nothing is computed with."""
    known = {f.name for f in fields(PreTrainedConfig)} | {"_name_or_path", "model_type", "transformers_version"}
    return config.to_dict().keys() - known - _declared(config) - {*UNDECLARED, "head_dim"}


def _value(config, key: str) -> object:
    return config.to_dict().get(key)


def have_equal_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules hold the same weights, of their own and not of the modules in them."""
    own, theirs = (dict(m.named_parameters(recurse=False)) for m in (one, other))
    return own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own)


def module_kinds(modules: Iterable[str]) -> tuple[str, ...]:
    """Return the kinds of modules, the last parts of their names, each once."""
    return tuple(sorted({name.rpartition(".")[2] for name in modules}))


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """What they hold."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def check_tokenizers(own, other, model: str, second: str, sizes: tuple[int, int], notes: Notes) -> None:
    """Raise an error unless every id that both tokenizers define means the same in both, and both split texts alike.

    Args:
        own: the first tokenizer.
        other: the second.
        model: names the first in errors.
        second: names the second.
        sizes: rows of each one's embedding. An id that only one defines needs a row of the other, unless it pads.
        notes: of such ids, and of other differences that each model's own texts have.
    """
    mine, theirs = own.get_vocab(), other.get_vocab()
    if mine != theirs:
        moved = [t for t in mine.keys() & theirs.keys() if mine[t] != theirs[t]]
        if moved:
            token = min(moved, key=lambda t: (mine[t], t))
            raise _difference(model, second, f"the token {token!r}", mine[token], theirs[token])
        tokens = [{index: token for token, index in vocab.items()} for vocab in (mine, theirs)]
        renamed = [i for i in tokens[0].keys() & tokens[1].keys() if tokens[0][i] != tokens[1][i]]
        if renamed:
            index = min(renamed)
            raise _difference(model, second, f"the token of id {index}", *(repr(one[index]) for one in tokens))
        for one, size, names, ids in (
            (own, sizes[1], (model, second), tokens[0].keys() - tokens[1].keys()),
            (other, sizes[0], (second, model), tokens[1].keys() - tokens[0].keys()),
        ):
            _check_alone(one, size, *names, ids, notes)
    if any(getattr(one, "backend_tokenizer", None) is None for one in (own, other)):
        return  # of a slow tokenizer the tokens are all that can be compared
    parts = [json.loads(one.backend_tokenizer.to_str()) for one in (own, other)]
    for part in SPLITS:
        if parts[0].get(part) != parts[1].get(part):
            raise _difference(model, second, f"the {part}", *(_short(one.get(part)) for one in parts))
    models, shared = [one["model"] for one in parts], mine.keys() & theirs.keys()
    for key in sorted(models[0].keys() | models[1].keys()):
        values = [_within(one.get(key), key, shared) for one in models]
        if values[0] != values[1]:
            raise _difference(model, second, f"the {key} of its model", *map(_short, values))
    added = [{t["content"]: t for t in part["added_tokens"]} for part in parts]
    other_added = sorted(t for t in shared & {*added[0], *added[1]} if added[0].get(t) != added[1].get(t))
    around = [] if parts[0].get("post_processor") == parts[1].get("post_processor") else ["what is put around a text"]
    if differences := [*around, *(f"how the text {token!r} is found" for token in other_added)]:
        notes.add(
            f"tokenizers {model} {second}",
            f"the tokenizers of {model} and {second} differ in {', '.join(differences)}; each model's prompts are read "
            "by its own",
        )


def _check_alone(tokenizer, size: int, name: str, other: str, ids: set[int], notes: Notes) -> None:
    """Raise an error for ids that one tokenizer alone defines and the other model has no row for; tell of others."""
    if not ids:
        return
    beyond = sorted(i for i in ids if i >= size and i != tokenizer.pad_token_id)
    first = beyond[0] if beyond else min(ids)
    token = tokenizer.convert_ids_to_tokens(first)
    if beyond:
        raise SnpatchError(
            f"the tokenizer of {name} has the token {token!r} ({first}), and the embedding of {other} has {size} rows: "
            "both models of an engine read the same ids; run each in an engine of its own"
        )
    notes.add(
        f"tokens {name} {other}",
        f"the tokenizer of {name} has {len(ids)} tokens that the one of {other} has not, as {token!r} ({first})",
    )


def _within(value: object, key: str, shared: set[str]) -> object:
    """Return what of a tokenizer's model is about tokens that both define."""
    if key == "vocab":  # a table was compared as the tokenizer's; a list holds scores
        return None if isinstance(value, dict) else [one for one in value or () if one[0] in shared]
    if key == "merges":
        pairs = [one.split(" ", 1) if isinstance(one, str) else one for one in value or ()]
        return [pair for pair in pairs if {*pair, "".join(pair)} <= shared]
    return value


def _difference(model: str, second: str, what: str, mine: object, theirs: object) -> SnpatchError:
    return SnpatchError(
        f"the tokenizers of {model} and {second} differ in {what}: {mine} and {theirs}; both models of an engine must "
        "read the same ids"
    )


def _short(part: object) -> str:
    text = json.dumps(part)
    return text if len(text) <= 200 else text[:200] + " ..."
