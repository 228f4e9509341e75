"""Checks that two checkpoints can be the primary and secondary weights of one engine.

Why only declared and used config keys are compared: both models read the same ids at the same positions, with one KV
cache layout, so a difference in the computation would change the completion without an error. Unused keys (of other
tools, a window that no layer has) differ between most public pairs.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from snpatch.errors import SnpatchError, shown
from snpatch.models.notes import Notes
from snpatch.models.pretrained import load_pretrained, wrap_loader_errors

# Keys that a config's class declares, but that do not change the forward pass.
MAY_DIFFER_KEYS = (
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
# Keys that vLLM or transformers read although a config's class does not declare them.
UNDECLARED_KEYS = (
    "attention_bias",
    "bias",
    "compression_config",
    "dual_chunk_attention_config",
    "mlp_bias",
    "quantization_config",
    "tie_word_embeddings",
)
WINDOW_KEYS = ("sliding_window", "use_sliding_window", "max_window_layers")
ROPE_PARAMETER_KEYS = ("rope_parameters", "original_max_position_embeddings")
# rope_type -> keys that it uses in addition to its base, and their defaults; of other types all keys count.
# Source: transformers.modeling_rope_utils.
ROPE_TYPE_KEYS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": None},
    "llama3": {"factor": None, "low_freq_factor": None, "high_freq_factor": None,
               "original_max_position_embeddings": None},
    "yarn": {"factor": None, "original_max_position_embeddings": None, "beta_fast": 32, "beta_slow": 1,
             "truncate": True},
    "longrope": {"short_factor": None, "long_factor": None, "original_max_position_embeddings": None},
    "proportional": {"factor": 1.0},
}  # fmt: skip
SCALED_ATTENTION_TYPES = ("yarn", "longrope")  # they scale attention by a factor that other keys determine
# Parts of a tokenizer that determine ids in addition to its tokens. What it adds around a text may differ, because each
# model's prompts are encoded by its own tokenizer.
COMPARED_PARTS = ("normalizer", "pre_tokenizer")


def check_compatible(model: str | Path, second: str | Path, tokenizer, other_tokenizer, notes: Notes) -> None:
    """Check that one engine can run two checkpoints.

    Args:
        model: Primary checkpoint.
        second: Secondary checkpoint.
        tokenizer: The primary checkpoint's tokenizer.
        other_tokenizer: The secondary checkpoint's tokenizer.
        notes: Gets a warning about config keys that differ but are not used.

    Raises:
        SnpatchError: Architectures, configs or tokenizers differ; the error names the first difference.
    """
    config, second_config = (load_pretrained(AutoConfig, name) for name in (model, second))
    if config.model_type != second_config.model_type:
        raise SnpatchError(
            f"{second}: expected architecture {config.model_type} as {model}, got {second_config.model_type}. Run each "
            "model in its own engine."
        )
    context = min(config.max_position_embeddings, second_config.max_position_embeddings)
    used = []
    for name, model_config in ((model, config), (second, second_config)):
        with wrap_loader_errors(name, "AutoConfig"):
            used.append(get_used_config(model_config, context))
    keys, second_keys = used
    for key in sorted(keys.keys() | second_keys.keys()):
        value, second_value = keys.get(key), second_keys.get(key)
        if value != second_value:
            raise SnpatchError(
                f"{second}: expected {key} = {shown(value)} as in the config of {model}, got {shown(second_value)}. "
                "Run each model in its own engine."
            )
    values, second_values = config.to_dict(), second_config.to_dict()
    unused = sorted(
        key for key in _unused_keys(config) | _unused_keys(second_config) if values.get(key) != second_values.get(key)
    )
    if unused:
        notes.add(
            f"config {second}",
            f"{model} and {second} differ in keys that a {config.model_type} does not compute with: "
            f"{', '.join(unused)}",
        )
    sizes = config.vocab_size, second_config.vocab_size
    check_tokenizers(tokenizer, other_tokenizer, str(model), str(second), sizes, notes)


def get_used_config(config, context: int) -> dict[str, object]:
    """Return the config keys that a model's forward pass uses, for at most `context` tokens.

    Keys at their defaults equal absent keys. A window counts if a layer has it and it is shorter than `context`, a key
    of the rotary positions if their type uses it.
    """
    used = {
        name: getattr(config, name)
        for name in _declared_keys(config) - {*MAY_DIFFER_KEYS, *WINDOW_KEYS, *ROPE_PARAMETER_KEYS}
    }
    used |= {name: value for name in UNDECLARED_KEYS if (value := getattr(config, name, None)) not in (None, False)}
    used["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    is_windowed = window is not None and window < context and (layers is None or "sliding_attention" in layers)
    used["sliding_window"] = window if is_windowed else None
    if getattr(config, "rope_parameters", None):
        config.standardize_rope_params()  # takes original_max_position_embeddings from the config's top level
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer = {kind: _used_rope(config, one, kind) for kind, one in rope.items() if isinstance(one, dict)}
    used["rope_parameters"] = by_layer or _used_rope(config, rope)
    if layers is not None:
        windows = {kind: (used["sliding_window"] if kind == "sliding_attention" else None) for kind in layers}
        used["layer_types"] = [(windows[kind], by_layer.get(kind)) for kind in layers]
        used["rope_parameters"] = None if by_layer else used["rope_parameters"]
    return {name: _to_plain(value) for name, value in used.items()}


def _used_rope(config, parameters: Mapping, layer_type: str | None = None) -> dict[str, object]:
    """Return the keys that the rotary positions are computed with.

    A key at its default equals an absent one.

    Args:
        config: The model's config.
        parameters: Its rope_parameters, or those of one kind of layer.
        layer_type: The kind of layer; None if all layers have the same parameters.
    """
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "linear" and parameters.get("factor") == 1:
        kind = "default"
    defaults = ROPE_TYPE_KEYS.get(kind, dict.fromkeys(parameters.keys() - {"type"}))
    values = {name: default if parameters.get(name) is None else parameters[name] for name, default in defaults.items()}
    if kind in SCALED_ATTENTION_TYPES:
        values["attention_factor"] = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), layer_type=layer_type)[1]
        if "factor" in values and values["factor"] is None:
            values["factor"] = config.max_position_embeddings / parameters["original_max_position_embeddings"]
    share = parameters.get("partial_rotary_factor")
    fixed = {"rope_theta": parameters.get("rope_theta"), "share": 1.0 if share is None else share}
    return {**fixed, **{name: value for name, value in values.items() if value is not None}, "rope_type": kind}


def _to_plain(value) -> object:
    return value.to_dict() if hasattr(value, "to_dict") else value


def _declared_keys(config) -> set[str]:
    """Return the keys that a config's own class declares."""
    return {f.name for f in fields(config)} - {f.name for f in fields(PreTrainedConfig)}


def _unused_keys(config) -> set[str]:
    """Return the keys of a config that its class does not declare and that are not used."""
    known = {f.name for f in fields(PreTrainedConfig)} | {"_name_or_path", "model_type", "transformers_version"}
    used = {*UNDECLARED_KEYS, *ROPE_PARAMETER_KEYS, "head_dim"}
    return config.to_dict().keys() - known - _declared_keys(config) - used


def have_equal_weights(module: nn.Module, other: nn.Module) -> bool:
    """Return whether two modules have equal parameters; those of submodules do not count."""
    own_weights, other_weights = (dict(m.named_parameters(recurse=False)) for m in (module, other))
    return own_weights.keys() == other_weights.keys() and all(
        torch.equal(own_weights[name], other_weights[name]) for name in own_weights
    )


def module_kinds(modules: Iterable[str]) -> tuple[str, ...]:
    """Return the distinct kinds of modules: the last parts of their names."""
    return tuple(sorted({name.rpartition(".")[2] for name in modules}))


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of all elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def check_tokenizers(first, other, model: str, second: str, sizes: tuple[int, int], notes: Notes) -> None:
    """Check that each id that two tokenizers share means the same token, and that both split texts alike.

    Args:
        first: First tokenizer.
        other: Second tokenizer.
        model: Name of the first tokenizer's model, for errors.
        second: Name of the second tokenizer's model, for errors.
        sizes: Rows of each model's embedding. An id that one tokenizer alone defines needs a row in the other model's
            embedding, unless it is padding.
        notes: Gets warnings about such ids, and about differences that only change what is added around a text.

    Raises:
        SnpatchError: The tokenizers differ; the error names the first difference.
    """
    first_ids, other_ids = first.get_vocab(), other.get_vocab()
    if first_ids != other_ids:
        moved_tokens = [t for t in first_ids.keys() & other_ids.keys() if first_ids[t] != other_ids[t]]
        if moved_tokens:
            token = min(moved_tokens, key=lambda t: (first_ids[t], t))
            raise _difference(model, second, f"the token {token!r}", first_ids[token], other_ids[token])
        tokens = [{index: token for token, index in vocab.items()} for vocab in (first_ids, other_ids)]
        renamed = [i for i in tokens[0].keys() & tokens[1].keys() if tokens[0][i] != tokens[1][i]]
        if renamed:
            index = min(renamed)
            raise _difference(model, second, f"the token of id {index}", *(repr(table[index]) for table in tokens))
        for tokenizer, size, names, ids in (
            (first, sizes[1], (model, second), tokens[0].keys() - tokens[1].keys()),
            (other, sizes[0], (second, model), tokens[1].keys() - tokens[0].keys()),
        ):
            _check_unshared_ids(tokenizer, size, *names, ids, notes)
    tokenizers = first, other
    if any(getattr(tokenizer, "backend_tokenizer", None) is None for tokenizer in tokenizers):
        return  # of a slow tokenizer only the tokens can be compared
    parts = [json.loads(tokenizer.backend_tokenizer.to_str()) for tokenizer in tokenizers]
    for part in COMPARED_PARTS:
        if parts[0].get(part) != parts[1].get(part):
            raise _difference(model, second, f"the {part}", *(_shorten(tokenizer.get(part)) for tokenizer in parts))
    models, shared = [tokenizer["model"] for tokenizer in parts], first_ids.keys() & other_ids.keys()
    for key in sorted(models[0].keys() | models[1].keys()):
        values = [_restrict_to_shared(table.get(key), key, shared) for table in models]
        if values[0] != values[1]:
            raise _difference(model, second, f"the {key} of its model", *map(_shorten, values))
    added = [{t["content"]: t for t in tokenizer["added_tokens"]} for tokenizer in parts]
    changed = sorted(t for t in shared & {*added[0], *added[1]} if added[0].get(t) != added[1].get(t))
    around = [] if parts[0].get("post_processor") == parts[1].get("post_processor") else ["what is added around a text"]
    if differences := [*around, *(f"how the text {token!r} is found" for token in changed)]:
        notes.add(
            f"tokenizers {model} {second}",
            f"the tokenizers of {model} and {second} differ in {', '.join(differences)}; each model's prompts are "
            "encoded by its own",
        )


def _check_unshared_ids(tokenizer, size: int, name: str, other: str, ids: set[int], notes: Notes) -> None:
    """Check the ids that only one tokenizer has; add a note on them.

    Raises:
        SnpatchError: An id has no row in the other model.
    """
    if not ids:
        return
    beyond = sorted(i for i in ids if i >= size and i != tokenizer.pad_token_id)
    first = beyond[0] if beyond else min(ids)
    token = tokenizer.convert_ids_to_tokens(first)
    if beyond:
        raise SnpatchError(
            f"{name}: expected token ids below {size}, the rows of {other}'s embedding, got {token!r} ({first}). Run "
            "each model in its own engine."
        )
    notes.add(
        f"tokens {name} {other}",
        f"the tokenizer of {name} has {len(ids)} tokens that {other}'s tokenizer lacks, such as {token!r} ({first})",
    )


def _restrict_to_shared(value, key: str, shared: set[str]) -> object:
    """Return the part of a tokenizer model's vocabulary or merges that is about tokens of both tokenizers."""
    if key == "vocab":  # a table was compared as the tokenizer's; a list has scores
        return None if isinstance(value, dict) else [entry for entry in value or () if entry[0] in shared]
    if key == "merges":
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in value or ()]
        return [pair for pair in pairs if {*pair, "".join(pair)} <= shared]
    return value


def _difference(model: str, second: str, what: str, first: object, other: object) -> SnpatchError:
    return SnpatchError(
        f"tokenizers: expected the same ids in both models of an engine, got a difference between {model} and {second} "
        f"in {what}: {first} and {other}. Run each model in its own engine."
    )


def _shorten(part: object) -> str:
    text = json.dumps(part)
    return text if len(text) <= 200 else text[:200] + " ..."
