"""A sweep on several replicas of an engine, each an actor of Ray with its own GPUs, which pull work as they have room.

Why the driver alone writes the store: actors may run on machines that share no disk. It holds judges and rows, but no
engine; what needs one (token ids, digests, contrasts) the first actor tells.
"""

import os
import queue
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from snpatch.engine.requests import Completion
from snpatch.errors import EngineCrashedError, ReceiptError, SnpatchError, first_line
from snpatch.experiments.context import ExperimentContext
from snpatch.ranking.ranking import Ranking
from snpatch.sweeps import judging, sweep, texts
from snpatch.sweeps.store import Store, Text
from snpatch.sweeps.sweep_file import SweepSpec

try:
    import ray
    from ray.exceptions import RayActorError, RayTaskError
except ImportError as error:
    raise ImportError("replicas need more packages: pip install 'snpatch[ray]'") from error


@dataclass(frozen=True)
class Told:
    """What an actor knows and the driver does not. texts: key and error of each item, point by point."""

    backend: str
    digests: dict[str, str]
    rankings: dict[str, Ranking]
    texts: list[list[tuple[str | None, str | None]]]

    def fingerprint(self, model: str) -> str:
        """Of a model that the sweep runs."""
        return self.digests[model]


class Work:
    """Keys of texts that no replica has yet. An actor, so that every replica can ask it."""

    def __init__(self) -> None:
        self._open: deque[str] = deque()
        self._taken: dict[int, list[str]] = {}
        self._is_ended = False

    def add(self, keys: list[str]) -> None:
        self._open.extend(keys)

    def take(self, replica: int, most: int) -> list[str]:
        """So many for a replica; none: there is nothing to do now."""
        keys = [self._open.popleft() for _ in range(min(most, len(self._open)))]
        self._taken.setdefault(replica, []).extend(keys)
        return keys

    def taken(self, replica: int) -> list[str]:
        """All that a replica ever took."""
        return self._taken.pop(replica, [])

    def end(self) -> None:
        self._is_ended = True

    def is_ended(self) -> bool:
        return self._is_ended


class Replica:
    """An engine of its own. arguments: the ExperimentContext's."""

    def __init__(self, spec: SweepSpec, out: Path, arguments: dict) -> None:
        self._context, self._spec = ExperimentContext(spec, out, **arguments), spec
        self._requests: dict = {}

    def prepare(self) -> Told:
        """Open the engine, and tell what the sweep's texts are."""
        context, plan = self._context, self._spec.plan
        rankings = context.rankings(self._spec)
        sets = {name: context.prompts(name) for name in self._spec.swept}
        asked = sweep.ask(context.engine, sets, rankings, plan)
        self._requests = {item.key: item.request for item in asked.flat if item.request is not None}
        for request in self._requests.values():
            context.engine.executor.check_request(request)
        return Told(
            context.engine.backend,
            {name: context.engine.fingerprint(name) for name in plan.models},
            {name: replace(ranking, statistics=None) for name, ranking in rankings.items()},
            [[(item.key, item.error) for item in mine] for mine in asked.items],
        )

    def write(self, work, me: int) -> Iterator[tuple[str, Text | str]]:
        """Yield (key, text) of each that it takes from the work, as they are finished; a str is why a text failed.

        A dead or spoiled engine ends the actor.
        """
        while not ray.get(work.is_ended.remote()):
            claimed: list[str] = []
            try:
                for index, output in self._context.engine.run(self._taken(work, me, claimed)):
                    key = claimed[index]
                    if output.error is not None:
                        yield key, str(output.error)
                    else:
                        yield key, texts.text_of(Completion.of(self._requests[key], output))
            except EngineCrashedError:
                os._exit(1)
            if not claimed:
                time.sleep(texts.POLL_S)

    def _taken(self, work, me: int, claimed: list[str]) -> Iterator:
        while keys := ray.get(work.take.remote(me, texts.CLAIM)):
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
    restarts: int = texts.RESTARTS,
    **arguments,
) -> sweep.SweepResult:
    """The sweep on so many replicas of `gpus` GPUs each; one that dies is replaced, `restarts` times in all.

    lab: the driver's, whose engine is never opened. arguments: of the replicas' Labs.
    """
    judges = {name: context.judge(name) for name in spec.judged}
    chats = [chat for name in spec.swept for chat in context.prompts(name)]
    with _Team(spec, context.out, arguments, gpus) as team:
        told = team.start(replicas)
        for name in spec.plan.models:
            context.note_model(told, name)
        for name, ranking in told.rankings.items():
            context.note_ranking(name, ranking)
        points, notes = sweep.points_of(told.rankings, spec.plan)
        items = [texts.told(chats, mine, spec.plan.samples) for mine in told.texts]
        asked = sweep.named(points, notes, {name: len(context.prompts(name)) for name in spec.swept}, items)
        asked.name("sweep", judges, store)
        prompts = {item.key: item.prompt for item in asked.flat if item.key is not None}
        with context.progress("sweep") as progress, judging.Meanwhile(judges, store) as meanwhile:
            team.fill(store, prompts, restarts, meanwhile.add, progress)
    return sweep.finish(asked, judges, spec.plan, store)


class _Team:
    """The replicas of one run. Use as a context."""

    def __init__(self, spec: SweepSpec, out: Path, arguments: dict, gpus: float) -> None:
        self._made = ray.remote(Replica).options(num_gpus=gpus, max_restarts=0), (spec, out, arguments)
        self._results: queue.Queue = queue.Queue()
        self._actors: dict[int, object] = {}
        self._is_ours = not ray.is_initialized()

    def __enter__(self) -> "_Team":
        if self._is_ours:
            ray.init(log_to_driver=False, include_dashboard=False)
        self._work = ray.remote(Work).options(num_cpus=0).remote()
        return self

    def __exit__(self, *_: object) -> None:
        ray.get(self._work.end.remote())
        for actor in self._actors.values():
            ray.kill(actor)
        if self._is_ours:
            ray.shutdown()

    def start(self, replicas: int) -> Told:
        """The first replica makes rankings that have to be made; the others find them."""
        told = self._begin(0)
        others = [self._actor(number) for number in range(1, replicas)]
        ready = [actor.prepare.remote() for actor in others]
        for number, one in enumerate(ready, start=1):
            if _got(one).texts != told.texts:
                raise SnpatchError("two replicas ask for different texts: do all see the same files?")
            self._listen(number)
        return told

    def fill(self, store: Store, prompts: dict[str, str], restarts: int, written, progress) -> None:
        """Write what the store lacks, see texts.fill. prompts: by the key of each text."""
        left, lost, number = store.ask(list(prompts)), Counter(), len(self._actors)
        while left:
            if claimed := store.claim(left):
                ray.get(self._work.add.remote(claimed))
            waiting = set(claimed)
            while waiting:
                what, replica, *result = self._results.get()
                if what == "text":
                    key, text = result
                    waiting.discard(key)
                    if isinstance(text, str):
                        store.suspect(text, [key])
                    else:
                        store.keep(key, text)
                        written(prompts[key], text.completion)
                    left -= 1
                    if progress:
                        progress(len(prompts) - left, len(prompts))
                    continue
                (error,) = result
                if isinstance(error, ReceiptError) or not restarts:
                    raise error
                restarts -= 1
                print(f"snpatch: replica {replica} is replaced: {error}", file=sys.stderr)
                dropped = [key for key in ray.get(self._work.taken.remote(replica)) if key in waiting]
                ray.kill(self._actors.pop(replica))
                lost.update(dropped)
                # What one replica's end took with it is done again at once; what a second one's, in smaller groups.
                again = [key for key in dropped if lost[key] == 1]
                waiting -= set(dropped) - set(again)
                store.suspect(str(error), [key for key in dropped if lost[key] > 1])
                self._begin(number)
                number += 1
                ray.get(self._work.add.remote(again))
            left = store.missing()
            if left and not claimed:
                time.sleep(texts.POLL_S)

    def _begin(self, number: int) -> Told:
        told = _got(self._actor(number).prepare.remote())
        self._listen(number)
        return told

    def _actor(self, number: int):
        remote, arguments = self._made
        self._actors[number] = remote.remote(*arguments)
        return self._actors[number]

    def _listen(self, number: int) -> None:
        actor = self._actors[number]
        threading.Thread(target=self._hear, args=(number, actor), name=f"snpatch-replica-{number}", daemon=True).start()

    def _hear(self, number: int, actor) -> None:
        """Hand on what a replica writes, and its end."""
        try:
            for one in actor.write.options(num_returns="streaming").remote(self._work, number):
                self._results.put(("text", number, *ray.get(one)))
        except (RayActorError, RayTaskError) as error:
            self._results.put(("died", number, _error(error)))


def _got(reference) -> Told:
    try:
        return ray.get(reference)
    except (RayActorError, RayTaskError) as error:
        raise _error(error) from error


def _error(error: Exception) -> SnpatchError:
    """A replica's own error, or that it is no more."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, SnpatchError):
        return cause
    return EngineCrashedError(f"a replica has ended: {first_line(error)}")
