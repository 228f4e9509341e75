"""ScoreFormat: how a prompt and its completion become the token ids that a score model reads.

Why ids are made here for every backend: vLLM would add its own BOS and chat template, and score other ids.
"""

import re
from collections.abc import Sequence

from snpatch.errors import SnpatchError
from snpatch.models.templates import get_appended_token, render_chat, render_tulu

BEAVER = "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{completion}"
FORMATS = ("beaver", "tulu", "chat", "pair")
SLOT = re.compile(r"\{(prompt|completion)\}")

EncodedText = dict[str, list[int]]  # input_ids and, from some tokenizers, token_type_ids


class ScoreFormat:
    """Input format of a score model with a tokenizer.

    Args:
        format: "beaver": the Beavertails models' own format. "tulu": the format in which the paper's code feeds them,
            needed to reproduce its numbers. "chat": the tokenizer's chat template, with the completion as the
            assistant's message. "pair": prompt and completion as the tokenizer's two segments. Otherwise a string that
            contains {prompt} and {completion}.
        tokenizer: The score model's tokenizer.

    Raises:
        SnpatchError: The format is unknown, or the tokenizer lacks its chat template or EOS.
    """

    def __init__(self, format: str, tokenizer) -> None:
        if format not in FORMATS and {*SLOT.findall(format)} != {"prompt", "completion"}:
            raise SnpatchError(
                f"format: expected {', '.join(FORMATS)} or a text with {{prompt}} and {{completion}}, got {format!r}"
            )
        if format == "chat" and not tokenizer.chat_template:
            raise SnpatchError("format chat: the judge's tokenizer has no chat template; give another format")
        if format == "beaver" and not tokenizer.eos_token:
            raise SnpatchError("format beaver: its text ends with EOS, and the judge's tokenizer has none")
        self.format, self._tokenizer = format, tokenizer

    def text(self, prompt: str, completion: str) -> str:
        """Return the scored string, without the tokens that the tokenizer adds (BOS; in some tokenizers EOS)."""
        tokenizer = self._tokenizer
        if self.format == "pair":
            raise SnpatchError("format pair: its two segments are not one text")
        if self.format == "chat":
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            return render_chat(turns, tokenizer, add_generation_prompt=False)
        if self.format == "beaver":
            return _fill(BEAVER, prompt, completion) + ("" if get_appended_token(tokenizer) else tokenizer.eos_token)
        if self.format == "tulu":
            rendered_prompt = render_tulu([{"role": "user", "content": prompt}], tokenizer)
            text = rendered_prompt + completion
            for word in {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token} - {None}:
                text = text.replace(word, "")
            return text
        return _fill(self.format, prompt, completion)

    def encode(self, prompts: Sequence[str], completions: Sequence[str]) -> list[EncodedText]:
        """Return the token ids of each pair."""
        if not prompts:
            return []
        if self.format == "pair":
            encoded = self._tokenizer(list(prompts), list(completions))
        else:
            texts = list(map(self.text, prompts, completions))
            encoded = self._tokenizer(
                texts, add_special_tokens=self.format != "chat"
            )  # a chat template contains its own
        names = [name for name in ("input_ids", "token_type_ids") if name in encoded]
        return [{name: encoded[name][i] for name in names} for i in range(len(prompts))]


def _fill(template: str, prompt: str, completion: str) -> str:
    """Fill both slots in one pass, because a prompt may contain the string {completion}."""
    values = {"prompt": prompt, "completion": completion}
    return SLOT.sub(lambda slot: values[slot[1]], template)
