"""Scores of stored completions: each different (prompt, completion) once per judge, stored by its fingerprint.

Why a judge that raises does not end a run: completions and scores are what took the time. What could not be scored is
recorded and the rest continues; only a judge that can score nothing is an error.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from snpatch.errors import SnpatchError, first_line
from snpatch.judges.protocol import BrokenJudgeError, Judge, score_all
from snpatch.sweeps.store import Store, completion_key
from snpatch.utils.hashing import SCORE_VERSION, hash_json

JUDGE_BATCH_SIZE = 256  # completions per call of a judge
MAX_CONSECUTIVE_FAILURES = 16  # completions without a score, after which a judge is not called any more
NOT_SCORED = "not scored: the judge failed on all earlier completions"

Pair = tuple[str, str]  # prompt, completion


class BackgroundScorer:
    """Scores completions in a thread while others are generated. Within the context the judges belong to it alone.

    What cannot be scored here is left to `judge_all`, which reports why.
    """

    def __init__(self, judges: Mapping[str, Judge], store: Store) -> None:
        self._judges, self._store, self._judge_keys = judges, store, judge_keys(judges, store)
        self._seen: set[Pair] = set()
        self._waiting: list[Pair] = []
        self._pool = ThreadPoolExecutor(1, "snpatch-judges")
        self._running: deque[Future] = deque()

    def __enter__(self) -> "BackgroundScorer":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            self._store_finished()

    def add(self, prompt: str, completion: str) -> None:
        """Score a finished completion with the next batch."""
        if (pair := (prompt, completion)) not in self._seen:
            self._seen.add(pair)
            self._waiting.append(pair)
        if len(self._waiting) >= JUDGE_BATCH_SIZE:
            self._running.append(self._pool.submit(self._score, self._waiting))
            self._waiting = []
            self._store_finished()

    def _score(self, pairs: list[Pair]) -> dict[str, dict[Pair, float]]:
        return {name: score_chunk(name, judge, pairs)[0] for name, judge in self._judges.items()}

    def _store_finished(self) -> None:
        while self._running and self._running[0].done():
            for name, scores in self._running.popleft().result().items():
                by_key = {completion_key(*pair): score for pair, score in scores.items()}
                self._store.add_scores(self._judge_keys[name], by_key)


def judge_keys(judges: Mapping[str, Judge], store: Store) -> dict[str, str]:
    """Return the key of each judge's scores: of its fingerprint, or else one that only this process uses."""
    fingerprints = {name: getattr(judge, "fingerprint", None) for name, judge in judges.items()}
    return {
        name: f"{store.owner} {name}" if fingerprint is None else hash_json([SCORE_VERSION, fingerprint])
        for name, fingerprint in fingerprints.items()
    }


def judge_all(records: Sequence[dict], judges: Mapping[str, Judge], store: Store) -> None:
    """Set `scores` of each record: judge -> number, None if the completion or its score failed."""
    keys = judge_keys(judges, store)
    completed = [record for record in records if record["completion"] is not None]
    pairs = list({(record["prompt"], record["completion"]): None for record in completed})
    scores = {name: score_pairs(name, judge, pairs, store, keys[name]) for name, judge in judges.items()}
    for record in records:
        pair = record["prompt"], record["completion"]
        record["scores"] = {name: judge_scores.get(pair) for name, judge_scores in scores.items()}


def check_scored(records: Sequence[dict]) -> None:
    """Raise for the first completion that failed or has no score: for tables that need all of them."""
    for record in records:
        if record["completion"] is None:
            raise SnpatchError(
                f"a completion could not be generated: {record['error']}. The others are stored; repeat the run."
            )
        for judge, score in record["scores"].items():
            if score is None:
                raise SnpatchError(f"judge {judge!r} has no score of the completion of {record['prompt'][:80]!r}")


def score_pairs(name: str, judge: Judge, pairs: Sequence[Pair], store: Store, judge_key: str) -> dict[Pair, float]:
    """Return a judge's score of each pair that it can score, stored ones under `judge_key`."""
    cached = store.scores(judge_key)
    scores = {pair: cached[key] for pair in pairs if (key := completion_key(*pair)) in cached}
    to_score = [pair for pair in pairs if pair not in scores]
    consecutive_failures, first_error = 0, None
    for start in range(0, len(to_score), JUDGE_BATCH_SIZE):
        chunk = to_score[start : start + JUDGE_BATCH_SIZE]
        new_scores, errors = score_chunk(name, judge, chunk)
        for (prompt, completion), error in errors.items():
            first_error = first_error or error
            store.record_failure({"judge": name, "prompt": prompt, "completion": completion}, error)
        store.add_scores(judge_key, {completion_key(*pair): score for pair, score in new_scores.items()})
        scores |= new_scores
        consecutive_failures = 0 if new_scores else consecutive_failures + len(chunk)
        if consecutive_failures >= MAX_CONSECUTIVE_FAILURES:
            break
    if first_error is not None and not scores:
        raise SnpatchError(first_error)
    return scores


def score_chunk(name: str, judge: Judge, chunk: Sequence[Pair]) -> tuple[dict[Pair, float], dict[Pair, str]]:
    """Return scores, and an error for each pair without one.

    Pairs that cannot be scored together are scored alone.
    """
    scores, error = _try_score(name, judge, chunk)
    if error is None or len(chunk) == 1:
        return scores, {} if error is None else {chunk[0]: error}
    errors: dict[Pair, str] = {}
    for index, pair in enumerate(chunk):
        pair_scores, error = _try_score(name, judge, [pair])
        scores |= pair_scores
        if error is not None:
            errors[pair] = error
        if len(errors) > index and len(errors) == MAX_CONSECUTIVE_FAILURES:
            return scores, {pair: errors.get(pair, NOT_SCORED) for pair in chunk}
    return scores, errors


def _try_score(name: str, judge: Judge, pairs: Sequence[Pair]) -> tuple[dict[Pair, float], str | None]:
    try:
        scores = score_all({name: judge}, [prompt for prompt, _ in pairs], [completion for _, completion in pairs])
    except BrokenJudgeError:
        raise
    except SnpatchError as error:
        return {}, str(error)
    except Exception as error:  # noqa: BLE001 - a judge may be a user's function
        return {}, f"judge {name!r}: {type(error).__name__}: {first_line(error)}"
    return dict(zip(pairs, scores[name], strict=True)), None
