"""Texts of many patches over the same prompts, each written once, as one continuous batch, and kept as it finishes.

Why a text is kept under a key of all that made it, by content: a killed run loses at most the texts under way, and what
is kept stays valid whatever models are called and whatever else is loaded, and no longer. Greedy texts of equal neurons
are one text, whichever ranking names them.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from snpatch.data import Chat, question
from snpatch.engine import Engine
from snpatch.engine.requests import Completion
from snpatch.errors import EngineCrashedError, ReceiptError, SnpatchError, SpoiledEngineError
from snpatch.executors.base import Progress, Request
from snpatch.judges.protocol import BrokenJudgeError
from snpatch.patching.patch import Intervention, Patch, digest_of
from snpatch.sampling import Sampling
from snpatch.sweeps.config import check_texts
from snpatch.sweeps.store import Store, Text, state_of
from snpatch.utils.hashing import GENERATION_VERSION

GIVE_UP = 8  # failed runs one after the other, in none of which a text was written
RESTARTS = 5  # of a dying engine, in one run
CLAIM = 64  # texts that are taken at once from what is open
POLL_S = 0.5  # how often it is looked whether other processes have finished what is theirs


@dataclass(frozen=True)
class Item:
    """A text that is wanted: one sample of a prompt under a patch. error: why its prompt cannot be run."""

    key: str | None
    prompt_index: int
    prompt: str
    sample: int
    request: Request | None = None
    error: str | None = None


def write(
    engine: Engine,
    prompts: Sequence[Chat],
    patches: Sequence[Patch | str],
    sampling: Sampling,
    *,
    samples: int = 1,
    store: str | Path | Store | None = None,
    restarts: int = RESTARTS,
    progress: Progress | None = None,
) -> list[list[dict]]:
    """A record for each patch (or unpatched model), prompt and sample: from the store where it has them, else written.

    Records hold prompt_index, prompt (the user's last question), sample, state, completion, token_ids, finish_reason,
    overwrites; of a text that failed completion is None and error says why. samples: texts of a prompt, which need a
    temperature. store: a folder that keeps texts, so that a killed run continues; or an open Store. restarts: how often
    an engine that dies is started anew.
    """
    items = wanted(engine, prompts, patches, sampling, samples)
    with Store(store) if not isinstance(store, Store) else nullcontext(store) as kept:
        fill(engine, [item for mine in items for item in mine], kept, restarts=restarts, progress=progress)
        return records(items, kept)


def wanted(
    engine: Engine, prompts: Sequence[Chat], patches: Sequence[Patch | str], sampling: Sampling, samples: int = 1
) -> list[list[Item]]:
    """What each patch asks for: an item for each prompt and sample. One that cannot be run has an error instead."""
    check_texts(sampling, "texts")
    if samples > 1 and sampling.temperature == 0:
        raise SnpatchError("texts: several samples of a prompt need a temperature above 0: greedy ones are the same")
    recipients = engine.requests.recipients(patches, len(patches))
    encoded = {recipient: _encoded(engine, prompts, recipient) for recipient in dict.fromkeys(recipients)}
    seeded = [_seeded(sampling, sample, samples) for sample in range(samples)]
    return [
        [
            _item(engine, patch, content, sampling, sample, index, prompt, ids)
            for index, (prompt, ids) in enumerate(zip(prompts, encoded[recipient], strict=True))
            for sample, sampling in enumerate(seeded)
        ]
        for patch, recipient in zip(patches, recipients, strict=True)
        for content in [_content(engine, patch)]
    ]


def _item(engine, patch, content, sampling, sample, index, prompt, ids) -> Item:
    asked = question(prompt)
    if isinstance(ids, str):
        return Item(None, index, asked, sample, error=ids)
    one = engine.requests.fitted(ids, sampling)
    # Two samples of the same prompt are two texts; two greedy ones are the same.
    copy = index if sampling.temperature > 0 else None
    key = digest_of({**content, "sampling": asdict(one), "prompt": ids, "copy": copy})
    return Item(key, index, asked, sample, engine.requests.patched(ids, patch, sampling=one))


def told(chats: Sequence[Chat], texts: Sequence[tuple[str | None, str | None]], samples: int) -> list[Item]:
    """What another process's `wanted` gave, from the key and error of each: items without requests."""
    return [
        Item(key, index // samples, question(chats[index // samples]), index % samples, error=error)
        for index, (key, error) in enumerate(texts)
    ]


def fill(
    engine: Engine,
    items: Sequence[Item],
    store: Store,
    *,
    restarts: int = RESTARTS,
    written: Callable[[str, str], None] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write what the store lacks. Returns when none of it is open, here or with another process.

    A run of the engine that fails is begun again without what was under way, which is then tried in smaller groups:
    the one text that fails alone is given up, and its error kept. written: is told prompt and completion of each text.
    """
    prompts = {item.key: item.prompt for item in items}
    by_key = {item.key: item.request for item in items if item.request is not None}
    for request in by_key.values():
        engine.executor.check_request(request)
    left, failed = store.ask(list(by_key)), 0
    while left:
        claimed: list[str] = []
        try:
            with closing(engine.run(_claimed(store, by_key, claimed))) as outputs:
                for index, output in outputs:
                    key = claimed[index]
                    if output.error is not None:
                        store.suspect(str(output.error), [key])
                    else:
                        completion = Completion.of(by_key[key], output)
                        store.keep(key, text_of(completion))
                        if written:
                            written(prompts[key], completion.text)
                    left, failed = left - 1, 0
                    if progress:
                        progress(len(by_key) - left, len(by_key))
        except SnpatchError as error:
            if isinstance(error, BrokenJudgeError | ReceiptError) and not isinstance(error, SpoiledEngineError):
                raise  # nothing that such an engine writes can be used, and nothing that such a judge says
            failed += 1
            if not store.suspect(str(error)) or failed == GIVE_UP:
                raise  # it is none of the texts' doing
            print(f"snpatch: a run failed and is begun again: {error}", file=sys.stderr)
            if isinstance(error, EngineCrashedError):
                if not restarts:
                    raise
                restarts -= 1
                engine.restart()
        left = store.missing()
        if left and not claimed:
            time.sleep(POLL_S)
        if progress:
            progress(len(by_key) - left, len(by_key))


def records(items: Sequence[Sequence[Item]], store: Store) -> list[list[dict]]:
    """A record of each item, see `write`."""
    keys = {item.key for mine in items for item in mine if item.key is not None}
    texts = store.texts(keys)
    errors = store.errors(keys - texts.keys())
    return [[_record(item, texts.get(item.key), errors.get(item.key)) for item in mine] for mine in items]


def _claimed(store: Store, by_key: dict[str, Request], claimed: list[str]) -> Iterator[Request]:
    """Requests as the engine has room for them, each noted in `claimed`. Suspects end the run after their own group."""
    while keys := store.claim(CLAIM):
        for key in keys:
            claimed.append(key)
            yield by_key[key]
        if store.is_suspect(keys[0]):
            return


def _encoded(engine: Engine, prompts: Sequence[Chat], recipient: str) -> list[list[int] | str]:
    """Token ids of each prompt, or why it has none."""
    try:
        return engine.encode(prompts, recipient)
    except SnpatchError:
        if not len(prompts) or isinstance(prompts, str):
            raise
    found: list[list[int] | str] = []
    for prompt in prompts:
        try:
            found += engine.encode([prompt], recipient)
        except SnpatchError as error:
            found.append(str(error))
    return found


def _seeded(sampling: Sampling, sample: int, samples: int) -> Sampling:
    """The sampling of one of several samples: each has a seed of its own, from the sampling's on."""
    return sampling if samples == 1 else replace(sampling, seed=(sampling.seed or 0) + sample)


def _content(engine: Engine, patch: Patch | str) -> dict:
    """What names a text besides its prompt and sampling, by content."""
    name = patch if isinstance(patch, str) else patch.recipient
    content = {
        "version": GENERATION_VERSION,
        "recipient": engine.fingerprint(name),
        "ends": sorted(engine.requests.model(name).weights.eos_ids),
    }
    if isinstance(patch, str):
        return content
    return content | {"interventions": [_content_of(engine, one) for one in patch.interventions if len(one.window)]}


def _content_of(engine: Engine, intervention: Intervention) -> dict:
    content = intervention.content(engine.fingerprint)
    del content["ranking"], content["window"]  # their order within a window is nothing to a text
    return content | {"neurons": intervention.ranking.window_fingerprint(intervention.window)}


def text_of(completion: Completion) -> Text:
    """A completion as it is kept."""
    return Text(completion.text, completion.token_ids, completion.finish_reason, completion.overwrites)


def _record(item: Item, text: Text | None, error: str | None) -> dict:
    error, completion = item.error or error, None if text is None else text.completion
    record = {"prompt_index": item.prompt_index, "prompt": item.prompt, "sample": item.sample}
    record["state"] = state_of(completion, error)
    if text is not None:
        return record | asdict(text)
    nothing = {"completion": None, "token_ids": [], "finish_reason": None, "overwrites": 0}
    return record | nothing | {"error": error}
