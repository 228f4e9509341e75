"""Sweeps that clients request: run in the serving engine's batch and streamed as server-sent events.

start: the points that will run. completion: one finished completion. row: a point over all prompts, judged. summary:
totals and the noise floor, which is how much k = 0 and a patch of the recipient into itself change (expected: nothing).
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from snpatch.data import question
from snpatch.engine.requests import Completion
from snpatch.errors import OverflowedError, ServerBusyError, SnpatchError, SpoiledEngineError, error_field, first_line
from snpatch.executors.base import Request
from snpatch.judges.protocol import score_all
from snpatch.patching.patch import Patch, recipient_name
from snpatch.ranking.window import Window
from snpatch.sampling import Sampling
from snpatch.server.errors import error_message
from snpatch.server.state import ServerState
from snpatch.sweeps.rows import Row, compare_scores
from snpatch.sweeps.sweep import DEFAULT_SET
from snpatch.utils.optional import require
from snpatch.utils.schema import option

MAX_CONCURRENT_SWEEPS = 4
MAX_EXTRA_POINTS = 4  # points besides the windows: two unpatched models and the noise floor
ZERO_NEURONS, SELF_PATCH = "k = 0", "self-patch"  # the points of the noise floor


@dataclass(frozen=True)
class Message:
    """Message of a chat."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class SweepRequest:
    """Body of a sweep request. Fields without help are those of spec.PatchSchema."""

    recipient: str
    donor: str
    ranking: str
    windows: tuple[int | tuple[int, int], ...]
    prompts: tuple[str | tuple[Message, ...], ...]
    positions: str | int = "all"
    strength: float = 1.0
    seed: int | None = None
    judge: str = option("refusal", "Name of a judge of the server.")
    max_tokens: int = option(128, "Maximum number of new tokens per completion.", min=1)
    temperature: float = option(0.0, "Sampling temperature; 0 is greedy.")


@dataclass(frozen=True)
class _Point:
    """A patch, or an unpatched model, over all prompts. floor: its name in the noise floor, if it belongs to it."""

    patch: Patch | str
    floor: str | None = None


class ClientSweep:
    """Running sweep of one client. Build it with `build`."""

    def __init__(self, state: ServerState, request: SweepRequest) -> None:
        self._state, self._request = state, request
        self._num_neurons = state.engine.geometry.n_layers * state.engine.geometry.n_neurons
        self._self_patch_error: str | None = None
        self._check_request()
        self._prompts = [
            prompt if isinstance(prompt, str) else [asdict(message) for message in prompt] for prompt in request.prompts
        ]
        self._questions = [prompt if isinstance(prompt, str) else question(prompt) for prompt in self._prompts]
        self._points = self._build_points()
        self._requests = self._build_requests()
        # By point and prompt; None while it is not finished.
        self._completions: list[list[Completion | OverflowedError | None]] = []

    @classmethod
    async def build(cls, state: ServerState, request: SweepRequest) -> "ClientSweep":
        """Check a request and build its sweep in a thread, so that other requests are served meanwhile."""
        if len(state.sweeps) + state.num_preparing_sweeps >= MAX_CONCURRENT_SWEEPS:
            raise _too_many_sweeps()
        state.num_preparing_sweeps += 1
        try:
            return await asyncio.to_thread(cls, state, request)
        finally:
            state.num_preparing_sweeps -= 1

    def _build_requests(self) -> list[list[Request]]:
        """Return one list per point with one request per prompt."""
        request, engine = self._request, self._state.engine
        sampling = Sampling(max_tokens=request.max_tokens, temperature=request.temperature, seed=request.seed)
        prompt_ids: dict[str, list[list[int]]] = {}  # by recipient
        for name in dict.fromkeys(recipient_name(point.patch) for point in self._points):
            prompt_ids[name] = []
            for index, prompt in enumerate(self._prompts):
                with error_field(f"prompts.{index}"):
                    prompt_ids[name] += engine.requests.encode([prompt], name)
        requests = []
        for point in self._points:
            indexed = engine.requests.writing(prompt_ids[recipient_name(point.patch)], point.patch, sampling)
            requests.append([request for _, request in indexed])
            engine.executor.slots.check_request(requests[-1][0])
        return requests

    def _check_request(self) -> None:
        request, judges, config = self._request, self._state.judges, self._state.config
        if request.judge not in judges:
            message = f"judge: expected one of {', '.join(judges)}, got {request.judge!r}"
            raise SnpatchError(message, field="judge")
        for name in ("windows", "prompts"):
            if not getattr(request, name):
                raise SnpatchError(f"{name}: expected at least one, got none", field=name)
        num_windows, num_prompts = len(request.windows), len(request.prompts)
        if num_windows > config.max_sweep_windows:
            raise SnpatchError(
                f"sweep: expected at most {config.max_sweep_windows} windows (--max-sweep-windows), got "
                f"{num_windows}. Send several sweeps.",
                field="windows",
            )
        num_completions, limit = (num_windows + MAX_EXTRA_POINTS) * num_prompts, config.max_sweep_completions
        if num_completions > limit:
            raise SnpatchError(
                f"sweep: expected at most {limit} completions (--max-sweep-completions), got {num_prompts} prompts x "
                f"({num_windows} windows + {MAX_EXTRA_POINTS}) = {num_completions}. Send several sweeps."
            )
        max_chars = require(config.max_prompt_chars)
        for index, prompt in enumerate(request.prompts):
            field = f"prompts.{index}"
            contents = [prompt] if isinstance(prompt, str) else [message.content for message in prompt]
            if (num_chars := sum(map(len, contents))) > max_chars:
                raise SnpatchError(
                    f"{field}: expected at most {max_chars} characters (--max-prompt-chars), got {num_chars}",
                    field=field,
                )
            if not isinstance(prompt, str) and not any(message.role == "user" for message in prompt):
                raise SnpatchError(f"{field}: expected a chat with a user message, got none", field=field)

    async def events(self) -> AsyncIterator[str]:
        """Yield server-sent events. The sweep is cancelled if the consumer stops iterating.

        A finished sweep stops counting against MAX_CONCURRENT_SWEEPS even if its events are not read yet.
        """
        queue: asyncio.Queue[str | None] = asyncio.Queue()  # holds at most max_sweep_completions events and rows
        task = asyncio.create_task(self._run(queue.put_nowait))
        task.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            while (event := await queue.get()) is not None:
                yield event
            await task  # raises errors that are not the client's
        finally:
            task.cancel()

    async def _run(self, send: Callable[[str], None]) -> None:
        """Generate and judge all completions as one of the running sweeps."""
        sweeps = self._state.sweeps
        sweeps.add(self)
        try:
            if len(sweeps) > MAX_CONCURRENT_SWEEPS:
                raise _too_many_sweeps()
            await self._generate_all(send)
        except SnpatchError as error:
            send(_format_event("error", message=error_message(error)))
        finally:
            sweeps.discard(self)

    async def _generate_all(self, send: Callable[[str], None]) -> None:
        start = time.monotonic()
        num_points, num_prompts = len(self._points), len(self._questions)
        self._completions = [[None] * num_prompts for _ in self._points]
        finished: asyncio.Queue = asyncio.Queue()
        work = iter([(p, i) for p in range(num_points) for i in range(num_prompts)])
        max_num_seqs = self._state.engine.executor.engine.vllm_config.scheduler_config.max_num_seqs
        tasks = [asyncio.create_task(self._generate(work, finished)) for _ in range(max(1, max_num_seqs // 2))]
        try:
            points = [self._describe(point) for point in self._points]
            send(_format_event("start", points=points, completions=num_points * num_prompts))
            num_left = {p: num_prompts for p in range(num_points)}
            scores: dict[int, np.ndarray] = {}
            while num_left:
                result = await finished.get()
                if isinstance(result, Exception):
                    raise result
                p, i = result
                send(_format_event("completion", **self._completion(p, i)))
                num_left[p] -= 1
                # Points are judged in order, because each is compared with the unpatched ones before it.
                while num_left and not num_left[min(num_left)]:
                    p = min(num_left)
                    del num_left[p]
                    scores[p] = await asyncio.to_thread(self._score, p)
                    send(_format_event("row", **await asyncio.to_thread(self._row, p, scores)))
            send(_format_event("summary", **self._summary(scores, time.monotonic() - start)))
        finally:
            for task in tasks:
                task.cancel()

    async def _generate(self, work: Iterator[tuple[int, int]], finished: asyncio.Queue) -> None:
        """Generate one completion after the other and report each as (point, prompt), or an error."""
        try:
            for p, i in work:
                self._completions[p][i] = await self._generate_one(self._requests[p][i])
                finished.put_nowait((p, i))
        except SnpatchError as error:
            finished.put_nowait(error)
        except Exception as error:  # noqa: BLE001 (from vLLM; the client must see it)
            finished.put_nowait(SnpatchError(f"completion: generation failed: {first_line(error)}"))

    async def _generate_one(self, request: Request) -> Completion | OverflowedError:
        """Return a completion, or the error if it overflowed. A spoiled engine raises and ends the sweep."""
        try:
            return Completion.of(request, await self._state.engine.executor.output(request))
        except OverflowedError as error:
            reported = self._state.handle_overflow(error)
            if isinstance(reported, SpoiledEngineError):
                raise reported from error
            return reported

    def _build_points(self) -> list[_Point]:
        """Return the unpatched models, the noise floor, and each window."""
        request, state = self._request, self._state
        shared = {n: getattr(request, n) for n in ("recipient", "donor", "ranking", "positions", "strength", "seed")}
        patches = []
        for index, window in enumerate(request.windows):
            try:
                patches.append(state.registry.parse({**shared, "window": window}).patch)
            except SnpatchError as error:
                error.field = f"windows.{index}" if error.field == "window" else error.field
                raise
        points = [_Point(request.recipient)]
        if request.donor in state.engine.models:
            points.append(_Point(request.donor))
        largest_window = Window(0, max(patch.window.hi for patch in patches))
        points.append(_Point(_changed(patches[0], window=0), ZERO_NEURONS))
        self_patch = _changed(patches[0], donor=request.recipient, window=largest_window, strength=1.0)
        try:
            state.engine.executor.slots.check_request(state.engine.requests.patched([0], self_patch))
            points.append(_Point(self_patch, SELF_PATCH))
        except SnpatchError as error:  # a compiled engine with two sets of weights cannot run one model in both streams
            self._self_patch_error = str(error)
        return points + [_Point(patch) for patch in patches]

    def _describe(self, point: _Point) -> dict:
        """Return the fields that name a point in its events; see sweeps.sweep.Row."""
        request, patch = self._request, point.patch
        is_patched = isinstance(patch, Patch)
        donor = request.recipient if point.floor == SELF_PATCH else request.donor
        return {
            "recipient": recipient_name(patch),
            "donor": donor if is_patched else None,
            "ranking": request.ranking if is_patched else None,
            "rank_lo": patch.window.lo if is_patched else 0,
            "rank_hi": patch.window.hi if is_patched else 0,
            "strength": patch.strength if is_patched else None,
            **({"floor": point.floor} if point.floor else {}),
        }

    def _completion(self, p: int, i: int) -> dict:
        """Return the data of a `completion` event."""
        completion, point = require(self._completions[p][i]), {**self._describe(self._points[p]), "prompt_index": i}
        if isinstance(completion, OverflowedError):
            empty = {"text": None, "tokens": 0, "finish_reason": None, "overwrites": 0}
            return {**point, **empty, "error": error_message(completion)}
        return {
            **point,
            "text": completion.text,
            "tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "overwrites": completion.overwrites,
        }

    def _score(self, p: int) -> np.ndarray:
        """Return the scores [prompts] of a point's completions; NaN for a failed completion."""
        judge, scores = self._request.judge, np.full(len(self._questions), np.nan)
        texts = {i: c.text for i, c in enumerate(self._completions[p]) if isinstance(c, Completion)}
        questions = [self._questions[i] for i in texts]
        try:
            if texts:
                judged = score_all({judge: self._state.judges[judge]}, questions, [*texts.values()])
                scores[[*texts]] = judged[judge]
            return scores
        except SnpatchError:
            raise
        except Exception as error:  # from a user's function
            raise SnpatchError(f"judge {judge!r} failed: {first_line(error)}") from error

    def _row(self, p: int, scores: dict[int, np.ndarray]) -> dict:
        """Return a Row over all prompts, plus `changed`.

        `changed` is the fraction that differs from the unpatched recipient.
        """
        description, point = self._describe(self._points[p]), self._points[p]
        completions = [completion for completion in self._completions[p] if isinstance(completion, Completion)]
        floor = {"floor": description.pop("floor")} if point.floor else {}
        patch = point.patch if isinstance(point.patch, Patch) else None
        has_donor = patch is not None and isinstance(self._points[1].patch, str)
        compared = np.stack([scores[p], *([scores[0]] if patch else []), *([scores[1]] if has_donor else [])])
        own_scores, *other_scores = compared[:, ~np.isnan(compared).any(axis=0)]  # prompts without a failed completion
        num_neurons = description["rank_hi"] - description["rank_lo"]
        row = Row(
            **description,
            judge=self._request.judge,
            set=DEFAULT_SET,
            control=None,
            control_seed=None,
            neuron_fraction=num_neurons / self._num_neurons,
            prompts=len(own_scores),
            failed=len(self._questions) - len(own_scores),
            tokens=sum(len(completion.token_ids) for completion in completions),
            overwrites=sum(completion.overwrites for completion in completions),
            **compare_scores(own_scores, *other_scores),
            ranked_fraction=None if patch is None else num_neurons / len(patch.ranking),
        )
        return {**asdict(row), "changed": self._changed_fraction(p), **floor}

    def _changed_fraction(self, p: int) -> float | None:
        """Return the fraction of completions that differ from the unpatched recipient's.

        Return None without a pair.
        """
        pairs = zip(self._completions[p], self._completions[0], strict=True)
        complete = [(a, b) for a, b in pairs if isinstance(a, Completion) and isinstance(b, Completion)]
        return sum(a.token_ids != b.token_ids for a, b in complete) / len(complete) if complete else None

    def _summary(self, scores: dict[int, np.ndarray], seconds: float) -> dict:
        completions = [c for row in self._completions for c in row if isinstance(c, Completion)]
        floor: dict[str, dict[str, Any]] = {
            point.floor: {"changed": self._changed_fraction(p), "difference": _nan_mean(scores[p] - scores[0])}
            for p, point in enumerate(self._points)
            if point.floor
        }
        if self._self_patch_error:
            floor[SELF_PATCH] = {"error": self._self_patch_error}
        return {
            "completions": len(completions),
            "failed": len(self._points) * len(self._questions) - len(completions),
            "tokens": sum(len(completion.token_ids) for completion in completions),
            "overwrites": sum(completion.overwrites for completion in completions),
            "seconds": seconds,
            "verified": True,  # because a receipt that differs from its patch would have ended the sweep
            "floor": floor,
        }


def _too_many_sweeps() -> ServerBusyError:
    return ServerBusyError(f"sweeps: at most {MAX_CONCURRENT_SWEEPS} at once. Send it again later.")


def _nan_mean(values: np.ndarray) -> float | None:
    """Return the mean of the values that are not NaN, or None without any."""
    numbers = values[~np.isnan(values)]
    return float(numbers.mean()) if len(numbers) else None


def _format_event(name: str, **data) -> str:
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"


def _changed(patch: Patch, **fields) -> Patch:
    """Return a patch of one intervention with other fields."""
    (intervention,) = patch.interventions
    return Patch(patch.recipient, interventions=[replace(intervention, **fields)])
