"""Requests: prompts, patches and sampling become what an executor runs; what it gives becomes completions.

Every caller goes through here (engines, contrasts, sweeps, servers), so that a prompt has the same ids and a patch the
same meaning whoever asks. All of a call is checked before any of it runs.
"""

import operator
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace

from snpatch.errors import SnpatchError, is_unicode, shown
from snpatch.executors.base import Capture, Geometry, Observation, Output, Request
from snpatch.models.model import Model
from snpatch.models.notes import Notes
from snpatch.models.templates import Chat, ChatTemplate
from snpatch.patching.patch import Constant, Intervention, Noise, Overwrite, Patch, Scale, recipient_name
from snpatch.ranking.ranking import Ranking
from snpatch.sampling import Sampling

Prompt = str | Chat | Sequence[int]


@dataclass(frozen=True)
class Completion:
    """What one prompt gave.

    token_ids and logprobs include an ending EOS; text has no special tokens and is cut before a stop string.
    finish_reason: "eos", "stop" (stop_reason is the string), "length", or "guard": text is the guard's refusal, and no
    token was written. overwrites: the device's own count. harm: the guard's probability that its model's own answer
    would be harmful; None without a guard.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str
    stop_reason: str | None
    logprobs: list[float] | None
    overwrites: int
    harm: float | None = None

    @classmethod
    def of(cls, request: Request, output: Output, harm: float | None = None) -> "Completion":
        """What the executor gave for a request that writes."""
        return cls(
            list(request.prompt_ids),
            output.token_ids,
            output.text,
            output.finish_reason,
            output.stop_reason,
            output.logprobs,
            output.overwrites,
            harm,
        )

    @classmethod
    def refused(cls, prompt_ids: Sequence[int], refusal: str, harm: float) -> "Completion":
        """What stands in the place of an answer that a guard did not let be written."""
        return cls(list(prompt_ids), [], refusal, "guard", None, None, 0, harm)


class Requests:
    """Makes requests for one engine.

    templates: of each set of weights; models: name -> Model, the engine's; notes: what is told of prompts.
    """

    def __init__(
        self, templates: Sequence[ChatTemplate], geometry: Geometry, models: Mapping[str, Model], notes: Notes
    ) -> None:
        self.templates, self.notes = templates, notes
        self._geometry, self._models = geometry, models
        self._looked_at: set[tuple[str, int]] = set()  # windows' borders of rankings

    def model(self, name: str) -> Model:
        """The model of this name."""
        if name not in self._models:
            raise SnpatchError(f"no model named {name!r}: there are {', '.join(self._models)}")
        return self._models[name]

    def template(self, model: str) -> ChatTemplate:
        """How a model reads chats."""
        return self.templates[self.model(model).weights.index]

    # ---- ids ----------------------------------------------------------------------------------------------------

    def encode(self, prompts: Sequence[Prompt], model: str | Sequence[str], room: int = 1) -> list[list[int]]:
        """Token ids of each prompt; model: who reads it; `room`: how many tokens must still fit the context."""
        prompts = listed(prompts)
        if not prompts:
            raise SnpatchError("the list of prompts is empty")
        encoded = []
        for index, (prompt, reader) in enumerate(
            zip(prompts, broadcast(model, len(prompts), "model", (str,)), strict=True)
        ):
            ids = self._ids(prompt, reader, index)
            self.check_room(ids, room, f"prompt {index}")
            encoded.append(ids)
        return encoded

    def completions(self, completions: Sequence[str | Sequence[int]], prompts: int) -> list[list[int]]:
        """Token ids of the completion of each prompt."""
        completions = listed(completions, "completions")
        if len(completions) != prompts:
            raise SnpatchError(f"{prompts} prompts and {len(completions)} completions")
        found = []
        for index, completion in enumerate(completions):
            name, tokenizer = f"completion {index}", self.templates[0].tokenizer
            if isinstance(completion, str):
                completion = tokenizer(_text(completion, name), add_special_tokens=False)["input_ids"]
            found.append(self._checked(completion, name, tokenizer, "a text or a list of token ids"))
        return found

    def check_room(self, ids: Sequence[int], room: int, name: str = "a text") -> None:
        """An error for a text without tokens, or after which so many do not fit the context."""
        if not ids:
            raise SnpatchError(f"{name} has no tokens")
        if len(ids) + room > self._geometry.context:
            raise SnpatchError(f"{name} has {len(ids)} tokens, the model's context holds {self._geometry.context}")

    def fitted(self, ids: Sequence[int], sampling: Sampling) -> Sampling:
        """The same sampling, ended by the context where that comes first."""
        room = self._geometry.context - len(ids)
        if sampling.max_tokens <= room:
            return sampling
        return replace(sampling, max_tokens=room, min_tokens=min(room, sampling.min_tokens))

    def _ids(self, prompt: Prompt, model: str, index: int) -> list[int]:
        template, name = self.template(model), f"prompt {index}"
        if isinstance(prompt, str):
            ids = template.tokenizer(_text(prompt, name))["input_ids"]
        elif isinstance(prompt, list | tuple) and any(isinstance(message, Mapping) for message in prompt):
            chat = _chat(prompt, name)
            ids = template.encode(chat)
            if not self.notes.has("marks") and (mark := template.find_mark(chat)):
                self.notes.add(
                    "marks",
                    f"{name}: a message holds {mark!r}, which chat templates write, and is put into a template as it "
                    "is: give turns as messages, or a text that is templated already as a text",
                )
        else:
            ids = prompt
        wanted = "a text, a chat (a list of role and content) or a list of token ids"
        ids = self._checked(ids, name, template.tokenizer, wanted)
        self.note_double_bos(ids, template.tokenizer, name)
        return ids

    def note_double_bos(self, ids: Sequence[int], tokenizer, name: str) -> None:
        """Tell of a text that begins with BOS twice: its own, and the one that the tokenizer adds."""
        bos = tokenizer.bos_token_id
        if bos is not None and list(ids[:2]) == [bos, bos]:
            self.notes.add(
                "bos",
                f"{name} begins with {tokenizer.bos_token!r} twice: the tokenizer adds one to a text that has its own; "
                "leave it out, or give the chat itself or token ids",
            )

    def check_ids(self, ids: Sequence[int], name: str) -> None:
        """Raise an error for token ids that a model of this engine has no row for."""
        self._checked(ids, name, self.templates[0].tokenizer, "a list of token ids")

    def _checked(self, given: Sequence[int], name: str, tokenizer, wanted: str) -> list[int]:
        """Token ids of a list, or of a numpy array or tensor of integers."""
        given = given.tolist() if hasattr(given, "tolist") else given
        if not isinstance(given, list | tuple | range) or any(isinstance(i, str | list | tuple | Set) for i in given):
            raise SnpatchError(f"{name}: wanted {wanted}, got {shown(given)}")
        try:
            ids = [-1 if isinstance(i, bool) else operator.index(i) for i in given]
        except TypeError:
            ids = [-1]
        size = self._geometry.vocab_size
        if wrong := [i for i in ids if not 0 <= i < size]:
            token = f": {tokenizer.convert_ids_to_tokens(wrong[0])!r} is {wrong[0]}" if wrong[0] >= size else ""
            raise SnpatchError(f"{name}: token ids must be integers in 0..{size - 1}{token}")
        return ids

    @staticmethod
    def recipients(patch: Patch | str | Sequence[Patch | str], n: int) -> list[str]:
        """Who speaks in each of n texts."""
        return [recipient_name(one) for one in broadcast(patch, n, "patch", (Patch, str))]

    # ---- requests -----------------------------------------------------------------------------------------------

    def writing(
        self,
        ids: Sequence[list[int]],
        patch: Patch | str | Sequence[Patch | str],
        sampling: Sampling | Sequence[Sampling],
    ) -> list[tuple[int, Request]]:
        """(index of the prompt, request) of each text to write; n of a prompt where its sampling says so."""
        patches = broadcast(patch, len(ids), "patch", (Patch, str))
        samplings = broadcast(sampling, len(ids), "sampling", (Sampling,))
        return [
            (index, self.patched(prompt, one, sampling=single))
            for index, (prompt, one, s) in enumerate(zip(ids, patches, samplings, strict=True))
            for single in self.fitted(prompt, s).singles()
        ]

    def reading(
        self,
        ids: Sequence[list[int]],
        patch: Patch | str | Sequence[Patch | str],
        completions: Sequence[list[int]] | None,
    ) -> list[Request]:
        """A request for each prompt and its completion, which is read as if it had been generated."""
        patches = broadcast(patch, len(ids), "patch", (Patch, str))
        read = [[] for _ in ids] if completions is None else completions
        for index, (prompt, completion) in enumerate(zip(ids, read, strict=True)):
            if completions is not None and not completion:
                raise SnpatchError(f"completion {index} has no tokens")
            self.check_room(prompt, len(completion), f"prompt {index}")
        return [self.patched(*each, prompt_logprobs=True) for each in zip(ids, patches, read, strict=True)]

    def capturing(
        self, ids: Sequence[list[int]], model: str, ranking: Ranking, k: int, position: str | int
    ) -> list[Request]:
        """Return a request per prompt that captures activations. position: "last_prompt_token" or an index."""
        if not 1 <= k <= len(ranking):
            raise SnpatchError(f"k must lie in 1..{len(ranking)}, the ranked neurons; got {k}")
        self._check_shape(ranking)
        self._tell_ties(ranking, k)
        requests = []
        for index, prompt in enumerate(ids):
            place = -1 if position == "last_prompt_token" else position
            if type(place) is not int or not -len(prompt) <= place < len(prompt):
                raise SnpatchError(
                    f"positions={position!r}: expected last_prompt_token or an index, prompt {index} has {len(prompt)} "
                    "tokens"
                )
            place %= len(prompt)
            capture = Capture(ranking, k, place, place + 1)
            requests.append(Request(prompt, self.model(model), capture=capture))
        return requests

    def observing(self, ids: list[int], pair: tuple[str, str | None], observe: Observation, **asked) -> Request:
        """A text that both models of a pair read, the first one as the recipient; None: the recipient alone."""
        recipient, donor = (None if name is None else self.model(name) for name in pair)
        return Request(ids, recipient, donor, observe=observe, **asked)

    def patched(self, prompt: list[int], patch: Patch | str, completion: Sequence[int] = (), **asked) -> Request:
        """A prompt, and perhaps a completion to read, under a patch or in an unpatched model."""
        text = [*prompt, *completion]
        if isinstance(patch, str):
            return Request(text, self.model(patch), **asked)
        self._check_shape(patch.ranking)
        most = len(text) + (asked["sampling"].max_tokens if "sampling" in asked else 0)
        for one in patch.interventions:
            if isinstance(one.positions, int) and one.positions >= most:
                raise SnpatchError(f"positions={one.positions} is past the {most} tokens that the text can have")
        overwrites = patch.resolved(self.model, len(prompt))
        for intervention, overwrite in zip(patch.interventions, overwrites, strict=True):
            self._check_magnitude(intervention, overwrite)
        donor = next((one.source for one in overwrites if isinstance(one.source, Model)), None)
        self._tell_degenerate(patch, donor)
        # An empty window names nothing, so that texts with it share what is kept of the unpatched ones.
        kept = tuple(one for one in overwrites if len(one.window))
        return Request(text, self.model(patch.recipient), donor, kept, **asked)

    def _check_magnitude(self, intervention: Intervention, overwrite: Overwrite) -> None:
        """Raise an error for factors and values that the activations' dtype cannot hold."""
        keep, take = overwrite.factors
        checks = [("strength", "strength", intervention.strength)]
        if isinstance(intervention.donor, Scale):
            checks.append(("donor", "the scale, with the strength,", keep))
        if isinstance(intervention.donor, Constant | Noise):
            largest_value = take * intervention.donor.magnitude
            checks.append(("donor", "the donor's largest value, times the strength,", largest_value))
        largest = self._geometry.max_activation
        for field, name, value in checks:
            if not abs(value) <= largest:
                raise SnpatchError(
                    f"patch: {name} must be at most {largest:.6g}, what {self._geometry.dtype} can hold and a norm can "
                    f"square; got {value:.6g}",
                    field=field,
                )

    def _tell_degenerate(self, patch: Patch, donor: Model | None) -> None:
        """Tell of a donor that is the recipient by content, and of windows that end among equal scores."""
        if donor is not None and donor.fingerprint == self.model(patch.recipient).fingerprint:
            self.notes.add(
                f"self {donor.fingerprint}",
                f"the donor of a patch is its recipient {patch.recipient} by content: the patch changes nothing",
            )
        for one in patch.interventions:
            self._tell_ties(one.ranking, one.window.lo, one.window.hi)

    def _tell_ties(self, ranking: Ranking, *borders: int) -> None:
        for border in borders:
            if (ranking.fingerprint, border) in self._looked_at:
                continue
            self._looked_at.add((ranking.fingerprint, border))
            if n := ranking.ties(border):
                self.notes.add(
                    f"ties {ranking.fingerprint} {border}",
                    f"{n} neurons of a ranking share the score at a window's border, {border}: which of them are "
                    "patched is decided by their place in the model",
                )

    def _check_shape(self, ranking: Ranking) -> None:
        wanted = (self._geometry.n_layers, self._geometry.n_neurons)
        if ranking.shape != wanted:
            raise SnpatchError(f"the ranking is for a model of {list(ranking.shape)}, this one is {list(wanted)}")


def listed(given: Sequence, name: str = "prompts") -> list:
    """Return the items of something that has an order and a length: a list, a tuple, an array, a column of a table."""
    is_one = isinstance(given, str | bytes | bytearray | Mapping | Set)
    if is_one or not (hasattr(given, "__len__") and hasattr(given, "__getitem__")):
        got = "one text" if isinstance(given, str) else f"{type(given).__name__} ({shown(given)})"
        raise SnpatchError(f"{name} must be a list; got {got}")
    return list(given)


def _text(text: str, name: str) -> str:
    if not is_unicode(text):
        raise SnpatchError(f"{name} holds half of a surrogate pair: wanted text, got {shown(text)}")
    return text


def _chat(chat: Sequence[Mapping], name: str) -> Chat:
    """A chat whose messages each have a role and a content, or what a template may take in its place."""
    for place, message in enumerate(chat):
        where = f"{name}, message {place}"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise SnpatchError(f"{where}: wanted a table with role and content, got {shown(message)}")
        content = message.get("content")
        if not isinstance(content, str | list) and not (content is None and message.keys() - {"role", "content"}):
            raise SnpatchError(f"{where}: wanted content (a text), got {shown(content)}")
        for text in _texts_in(message):
            _text(text, where)
    return [dict(message) for message in chat]


def _texts_in(value: object) -> Iterator[str]:
    """Yield all texts of nested tables and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _texts_in(one)


def broadcast(given, n: int, name: str, kinds: tuple[type, ...]) -> list:
    """One thing for all of n prompts, or a list of one for each, as such a list."""
    each = list(given) if isinstance(given, list | tuple) else [given] * n
    if len(each) != n:
        raise SnpatchError(f"{name}: wanted one for all or one for each of {n} prompts, got {len(each)}")
    for one in each:
        if not isinstance(one, kinds):
            raise SnpatchError(f"{name}: wanted {' or '.join(k.__name__ for k in kinds)}, got {one!r}")
    return each
