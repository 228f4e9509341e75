"""How chats become text and ids: by the tokenizer's own template, Tulu's, or one that lies beside an adapter.

The one Tulu template serves training, writing and judging. As published: `<|role|>`, newline, text, newline, and EOS
after an assistant's text. Why BOS is not in the text that prompts are made of: each tokenizer adds what it adds, and
twice would be another text.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from snpatch.errors import SnpatchError
from snpatch.models import sandbox
from snpatch.models.clock import at_fixed_date
from snpatch.models.digest import TOKENIZER, digest_of_tokenizer, folder_of_adapter
from snpatch.models.pretrained import load_pretrained

Chat = list[dict[str, str]]
ROLES = ("system", "user", "assistant")
ASSISTANT = "<|assistant|>\n"  # after it the assistant speaks
# What the common templates put around turns.
MARKS = (
    "<|user|>", "<|assistant|>", "<|system|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<<SYS>>", "\n\nHuman:", "\n\nAssistant:",
    "### Instruction:", "### Response:", "BEGINNING OF CONVERSATION:",
)  # fmt: skip
FILE = "chat_template.jinja"  # what adapters were trained with lies beside them under this name

TULU = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim }}{% endif %}"
    "{% if not loop.last %}{{ '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\n<|assistant|>\n' }}{% endif %}"
)
"""Tulu's template with BOS; the text between the generation marks is what training's loss covers."""


class Template:
    """One template with one tokenizer.

    name: "tokenizer" (its own), "tulu" or "beside" (an adapter's). source: the template; None: what the name says.
    variables: further ones that it reads, as enable_thinking.
    """

    def __init__(
        self, name: str, tokenizer, source: str | None = None, variables: Mapping[str, object] | None = None
    ) -> None:
        if added := adds_behind(tokenizer):
            raise SnpatchError(
                f"{tokenizer.name_or_path}: its tokenizer puts {added!r} behind every text, so that a model would read "
                "a finished one: set add_eos_token = false in its tokenizer_config.json, or take the token out of its "
                "post_processor"
            )
        self.name, self.tokenizer, self.variables = name, tokenizer, dict(variables or {})
        self.source = source or (TULU if name == "tulu" else source_of(tokenizer))
        parts = [self.source, digest_of_tokenizer(tokenizer)]
        parts += [json.dumps(self.variables, sort_keys=True)] if self.variables else []
        self.digest = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]

    def reads(self, variable: str) -> bool:
        """Whether the template has a variable of this name."""
        return re.search(rf"\b{re.escape(variable)}\b", self.source) is not None

    def text(self, chat: Chat, goes_on: bool = False) -> str:
        """The chat, ready for the assistant to speak; goes_on: its last message is one that goes on instead."""
        if self.name == "tulu":
            return tulu(chat, self.tokenizer, goes_on)
        return render(
            chat, self.tokenizer, is_asked=not goes_on, goes_on=goes_on, source=self.source, variables=self.variables
        )

    def ids(self, chat: Chat) -> list[int]:
        """Token ids of the chat, ready for the assistant to speak."""
        return list(self.tokenizer(self.text(chat), add_special_tokens=self.name == "tulu")["input_ids"])

    def mark_in(self, chat: Chat) -> str | None:
        """Return a mark of a chat template that a message holds already; None if there is none."""
        texts = [message.get("content") for message in chat]
        found = (mark for text in texts if isinstance(text, str) for mark in self._marks if mark in text)
        return min(found, default=None)

    @cached_property
    def _marks(self) -> set[str]:
        """The tokenizer's special tokens, but for those that are words, and the common templates' marks."""
        special = (token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special)
        return {*MARKS, *(token for token in special if re.search(r"[<\[|]", token))}


def adds_behind(tokenizer) -> str | None:
    """Return the token that a tokenizer puts behind every text, as some put EOS; None if it puts none there."""
    whole, bare = (list(tokenizer("a", add_special_tokens=added)["input_ids"]) for added in (True, False))
    return tokenizer.convert_ids_to_tokens(whole[-1]) if bare and whole[-len(bare) :] != bare else None


def source_of(tokenizer) -> str:
    """Return the source of a tokenizer's own chat template, of several the default one, its clock at a fixed date."""
    if not tokenizer.chat_template:
        raise SnpatchError(f"{tokenizer.name_or_path}: its tokenizer has no chat template; use template='tulu'")
    try:
        return at_fixed_date(tokenizer.get_chat_template())
    except ValueError as error:
        raise SnpatchError(f"{tokenizer.name_or_path}: {error}") from error


def render(
    chat: Chat,
    tokenizer,
    is_asked: bool,
    goes_on: bool = False,
    source: str | None = None,
    variables: Mapping[str, object] | None = None,
) -> str:
    """Return a chat in a template.

    is_asked: the assistant is to speak next; goes_on: the last message is one that goes on; source: the template, None:
    the tokenizer's own; variables: further ones that it reads. One that is not Tulu's is rendered in the sandbox.
    """
    source = source or source_of(tokenizer)
    options = {"add_generation_prompt": is_asked, "continue_final_message": goes_on}
    if source == TULU:
        return tokenizer.apply_chat_template(chat, chat_template=TULU, tokenize=False, **options)
    subject = f"the chat template of {tokenizer.name_or_path} refuses a chat"
    return sandbox.render(source, chat, {**tokenizer.special_tokens_map, **(variables or {})}, options, subject)


def tulu(chat: Chat, tokenizer, goes_on: bool = False) -> str:
    """A chat in Tulu's format, without BOS; goes_on: the last message goes on, where else the assistant would begin."""
    for message in chat:
        if message.get("role") not in ROLES:
            raise SnpatchError(f"the Tulu template knows {', '.join(ROLES)}, got {message.get('role')!r}")
        if not isinstance(message.get("content"), str):
            raise SnpatchError(f"the Tulu template wants a text in each message, got {message.get('content')!r}")
    if not tokenizer.eos_token and any(m["role"] == "assistant" for m in (chat[:-1] if goes_on else chat)):
        raise SnpatchError("the Tulu template ends an assistant's text with EOS, and the tokenizer has none")
    told, last = (chat[:-1], chat[-1]["content"]) if goes_on else (chat, "")
    if not told:
        return ASSISTANT + last
    text = tokenizer.apply_chat_template(
        told, chat_template=TULU, tokenize=False, add_generation_prompt=True, bos_token=""
    )
    return text + last


def open_template(
    name: str,
    tokenizer,
    adapters: Sequence[str | Path],
    own=None,
    others: tuple[object, Sequence[str | Path]] | None = None,
    variables: Mapping[str, object] | None = None,
) -> Template:
    """Return the template that a config names.

    Args:
        name: "tokenizer", "tulu", or "auto": what the adapters were trained with, where they tell; else the weights'
            own; else the other set's; else Tulu's.
        tokenizer: reads the template's text.
        adapters: the LoRA and IA3 folders on one set of weights.
        own: the tokenizer that lies beside the weights; None: the same.
        others: the tokenizer and the adapters of the other set of weights.
        variables: see Template.

    Raises:
        SnpatchError: adapters were trained with different templates, or there is none that is named.
    """
    own = own or tokenizer
    is_auto = name == "auto"
    sources = [_shared_template(adapters)] if is_auto else []
    sources += [_source(own)]
    if others is not None:
        sources += [_shared_template(others[1]) if is_auto else None, _source(others[0])]
    source = next(filter(None, sources), None)
    if name == "tulu" or (is_auto and source in (None, TULU)):
        return Template("tulu", tokenizer, TULU, variables)
    if source is None:
        source = source_of(own)
    return Template("tokenizer" if source == _source(own) else "beside", tokenizer, source, variables)


def has_tokenizer(adapter: str | Path) -> bool:
    """Whether a tokenizer lies beside an adapter."""
    files = (path for pattern in TOKENIZER for path in folder_of_adapter(adapter).glob(pattern))
    return any(not path.name.startswith("chat_template") for path in files)


def open_tokenizer(adapter: str | Path):
    """Load the tokenizer that lies beside an adapter."""
    from transformers import AutoTokenizer

    return load_pretrained(AutoTokenizer, folder_of_adapter(adapter))


def _shared_template(adapters: Sequence[str | Path]) -> str | None:
    """Return the one template that adapters were trained with; None where no folder has one."""
    sources = {adapter: source for adapter in adapters if (source := template_beside(adapter)) is not None}
    if len({*sources.values()}) > 1:
        named = ", ".join(map(str, sources))
        raise SnpatchError(f"adapters were trained with different templates ({named}): choose one by template=")
    return next(iter(sources.values()), None)


def template_beside(adapter: str | Path) -> str | None:
    """Return the template that an adapter was trained with, by the files beside it; None where there is none."""
    file = folder_of_adapter(adapter) / FILE
    try:
        if file.is_file():
            return at_fixed_date(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SnpatchError(f"{file} cannot be read: {error}") from error
    return _source(open_tokenizer(adapter)) if has_tokenizer(adapter) else None


def _source(tokenizer) -> str | None:
    return source_of(tokenizer) if tokenizer.chat_template else None
