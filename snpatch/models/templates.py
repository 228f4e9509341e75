"""How chats become text and ids: by the tokenizer's own template, or by Tulu's.

The one Tulu template serves training, writing and judging. As published: `<|role|>`, newline, text, newline, and EOS
after an assistant's text. Why BOS is not in the text that prompts are made of: each tokenizer adds what it adds, and
twice would be another text.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from snpatch.errors import SnpatchError
from snpatch.models import sandbox
from snpatch.models.clock import at_fixed_date
from snpatch.models.digest import digest_of_tokenizer

Chat = list[dict[str, str]]
ROLES = ("system", "user", "assistant")
ASSISTANT = "<|assistant|>\n"  # after it the assistant speaks
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
    """One template of one tokenizer. name: "tokenizer" or "tulu"."""

    def __init__(self, name: str, tokenizer) -> None:
        self.name, self._tokenizer = name, tokenizer
        self.source = TULU if name == "tulu" else source_of(tokenizer)
        named = f"{self.source} {digest_of_tokenizer(tokenizer)}"
        self.digest = hashlib.sha256(named.encode()).hexdigest()[:16]

    def text(self, chat: Chat, goes_on: bool = False) -> str:
        """The chat, ready for the assistant to speak; goes_on: its last message is one that goes on instead."""
        if self.name == "tulu":
            return tulu(chat, self._tokenizer, goes_on)
        return render(chat, self._tokenizer, is_asked=not goes_on, goes_on=goes_on)

    def ids(self, chat: Chat) -> list[int]:
        """Token ids of the chat, ready for the assistant to speak."""
        if self.name == "tulu":
            return list(self._tokenizer(tulu(chat, self._tokenizer))["input_ids"])
        return list(self._tokenizer(self.text(chat), add_special_tokens=False)["input_ids"])


def source_of(tokenizer) -> str:
    """Return the source of a tokenizer's own chat template, of several the default one, its clock at a fixed date."""
    if not tokenizer.chat_template:
        raise SnpatchError(f"{tokenizer.name_or_path}: its tokenizer has no chat template; use template='tulu'")
    try:
        return at_fixed_date(tokenizer.get_chat_template())
    except ValueError as error:
        raise SnpatchError(f"{tokenizer.name_or_path}: {error}") from error


def render(chat: Chat, tokenizer, is_asked: bool, goes_on: bool = False) -> str:
    """Return a chat in the tokenizer's own template.

    is_asked: the assistant is to speak next; goes_on: the last message is one that goes on. A template that is not
    Tulu's is rendered in the sandbox.
    """
    source, options = source_of(tokenizer), {"add_generation_prompt": is_asked, "continue_final_message": goes_on}
    if source == TULU:
        return tokenizer.apply_chat_template(chat, tokenize=False, **options)
    subject = f"the chat template of {tokenizer.name_or_path} refuses a chat"
    return sandbox.render(source, chat, tokenizer.special_tokens_map, options, subject)


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


def open_template(name: str, tokenizer, adapters: Sequence[str | Path]) -> Template:
    """The template that a config names. "auto": what the adapters were trained with, where they tell; else the
    tokenizer's own; else Tulu's.
    """
    if name != "auto":
        return Template(name, tokenizer)
    try:
        told = {f: (Path(f) / FILE).read_text(encoding="utf-8") for f in adapters if (Path(f) / FILE).is_file()}
    except (OSError, ValueError) as error:
        raise SnpatchError(f"an adapter's {FILE} cannot be read: {error}") from error
    if len({*told.values()}) > 1:
        raise SnpatchError(
            f"adapters were trained with different templates ({', '.join(map(str, told))}): choose one by template="
        )
    for source in {*told.values()}:
        if source == TULU:
            return Template("tulu", tokenizer)
        if not tokenizer.chat_template or at_fixed_date(source) != source_of(tokenizer):
            raise SnpatchError(
                f"{next(iter(told))}: trained with a template that is neither Tulu's nor the tokenizer's: choose one "
                "by template="
            )
    return Template("tokenizer" if tokenizer.chat_template else "tulu", tokenizer)
