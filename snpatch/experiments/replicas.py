"""Sweeps on several replicas of an engine: Ray actors with their own GPUs, which pull work when they have room.

Why only the driver writes the store: actors may run on machines without a shared disk. The driver opens judges and
prompts but no engine; what needs one (token ids, fingerprints, contrasts) comes from the first actor.
"""

import logging
import os
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snpatch.engine.requests import Completion
from snpatch.errors import EngineCrashedError, ReceiptError, SnpatchError, first_line
from snpatch.executors.base import Progress
from snpatch.experiments.context import ExperimentContext
from snpatch.ranking.ranking import Ranking
from snpatch.sweeps import generation, judging, sweep
from snpatch.sweeps.coherence import Reading, find_unread, read_completions, store_logprobs
from snpatch.sweeps.points import build_points
from snpatch.sweeps.store import Store, StoredCompletion
from snpatch.sweeps.sweep_file import SweepSpec
from snpatch.utils.optional import install_hint

try:
    import ray
    from ray.exceptions import RayActorError, RayTaskError
except ImportError as error:
    raise ImportError(f"replicas need more packages: {install_hint('ray')}") from error

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReplicaInfo:
    """Facts that an actor knows and the driver does not.

    Attributes:
        backend: Backend of the engine.
        fingerprints: Fingerprints of the sweep's models, by name.
        rankings: The sweep's rankings.
        tasks: Key and error of each task, for each point.
    """

    backend: str
    fingerprints: dict[str, str]
    rankings: dict[str, Ranking]
    tasks: list[list[tuple[str | None, str | None]]]

    def fingerprint(self, model: str) -> str:
        """Return the fingerprint of a model, as Engine.fingerprint does."""
        return self.fingerprints[model]


class SharedQueue:
    """Keys of completions that no replica has taken yet. An actor, so that every replica can call it."""

    def __init__(self) -> None:
        self._open: deque[str] = deque()
        self._taken: dict[int, list[str]] = {}
        self._is_closed = False

    def add(self, keys: list[str]) -> None:
        """Append keys, which are taken in the order in which they were added."""
        self._open.extend(keys)

    def take(self, replica: int, limit: int) -> list[str]:
        """Return at most `limit` keys for a replica; an empty list if none is open now."""
        keys = [self._open.popleft() for _ in range(min(limit, len(self._open)))]
        self._taken.setdefault(replica, []).extend(keys)
        return keys

    def forget(self, replica: int) -> list[str]:
        """Forget a replica, and return all keys that it ever took."""
        return self._taken.pop(replica, [])

    def close(self) -> None:
        """Let each replica end as soon as it finds no open key; until then it asks again for new ones."""
        self._is_closed = True

    def is_closed(self) -> bool:
        """Return whether `close` was called; a replica asks whenever it has no key left to complete."""
        return self._is_closed


class Replica:
    """Actor with an engine of its own. `arguments` are those of its ExperimentContext."""

    def __init__(self, spec: SweepSpec, out: Path, arguments: dict) -> None:
        self._context, self._spec = ExperimentContext(spec, out, **arguments), spec
        self._requests: dict = {}

    def prepare(self) -> ReplicaInfo:
        """Open the engine, plan the sweep, and return what the driver needs."""
        context, config = self._context, self._spec.sweep
        rankings = context.sweep_rankings(self._spec)
        sets = {name: context.prompts(name) for name in self._spec.set_names}
        plan = sweep.plan_sweep(context.engine, sets, rankings, config, context.clusters(sets, config))
        self._requests = {task.key: task.request for task in plan.flat_tasks if task.request is not None}
        for request in self._requests.values():
            context.engine.executor.check_request(request)
        return ReplicaInfo(
            context.engine.backend,
            {name: context.engine.fingerprint(name) for name in config.models},
            rankings,
            [[(task.key, task.error) for task in point_tasks] for point_tasks in plan.tasks],
        )

    def generate(self, shared_queue, number: int) -> Iterator[tuple[str, StoredCompletion | str]]:
        """Yield key and completion of the requests that the replica takes from the queue.

        A str is the error of a completion. A crashed or spoiled engine ends the actor.
        """
        while not ray.get(shared_queue.is_closed.remote()):
            claimed: list[str] = []
            try:
                for index, output in self._context.engine.run(self._take(shared_queue, number, claimed)):
                    key = claimed[index]
                    if output.error is not None:
                        yield key, str(output.error)
                    else:
                        yield key, generation.to_stored(Completion.of(self._requests[key], output))
            except EngineCrashedError:
                os._exit(1)
            if not claimed:
                time.sleep(generation.POLL_SECONDS)

    def read(self, readings: list[Reading]) -> list[tuple[Reading, float]]:
        """Return the log-probability of each completion that an unpatched model reads."""
        return list(read_completions(self._context.engine, readings, self._requests))

    def _take(self, shared_queue, number: int, claimed: list[str]) -> Iterator:
        while keys := ray.get(shared_queue.take.remote(number, generation.CLAIM_SIZE)):
            for key in keys:
                claimed.append(key)
                yield self._requests[key]


def run(
    context: ExperimentContext,
    spec: SweepSpec,
    store: Store,
    *,
    replicas: int,
    gpus: float = 0,
    max_restarts: int = generation.MAX_RESTARTS,
    **arguments,
) -> sweep.SweepResult:
    """Run the sweep of a file on replicas of the engine.

    Args:
        context: The driver's context; its engine is never opened.
        spec: The sweep file.
        store: Where completions and scores are stored.
        replicas: Number of replicas.
        gpus: GPUs per replica.
        max_restarts: Replicas that may be replaced after they died, in total.
        arguments: Arguments of the replicas' contexts.
    """
    judges = {name: context.judge(name) for name in spec.judge_names}
    chats = [chat for name in spec.set_names for chat in context.prompts(name)]
    with _Team(spec, context.out, arguments, gpus) as team:
        info = team.start(replicas)
        for name in spec.sweep.models:
            context.record_model(info, name)
        for name, ranking in info.rankings.items():
            context.record_ranking(name, ranking)
        points, notes = build_points(info.rankings, spec.sweep)
        tasks = [generation.tasks_from_keys(chats, point_tasks, spec.sweep.samples) for point_tasks in info.tasks]
        sizes = {name: len(context.prompts(name)) for name in spec.set_names}
        plan = sweep.label_tasks(points, notes, sizes, tasks, context.clusters(sizes, spec.sweep))
        plan.set_labels("sweep", judges, store)
        prompts = {task.key: task.prompt for task in plan.flat_tasks if task.key is not None}
        with context.progress("sweep") as progress, judging.BackgroundScorer(judges, store) as scorer:
            team.generate_missing(store, prompts, max_restarts, scorer.add, progress)
        if spec.sweep.coherence:
            unread = find_unread(store, plan.readers, info.fingerprints)
            store_logprobs(team.read(unread), store, info.fingerprints)
    return sweep.build_result(plan, judges, spec.sweep, store, info.fingerprints)


class _Team:
    """Replicas of one run. Use as a context."""

    def __init__(self, spec: SweepSpec, out: Path, arguments: dict, gpus: float) -> None:
        self._actor_class = ray.remote(Replica).options(num_gpus=gpus, max_restarts=0)
        self._actor_arguments = (spec, out, arguments)
        self._events: queue.Queue = queue.Queue()
        self._actors: dict[int, Any] = {}  # Ray's handles have no methods that a type checker knows
        self._owns_ray = not ray.is_initialized()

    def __enter__(self) -> "_Team":
        if self._owns_ray:
            ray.init(log_to_driver=False, include_dashboard=False)
        self._shared_queue: Any = ray.remote(SharedQueue).options(num_cpus=0).remote()
        return self

    def __exit__(self, *_: object) -> None:
        ray.get(self._shared_queue.close.remote())
        for actor in self._actors.values():
            ray.kill(actor)
        if self._owns_ray:
            ray.shutdown()

    def start(self, replicas: int) -> ReplicaInfo:
        """Start the replicas. The first one computes missing rankings, and the others read them."""
        info = self._start_replica(0)
        others = [self._create_actor(number) for number in range(1, replicas)]
        prepared = [actor.prepare.remote() for actor in others]
        for number, reference in enumerate(prepared, start=1):
            if _get_info(reference).tasks != info.tasks:
                raise SnpatchError("two replicas plan different completions: do all see the same files?")
            self._listen(number)
        return info

    def generate_missing(
        self,
        store: Store,
        prompts: dict[str, str],  # by key
        max_restarts: int,
        on_completion: Callable[[str, str], None],
        progress: Progress | None,
    ) -> None:
        """Generate what the store lacks, see generation.generate_missing."""
        missing = store.queue.enqueue(list(prompts))
        num_losses: Counter[str] = Counter()  # how many replicas died while they generated a completion
        next_number = len(self._actors)
        while missing:
            if claimed := store.queue.claim(missing):
                ray.get(self._shared_queue.add.remote(claimed))
            waiting = set(claimed)
            while waiting:
                kind, replica, *event = self._events.get()
                if kind == "completion":
                    key, completion = event
                    waiting.discard(key)
                    if isinstance(completion, str):
                        store.queue.mark_suspect(completion, [key])
                    else:
                        store.add(key, completion)
                        on_completion(prompts[key], completion.completion)
                    missing -= 1
                    if progress:
                        progress(len(prompts) - missing, len(prompts))
                    continue
                (error,) = event
                if isinstance(error, ReceiptError) or not max_restarts:
                    raise error
                max_restarts -= 1
                logger.warning("snpatch: replica %d is replaced: %s", replica, error)
                lost = [key for key in ray.get(self._shared_queue.forget.remote(replica)) if key in waiting]
                ray.kill(self._actors.pop(replica))
                num_losses.update(lost)
                # After its first loss a completion is repeated at once, after its second in smaller groups.
                repeated = [key for key in lost if num_losses[key] == 1]
                waiting -= set(lost) - set(repeated)
                store.queue.mark_suspect(str(error), [key for key in lost if num_losses[key] > 1])
                self._start_replica(next_number)
                next_number += 1
                ray.get(self._shared_queue.add.remote(repeated))
            missing = store.queue.num_missing()
            if missing and not claimed:
                time.sleep(generation.POLL_SECONDS)

    def read(self, readings: list[Reading]) -> Iterator[tuple[Reading, float]]:
        """Yield the log-probability of each reading.

        The replicas read equal parts, and generate no more.
        """
        ray.get(self._shared_queue.close.remote())  # an actor runs one method at a time
        actors = list(self._actors.values())
        parts = [readings[number :: len(actors)] for number in range(len(actors))]
        try:
            for reference in [actor.read.remote(part) for actor, part in zip(actors, parts, strict=True) if part]:
                yield from ray.get(reference)
        except (RayActorError, RayTaskError) as error:
            raise _to_snpatch_error(error) from error

    def _start_replica(self, number: int) -> ReplicaInfo:
        info = _get_info(self._create_actor(number).prepare.remote())
        self._listen(number)
        return info

    def _create_actor(self, number: int):
        self._actors[number] = self._actor_class.remote(*self._actor_arguments)
        return self._actors[number]

    def _listen(self, number: int) -> None:
        name, arguments = f"snpatch-replica-{number}", (number, self._actors[number])
        threading.Thread(target=self._forward_events, args=arguments, name=name, daemon=True).start()

    def _forward_events(self, number: int, actor) -> None:
        """Put completions of a replica, and its end, into the queue of events."""
        try:
            for reference in actor.generate.options(num_returns="streaming").remote(self._shared_queue, number):
                self._events.put(("completion", number, *ray.get(reference)))
        except (RayActorError, RayTaskError) as error:
            self._events.put(("died", number, _to_snpatch_error(error)))


def _get_info(reference) -> ReplicaInfo:
    try:
        return ray.get(reference)
    except (RayActorError, RayTaskError) as error:
        raise _to_snpatch_error(error) from error


def _to_snpatch_error(error: Exception) -> SnpatchError:
    """Return a replica's own error, or the error that it died."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, SnpatchError):
        return cause
    return EngineCrashedError(f"a replica has ended: {first_line(error)}")
