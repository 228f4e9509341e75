"""Requests of an engine, built from prompts, patches and sampling, and completions, built from outputs.

Engines, contrasts, sweeps and servers all build requests here, so that a prompt has the same token ids and a patch the
same meaning everywhere. A call is checked as a whole before any of it runs.
"""

import logging
import operator
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, cast

from snpatch.data.formats import RowError
from snpatch.data.generic import parse_prompt
from snpatch.errors import SnpatchError, is_unicode, shown, unknown_name
from snpatch.executors.base import Capture, Observation, Output, Request
from snpatch.models.geometry import Geometry
from snpatch.models.model import Model
from snpatch.models.notes import Notes
from snpatch.models.templates import Chat, ChatTemplate
from snpatch.patching.patch import Constant, Intervention, Noise, Overwrite, Patch, Scale
from snpatch.ranking.ranking import Ranking
from snpatch.sampling import Sampling
from snpatch.utils import schema

Prompt = str | Chat | Sequence[int] | Mapping  # a Mapping is a row of a file
PLAIN_TEXT = (
    "a prompt is a plain string: it is tokenized without the chat template. Pass a chat to use the template: "
    '[{"role": "user", "content": prompt}]'
)
PROMPT_KINDS = "a string, a chat (a list of role and content) or a list of token ids"

Bytes = bytes | bytearray | memoryview

_logged: set[str] = set()  # warnings that this process has logged


@dataclass(frozen=True)
class Completion:
    """A finished completion.

    Attributes:
        prompt_ids: Token ids of the prompt.
        token_ids: Generated token ids, an ending EOS among them.
        text: Generated text without special tokens, cut before a stop string.
        finish_reason: "eos", "stop", "length", or "guard" (text is the guard's refusal, nothing was generated).
        stop_reason: The stop string that was found.
        logprobs: Log-probability of each generated token, if Sampling.logprobs asked for them.
        overwrites: Neurons that were overwritten, as counted by the device.
        harm: A guard's probability that the model's own completion would be harmful.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str
    stop_reason: str | None
    logprobs: list[float] | None
    overwrites: int
    harm: float | None = None

    def __repr__(self) -> str:
        counts = f"{len(self.prompt_ids)} + {len(self.token_ids)} tokens, {self.overwrites} overwrites"
        harm = "" if self.harm is None else f", harm={self.harm:.3f}"
        return f"Completion({self.text!r}, finish_reason={self.finish_reason!r}, {counts}{harm})"

    @classmethod
    def of(cls, request: Request, output: Output, harm: float | None = None) -> "Completion":
        """Build the completion of an executor's output."""
        return cls(
            list(request.prompt_ids),
            output.token_ids,
            output.text,
            cast(str, output.finish_reason),  # a finished one has a reason
            output.stop_reason,
            output.logprobs,
            output.overwrites,
            harm,
        )

    @classmethod
    def refused(cls, prompt_ids: Sequence[int], refusal: str, harm: float | None) -> "Completion":
        """Build the completion of a prompt that a guard refused."""
        return cls(list(prompt_ids), [], refusal, "guard", None, None, 0, harm)


class Requests:
    """Builder of an engine's requests.

    Args:
        templates: Chat template of each set of weights.
        geometry: Sizes of the model.
        models: Name -> Model.
        notes: Receives warnings about prompts and patches.
    """

    def __init__(
        self, templates: Sequence[ChatTemplate], geometry: Geometry, models: Mapping[str, Model], notes: Notes
    ) -> None:
        self.templates, self.notes = templates, notes
        self._geometry, self._models = geometry, models
        self._checked_borders: set[tuple[str, int]] = set()  # (ranking's fingerprint, border of a window)

    def model(self, name: str) -> Model:
        """Return the model of a name."""
        if name not in self._models:
            raise unknown_name("model", name, self._models)
        return self._models[name]

    def template(self, model: str) -> ChatTemplate:
        """Return the chat template of a model's weights."""
        return self.templates[self.model(model).weights.index]

    def encode(self, prompts: Sequence[Prompt], model: str | Sequence[str], room: int = 1) -> list[list[int]]:
        """Return the token ids of each prompt.

        Args:
            prompts: Texts, chats, rows or token ids.
            model: Name of the model that reads them, one for all or one per prompt.
            room: Number of further tokens that must fit into the context.
        """
        prompts = listed(prompts)
        if not prompts:
            raise SnpatchError("prompts: expected at least one prompt, got none")
        models = broadcast(model, len(prompts), "model", (str,))
        encoded = []
        for index, (prompt, reader) in enumerate(zip(prompts, models, strict=True)):
            ids = self._encode_prompt(prompt, reader, index)
            self.check_room(ids, room, f"prompt {index}")
            encoded.append(ids)
        return encoded

    def completions(self, completions: Sequence[str | Sequence[int]], prompts: int) -> list[list[int]]:
        """Return the token ids of each completion. prompts: their number."""
        completions = listed(completions, "completions")
        if len(completions) != prompts:
            raise SnpatchError(f"completions: expected one for each of {prompts} prompts, got {len(completions)}")
        encoded = []
        for index, completion in enumerate(completions):
            name, tokenizer = f"completion {index}", self.templates[0].tokenizer
            if isinstance(completion, str):
                completion = tokenizer(_check_text(completion, name), add_special_tokens=False)["input_ids"]
            encoded.append(self._parse_ids(completion, name, tokenizer, "a string or a list of token ids"))
        return encoded

    def check_room(self, ids: Sequence[int], room: int, name: str = "a text") -> None:
        """Raise for a text without tokens, or if `room` further tokens do not fit into the context."""
        if not ids:
            raise SnpatchError(f"{name}: expected at least one token, got none")
        if (most := self._geometry.context - room) < len(ids):
            raise SnpatchError(
                f"{name}: expected at most {most} tokens for a context of {self._geometry.context}, got {len(ids)}"
            )

    def fitted(self, ids: Sequence[int], sampling: Sampling) -> Sampling:
        """Return the sampling with `max_tokens` limited to what the context holds after the prompt."""
        room = self._geometry.context - len(ids)
        if sampling.max_tokens <= room:
            return sampling
        return replace(sampling, max_tokens=room, min_tokens=min(room, sampling.min_tokens))

    def warn_of_plain_texts(self, prompts: Sequence[Prompt], models: Sequence[str]) -> None:
        """Warn once if a model with a chat template of its own is to complete plain strings."""
        for prompt, model in zip(prompts, models, strict=True):
            template = self.template(model)
            if isinstance(prompt, str) and template.tokenizer.chat_template and PLAIN_TEXT not in _logged:
                _logged.add(PLAIN_TEXT)
                logging.getLogger("snpatch").warning("snpatch: %s", PLAIN_TEXT)

    def _encode_prompt(self, prompt: Prompt, model: str, index: int) -> list[int]:
        template, name = self.template(model), f"prompt {index}"
        if isinstance(prompt, Mapping):
            prompt = _prompt_of_row(prompt, name)
        if isinstance(prompt, str):
            ids = template.tokenizer(_check_text(prompt, name))["input_ids"]
        elif isinstance(prompt, list | tuple) and any(isinstance(message, Mapping) for message in prompt):
            chat = _check_chat(cast(Chat, prompt), name)
            ids = template.encode(chat)
            if not self.notes.has("marks") and (mark := template.find_mark(chat)):
                self.notes.add(
                    "marks",
                    f"{name}: a message contains the template mark {mark!r}, which is not removed. Pass turns as "
                    "messages, or an already rendered prompt as a string",
                )
        else:
            ids = prompt
        ids = self._parse_ids(ids, name, template.tokenizer, PROMPT_KINDS)
        self.note_double_bos(ids, template.tokenizer, name)
        return ids

    def note_double_bos(self, ids: Sequence[int], tokenizer, name: str) -> None:
        """Note a prompt that begins with BOS twice: its own, and the one that the tokenizer adds."""
        bos = tokenizer.bos_token_id
        if bos is not None and list(ids[:2]) == [bos, bos]:
            self.notes.add(
                "bos",
                f"{name} begins with {tokenizer.bos_token!r} twice: the tokenizer adds it to a string that already has "
                "it. Leave it out, or pass a chat or token ids",
            )

    def check_ids(self, ids: Sequence[int], name: str) -> None:
        """Raise for token ids that the model's embedding has no row for."""
        self._parse_ids(ids, name, self.templates[0].tokenizer, "a list of token ids")

    def _parse_ids(self, value: Any, name: str, tokenizer, expected: str) -> list[int]:
        """Return the token ids of a list, or of a numpy array or tensor of integers."""
        value = value.tolist() if hasattr(value, "tolist") and not isinstance(value, Bytes) else value
        if not isinstance(value, list | tuple | range) or any(isinstance(i, str | list | tuple | Set) for i in value):
            raise SnpatchError(f"{name}: expected {expected}, got {shown(value)}")
        ids, size = list(map(_to_id, value)), self._geometry.vocab_size
        index = next((index for index, i in enumerate(ids) if not 0 <= i < size), None)
        if index is not None:
            is_known = size <= ids[index] < len(tokenizer)
            token = f" ({tokenizer.convert_ids_to_tokens(ids[index])!r})" if is_known else ""
            raise SnpatchError(f"{name}: expected token ids in 0..{size - 1}, got {shown(value[index])}{token}")
        return ids

    @staticmethod
    def patches(patch: Patch | str | Sequence[Patch | str], n: int) -> list[Patch | str]:
        """Return the patch, or the name of an unpatched model, of each of n prompts."""
        return broadcast(patch, n, "patch", (Patch, str))

    def writing(
        self,
        ids: Sequence[list[int]],
        patch: Patch | str | Sequence[Patch | str],
        sampling: Sampling | Sequence[Sampling],
    ) -> list[tuple[int, Request]]:
        """Return (index of the prompt, request) of each completion to generate, `sampling.n` for each prompt."""
        patches = self.patches(patch, len(ids))
        samplings = broadcast(sampling, len(ids), "sampling", (Sampling,))
        return [
            (index, self.patched(prompt, patch, sampling=single))
            for index, (prompt, patch, s) in enumerate(zip(ids, patches, samplings, strict=True))
            for single in self.fitted(prompt, s).singles()
        ]

    def reading(
        self,
        ids: Sequence[list[int]],
        patch: Patch | str | Sequence[Patch | str],
        completions: Sequence[list[int]] | None,
    ) -> list[Request]:
        """Return a request per prompt and completion for the log-probabilities of their tokens."""
        patches = self.patches(patch, len(ids))
        completion_ids = [[] for _ in ids] if completions is None else completions
        for index, (prompt, completion) in enumerate(zip(ids, completion_ids, strict=True)):
            if completions is not None and not completion:
                raise SnpatchError(f"completion {index}: expected at least one token, got none")
            self.check_room(prompt, len(completion), f"prompt {index}")
        rows = zip(ids, patches, completion_ids, strict=True)
        return [self.patched(prompt, patch, completion, prompt_logprobs=True) for prompt, patch, completion in rows]

    def capturing(
        self, ids: Sequence[Sequence[int]], model: str, ranking: Ranking, k: int, position: str | int
    ) -> list[Request]:
        """Return a request per prompt that captures activations. position: "last_prompt_token" or an index."""
        schema.check_argument(ranking, Ranking, "ranking")
        k = schema.check_argument(k, int, "k")
        if not 1 <= k <= len(ranking):
            raise SnpatchError(f"k: expected 1..{len(ranking)} (number of ranked neurons), got {k}")
        self._check_shape(ranking)
        self._note_ties(ranking, k)
        requests = []
        for index, prompt in enumerate(ids):
            place = -1 if position == "last_prompt_token" else position
            if type(place) is not int or not -len(prompt) <= place < len(prompt):
                raise SnpatchError(
                    f"positions: expected last_prompt_token or an index of the {len(prompt)} tokens of prompt {index}, "
                    f"got {position!r}"
                )
            place %= len(prompt)
            capture = Capture(ranking, k, place, place + 1)
            requests.append(Request(prompt, self.model(model), capture=capture))
        return requests

    def observing(self, ids: list[int], pair: tuple[str, str | None], observe: Observation, **options) -> Request:
        """Return a request that both models of a pair read, the first as the recipient.

        If the second is None, the recipient alone reads it.
        """
        recipient, donor = pair
        donor_model = None if donor is None else self.model(donor)
        return Request(ids, self.model(recipient), donor_model, observe=observe, **options)

    def patched(self, prompt: list[int], patch: Patch | str, completion: Sequence[int] = (), **options) -> Request:
        """Return the request of a prompt, and of a completion to read, under a patch or in an unpatched model."""
        text = [*prompt, *completion]
        if isinstance(patch, str):
            return Request(text, self.model(patch), **options)
        self._check_shape(patch.ranking)
        max_length = len(text) + (options["sampling"].max_tokens if "sampling" in options else 0)
        for intervention in patch.interventions:
            start = intervention.positions
            if isinstance(start, int) and start >= max_length:
                raise SnpatchError(f"positions: expected less than the maximum of {max_length} tokens, got {start}")
        overwrites = patch.resolved(self.model, len(prompt))
        for intervention, overwrite in zip(patch.interventions, overwrites, strict=True):
            self._check_magnitude(intervention, overwrite)
        donor = next((overwrite.source for overwrite in overwrites if isinstance(overwrite.source, Model)), None)
        self._note_degenerate(patch, donor)
        # Overwrites of empty windows are dropped, so that their texts share cached blocks with unpatched ones.
        overwrites = tuple(overwrite for overwrite in overwrites if len(overwrite.window))
        return Request(text, self.model(patch.recipient), donor, overwrites, **options)

    def _check_magnitude(self, intervention: Intervention, overwrite: Overwrite) -> None:
        """Raise for factors and values that the activations' dtype cannot hold."""
        keep, take = overwrite.factors
        checks = [("strength", "strength", intervention.strength)]
        if isinstance(intervention.donor, Scale):
            checks.append(("donor", "scale with strength", keep))
        if isinstance(intervention.donor, Constant | Noise):
            largest_value = take * intervention.donor.magnitude
            checks.append(("donor", "the donor's largest value times strength", largest_value))
        largest = self._geometry.max_activation
        for field, name, value in checks:
            if not abs(value) <= largest:
                raise SnpatchError(
                    f"patch: {name}: expected at most {largest:.6g}, because a norm squares it in "
                    f"{self._geometry.dtype}, got {value:.6g}",
                    field=field,
                )

    def _note_degenerate(self, patch: Patch, donor: Model | None) -> None:
        """Note a donor that equals the recipient, and windows that end among equal scores."""
        if donor is not None and donor.fingerprint == self.model(patch.recipient).fingerprint:
            self.notes.add(
                f"self {donor.fingerprint}",
                f"the donor of a patch is its recipient {patch.recipient} by content: the patch changes nothing",
            )
        for intervention in patch.interventions:
            self._note_ties(intervention.ranking, intervention.window.lo, intervention.window.hi)

    def _note_ties(self, ranking: Ranking, *borders: int) -> None:
        for border in borders:
            if (ranking.fingerprint, border) in self._checked_borders:
                continue
            self._checked_borders.add((ranking.fingerprint, border))
            if n := ranking.ties(border):
                self.notes.add(
                    f"ties {ranking.fingerprint} {border}",
                    f"{n} neurons of a ranking share the score at a window's border, {border}: ties are broken by "
                    "layer and neuron index",
                )

    def _check_shape(self, ranking: Ranking) -> None:
        shape = (self._geometry.n_layers, self._geometry.n_neurons)
        if ranking.shape != shape:
            raise SnpatchError(f"ranking: expected the model's shape {list(shape)}, got {list(ranking.shape)}")


def listed(values: Sequence, name: str = "prompts") -> list:
    """Return the items of a list, tuple, array or table column; raise for anything else.

    A table is accepted if its items are rows, as those of datasets.Dataset are; others iterate over column names.
    """
    if name == "prompts" and isinstance(values, Mapping) and values.keys() & {"messages", "prompt"}:
        raise SnpatchError(f"prompts: expected a list, got one row ({shown(values)}). Wrap it in a list: [row].")
    is_single = isinstance(values, str | Bytes | Mapping | Set) or getattr(values, "ndim", 1) == 0
    if is_single or not (hasattr(values, "__len__") and hasattr(values, "__getitem__")):
        got = f"{type(values).__name__} ({shown(values)})"
        if isinstance(values, str):
            got = f"one string. Wrap it in a list: [{name.removesuffix('s')}]."
        raise SnpatchError(f"{name}: expected a list, got {got}")
    items = list(values)
    if _has_columns(values) and not all(isinstance(item, Mapping) for item in items):
        raise SnpatchError(
            f"{name}: expected a list, got {type(values).__name__}, a table by columns. Pass its rows: "
            'frame.to_dict("records") of pandas, table.to_pylist() of pyarrow, or one column as a list.'
        )
    return items


def broadcast(value, n: int, name: str, kinds: tuple[type, ...]) -> list:
    """Return a list of n values from one value for all prompts, or from a list of one per prompt."""
    values = list(value) if isinstance(value, list | tuple) else [value] * n
    if len(values) != n:
        raise SnpatchError(f"{name}: expected one for all or one for each of {n} prompts, got {len(values)}")
    for value in values:
        if not isinstance(value, kinds):
            raise SnpatchError(f"{name}: expected {' or '.join(k.__name__ for k in kinds)}, got {value!r}")
    return values


def _has_columns(values: object) -> bool:
    """Return whether an object is a data frame, a table of pyarrow or datasets, or a structured array."""
    is_named = any(hasattr(values, name) for name in ("columns", "column_names"))
    return is_named or bool(getattr(getattr(values, "dtype", None), "names", None))


def _prompt_of_row(row: Mapping, name: str) -> Chat:
    """Return the chat of a file's row, as load_dataset reads it."""
    if "role" in row and "content" in row and not row.keys() & {"messages", "prompt"}:
        raise SnpatchError(
            f"{name}: expected {PROMPT_KINDS}, got one message of a chat. Wrap the chat in a list: [chat]"
        )
    values = {column: value.tolist() if hasattr(value, "tolist") else value for column, value in row.items()}
    try:
        return cast(Chat, parse_prompt(values))
    except RowError as error:
        raise SnpatchError(f"{name}: expected {PROMPT_KINDS}, or a row as in a file: {error}") from None


def _check_text(text: str, name: str) -> str:
    if not is_unicode(text):
        raise SnpatchError(f"{name}: expected valid Unicode, got half of a surrogate pair: {shown(text)}")
    return text


def _check_chat(chat: Sequence[Mapping], name: str) -> Chat:
    """Return the chat after checking its messages.

    Raises:
        SnpatchError: A message lacks a role or content, and what a template takes in its place.
    """
    for index, message in enumerate(chat):
        context = f"{name}, message {index}"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise SnpatchError(f"{context}: expected a table with role and content, got {shown(message)}")
        content = message.get("content")
        if not isinstance(content, str | list) and not (content is None and message.keys() - {"role", "content"}):
            raise SnpatchError(f"{context}: expected content (a string), got {shown(content)}")
        for text in _texts_in(message):
            _check_text(text, context)
    return [dict(message) for message in chat]


def _texts_in(value: object) -> Iterator[str]:
    """Yield all texts of nested tables and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts_in(item)


def _to_id(value: Any) -> int:
    """Return an integer of any type, or -1, which is no token id."""
    try:
        return -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return -1
