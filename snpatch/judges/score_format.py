"""What a score model reads: how a prompt and its completion become the ids of one text.

Why ids are made here for every backend: vLLM would add its own BOS and template, and score other texts.
"""

import re
from collections.abc import Sequence

from snpatch.errors import SnpatchError
from snpatch.models.templates import get_appended_token, render_chat, render_tulu

BEAVER = "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{completion}"
NAMES = ("beaver", "tulu", "chat", "pair")
SLOT = re.compile(r"\{(prompt|completion)\}")

Row = dict[str, list[int]]  # input_ids and, of some tokenizers, token_type_ids


class ScoreFormat:
    """One format with one tokenizer.

    format: "beaver", the Beavertails models' native text; "tulu", what the paper's code feeds them instead, and what
    its numbers need; "chat", the tokenizer's chat template with the completion as the assistant's turn; "pair",
    prompt and completion as the tokenizer's two segments; or a text that holds {prompt} and {completion}.
    """

    def __init__(self, format: str, tokenizer) -> None:
        if format not in NAMES and {*SLOT.findall(format)} != {"prompt", "completion"}:
            raise SnpatchError(
                f"format: wanted {', '.join(NAMES)} or a text with {{prompt}} and {{completion}}, got {format!r}"
            )
        if format == "chat" and not tokenizer.chat_template:
            raise SnpatchError("format chat: the judge's tokenizer has no chat template; give another format")
        if format == "beaver" and not tokenizer.eos_token:
            raise SnpatchError("format beaver: its text ends with EOS, and the judge's tokenizer has none")
        self.format, self._tokenizer = format, tokenizer

    def text(self, prompt: str, completion: str) -> str:
        """What is scored, but for what the tokenizer adds by itself (BOS; of some, EOS)."""
        tokenizer = self._tokenizer
        if self.format == "pair":
            raise SnpatchError("format pair: its two segments are not one text")
        if self.format == "chat":
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            return render_chat(turns, tokenizer, add_generation_prompt=False)
        if self.format == "beaver":
            return _fill(BEAVER, prompt, completion) + ("" if get_appended_token(tokenizer) else tokenizer.eos_token)
        if self.format == "tulu":
            asked = render_tulu([{"role": "user", "content": prompt}], tokenizer)
            text = asked + completion.split("<|user|>")[0]
            for word in {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token} - {None}:
                text = text.replace(word, "")
            return text
        return _fill(self.format, prompt, completion)

    def rows(self, prompts: Sequence[str], completions: Sequence[str]) -> list[Row]:
        """The ids of each pair."""
        if not prompts:
            return []
        if self.format == "pair":
            encoded = self._tokenizer(list(prompts), list(completions))
        else:
            texts = list(map(self.text, prompts, completions))
            encoded = self._tokenizer(texts, add_special_tokens=self.format != "chat")  # a template writes its own
        names = [name for name in ("input_ids", "token_type_ids") if name in encoded]
        return [{name: encoded[name][i] for name in names} for i in range(len(prompts))]


def _fill(template: str, prompt: str, completion: str) -> str:
    """In one pass, so that a prompt may hold the word {completion}."""
    values = {"prompt": prompt, "completion": completion}
    return SLOT.sub(lambda slot: values[slot[1]], template)
