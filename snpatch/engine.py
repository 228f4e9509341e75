"""Engine: load, contrast, generate, capture; the one facade over the executors.

Why a contrast counts the positions that hold its completions' tokens while they are written, but reads the finished
texts once more for those that emit them: which of these emitted an EOS is known only afterwards.
"""

import hashlib
import importlib.util
import inspect
import json
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer

from snpatch import __version__
from snpatch.errors import ReceiptError, SnpatchError
from snpatch.executors.base import Logprobs, Output, Progress, Request, Statistics
from snpatch.guard.guard import Guard
from snpatch.models.adapters import load_adapters
from snpatch.models.pretrained import load_pretrained
from snpatch.patching.patch import Constant, Noise, Patch
from snpatch.ranking.ranking import Ranking
from snpatch.sampling import GREEDY, Sampling

Chat = list[dict[str, str]]
Prompt = str | Chat | Sequence[int]

BACKENDS = ("auto", "vllm", "transformers")
POSITIONS = ("emitted", "emitting", "prompt", "prompt_last")
CONTRAST_SAMPLING = Sampling(max_tokens=256)  # paper, Eq. 3's completions


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


class Engine:
    """A model and its adapters, ready to run as recipients and donors.

    model: Hugging Face folder or name. adapters: name -> PEFT IA3 folder, or a list of folders stacked in order;
    "base" is always there: the weights alone. template: how chats become text: "tokenizer" (its own), "tulu"
    (`<|user|>`, newline, text, newline, `<|assistant|>`, newline) or "auto" (the tokenizer's if it has one).
    backend: "vllm" (VllmExecutor), "transformers" (TransformersExecutor), or "auto": vllm where it is installed.
    All other arguments are the executor's; see there.
    """

    def __init__(
        self,
        model: str | Path,
        adapters: dict[str, str | Path | Sequence[str | Path]] | None = None,
        *,
        backend: str = "auto",
        template: str = "auto",
        **executor_arguments,
    ) -> None:
        if template not in ("auto", "tokenizer", "tulu"):
            raise SnpatchError(f"template must be auto, tokenizer or tulu, got {template!r}")
        self.tokenizer = load_pretrained(AutoTokenizer, model)
        if template == "tokenizer" and not self.tokenizer.chat_template:
            raise SnpatchError(f"{model}: its tokenizer has no chat template; use template='tulu'")
        self.template = "tulu" if template == "tulu" or not self.tokenizer.chat_template else "tokenizer"
        self._model_name = str(model)
        self.backend = chosen(backend)
        if self.backend == "vllm":
            from snpatch.executors.vllm.executor import VllmExecutor as Executor
        else:
            from snpatch.executors.transformers.executor import TransformersExecutor as Executor

            unknown = executor_arguments.keys() - inspect.signature(Executor).parameters.keys()
            if unknown:
                raise SnpatchError(f"backend transformers: there is no argument {', '.join(sorted(unknown))}")
        self._executor = Executor(model, self.tokenizer, **executor_arguments)
        self.geometry = self._executor.geometry
        self._digests = {"base": ""}
        for name, folders in (adapters or {}).items():  # before what takes long, so that errors come soon
            self.add_adapter(name, folders)
        self._executor.start()
        self._digests["base"] = self._executor.model_digest

    def close(self) -> None:
        """Free what the engine holds; it cannot be used afterwards. `with Engine(...)` does it at its end."""
        self._executor.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def models(self) -> tuple[str, ...]:
        """The names that can be recipients and donors."""
        return tuple(self._digests)

    @property
    def digest(self) -> str:
        """Names the model and its adapters by their content: part of a sweep record's key."""
        return hashlib.sha256(json.dumps(self._digests, sort_keys=True).encode()).hexdigest()[:16]

    def digest_of(self, model: str) -> str:
        """Names one model and its template by content, whatever it is called: what a guard is bound to."""
        parts = [self._digests["base"], self._digests[self._known(model)], self.template]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def add_adapter(self, name: str, folders: str | Path | Sequence[str | Path]) -> None:
        """Make the model with these adapters available as `name`."""
        if name in self._digests:
            raise SnpatchError(f"adapter name {name!r} is taken")
        scales = load_adapters(folders, self.geometry.n_layers, self.geometry.widths)
        self._executor.register_adapter(name, scales)
        self._digests[name] = scales.digest

    def generate(
        self,
        prompts: Sequence[Prompt],
        patch: Patch | str | Sequence[Patch | str] = "base",
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        progress: Progress | None = None,
        guard: Guard | None = None,
    ) -> list[Completion]:
        """Write a completion for each prompt, patched while it is written (the paper's Algorithm 1).

        patch: a Patch, or the name of a model to run unpatched, or one of these for each prompt; sampling
        likewise. Where it asks for n texts of a prompt, n completions stand in that prompt's place. A patch that
        the device did not apply in full is a ReceiptError. guard: first reads each prompt once, in the model that it
        was fitted on; prompts that it finds harmful are answered with its refusal, and progress does not count them.
        """
        if guard is not None and not isinstance(guard, Guard):
            raise SnpatchError(f"guard: wanted a Guard, got {guard!r}")
        ids = self.encode(prompts)
        patches = _one_each(patch, len(ids), "patch", (Patch, str))
        samplings = _one_each(sampling, len(ids), "sampling", (Sampling,))
        asked = [
            [self._request(i, p, sampling=one) for one in _one_by_one(self._fitted(i, s))]
            for i, p, s in zip(ids, patches, samplings, strict=True)
        ]
        harm = [None] * len(ids) if guard is None else guard.predict(self, ids).tolist()
        requests = [(r, h) for each, h in zip(asked, harm, strict=True) for r in each]
        refused = [h is not None and h > guard.threshold for _, h in requests]
        run = [r for (r, _), no in zip(requests, refused, strict=True) if not no]
        written = iter(self._executor.execute(run, progress=progress)[0] if run else ())
        outputs = [Output(text=guard.refusal, finish_reason="guard") if no else next(written) for no in refused]
        return [
            Completion(
                list(r.prompt_ids), o.token_ids, o.text, o.finish_reason, o.stop_reason, o.logprobs, o.overwrites, h
            )
            for (r, h), o in zip(requests, outputs, strict=True)
        ]

    def contrast(
        self,
        prompts: Sequence[Prompt],
        generator: str,
        against: str,
        *,
        at: str = "emitted",
        completions: Sequence[str | Sequence[int]] | None = None,
        sampling: Sampling = CONTRAST_SAMPLING,
        exclude_layers: Sequence[int] = (-1,),
        progress: Progress | None = None,
    ) -> Ranking:
        """Rank neurons by how much their activations differ between two models on the same text (Eq. 3).

        The generator writes a completion for each prompt, or `completions` gives them; both models read prompt
        and completion. sampling: how they are written. Both are left aside where `at` names prompt positions.
        at: the positions that count: "emitted" holds the completion's tokens (published code),
        "emitting" are the ones that predict them (paper's text), "prompt" all of the prompt, "prompt_last" its
        last token; EOS never counts. Moments of the ranking: recipient = generator, donor = against.
        """
        if at not in POSITIONS:
            raise SnpatchError(f"at must be one of {', '.join(POSITIONS)}, got {at!r}")
        if sampling.n > 1:
            raise SnpatchError("contrast: one completion a prompt; give a prompt several times for several")
        if sampling.ignore_eos:
            raise SnpatchError("contrast: EOS never counts, so sampling cannot ignore it")
        ids = self.encode(prompts)
        pair = self._known(generator), self._known(against)
        if at == "emitted" and completions is None and not sampling.stop:
            statistics, expected = self._observe_writing(ids, pair, sampling, progress)
        else:
            written: Sequence[list[int]] = [[] for _ in ids]
            if at.startswith("emit"):
                written = self._completions(ids, generator, completions, sampling, progress)
            statistics, expected = self._observe_reading(ids, written, pair, at, progress)
        if (statistics.count != expected).any():
            raise ReceiptError(
                f"contrast: {expected} tokens should have counted in each layer, got {statistics.count.tolist()}"
            )
        meta = {
            "model": self._model_name,
            "generator": generator,
            "against": against,
            "at": at,
            "tokens": expected,
            "prompts": len(ids),
            "prompts_digest": hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16],
            "versions": {"snpatch": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        }
        scores, moments = _change_scores(statistics)
        return Ranking.from_scores(scores, exclude_layers, moments, meta)

    def capture(
        self,
        prompts: Sequence[Prompt],
        model: str,
        ranking: Ranking,
        k: int,
        *,
        at: str | int = "prompt_last",
        progress: Progress | None = None,
    ) -> Tensor:
        """Activations of the ranking's first k neurons at one position of each prompt: [prompts, k] in rank order.

        at: "prompt_last", or a position counted from 0 (negative: from the prompt's end).
        """
        if not 1 <= k <= len(ranking):
            raise SnpatchError(f"k must lie in 1..{len(ranking)}, the ranked neurons; got {k}")
        self._check_shape(ranking)
        requests = []
        for index, prompt in enumerate(self.encode(prompts)):
            position = -1 if at == "prompt_last" else at
            if not isinstance(position, int) or not -len(prompt) <= position < len(prompt):
                raise SnpatchError(f"at={at!r}: prompt {index} has {len(prompt)} tokens")
            position %= len(prompt)
            requests.append(Request(prompt, self._known(model), capture=(ranking, k, position, position + 1)))
        outputs, _ = self._executor.execute(requests, progress=progress)
        return torch.cat([output.captured for output in outputs])

    def logprobs(
        self,
        prompts: Sequence[Prompt],
        patch: Patch | str | Sequence[Patch | str] = "base",
        progress: Progress | None = None,
        *,
        completions: Sequence[str | Sequence[int]] | None = None,
    ) -> list[Logprobs]:
        """Log-probability of each token of each prompt but the first, patched; with completions: of their tokens.

        completions: one for each prompt, read as if it had been generated: a patch's `where` counts from its start.
        """
        ids = self.encode(prompts, room=0)
        patches = _one_each(patch, len(ids), "patch", (Patch, str))
        read = [[] for _ in ids] if completions is None else self._tokens(completions, len(ids))
        for index, (prompt, completion) in enumerate(zip(ids, read, strict=True)):
            if completions is not None and not completion:
                raise SnpatchError(f"completion {index} has no tokens")
            self._check_room(prompt, len(completion), index)
        requests = [self._request(*each, prompt_logprobs=True) for each in zip(ids, patches, read, strict=True)]
        outputs, _ = self._executor.execute(requests, progress=progress)
        found = [output.prompt_logprobs for output in outputs]
        return found if completions is None else [f.last(len(c)) for f, c in zip(found, read, strict=True)]

    def _observe_writing(self, ids, pair, sampling, progress) -> tuple[Statistics, int]:
        """Statistics over the positions that hold the first model's completions, gathered while it writes them.

        The position of the last token is run for one more token, which is dropped, unless an EOS ended the text.
        """
        fitted = [self._fitted(prompt, sampling) for prompt in ids]
        requests = [
            Request(
                prompt,
                *pair,
                observe=(0, len(prompt), len(prompt) + s.max_tokens),
                observe_ends=False,
                sampling=replace(s, max_tokens=s.max_tokens + 1),
            )
            for prompt, s in zip(ids, fitted, strict=True)
        ]
        outputs, (statistics,) = self._executor.execute(requests, groups=1, progress=progress)
        kept = [len(o.token_ids) - (o.finish_reason == "eos") for o in outputs]
        return statistics, _some(sum(min(n, s.max_tokens) for n, s in zip(kept, fitted, strict=True)))

    def _observe_reading(self, ids, written, pair, at, progress) -> tuple[Statistics, int]:
        """Statistics over the positions that `at` names of finished texts."""
        requests = []
        for prompt, completion in zip(ids, written, strict=True):
            start, stop = _observed(at, len(prompt), len(completion))
            text = [*prompt, *completion]
            self._check_room(text[:stop], room=0)
            if stop > start:
                requests.append(Request(text[:stop], *pair, observe=(0, start, stop)))
        expected = _some(sum(r.observe[2] - r.observe[1] for r in requests))
        _, (statistics,) = self._executor.execute(requests, groups=1, progress=progress)
        return statistics, expected

    def _request(self, prompt: list[int], patch: Patch | str, completion: Sequence[int] = (), **asked) -> Request:
        text = [*prompt, *completion]
        if isinstance(patch, str):
            return Request(text, self._known(patch), **asked)
        self._check_shape(patch.ranking)
        most = len(text) + (asked["sampling"].max_tokens if "sampling" in asked else 0)
        if isinstance(patch.where, int) and patch.where >= most:
            raise SnpatchError(f"where={patch.where} lies past the {most} tokens that the text can have")
        donor = patch.donor if isinstance(patch.donor, Constant | Noise) else self._known(patch.donor)
        return Request(
            text,
            self._known(patch.recipient),
            donor,
            patch.ranking,
            patch.window,
            patch.positions(len(prompt)),
            **asked,
        )

    def _completions(self, ids, generator, completions, sampling, progress) -> list[list[int]]:
        """Token ids of each completion, without an ending EOS."""
        if completions is None:
            written = self.generate(ids, generator, sampling, progress)
            return [c.token_ids[:-1] if c.finish_reason == "eos" else c.token_ids for c in written]
        given = self._tokens(completions, len(ids))
        for index, written in enumerate(given):
            while written and written[-1] in self._executor.eos_ids:
                written.pop()
            if not self._executor.eos_ids.isdisjoint(written):
                raise SnpatchError(f"completion {index} goes on after an EOS")
        return given

    def _tokens(self, completions: Sequence[str | Sequence[int]], prompts: int) -> list[list[int]]:
        """Token ids of the completion of each prompt."""
        if len(completions) != prompts:
            raise SnpatchError(f"{prompts} prompts and {len(completions)} completions")
        texts = (
            c if not isinstance(c, str) else self.tokenizer(c, add_special_tokens=False)["input_ids"]
            for c in completions
        )
        return [self._checked_ids(ids, f"completion {index}") for index, ids in enumerate(texts)]

    def encode(self, prompts: Sequence[Prompt], room: int = 1) -> list[list[int]]:
        """Token ids of each prompt, as `generate` runs them; `room`: how many tokens must still fit the context."""
        if isinstance(prompts, str):
            raise SnpatchError("prompts must be a list; got one text")
        if not len(prompts):
            raise SnpatchError("the list of prompts is empty")
        encoded = []
        for index, prompt in enumerate(prompts):
            ids = self._encode_one(prompt, index)
            self._check_room(ids, room, index)
            encoded.append(ids)
        return encoded

    def _encode_one(self, prompt: Prompt, index: int) -> list[int]:
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"])
        if len(prompt) and all(isinstance(message, dict) for message in prompt):
            if self.template == "tulu":
                return list(self.tokenizer(tulu(prompt))["input_ids"])
            rendered = self.tokenizer.apply_chat_template(prompt, tokenize=True, add_generation_prompt=True)
            return list(rendered["input_ids"])
        return self._checked_ids(prompt, f"prompt {index}")

    def _checked_ids(self, given: Sequence[int], name: str) -> list[int]:
        try:
            ids = [operator.index(i) for i in given]
        except TypeError:
            ids = [-1]
        if not all(0 <= i < self.geometry.vocab_size for i in ids):
            raise SnpatchError(f"{name}: token ids must be integers in 0..{self.geometry.vocab_size - 1}")
        return ids

    def _check_room(self, ids: Sequence[int], room: int, index: int | None = None) -> None:
        name = "a text" if index is None else f"prompt {index}"
        if not ids:
            raise SnpatchError(f"{name} has no tokens")
        if len(ids) + room > self.geometry.context:
            raise SnpatchError(f"{name} has {len(ids)} tokens, the model's context holds {self.geometry.context}")

    def _fitted(self, ids: Sequence[int], sampling: Sampling) -> Sampling:
        """The same sampling, ended by the context where that comes first."""
        room = self.geometry.context - len(ids)
        if sampling.max_tokens <= room:
            return sampling
        return replace(sampling, max_tokens=room, min_tokens=min(room, sampling.min_tokens))

    def _known(self, name: str) -> str:
        if name not in self._digests:
            raise SnpatchError(f"no model named {name!r}: there are {', '.join(self._digests)}")
        return name

    def _check_shape(self, ranking: Ranking) -> None:
        wanted = (self.geometry.n_layers, self.geometry.n_neurons)
        if ranking.shape != wanted:
            raise SnpatchError(f"the ranking is for a model of {list(ranking.shape)}, this one is {list(wanted)}")


def chosen(backend: str) -> str:
    """ "vllm" or "transformers": what `backend` names, or for "auto" the faster one that is installed."""
    if backend not in BACKENDS:
        raise SnpatchError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        return "vllm" if importlib.util.find_spec("vllm") else "transformers"
    return backend


def tulu(chat: Chat) -> str:
    """The Tulu template, ready for the assistant to speak."""
    roles = {message.get("role") for message in chat}
    if not roles <= {"system", "user", "assistant"}:
        raise SnpatchError(f"the Tulu template knows system, user and assistant, got {sorted(map(str, roles))}")
    turns = "".join(f"<|{message['role']}|>\n{message['content'].strip()}\n" for message in chat)
    return f"{turns}<|assistant|>\n"


def _one_by_one(sampling: Sampling) -> list[Sampling]:
    """The n samplings of one text each that a sampling of n texts stands for."""
    seeds = [None if sampling.seed is None else sampling.seed + i for i in range(sampling.n)]
    return [replace(sampling, n=1, seed=seed) for seed in seeds]


def _one_each(given, n: int, name: str, kinds: tuple[type, ...]) -> list:
    each = list(given) if isinstance(given, list | tuple) else [given] * n
    if len(each) != n:
        raise SnpatchError(f"{name}: wanted one for all or one for each of {n} prompts, got {len(each)}")
    for one in each:
        if not isinstance(one, kinds):
            raise SnpatchError(f"{name}: wanted {' or '.join(k.__name__ for k in kinds)}, got {one!r}")
    return each


def _some(positions: int) -> int:
    if not positions:
        raise SnpatchError("contrast: there is no position to observe: every completion is empty")
    return positions


def _observed(at: str, prompt: int, completion: int) -> tuple[int, int]:
    """The half-open range of positions that count."""
    return {
        "emitted": (prompt, prompt + completion),
        "emitting": (prompt - 1, prompt + completion - 1),
        "prompt": (0, prompt),
        "prompt_last": (prompt - 1, prompt),
    }[at]


def _change_scores(statistics: Statistics) -> tuple[Tensor, dict[str, Tensor]]:
    """Root mean squares [L, F] of the difference, and both models' means and unbiased deviations."""
    n = int(statistics.count[0])
    r, rr, d, dd, difference = statistics.sums.unbind(1)
    moments = {"recipient_mean": r / n, "donor_mean": d / n}
    if n > 1:
        for name, total, squares in (("recipient_std", r, rr), ("donor_std", d, dd)):
            moments[name] = ((squares - total * total / n).clamp(min=0) / (n - 1)).sqrt()
    return (difference / n).sqrt().float(), {name: moment.float() for name, moment in moments.items()}
