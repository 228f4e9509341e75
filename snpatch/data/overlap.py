"""Overlap of prompt sets: prompts that another set has, too, and prompts that repeat within a set.

Why normalized words: the same prompt is published in other letters, spaces and punctuation. Why n-grams of long prompts
alone: short ones share phrases without being the same. A text without spaces between words (Chinese) is one long word,
so that only exact matches find it.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from snpatch.data.dataset import Chat, Dataset

NGRAM = 8  # words
MIN_WORDS = 16  # of a prompt whose n-grams are compared
NEAR_FRACTION = 0.5  # of a prompt's n-grams that the other set has, from which it is a near match
WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Overlap:
    """Prompts of a set that another set has, too.

    Attributes:
        exact: Indices of prompts with the same words as a text of the other set.
        near: Indices of further prompts of at least MIN_WORDS words, of whose word 8-grams at least half occur in the
            other set.
    """

    exact: tuple[int, ...]
    near: tuple[int, ...]

    @property
    def indices(self) -> tuple[int, ...]:
        """Return the indices of both kinds, rising."""
        return tuple(sorted((*self.exact, *self.near)))


def split_words(text: str) -> list[str]:
    """Return the words of a text in Unicode's NFKC and lower case, without punctuation.

    A text without words is one word.
    """
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold()) or [text.strip()]


def find_overlap(prompts: Sequence[str], others: Iterable[str]) -> Overlap:
    """Find the prompts that occur among other texts.

    The prompts are indexed and the other texts are read once, so that these may be many.

    Args:
        prompts: Texts to look for.
        others: Texts to look in.
    """
    words = [split_words(prompt) for prompt in prompts]
    texts = {" ".join(prompt_words) for prompt_words in words}
    ngrams = {i: set(_to_ngrams(w)) for i, w in enumerate(words) if len(w) >= MIN_WORDS}
    all_ngrams = set().union(*ngrams.values())
    seen_texts, seen_ngrams = set(), set()
    for other in others:
        other_words = split_words(other)
        if (text := " ".join(other_words)) in texts:
            seen_texts.add(text)
        seen_ngrams |= all_ngrams.intersection(_to_ngrams(other_words))
    exact = tuple(i for i, prompt_words in enumerate(words) if " ".join(prompt_words) in seen_texts)
    near = (i for i, own in ngrams.items() if len(own & seen_ngrams) >= NEAR_FRACTION * len(own))
    return Overlap(exact, tuple(sorted(set(near) - set(exact))))


def count_repeats(prompts: Iterable[str]) -> int:
    """Return the number of prompts with the same words as an earlier one."""
    texts = [" ".join(split_words(prompt)) for prompt in prompts]
    return len(texts) - len(set(texts))


def join_user_messages(chat: Chat) -> str:
    """Return the user messages of a chat as one text."""
    return "\n".join(message["content"] for message in chat if message["role"] == "user")


def iter_user_texts(data: Dataset) -> Iterator[str]:
    """Yield each user message of a dataset's conversations, and those of a conversation together."""
    for example in data.examples:
        messages = [message["content"] for message in example.context if message["role"] == "user"]
        yield from messages
        if len(messages) > 1:
            yield join_user_messages(example.context)


def _to_ngrams(words: Sequence[str]) -> Iterator[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(NGRAM)), strict=False)
