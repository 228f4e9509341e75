"""Texts of many patches over the same prompts, each written once and judged once.

Why a text is kept under a key of all that made it, by content: a killed run loses at most the texts under way, and what
is kept stays valid whatever models are called and whatever else is loaded, and no longer.
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from snpatch import __version__
from snpatch.data import Chat, question
from snpatch.engine import Engine
from snpatch.errors import SnpatchError
from snpatch.executors.base import Progress
from snpatch.judges.protocol import Judge, score_all
from snpatch.patching.patch import Patch, digest_of
from snpatch.requests import Completion
from snpatch.runs.store import Store
from snpatch.sampling import Sampling


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
    recipients = engine.requests.recipients(patches, len(patches))
    encoded = {recipient: engine.encode(prompts, recipient) for recipient in dict.fromkeys(recipients)}
    work = [
        # Two samples of the same prompt are two texts; two greedy ones are the same.
        (key_of(engine, ids, patch, sampling, copy=index if sampling.temperature > 0 else None), patch, ids)
        for patch, recipient in zip(patches, recipients, strict=True)
        for index, ids in enumerate(encoded[recipient])
    ]
    with Store(store) as log:
        missing = list({key: item for key, *item in work if key not in log.records}.items())
        done = len(work) - len(missing)
        if missing:
            asked = [ids for _, (_, ids) in missing], [patch for _, (patch, _) in missing]
            with closing(engine.stream(*asked, sampling)) as completions:
                for index, completion in completions:
                    log.append(missing[index][0], _record(completion))
                    done += 1
                    if progress:
                        progress(done, len(work))
    asked_of = [question(prompt) for prompt in prompts]
    records = [
        {"prompt_index": i % len(prompts), "prompt": asked_of[i % len(prompts)], **log.records[key]}
        for i, (key, _, _) in enumerate(work)
    ]
    return [records[start : start + len(prompts)] for start in range(0, len(records), len(prompts))]


def key_of(engine: Engine, ids: list[int], patch: Patch | str, sampling: Sampling, copy: int | None) -> str:
    """Names a text by the content of everything that makes it."""
    is_patch = isinstance(patch, Patch)
    recipient = engine.requests.model(patch.recipient if is_patch else patch)
    return digest_of(
        {
            "snpatch": __version__,
            "patch": patch.content(engine.digest_of) if is_patch else {"recipient": engine.digest_of(patch)},
            "sampling": asdict(engine.requests.fitted(ids, sampling)),
            "ends": sorted(recipient.weights.eos_ids),
            "prompt": ids,
            "copy": copy,
        }
    )


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
