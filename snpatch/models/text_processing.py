"""Text processing of each set of weights: tokenizer, chat template and EOS tokens.

Why one rule for tokenizers, templates and generation configs: an adapter, a LoRA or a checkpoint was trained on prompts
of its own format, and in another format a model answers worse without an error. So the files in a folder apply to all
models on its set of weights; if two folders contradict each other, that is an error that names both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from snpatch.config import PRIMARY_WEIGHTS, EngineConfig
from snpatch.errors import SnpatchError
from snpatch.models.checkpoint import (
    load_config,
    load_eos_ids,
    note_unapplied_settings,
    read_generation_eos_ids,
)
from snpatch.models.checkpoint_files import GENERATION_CONFIG_FILE
from snpatch.models.compatibility import check_compatible, check_tokenizers
from snpatch.models.hub import resolve_adapter_folder, resolve_model_folder
from snpatch.models.notes import Notes
from snpatch.models.pretrained import load_pretrained
from snpatch.models.templates import (
    TEMPLATE_FILE,
    ChatTemplate,
    get_template_source,
    has_tokenizer,
    load_adapter_tokenizer,
    load_template,
    render_chat,
)

PROBE_CHAT = [  # contents that templates write as they are
    {"role": "user", "content": "1117"},
    {"role": "assistant", "content": "2227"},
    {"role": "user", "content": "3337"},
]


@dataclass(frozen=True, eq=False)
class TextProcessor:
    """Tokenizer, chat template and EOS tokens of one set of weights."""

    tokenizer: Any  # of transformers
    template: ChatTemplate
    eos_ids: frozenset[int]


def load_text_processors(config: EngineConfig, notes: Notes) -> list[TextProcessor]:
    """Load the text processor of each set of weights, the primary weights' first.

    Args:
        config: The engine's config.
        notes: Gets warnings about tokens without a row in the embedding and about a template that replaces another.

    Raises:
        SnpatchError: Two folders on one set of weights, or the two sets, contradict each other; the error names both.
    """
    from transformers import AutoTokenizer  # imports scikit-learn, which takes two seconds

    sources = [PRIMARY_WEIGHTS] if config.secondary is None else [PRIMARY_WEIGHTS, config.secondary]
    names = [source.checkpoint or config.model for source in sources]
    configs = {name: load_config(name, config.allow_untested) for name in names}  # first: AutoTokenizer reads it too
    tokenizers = {name: load_pretrained(AutoTokenizer, name) for name in names}
    if names[0] != names[-1]:
        check_compatible(names[0], names[1], tokenizers[names[0]], tokenizers[names[1]], notes)
    folders = [_get_adapter_folders(config, index) for index in range(len(names))]
    processors = []
    for index, name in enumerate(names):
        model_config, own_tokenizer = configs[name], tokenizers[name]
        size, adapters = model_config.vocab_size, folders[index]
        tokenizer = _load_tokenizer(name, own_tokenizer, adapters, size, notes)
        others = tokenizers[names[-1 - index]], folders[-1 - index]
        template = load_template(
            config.template, tokenizer, adapters, own_tokenizer, others, config.chat_template_kwargs
        )
        eos_ids = load_eos_ids(name, model_config, own_tokenizer) | _load_adapter_eos_ids(adapters, tokenizer)
        processors.append(TextProcessor(tokenizer, template, eos_ids))
        _note_tokens_without_row(name, size, processors[-1], notes)
        _note_unusual_template(processors[-1], notes)
        for folder in (resolve_model_folder(name, has_weights=False), *map(resolve_adapter_folder, adapters)):
            note_unapplied_settings(folder, notes)
        has_own_template = config.template == "auto" and own_tokenizer.chat_template
        if has_own_template and template.source != get_template_source(own_tokenizer):
            notes.add(
                f"template {name}",
                f"chats are rendered by the template in {', '.join(adapters)}, and not by {name}'s own",
            )
    for name in config.chat_template_kwargs:
        if not any(processor.template.uses_variable(name) for processor in processors):
            raise SnpatchError(f"chat_template_kwargs: the chat template of {config.model} reads no {name}")
    return processors


def has_text_files(folder: str) -> bool:
    """Return whether an adapter's folder contains a tokenizer, a chat template or a generation config."""
    names = (TEMPLATE_FILE, GENERATION_CONFIG_FILE)
    return has_tokenizer(folder) or any((resolve_adapter_folder(folder) / name).is_file() for name in names)


def _note_tokens_without_row(name: str, size: int, processor: TextProcessor, notes: Notes) -> None:
    """Add notes about tokens that an embedding of `size` rows does not have."""
    beyond = sorted((index, token) for token, index in processor.tokenizer.get_vocab().items() if index >= size)
    if beyond:
        index, token = beyond[0]
        notes.add(
            f"vocabulary {name}",
            f"{name}: its tokenizer has {len(beyond)} tokens outside the vocabulary of {size}, such as {token!r} "
            f"({index}); prompts that contain one are refused",
        )
    if outside := sorted(eos_id for eos_id in processor.eos_ids if not 0 <= eos_id < size):
        notes.add(
            f"ends {name}",
            f"{name}: EOS id {outside[0]} is outside the vocabulary of {size}, so it never ends a completion",
        )


def _note_unusual_template(processor: TextProcessor, notes: Notes) -> None:
    """Add notes about a chat template that writes other prompts than a model of chats expects."""
    template = processor.template
    if template.name == "tulu":
        return
    try:
        prompt, text = template.render(PROBE_CHAT[:1]), template.render(PROBE_CHAT)
        bare = render_chat(
            PROBE_CHAT[:1], template.tokenizer, False, source=template.source, variables=template.variables
        )
        last_id = template.encode(PROBE_CHAT[:1])[-1:]
    except SnpatchError:  # it refuses these chats, and may accept the user's
        return
    faults = []
    if bare == prompt:
        faults.append(f"ignores add_generation_prompt: prompts end with {prompt[-20:]!r}")
    if {*last_id} & processor.eos_ids:
        faults.append("ends prompts with EOS, so that they look finished to the model")
    if lost := [message["role"] for message in PROBE_CHAT if message["content"] not in text]:
        faults.append(f"drops messages of a chat of several turns (here one of the {lost[0]})")
    for fault in faults:
        notes.add(f"template {template.origin} {fault}", f"the chat template of {template.origin} {fault}")


def _get_adapter_folders(config: EngineConfig, index: int) -> list[str]:
    """Return the LoRA and IA3 folders on one set of weights (0: primary, 1: secondary)."""
    sources = [
        source for source in config.sources.values() if (source.weights_source != PRIMARY_WEIGHTS) == bool(index)
    ]
    return list(dict.fromkeys(folder for source in sources for folder in (*source.lora, *source.adapters)))


def _load_tokenizer(name: str, own, folders: Sequence[str], size: int, notes: Notes):
    """Return the tokenizer in the folders of the adapters on a model's weights, else the model's own."""
    tokenizer, origin = own, name
    for folder in filter(has_tokenizer, folders):
        other = load_adapter_tokenizer(folder)
        check_tokenizers(tokenizer, other, origin, folder, (size, size), notes)
        if origin != name and _get_encoding(tokenizer) != _get_encoding(other):
            raise SnpatchError(
                f"the tokenizers of {origin} and {folder} read texts differently, and adapters on one set of weights "
                "are read by one: run them in engines of their own"
            )
        tokenizer, origin = other, folder
    return tokenizer


def _get_encoding(tokenizer) -> tuple:
    """Return what determines a tokenizer's ids: its tokens, the ids it adds around a text, BOS and EOS."""
    return tokenizer.get_vocab(), list(tokenizer("a")["input_ids"]), tokenizer.bos_token, tokenizer.eos_token


def _load_adapter_eos_ids(folders: Sequence[str], tokenizer) -> frozenset[int]:
    """Return the EOS tokens of the adapters' generation configs and of the tokenizer."""
    declared = [
        eos_id for folder in folders for eos_id in read_generation_eos_ids(resolve_adapter_folder(folder)) or ()
    ]
    return frozenset(declared) | ({tokenizer.eos_token_id} - {None})
