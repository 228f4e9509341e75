"""Completions of many patches over the same prompts: planned, generated in one continuous batch, stored when finished.

Why a completion's key is a content hash of everything that determines it: a killed run loses at most the completions
it was generating, and stored ones stay valid whatever models are called. Greedy completions of patches with equal
neurons are one completion, whichever ranking selects them.
"""

import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from snpatch.data import Chat, question
from snpatch.engine import Engine
from snpatch.engine.requests import Completion
from snpatch.errors import EngineCrashedError, ReceiptError, SnpatchError, SpoiledEngineError
from snpatch.executors.base import Progress, Request
from snpatch.judges.protocol import BrokenJudgeError
from snpatch.patching.patch import Intervention, Patch, recipient_name
from snpatch.sampling import Sampling
from snpatch.sweeps.config import check_sampling
from snpatch.sweeps.store import Store, StoredCompletion, completion_state
from snpatch.utils.hashing import GENERATION_VERSION, REQUEST_DIGITS, hash_json

logger = logging.getLogger(__name__)
MAX_FAILED_RUNS = 8  # in a row without a finished completion
MAX_RESTARTS = 5  # of a crashed engine, per call
CLAIM_SIZE = 64  # completions claimed at a time
POLL_SECONDS = 0.5  # between looks whether other processes have finished theirs


@dataclass(frozen=True)
class CompletionTask:
    """One sample of a prompt under a patch.

    Attributes:
        key: Key in the store; None if the prompt cannot be run.
        prompt_index: Index of the prompt.
        prompt: Last question of the prompt's user.
        sample: Index of the sample.
        request: What the engine runs; None if the prompt cannot be run, or another process generates it.
        error: Why the prompt cannot be run.
    """

    key: str | None
    prompt_index: int
    prompt: str
    sample: int
    request: Request | None = None
    error: str | None = None


def generate_completions(
    engine: Engine,
    prompts: Sequence[Chat],
    patches: Sequence[Patch | str],
    sampling: Sampling,
    *,
    samples: int = 1,
    store: str | Path | Store | None = None,
    max_restarts: int = MAX_RESTARTS,
    progress: Progress | None = None,
) -> list[list[dict]]:
    """Return a record for each patch, prompt and sample; generate what the store does not have.

    Args:
        engine: The engine.
        prompts: The prompts.
        patches: Patches, or names of models that run unpatched.
        sampling: Sampling of one completion.
        samples: Completions per prompt; more than one need a temperature.
        store: A folder that stores completions, so that a killed run resumes; or an open Store.
        max_restarts: Restarts of a crashed engine.
        progress: Called as `progress(done, total)`.

    Returns:
        For each patch a list of records with prompt_index, prompt (the last question), sample, state, completion,
        token_ids, finish_reason and overwrites. A failed completion is None, and `error` says why.
    """
    tasks = plan_completions(engine, prompts, patches, sampling, samples)
    with Store(store) if not isinstance(store, Store) else nullcontext(store) as open_store:
        flat = [task for patch_tasks in tasks for task in patch_tasks]
        generate_missing(engine, flat, open_store, max_restarts=max_restarts, progress=progress)
        return build_records(tasks, open_store)


def plan_completions(
    engine: Engine, prompts: Sequence[Chat], patches: Sequence[Patch | str], sampling: Sampling, samples: int = 1
) -> list[list[CompletionTask]]:
    """Return, for each patch, a task per prompt and sample.

    A task whose prompt cannot be run has an error.
    """
    check_sampling(sampling, "completions")
    if samples > 1 and sampling.temperature == 0:
        raise SnpatchError("completions: several samples of a prompt need a temperature above 0: greedy ones are equal")
    recipients = [recipient_name(patch) for patch in engine.requests.patches(patches, len(patches))]
    encoded = {recipient: _encode(engine, prompts, recipient) for recipient in dict.fromkeys(recipients)}
    seeded = [_with_seed(sampling, sample, samples) for sample in range(samples)]
    tasks = []
    for patch, recipient in zip(patches, recipients, strict=True):
        content = _describe_patch(engine, patch)
        patch_tasks = []
        for index, (prompt, ids) in enumerate(zip(prompts, encoded[recipient], strict=True)):
            for sample, sample_sampling in enumerate(seeded):
                task = CompletionTask(None, index, question(prompt), sample)
                patch_tasks.append(_with_request(task, engine, patch, content, sample_sampling, ids))
        tasks.append(patch_tasks)
    return tasks


def tasks_from_keys(
    chats: Sequence[Chat], keys_and_errors: Sequence[tuple[str | None, str | None]], samples: int
) -> list[CompletionTask]:
    """Rebuild the tasks of one patch, without requests.

    keys_and_errors: from `plan_completions` in another process.
    """
    return [
        CompletionTask(key, index // samples, question(chats[index // samples]), index % samples, error=error)
        for index, (key, error) in enumerate(keys_and_errors)
    ]


def generate_missing(
    engine: Engine,
    tasks: Sequence[CompletionTask],
    store: Store,
    *,
    max_restarts: int = MAX_RESTARTS,
    on_completion: Callable[[str, str], None] | None = None,
    progress: Progress | None = None,
) -> None:
    """Generate what the store lacks. Return when no task is open, here or in another process.

    After a failed run of the engine a new one starts, and what the failed one was generating is tried again in smaller
    groups. A completion that fails alone is given up, and its error is stored.

    Args:
        engine: The engine.
        tasks: What is needed.
        store: Where completions are stored.
        max_restarts: Restarts of a crashed engine.
        on_completion: Called with prompt and completion of each finished task.
        progress: Called as `progress(done, total)`.
    """
    prompts = {task.key: task.prompt for task in tasks}
    requests = {task.key: task.request for task in tasks if task.key is not None and task.request is not None}
    for request in requests.values():
        engine.executor.check_request(request)
    missing = store.queue.enqueue(list(requests))
    failed_runs = 0

    def report(num_missing: int, key: str = "", completion: Completion | None = None) -> None:
        if completion is not None and on_completion:
            on_completion(prompts[key], completion.text)
        if progress:
            progress(len(requests) - num_missing, len(requests))

    while missing:
        claimed: list[str] = []
        try:
            with closing(_generate_claimed(engine, store, requests, claimed)) as finished:
                for key, completion in finished:
                    report(missing - 1, key, completion)
                    missing, failed_runs = missing - 1, 0
        except SnpatchError as error:
            failed_runs += 1
            max_restarts = _handle_failed_run(engine, store, error, failed_runs, max_restarts)
        missing = store.queue.num_missing()
        if missing and not claimed:
            time.sleep(POLL_SECONDS)
        report(missing)


def _handle_failed_run(engine: Engine, store: Store, error: SnpatchError, failed_runs: int, max_restarts: int) -> int:
    """Restart a crashed engine, and return how many restarts are left.

    Raise the error if no other run can help.
    """
    if isinstance(error, BrokenJudgeError | ReceiptError) and not isinstance(error, SpoiledEngineError):
        raise error  # no completion of such an engine and no score of such a judge can be used
    if not store.queue.mark_suspect(str(error)) or failed_runs == MAX_FAILED_RUNS:
        raise error  # the completions are not the cause
    logger.warning("snpatch: the engine run failed and is retried: %s", error)
    if isinstance(error, EngineCrashedError):
        if not max_restarts:
            raise error
        engine.restart()
        return max_restarts - 1
    return max_restarts


def build_records(tasks: Sequence[Sequence[CompletionTask]], store: Store) -> list[list[dict]]:
    """Return the record of each task, see `generate_completions`."""
    keys = {task.key for patch_tasks in tasks for task in patch_tasks if task.key is not None}
    completions = store.completions(keys)
    errors = store.queue.errors(keys - completions.keys())
    return [[_build_record(task, completions, errors) for task in patch_tasks] for patch_tasks in tasks]


def to_stored(completion: Completion) -> StoredCompletion:
    """Return a completion as it is stored."""
    return StoredCompletion(completion.text, completion.token_ids, completion.finish_reason, completion.overwrites)


def _generate_claimed(
    engine: Engine, store: Store, requests: dict[str, Request], claimed: list[str]
) -> Generator[tuple[str, Completion | None]]:
    """Claim, generate and store completions until none is free.

    Yield key and completion, None if it failed.
    """
    with closing(engine.run(_claim_requests(store, requests, claimed))) as outputs:
        for index, output in outputs:
            key = claimed[index]
            if output.error is not None:
                store.queue.mark_suspect(str(output.error), [key])
                yield key, None
                continue
            completion = Completion.of(requests[key], output)
            store.add(key, to_stored(completion))
            yield key, completion


def _claim_requests(store: Store, requests: dict[str, Request], claimed: list[str]) -> Iterator[Request]:
    """Yield requests when the engine has room, and append their keys to `claimed`.

    A group of suspects ends the run.
    """
    while keys := store.queue.claim(CLAIM_SIZE):
        for key in keys:
            claimed.append(key)
            yield requests[key]
        if store.queue.is_suspect(keys[0]):
            return


def _with_request(
    task: CompletionTask, engine: Engine, patch, content: dict, sampling: Sampling, ids
) -> CompletionTask:
    """Add key and request to a task, or the error (a str in place of token ids) of its prompt."""
    if isinstance(ids, str):
        return replace(task, error=ids)
    fitted = engine.requests.fitted(ids, sampling)
    # Two sampled completions of equal prompts are two completions; two greedy ones are one.
    copy = task.prompt_index if sampling.temperature > 0 else None
    key = hash_json({**content, "sampling": asdict(fitted), "prompt": ids, "copy": copy}, REQUEST_DIGITS)
    return replace(task, key=key, request=engine.requests.patched(ids, patch, sampling=fitted))


def _encode(engine: Engine, prompts: Sequence[Chat], recipient: str) -> Sequence[list[int] | str]:
    """Return token ids of each prompt, or the error of a prompt that cannot be encoded."""
    try:
        return engine.encode(prompts, recipient)
    except SnpatchError:
        if not len(prompts) or isinstance(prompts, str):
            raise
    encoded: list[list[int] | str] = []
    for prompt in prompts:
        try:
            encoded += engine.encode([prompt], recipient)
        except SnpatchError as error:
            encoded.append(str(error))
    return encoded


def _with_seed(sampling: Sampling, sample: int, samples: int) -> Sampling:
    """Return the sampling of one of several samples; their seeds count up from the sampling's seed."""
    return sampling if samples == 1 else replace(sampling, seed=(sampling.seed or 0) + sample)


def _describe_patch(engine: Engine, patch: Patch | str) -> dict:
    """Return what a completion's key contains besides prompt and sampling."""
    model = patch if isinstance(patch, str) else patch.recipient
    content = {
        "version": GENERATION_VERSION,
        "recipient": engine.fingerprint(model),
        "ends": sorted(engine.requests.model(model).weights.eos_ids),
    }
    if isinstance(patch, str):
        return content
    return content | {
        "interventions": [_describe_intervention(engine, part) for part in patch.interventions if len(part.window)]
    }


def _describe_intervention(engine: Engine, intervention: Intervention) -> dict:
    content = intervention.content(engine.fingerprint)
    del content["ranking"], content["window"]  # the order of neurons within a window does not change a completion
    return content | {"neurons": intervention.ranking.window_fingerprint(intervention.window)}


def _build_record(task: CompletionTask, completions: Mapping[str, StoredCompletion], errors: Mapping[str, str]) -> dict:
    stored, error = (None, None) if task.key is None else (completions.get(task.key), errors.get(task.key))
    error, completion = task.error or error, None if stored is None else stored.completion
    record = {"prompt_index": task.prompt_index, "prompt": task.prompt, "sample": task.sample}
    record["state"] = completion_state(completion, error)
    if stored is not None:
        return record | asdict(stored)
    empty = {"completion": None, "token_ids": [], "finish_reason": None, "overwrites": 0}
    return record | empty | {"error": error}
