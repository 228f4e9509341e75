"""Scores of kept texts: each different (prompt, completion) once a judge, by the judge's digest where it has one.

Why a judge that raises does not end a run: texts and scores are what took the time. What could not be scored is noted,
and all else goes on; only a judge that can score nothing is an error.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from snpatch.errors import SnpatchError, first_line
from snpatch.judges.protocol import BrokenJudgeError, Judge, score_all
from snpatch.sweeps.store import Store, text_of

TOGETHER = 256  # texts that a judge is given at once
GIVE_UP = 16  # failures one after the other, after which a judge is asked no more

Pair = tuple[str, str]


class Meanwhile:
    """Scores texts in a thread while others are written. Use as a context, within which the judges are its own.

    What cannot be scored here is left to `judge_all`, which says why.
    """

    def __init__(self, judges: Mapping[str, Judge], store: Store) -> None:
        self._judges, self._store, self._digests = judges, store, digests_of(judges, store)
        self._asked: set[Pair] = set()
        self._waiting: list[Pair] = []
        self._pool = ThreadPoolExecutor(1, "snpatch-judges")
        self._scoring: deque[Future] = deque()

    def __enter__(self) -> "Meanwhile":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            self._keep()

    def add(self, prompt: str, completion: str) -> None:
        """A text is finished."""
        if (pair := (prompt, completion)) not in self._asked:
            self._asked.add(pair)
            self._waiting.append(pair)
        if len(self._waiting) >= TOGETHER:
            self._scoring.append(self._pool.submit(self._score, self._waiting))
            self._waiting = []
            self._keep()

    def _score(self, pairs: list[Pair]) -> dict[str, dict[Pair, float]]:
        return {name: score_chunk(name, judge, pairs)[0] for name, judge in self._judges.items()}

    def _keep(self) -> None:
        """Keep what has been scored so far."""
        while self._scoring and self._scoring[0].done():
            for name, scores in self._scoring.popleft().result().items():
                own = {text_of(*pair): score for pair, score in scores.items()}
                self._store.keep_scores(self._digests[name], own)


def digests_of(judges: Mapping[str, Judge], store: Store) -> dict[str, str]:
    """What the scores of each judge are kept under; of one without a digest something that nobody asks for again."""
    return {name: getattr(judge, "fingerprint", f"{store.owner} {name}") for name, judge in judges.items()}


def judge_all(records: Sequence[dict], judges: Mapping[str, Judge], store: Store) -> None:
    """Set each record's scores: judge -> number, None where the text or its score could not be made.

    store: where scores are kept.
    """
    digests = digests_of(judges, store)
    written = [record for record in records if record["completion"] is not None]
    pairs = list({(record["prompt"], record["completion"]): None for record in written})
    found = {name: scores_of(name, judge, pairs, store, digests[name]) for name, judge in judges.items()}
    for record in records:
        pair = record["prompt"], record["completion"]
        record["scores"] = {name: scores.get(pair) for name, scores in found.items()}


def check_scored(records: Sequence[dict]) -> None:
    """An error for the first text that failed, or has no score: for tables that need every one."""
    for record in records:
        if record["completion"] is None:
            raise SnpatchError(f"a text could not be written: {record['error']}; the others are kept: run it again")
        for judge, score in record["scores"].items():
            if score is None:
                raise SnpatchError(f"judge {judge!r} has no score of the answer to {record['prompt'][:80]!r}")


def scores_of(name: str, judge: Judge, pairs: Sequence[Pair], store: Store, fingerprint: str) -> dict[Pair, float]:
    """A judge's score of each pair of prompt and completion that it can score. digest: what they are kept under."""
    kept = store.scores(fingerprint)
    found = {pair: kept[text] for pair in pairs if (text := text_of(*pair)) in kept}
    asked, failures, first = [pair for pair in pairs if pair not in found], 0, None
    for start in range(0, len(asked), TOGETHER):
        chunk = asked[start : start + TOGETHER]
        scores, errors = score_chunk(name, judge, chunk)
        for pair, error in errors.items():
            first = first or error
            store.fail({"judge": name, "prompt": pair[0], "completion": pair[1]}, error)
        store.keep_scores(fingerprint, {text_of(*pair): score for pair, score in scores.items()})
        found |= scores
        failures = 0 if scores else failures + len(chunk)
        if failures >= GIVE_UP:
            break
    if asked and not found:
        raise SnpatchError(first)
    return found


def score_chunk(name: str, judge: Judge, chunk: Sequence[Pair]) -> tuple[dict[Pair, float], dict[Pair, str]]:
    """Scores, and why what has none has none: pairs that cannot be scored together are scored one by one."""
    scores, error = _scored(name, judge, chunk)
    if error is None or len(chunk) == 1:
        return scores, {} if error is None else {chunk[0]: error}
    errors: dict[Pair, str] = {}
    for place, pair in enumerate(chunk):
        own, error = _scored(name, judge, [pair])
        scores |= own
        if error is not None:
            errors[pair] = error
        if len(errors) > place and len(errors) == GIVE_UP:
            return scores, {pair: errors.get(pair, "not tried: all before it failed") for pair in chunk}
    return scores, errors


def _scored(name: str, judge: Judge, pairs: Sequence[Pair]) -> tuple[dict[Pair, float], str | None]:
    try:
        found = score_all({name: judge}, [prompt for prompt, _ in pairs], [completion for _, completion in pairs])
    except BrokenJudgeError:
        raise
    except SnpatchError as error:
        return {}, str(error)
    except Exception as error:  # noqa: BLE001 - a judge is anybody's function
        return {}, f"judge {name!r}: {type(error).__name__}: {first_line(error)}"
    return dict(zip(pairs, found[name], strict=True)), None
