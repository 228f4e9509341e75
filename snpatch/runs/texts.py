"""Texts of many patches over the same prompts, each written once and judged once.

Why the store is a log of completions: a run that is killed has lost at most the chunk under way, and a record is used
again only if everything that determines its text is the same (that is its key).
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from snpatch import __version__
from snpatch.data import Chat, question
from snpatch.engine import Completion, Engine
from snpatch.errors import SnpatchError
from snpatch.executors.base import Progress
from snpatch.judges.judge import Judge, score_all
from snpatch.patching.patch import Patch
from snpatch.runs.store import Store
from snpatch.sampling import Sampling

CHUNK = 512  # requests between two writes to the store
RANKINGS = 32  # different ones in a chunk: an engine in vLLM holds so many at once (max_rankings)


def write(
    engine: Engine,
    prompts: Sequence[Chat],
    patches: Sequence[Patch | str],
    sampling: Sampling,
    *,
    store: str | Path | None = None,
    progress: Progress | None = None,
) -> list[list[dict]]:
    """A record for each patch (or unpatched model) and prompt: from the store where it has them, else generated.

    Records hold prompt_index, prompt (the user's last question), completion, token_ids, finish_reason, overwrites.
    store: a folder that keeps completions, so that a killed run continues.
    """
    if sampling.n > 1:
        raise SnpatchError("texts: one text of each prompt is written; give a prompt several times for several")
    asked = {**asdict(sampling), "engine": engine.digest, "snpatch": __version__}
    work: list[tuple[str, Patch | str, list[int]]] = []
    encoded = engine.encode(prompts)
    for patch in patches:
        identity = {**asked, **(patch.identity if isinstance(patch, Patch) else {"recipient": patch})}
        for index, ids in enumerate(encoded):
            # Two samples of the same prompt are two texts; two greedy ones are the same.
            copy = index if sampling.temperature > 0 else None
            work.append((_digest({**identity, "prompt": ids, "copy": copy}), patch, ids))
    with Store(store) as log:
        missing = list({key: item for key, *item in work if key not in log.records}.items())
        offset = len(work) - len(missing)
        for chunk in _chunks(missing):

            def report(done: int, _total: int, offset: int = offset) -> None:
                if progress:
                    progress(offset + done, len(work))

            completions = engine.generate(
                [ids for _, (_, ids) in chunk], [patch for _, (patch, _) in chunk], sampling, report
            )
            for (key, _), completion in zip(chunk, completions, strict=True):
                log.append(key, _record(completion))
            offset += len(chunk)
    asked_of = [question(prompt) for prompt in prompts]
    records = [
        {"prompt_index": i % len(prompts), "prompt": asked_of[i % len(prompts)], **log.records[key]}
        for i, (key, _, _) in enumerate(work)
    ]
    return [records[start : start + len(prompts)] for start in range(0, len(records), len(prompts))]


def _chunks(work: list[tuple]) -> Iterator[list[tuple]]:
    chunk, rankings = [], set()
    for key, (patch, ids) in work:
        ranking = None if isinstance(patch, str) else patch.ranking.digest
        if len(chunk) == CHUNK or len(rankings | {ranking}) > RANKINGS:
            yield chunk
            chunk, rankings = [], set()
        chunk.append((key, (patch, ids)))
        rankings.add(ranking)
    if chunk:
        yield chunk


def judge_all(records: Sequence[dict], judges: Mapping[str, Judge]) -> None:
    """Set each record's scores (judge -> number); each different (prompt, completion) is judged once."""
    pairs = list({(record["prompt"], record["completion"]): None for record in records})
    found = score_all(dict(judges), [prompt for prompt, _ in pairs], [completion for _, completion in pairs])
    by_pair = {pair: {name: found[name][i] for name in found} for i, pair in enumerate(pairs)}
    for record in records:
        record["scores"] = by_pair[record["prompt"], record["completion"]]


def _record(completion: Completion) -> dict:
    return {
        "completion": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "overwrites": completion.overwrites,
    }


def _digest(identity: dict) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
