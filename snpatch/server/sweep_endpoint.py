"""Sweeps that clients ask for, on the engine that serves and in its batch: a curve as it grows, as server-sent events.

start: what will run. text: each as it is finished. row: a window over all prompts, judged. summary: totals, and the
noise floor: how much k = 0 and a patch from the recipient into itself change, which should be nothing.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, replace

import numpy as np

from snpatch.data import question
from snpatch.errors import OverflowedError, ServerBusyError, SnpatchError, SpoiledEngineError, first_line, within
from snpatch.executors.base import Request
from snpatch.judges.protocol import score_all
from snpatch.patching.patch import Patch, speaker
from snpatch.ranking.window import Window
from snpatch.requests import Completion
from snpatch.sampling import Sampling
from snpatch.schema import option
from snpatch.server.errors import error_message
from snpatch.server.state import ServerState
from snpatch.statistics import Interval, causal_effect, interval, paired_p
from snpatch.sweeps.sweep import PROMPTS, Row

MOST = 4  # sweeps at once
BESIDE = 4  # points beside the windows, at most: two unpatched models and the noise floor
NOTHING, SELF = "k = 0", "self-patch"  # the noise floor


@dataclass(frozen=True)
class Message:
    """One of a chat's."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class SweepRequest:
    """What a client asks for. Fields but these as in spec.PatchForm."""

    recipient: str
    donor: str
    ranking: str
    windows: tuple[int | tuple[int, int], ...]
    prompts: tuple[str | tuple[Message, ...], ...]
    where: str | int = "all"
    strength: float = 1.0
    seed: int | None = None
    judge: str = option("refusal", "Name of a judge of the server.")
    max_tokens: int = option(128, "Most new tokens of a text.", min=1)
    temperature: float = option(0.0, "0 is greedy.")


@dataclass(frozen=True)
class _Point:
    """A patch, or an unpatched model, over all prompts. floor: which part of the noise floor it is."""

    patch: Patch | str
    floor: str | None = None


class Sweep:
    """One sweep, to be made by `made`."""

    def __init__(self, serving: ServerState, form: SweepRequest) -> None:
        self._serving, self._form = serving, form
        self._neurons = serving.engine.geometry.n_layers * serving.engine.geometry.n_neurons
        self._no_self_patch: str | None = None  # why
        self._check_asked()
        self._prompts = [one if isinstance(one, str) else [asdict(message) for message in one] for one in form.prompts]
        self._questions = [one if isinstance(one, str) else question(one) for one in self._prompts]
        self._points = self._every_point()
        self._requests = self._every_request()

    @classmethod
    async def made(cls, serving: ServerState, form: SweepRequest) -> "Sweep":
        """Make a sweep that could run, in a thread; bad input is an error. Other requests are served meanwhile."""
        if len(serving.sweeps) + serving.preparing >= MOST:
            raise ServerBusyError(f"{MOST} sweeps are running")
        serving.preparing += 1
        try:
            return await asyncio.to_thread(cls, serving, form)
        finally:
            serving.preparing -= 1

    def _every_request(self) -> list[list[Request]]:
        """Return the requests of each point and prompt."""
        form, requests = self._form, self._serving.engine.requests
        sampling = Sampling(max_tokens=form.max_tokens, temperature=form.temperature, seed=form.seed)
        encoded: dict[str, list[list[int]]] = {}
        for name in dict.fromkeys(speaker(point.patch) for point in self._points):
            encoded[name] = []
            for place, prompt in enumerate(self._prompts):
                with within(f"prompts.{place}"):
                    encoded[name] += requests.encode([prompt], name)
        made = []
        for point in self._points:
            asked = requests.writing(encoded[speaker(point.patch)], point.patch, sampling)
            made.append([request for _, request in asked])
            self._serving.engine.executor.slots.check_request(made[-1][0])
        return made

    def _check_asked(self) -> None:
        form, serving = self._form, self._serving
        if form.judge not in serving.judges:
            raise SnpatchError(f"no judge named {form.judge!r}: there are {', '.join(serving.judges)}", field="judge")
        for name in ("windows", "prompts"):
            if not getattr(form, name):
                raise SnpatchError("sweep: needs a window and a prompt", field=name)
        if len(form.windows) > serving.config.max_sweep_windows:
            raise SnpatchError(
                f"sweep: expected at most {serving.config.max_sweep_windows} windows (--max-sweep-windows), got "
                f"{len(form.windows)}. Send several sweeps.",
                field="windows",
            )
        n, most = (len(form.windows) + BESIDE) * len(form.prompts), serving.config.max_sweep_completions
        if n > most:
            raise SnpatchError(
                f"sweep: {len(form.windows)} windows and {BESIDE} points beside, of {len(form.prompts)} prompts, are "
                f"{n} texts: at most {most} are written (--max-sweep-completions)"
            )
        longest = serving.config.max_prompt_chars
        for place, prompt in enumerate(form.prompts):
            if sum(map(len, [prompt] if isinstance(prompt, str) else [m.content for m in prompt])) > longest:
                raise SnpatchError(
                    f"sweep: prompt {place} has more than {longest} letters (--max-prompt-chars)",
                    field=f"prompts.{place}",
                )
            if not isinstance(prompt, str) and not any(message.role == "user" for message in prompt):
                raise SnpatchError(
                    f"sweep: prompt {place} is a chat without a user's message", field=f"prompts.{place}"
                )

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events; whoever stops listening ends what runs. One that does not read holds no place."""
        news: asyncio.Queue[str | None] = asyncio.Queue()  # of at most max_sweep_completions events and rows
        running = asyncio.create_task(self._run(news.put_nowait))
        running.add_done_callback(lambda _: news.put_nowait(None))
        try:
            while (event := await news.get()) is not None:
                yield event
            await running  # of which an error that is none of the client's is one of this stream
        finally:
            running.cancel()

    async def _run(self, tell: Callable[[str], None]) -> None:
        """Write and judge every text in a place among the sweeps that run."""
        sweeps = self._serving.sweeps
        sweeps.add(self)
        try:
            if len(sweeps) > MOST:
                raise ServerBusyError(f"{MOST} sweeps are running")
            await self._write_all(tell)
        except SnpatchError as error:
            tell(_event("error", message=error_message(error)))
        finally:
            sweeps.discard(self)

    async def _write_all(self, tell: Callable[[str], None]) -> None:
        begun, self._texts = time.monotonic(), [[None] * len(self._questions) for _ in self._points]
        news: asyncio.Queue = asyncio.Queue()
        work = iter([(p, i) for p in range(len(self._points)) for i in range(len(self._questions))])
        seats = max(1, self._serving.engine.executor.engine.vllm_config.scheduler_config.max_num_seqs // 2)
        tasks = [asyncio.create_task(self._write(work, news)) for _ in range(seats)]
        try:
            n = len(self._points) * len(self._questions)
            tell(_event("start", points=[self._named(point) for point in self._points], texts=n))
            left = {p: len(self._questions) for p in range(len(self._points))}
            scores: dict[int, np.ndarray] = {}
            while left:
                found = await news.get()
                if isinstance(found, Exception):
                    raise found
                p, i = found
                tell(_event("text", **self._text(p, i)))
                left[p] -= 1
                # In their order, as each is compared with the unpatched ones before it.
                while left and not left[min(left)]:
                    p = min(left)
                    del left[p]
                    scores[p] = await asyncio.to_thread(self._score, p)
                    tell(_event("row", **await asyncio.to_thread(self._row, p, scores)))
            tell(_event("summary", **self._summary(scores, time.monotonic() - begun)))
        finally:
            for task in tasks:
                task.cancel()

    async def _write(self, work, news: asyncio.Queue) -> None:
        """One seat in the batch, which writes text after text."""
        try:
            for p, i in work:
                self._texts[p][i] = await self._written(self._requests[p][i])
                news.put_nowait((p, i))
        except SnpatchError as error:
            news.put_nowait(error)
        except Exception as error:  # noqa: BLE001 (vLLM's own, of which whoever listens must hear)
            news.put_nowait(SnpatchError(f"a text was not written: {first_line(error)}"))

    async def _written(self, request: Request) -> Completion | OverflowedError:
        """Return a text, or why there is none. A spoiled engine ends the sweep."""
        try:
            return Completion.of(request, await self._serving.engine.executor.output(request))
        except OverflowedError as error:
            reported = self._serving.judge(error)
            if isinstance(reported, SpoiledEngineError):
                raise reported from error
            return reported

    def _every_point(self) -> list[_Point]:
        """The unpatched models, the noise floor, and each window."""
        form, catalogue = self._form, self._serving.catalogue
        own = {n: getattr(form, n) for n in ("recipient", "donor", "ranking", "where", "strength", "seed")}
        patched = []
        for place, window in enumerate(form.windows):
            try:
                patched.append(catalogue.ask({**own, "window": window}).patch)
            except SnpatchError as error:
                error.field = f"windows.{place}" if error.field == "window" else error.field
                raise
        points = [_Point(form.recipient)]
        if form.donor in self._serving.engine.models:
            points.append(_Point(form.donor))
        largest = Window(0, max(patch.window.hi for patch in patched))
        points.append(_Point(replace(patched[0], window=0), NOTHING))
        itself = replace(patched[0], donor=form.recipient, window=largest, strength=1.0)
        try:
            self._serving.engine.executor.slots.check_request(self._serving.engine.requests.patched([0], itself))
            points.append(_Point(itself, SELF))
        except SnpatchError as error:  # two sets of weights, compiled: one model cannot run in both streams
            self._no_self_patch = str(error)
        return points + [_Point(patch) for patch in patched]

    def _named(self, point: _Point) -> dict:
        """What a point is, in every event that is about it; see sweeps.sweep.Row."""
        form, is_patched = self._form, isinstance(point.patch, Patch)
        return {
            "recipient": speaker(point.patch),
            "donor": (form.recipient if point.floor == SELF else form.donor) if is_patched else None,
            "ranking": form.ranking if is_patched else None,
            "lo": point.patch.window.lo if is_patched else 0,
            "hi": point.patch.window.hi if is_patched else 0,
            "strength": point.patch.strength if is_patched else None,
            **({"floor": point.floor} if point.floor else {}),
        }

    def _text(self, p: int, i: int) -> dict:
        one, named = self._texts[p][i], {**self._named(self._points[p]), "prompt_index": i}
        if isinstance(one, OverflowedError):
            nothing = {"text": None, "tokens": 0, "finish_reason": None, "overwrites": 0}
            return {**named, **nothing, "error": error_message(one)}
        return {
            **named,
            "text": one.text,
            "tokens": len(one.token_ids),
            "finish_reason": one.finish_reason,
            "overwrites": one.overwrites,
        }

    def _score(self, p: int) -> np.ndarray:
        """Return the scores of a point's texts [prompts], NaN where there is no text."""
        judge, scores = self._form.judge, np.full(len(self._questions), np.nan)
        texts = {i: one.text for i, one in enumerate(self._texts[p]) if isinstance(one, Completion)}
        questions = [self._questions[i] for i in texts]
        try:
            if texts:
                found = score_all({judge: self._serving.judges[judge]}, questions, [*texts.values()])
                scores[[*texts]] = found[judge]
            return scores
        except SnpatchError:
            raise
        except Exception as error:  # a user's own function
            raise SnpatchError(f"judge {judge!r} failed: {first_line(error)}") from error

    def _row(self, p: int, scores: dict[int, np.ndarray]) -> dict:
        """A point over all prompts: a Row, and `changed`, the share of texts that are not the unpatched recipient's."""
        named, point = self._named(self._points[p]), self._points[p]
        texts = [one for one in self._texts[p] if isinstance(one, Completion)]
        floor = {"floor": named.pop("floor")} if point.floor else {}
        is_patched, mean, effect = isinstance(point.patch, Patch), (None, None, None), (None, None, None)
        has_donor = is_patched and isinstance(self._points[1].patch, str)
        compared = np.stack([scores[p], *([scores[0]] if is_patched else []), *([scores[1]] if has_donor else [])])
        own, *others = compared[:, ~np.isnan(compared).any(axis=0)]  # of prompts with all texts
        if len(own):
            mean = interval(np.mean, own)
            effect = causal_effect(own, *others) if has_donor else effect
        row = Row(
            **named,
            judge=self._form.judge,
            set=PROMPTS,
            control_seed=None,
            share=(named["hi"] - named["lo"]) / self._neurons,
            prompts=len(own),
            failed=len(self._questions) - len(own),
            tokens=sum(len(one.token_ids) for one in texts),
            overwrites=sum(one.overwrites for one in texts),
            **_spread("mean", mean),
            **_spread("effect", effect),
            **_spread("net", (None, None, None)),
            p_unpatched=paired_p(own, others[0]) if is_patched and len(own) else None,
            p_control=None,
        )
        return {**asdict(row), "changed": self._changed(p), **floor}

    def _changed(self, p: int) -> float | None:
        """Return the share of texts that are not the unpatched recipient's; None if no prompt has both."""
        pairs = zip(self._texts[p], self._texts[0], strict=True)
        whole = [pair for pair in pairs if all(isinstance(one, Completion) for one in pair)]
        return sum(a.token_ids != b.token_ids for a, b in whole) / len(whole) if whole else None

    def _summary(self, scores: dict[int, np.ndarray], seconds: float) -> dict:
        every = [one for texts in self._texts for one in texts if isinstance(one, Completion)]
        floor = {
            point.floor: {"changed": self._changed(p), "difference": _mean(scores[p] - scores[0])}
            for p, point in enumerate(self._points)
            if point.floor
        }
        if self._no_self_patch:
            floor[SELF] = {"error": self._no_self_patch}
        return {
            "texts": len(every),
            "failed": len(self._points) * len(self._questions) - len(every),
            "tokens": sum(len(one.token_ids) for one in every),
            "overwrites": sum(one.overwrites for one in every),
            "seconds": seconds,
            "verified": True,  # all that are written: a receipt that differs from its patch would have ended the sweep
            "floor": floor,
        }


def _mean(values: np.ndarray) -> float | None:
    """Return the mean of the values that are not NaN."""
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if len(kept) else None


def _spread(name: str, found: Interval) -> dict[str, float | None]:
    """A value and its interval as a Row has them."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), found, strict=True))


def _event(name: str, **data) -> str:
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"
