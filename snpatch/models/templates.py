"""Chat templates: how chats become strings and token ids.

Training, generation and judging share one Tulu template. As published: `<|role|>`, newline, content, newline, and EOS
after an assistant's content. Why prompts are rendered without BOS: each tokenizer adds its own, and a second one would
be another prompt.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from snpatch.errors import SnpatchError, first_line, shown
from snpatch.models import sandbox
from snpatch.models.checkpoint_files import TOKENIZER_PATTERNS
from snpatch.models.clock import fix_date
from snpatch.models.fingerprint import fingerprint_tokenizer
from snpatch.models.hub import resolve_adapter_folder
from snpatch.models.pretrained import load_pretrained
from snpatch.utils.hashing import hash_bytes

Chat = list[dict[str, str]]
ROLES = ("system", "user", "assistant")
ASSISTANT = "<|assistant|>\n"  # generation prompt: the assistant's message follows it
# What common templates put around messages.
MARK = re.compile(
    r"<[|｜]\w[^<>\s]{0,40}>|\[\|\w+\|\]|</?(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>|<(?:reserved_|extra_id_)\d+>"
    r"|\[/?(?:SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]|<(?:human|bot|user|assistant)>:|^\s*<(?:s|bos)>"
    r"|</s>\s*$|BEGINNING OF CONVERSATION:|GPT4 Correct (?:User|Assistant):|(?<=\n\n)(?:Human|Assistant):"
    r"|### ?(?:Human|Assistant|User|System|Instruction|Response|Input|Output):"
)
USER_MARK = re.compile(r"(?<!\S)(?:Human|User|USER|Instruct):")  # a mark only if an assistant's follows
ASSISTANT_MARK = re.compile(r"(?<!\S)(?:Assistant|ASSISTANT|AI|Bot|Output):")
PROBE = "zqprobe"  # content of a chat that is rendered to find a template's own marks
TEMPLATE_FILE = "chat_template.jinja"  # file in an adapter's folder: the template that it was trained with

TULU = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('role: expected one of system, user, assistant for the Tulu template, got ' "
    "+ message['role']) }}{% endif %}{{ '<|' + message['role'] + '|>\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim }}{% endif %}"
    "{% if not loop.last %}{{ '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\n<|assistant|>\n' }}{% endif %}"
)
"""Tulu's template with BOS; training's loss covers what is between the generation marks."""


class ChatTemplate:
    """A chat template with a tokenizer.

    Args:
        name: "tokenizer" (the tokenizer's own template), "tulu" or "adapter" (saved with an adapter).
        tokenizer: Tokenizer that encodes the rendered chat.
        source: Jinja source; None: chosen by the name.
        variables: Further variables of the template, such as enable_thinking.
        origin: Folder or model that the template comes from; None: the tokenizer's.

    Raises:
        SnpatchError: The tokenizer appends a token to every string, or has no chat template.
    """

    def __init__(
        self,
        name: str,
        tokenizer,
        source: str | None = None,
        variables: Mapping[str, object] | None = None,
        origin: str | None = None,
    ) -> None:
        if appended := get_appended_token(tokenizer):
            raise SnpatchError(
                f"{tokenizer.name_or_path}: its tokenizer appends {appended!r} to every text, so that a prompt would "
                "look finished to the model. Set add_eos_token = false in its tokenizer_config.json, or remove the "
                "token from its post_processor."
            )
        self.name, self.tokenizer, self.variables = name, tokenizer, dict(variables or {})
        self.origin = origin or tokenizer.name_or_path
        self.source = source or (TULU if name == "tulu" else get_template_source(tokenizer))
        parts = [self.source, fingerprint_tokenizer(tokenizer)]
        parts += [json.dumps(self.variables, sort_keys=True)] if self.variables else []
        self.fingerprint = hash_bytes(" ".join(parts).encode())

    def uses_variable(self, variable: str) -> bool:
        """Return whether the template reads a variable of this name that it does not set itself."""
        subject = f"the chat template of {self.origin} cannot be read"
        return variable in sandbox.find_variables(self.source, subject)

    def render(self, chat: Chat, continue_final_message: bool = False) -> str:
        """Return the chat as a string that ends with the generation prompt.

        continue_final_message: end with the last message, unfinished, instead of the generation prompt.
        """
        if self.name == "tulu":
            return render_tulu(chat, self.tokenizer, continue_final_message)
        return render_chat(
            chat,
            self.tokenizer,
            add_generation_prompt=not continue_final_message,
            continue_final_message=continue_final_message,
            source=self.source,
            variables=self.variables,
            origin=self.origin,
        )

    def encode(self, chat: Chat) -> list[int]:
        """Return the token ids of the chat with the generation prompt."""
        return list(self.tokenizer(self.render(chat), add_special_tokens=self.name == "tulu")["input_ids"])

    def find_mark(self, chat: Chat) -> str | None:
        """Return a mark of a chat template that a message already contains; None if there is none."""
        for message in chat:
            if isinstance(text := message.get("content"), str) and (mark := self._find_mark_in(text)):
                return mark
        return None

    def _find_mark_in(self, text: str) -> str | None:
        text = text.replace("\r\n", "\n")
        if match := MARK.search(text) or (self._own_mark and self._own_mark.search(text)):
            return match[0].strip()
        match = USER_MARK.search(text)
        return match[0] if match and ASSISTANT_MARK.search(text, match.end()) else None

    @cached_property
    def _own_mark(self) -> re.Pattern[str] | None:
        """Return a pattern of the tokenizer's special tokens and what the template writes around messages.

        Ordinary words are left out.
        """
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        marks = {token for token in special if re.search(r"[<\[|]", token)}
        marks |= {
            mark for mark in self._render_marks(special) if re.search(r"\w", mark) and re.search(r"[^\w\s]", mark)
        }
        patterns = [rf"(?<!\w){re.escape(mark)}" if mark[0].isalnum() else re.escape(mark) for mark in sorted(marks)]
        return re.compile("|".join(patterns)) if patterns else None

    def _render_marks(self, special: set[str]) -> set[str]:
        """Return the lines that the template writes after each message of a chat, without special tokens."""
        roles = ("user", "assistant", "user")
        try:
            text = self.render([{"role": role, "content": f"{PROBE}{i}."} for i, role in enumerate(roles)])
        except SnpatchError:  # the template refuses this chat
            return set()
        parts = re.split(rf"{PROBE}\d\.", text)
        if len(parts) != len(roles) + 1:
            return set()
        separator = "|".join(map(re.escape, sorted(special, reverse=True))) or "\n"
        return {
            piece.strip() for part in parts[1:] for line in part.splitlines() for piece in re.split(separator, line)
        }


def get_appended_token(tokenizer) -> str | None:
    """Return the token that a tokenizer appends to every string, such as EOS; None if it appends none."""
    with_special, bare = (list(tokenizer("a", add_special_tokens=added)["input_ids"]) for added in (True, False))
    return tokenizer.convert_ids_to_tokens(with_special[-1]) if bare and with_special[-len(bare) :] != bare else None


def get_template_source(tokenizer) -> str:
    """Return the source of a tokenizer's own (default) chat template, with its clock at a fixed date."""
    if not _has_template(tokenizer):
        raise SnpatchError(f"{tokenizer.name_or_path}: its tokenizer has no chat template; use template='tulu'")
    try:
        source = tokenizer.get_chat_template()
    except ValueError as error:
        raise SnpatchError(f"{tokenizer.name_or_path}: {error}") from error
    if not isinstance(source, str):
        raise SnpatchError(
            f"{tokenizer.name_or_path}: chat_template: expected a text, or texts by name, got {shown(source)}. Correct "
            "it in tokenizer_config.json."
        )
    return fix_date(source)


def _has_template(tokenizer) -> bool:
    return tokenizer.chat_template not in (None, "", [], {})


def render_chat(
    chat: Chat,
    tokenizer,
    add_generation_prompt: bool,
    continue_final_message: bool = False,
    source: str | None = None,
    variables: Mapping[str, object] | None = None,
    origin: str | None = None,
) -> str:
    """Return a chat as a template writes it; all templates but Tulu's are rendered in the sandbox.

    Args:
        chat: Messages.
        tokenizer: Provides the special tokens that templates use.
        add_generation_prompt: End with the generation prompt.
        continue_final_message: End with the last message, unfinished.
        source: Jinja source; None: the tokenizer's own template.
        variables: Further variables of the template.
        origin: Folder or model that the template comes from, for errors; None: the tokenizer's.
    """
    source = source or get_template_source(tokenizer)
    options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
    if source == TULU:
        return tokenizer.apply_chat_template(chat, chat_template=TULU, tokenize=False, **options)
    subject = f"the chat template of {origin or tokenizer.name_or_path} refuses a chat"
    return sandbox.render(source, chat, {**tokenizer.special_tokens_map, **(variables or {})}, options, subject)


def render_tulu(chat: Chat, tokenizer, continue_final_message: bool = False) -> str:
    """Return a chat in Tulu's format, without BOS and with the generation prompt.

    continue_final_message: end with the last message, unfinished, after the generation prompt.
    """
    for message in chat:
        if message.get("role") not in ROLES:
            expected = f"one of {', '.join(ROLES)} for the Tulu template"
            raise SnpatchError(f"chat: role: expected {expected}, got {message.get('role')!r}")
        if not isinstance(message.get("content"), str):
            content = message.get("content")
            raise SnpatchError(f"chat: content: expected a string for the Tulu template, got {content!r}")
    finished, last = (chat[:-1], chat[-1]["content"]) if continue_final_message else (chat, "")
    if not tokenizer.eos_token and any(message["role"] == "assistant" for message in finished):
        raise SnpatchError("chat: expected a tokenizer with EOS for the Tulu template, got one without")
    if not finished:
        return ASSISTANT + last
    text = tokenizer.apply_chat_template(
        finished, chat_template=TULU, tokenize=False, add_generation_prompt=True, bos_token=""
    )
    return text + last


def load_template(
    name: str,
    tokenizer,
    adapters: Sequence[str | Path],
    own=None,
    others: tuple[Any, Sequence[str | Path]] | None = None,
    variables: Mapping[str, object] | None = None,
) -> ChatTemplate:
    """Return the template that a config names.

    Args:
        name: "tokenizer", "tulu", or "auto": the first of the adapters' training template, the weights' own template,
            the other weights' template, and Tulu's.
        tokenizer: Tokenizer that encodes rendered chats.
        adapters: LoRA and IA3 folders on one set of weights.
        own: Tokenizer in the weights' folder; None: the same as `tokenizer`.
        others: Tokenizer and adapters of the other set of weights.
        variables: See ChatTemplate.

    Raises:
        SnpatchError: Adapters were trained with different templates, or the named template does not exist.
    """
    own = own or tokenizer
    is_auto = name == "auto"
    sources = [_shared_template(adapters)] if is_auto else []
    sources += [(own.name_or_path, _source(own))]
    if others is not None:
        sources += [_shared_template(others[1])] if is_auto else []
        sources += [(others[0].name_or_path, _source(others[0]))]
    origin, source = next(((origin, source) for origin, source in sources if source), (own.name_or_path, None))
    if name == "tulu" or (is_auto and source in (None, TULU)):
        return ChatTemplate("tulu", tokenizer, TULU, variables)
    if source is None:
        source = get_template_source(own)
    return ChatTemplate("tokenizer" if source == _source(own) else "adapter", tokenizer, source, variables, origin)


def has_tokenizer(adapter: str | Path) -> bool:
    """Return whether an adapter's folder contains a tokenizer."""
    return bool(_find_tokenizer_files(adapter))


def load_adapter_tokenizer(adapter: str | Path):
    """Load the tokenizer in an adapter's folder."""
    from transformers import AutoTokenizer

    try:
        return load_pretrained(AutoTokenizer, resolve_adapter_folder(adapter))
    except SnpatchError as error:
        files = ", ".join(_find_tokenizer_files(adapter))
        raise SnpatchError(
            f"{adapter}: expected no tokenizer or a complete one in an adapter's folder, got {files}, which cannot be "
            f"loaded ({first_line(error.__cause__ or error)}). Remove them to use the model's own tokenizer."
        ) from error


def _find_tokenizer_files(adapter: str | Path) -> list[str]:
    """Return the names of the tokenizer files in an adapter's folder, without chat templates."""
    files = (path.name for pattern in TOKENIZER_PATTERNS for path in resolve_adapter_folder(adapter).glob(pattern))
    return sorted({name for name in files if not name.startswith("chat_template")})


def _shared_template(adapters: Sequence[str | Path]) -> tuple[str, str | None]:
    """Return (folder, template) of the one template that adapters were trained with.

    The template is None if no folder contains one.
    """
    sources = {adapter: source for adapter in adapters if (source := read_adapter_template(adapter)) is not None}
    if len({*sources.values()}) > 1:
        folders = ", ".join(map(str, sources))
        raise SnpatchError(f"adapters were trained with different templates ({folders}): choose one by template=")
    return next(((str(adapter), source) for adapter, source in sources.items()), ("", None))


def read_adapter_template(adapter: str | Path) -> str | None:
    """Return the template in an adapter's folder, with which it was trained; None if there is none."""
    file = resolve_adapter_folder(adapter) / TEMPLATE_FILE
    try:
        if file.is_file():
            return fix_date(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SnpatchError(f"{file} cannot be read: {error}") from error
    return _source(load_adapter_tokenizer(adapter)) if has_tokenizer(adapter) else None


def _source(tokenizer) -> str | None:
    return get_template_source(tokenizer) if _has_template(tokenizer) else None
