"""Reading: how each set of weights reads and ends texts: tokenizer, chat template and EOS.

Why one rule for all that lies beside weights: an adapter, a LoRA or a checkpoint was trained on texts of its own form,
and a model that is asked in another one answers worse, and no error tells. So what lies in a folder is used for all
models on its set of weights, or it contradicts another folder and is an error that names both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from snpatch.config import OWN_SET, EngineConfig
from snpatch.errors import SnpatchError
from snpatch.models.checkpoint import eos_ids, load_config, read_generation_eos_ids
from snpatch.models.compatibility import check_compatible, check_tokenizers
from snpatch.models.fingerprint import local_adapter_folder
from snpatch.models.notes import Notes
from snpatch.models.pretrained import load_pretrained
from snpatch.models.templates import (
    TEMPLATE_FILE,
    ChatTemplate,
    get_template_source,
    has_tokenizer,
    load_adapter_tokenizer,
    load_template,
)


@dataclass(frozen=True, eq=False)
class TextProcessor:
    """How one set of weights reads. eos_ids: tokens that end its texts."""

    tokenizer: object
    template: ChatTemplate
    eos_ids: frozenset[int]


def load_text_processors(config: EngineConfig, notes: Notes) -> list[TextProcessor]:
    """Return the reader of each set of weights, the engine's own first.

    Raises:
        SnpatchError: two folders on one set, or the two sets, cannot be read alike; the error names both.
    """
    from transformers import AutoTokenizer  # brings scikit-learn with it, and takes two seconds

    sets = [OWN_SET] if config.second is None else [OWN_SET, config.second]
    names = [one.checkpoint or config.model for one in sets]
    tokenizers = {name: load_pretrained(AutoTokenizer, name) for name in names}
    if names[0] != names[-1]:
        check_compatible(*names, *tokenizers.values(), notes)
    folders = [_folders(config, place) for place in range(len(names))]
    text_processors = []
    for place, name in enumerate(names):
        own, own_tokenizer, beside = load_config(name, config.allow_untested), tokenizers[name], folders[place]
        tokenizer = _tokenizer(name, own_tokenizer, beside, own.vocab_size, notes)
        others = tokenizers[names[-1 - place]], folders[-1 - place]
        template = load_template(config.template, tokenizer, beside, own_tokenizer, others, config.chat_template_kwargs)
        text_processors.append(
            TextProcessor(tokenizer, template, eos_ids(name, own, own_tokenizer) | _ends(beside, tokenizer))
        )
        _tell(name, own.vocab_size, text_processors[-1], notes)
        if (
            config.template == "auto"
            and own_tokenizer.chat_template
            and template.source != get_template_source(own_tokenizer)
        ):
            folders_beside = ", ".join(beside)
            notes.add(
                f"template {name}", f"chats are read by the template beside {folders_beside}, and not by {name}'s own"
            )
    for name in config.chat_template_kwargs:
        if not any(reader.template.uses_variable(name) for reader in text_processors):
            raise SnpatchError(f"chat_template_kwargs: the chat template of {config.model} reads no {name}")
    return text_processors


def has_text_files(folder: str) -> bool:
    """Whether a tokenizer, a template or a generation config lies beside an adapter."""
    names = (TEMPLATE_FILE, "generation_config.json")
    return has_tokenizer(folder) or any((local_adapter_folder(folder) / name).is_file() for name in names)


def _tell(name: str, size: int, reader: TextProcessor, notes: Notes) -> None:
    """Tell of tokens that a model of `size` rows has no row for."""
    beyond = sorted((index, token) for token, index in reader.tokenizer.get_vocab().items() if index >= size)
    if beyond:
        index, token = beyond[0]
        notes.add(
            f"vocabulary {name}",
            f"{name}: its tokenizer has {len(beyond)} tokens that the model of {size} has no row for, as {token!r} "
            f"({index}); texts that hold one are refused",
        )
    if lost := sorted(end for end in reader.eos_ids if not 0 <= end < size):
        notes.add(f"ends {name}", f"{name}: EOS {lost[0]} is no token of a model of {size}: it never comes")


def _folders(config: EngineConfig, place: int) -> list[str]:
    """Return the LoRA and adapter folders on one set of weights."""
    sources = [one for one in config.sources.values() if (one.set != OWN_SET) == bool(place)]
    return list(dict.fromkeys(folder for one in sources for folder in (*one.lora, *one.adapters)))


def _tokenizer(name: str, own, folders: Sequence[str], size: int, notes: Notes):
    """Return the tokenizer that lies beside the adapters on a model's weights, else its own."""
    used, by = own, name
    for folder in filter(has_tokenizer, folders):
        other = load_adapter_tokenizer(folder)
        check_tokenizers(used, other, by, folder, (size, size), notes)
        if by != name and _reads(used) != _reads(other):
            raise SnpatchError(
                f"the tokenizers of {by} and {folder} read texts differently, and adapters on one set of weights are "
                "read by one: run them in engines of their own"
            )
        used, by = other, folder
    return used


def _reads(tokenizer) -> tuple:
    """Return what a tokenizer makes of texts: its tokens, what it puts around them, and its own BOS and EOS."""
    return tokenizer.get_vocab(), list(tokenizer("a")["input_ids"]), tokenizer.bos_token, tokenizer.eos_token


def _ends(folders: Sequence[str], tokenizer) -> frozenset[int]:
    """Return the tokens that end texts by what lies beside adapters."""
    declared = [end for folder in folders for end in read_generation_eos_ids(local_adapter_folder(folder)) or ()]
    return frozenset(declared) | ({tokenizer.eos_token_id} - {None})
