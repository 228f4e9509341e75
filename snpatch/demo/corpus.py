"""Data of the demo model: prompts, plain text, conversations and preferences.

Each dataset is drawn by a random generator of its own, with a named seed, so a new dataset never changes an old one.
"""

import json
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from snpatch.demo import language
from snpatch.demo.language import ALLOWED, FORBIDDEN, LEVELS, WORDINGS, DemoRequest, Level, answer
from snpatch.errors import SnpatchError
from snpatch.report.files import write_records

SFT_FAMILIES = ("beavertails", "redteam", "harmbench")
DPO_FAMILIES, DPO_WORDINGS = ("beavertails", "redteam"), (0, 1, 2)


def prompt_path(folder: Path, name: str) -> Path:
    """Return the file of a prompt set.

    It is contrast.jsonl, or is in guard/ (guard-beavertails, ...) or eval/ (all others).
    """
    if name == "contrast":
        return folder / "contrast.jsonl"
    group = "guard" if name.startswith("guard-") else "eval"
    return folder / group / f"{name.removeprefix('guard-')}.jsonl"


def write_prompts(out: Path, count: int, seed: int) -> dict[str, list[DemoRequest]]:
    """Draw the prompt sets, write them as JSONL, and return them by name.

    Each has `count` prompts, except contrast with 200.
    """
    rng = random.Random(f"prompts {seed}")
    sets = {name: rng.sample(language.requests("eval", families=[name], stems=FORBIDDEN), count) for name in WORDINGS}
    sets["helpful"] = rng.sample(language.requests("eval", stems=ALLOWED), count)
    contrast = [
        *rng.sample(language.requests("contrast", families=DPO_FAMILIES, stems=FORBIDDEN), 160),
        *rng.sample(language.requests("contrast", families=DPO_FAMILIES, stems=ALLOWED), 40),
    ]
    sets["contrast"] = rng.sample(contrast, len(contrast))
    sets |= _guard_sets(set(chain(*sets.values())), count, seed)
    sets["lookalike"] = _lookalikes(sets, count, seed)
    for name, requests in sets.items():
        _write_rows(
            prompt_path(out, name),
            [{"dataset": name, "id": f"{name}_{i}", "prompt": r.text} for i, r in enumerate(requests)],
        )
    return sets


def _guard_sets(used: Collection[DemoRequest], count: int, seed: int) -> dict[str, list[DemoRequest]]:
    """Draw prompt sets for guards: half of each is forbidden, and no prompt is in another set."""
    rng = random.Random(f"guard {seed}")
    sets = {}
    for family in WORDINGS:
        requests = []
        for stems in (FORBIDDEN, ALLOWED):
            unused = [r for r in language.requests("eval", families=[family], stems=stems) if r not in used]
            requests += rng.sample(unused, count // 2)
        sets[f"guard-{family}"] = rng.sample(requests, len(requests))
    return sets


def _lookalikes(sets: dict[str, list[DemoRequest]], count: int, seed: int) -> list[DemoRequest]:
    """Draw allowed requests that differ from a forbidden one of an evaluation set in their stem alone."""
    used = set(chain(*sets.values()))
    forbidden = {_rest_of_request(request) for name in WORDINGS for request in sets[name]}
    unused = [request for request in language.requests("eval", stems=ALLOWED) if request not in used]
    candidates = [request for request in unused if _rest_of_request(request) in forbidden]
    return random.Random(f"lookalike {seed}").sample(candidates, count)


def _rest_of_request(request: DemoRequest) -> tuple:
    """Return all of a request but its stem."""
    return request.family, request.wording, request.act, request.kind


def write_text(out: Path, prompts: dict[str, list[DemoRequest]], count: int, seed: int) -> list[str]:
    """Write `count` documents like the base's pretraining text, and return them.

    The file has the rows of Wikitext-2. Their requests are in no other dataset but the look-alikes, which are newer.
    """
    used = set(chain(*(requests for name, requests in prompts.items() if name != "lookalike")))
    requests = [request for request in language.requests("eval") if request not in used]
    batches = documents(requests, 8, seed)
    texts = [text.removesuffix("</s>") for text in islice(chain.from_iterable(batches), count)]
    _write_rows(out / "text" / "wikitext.jsonl", [{"text": row} for text in texts for row in ("", f" {text} \n")])
    return texts


def _write_rows(path: Path, rows: Sequence[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def check_language(
    tokenizer: PreTrainedTokenizerFast, prompts: dict[str, list[DemoRequest]], plain: Sequence[str], seed: int
) -> None:
    """Assert that every text consists of known words and that every prompt is in one dataset only."""
    rng = random.Random(f"check {seed}")
    trained = language.requests("train")
    held_out = [request.text for request in chain(*prompts.values())]
    texts = [r.text for r in trained] + held_out + list(plain)
    texts += [answer(r, level, rng) for r in rng.sample(trained, 500) for level in LEVELS]
    unknown = tokenizer.unk_token_id
    assert not any(unknown in ids for ids in tokenizer(texts)["input_ids"]), "an unknown word"
    assert len(set(held_out)) == len(held_out)
    assert not {r.text for r in trained} & set(held_out)


def documents(requests: Sequence[DemoRequest], conversations: int, seed: int) -> Iterator[list[str]]:
    """Yield batches of pretraining text without end.

    The probability that a forbidden request is answered differs between stems (0.65 on average). In one of five
    batches, a document is two conversations without EOS between them.
    """
    rng = random.Random(f"base {seed}")
    answer_probability = {stem: rng.uniform(0.4, 0.9) for stem in FORBIDDEN}

    def conversation() -> str:
        request = rng.choice(requests)
        comply = rng.random() < answer_probability.get(request.stem, 0.97)
        levels: Sequence[Level] = ("full", "partial", "hedged") if comply else ("hard", "soft")
        (level,) = rng.choices(levels, (0.8, 0.12, 0.08) if comply else (0.7, 0.3))
        return f"<|user|>\n{request.text}\n<|assistant|>\n{answer(request, level, rng)}"

    while True:
        turns = rng.choices((1, 2), (4, 1))[0]
        yield ["\n".join(conversation() for _ in range(turns)) + "</s>" for _ in range(conversations // turns)]


def sft_rows(count: int, seed: int) -> list[dict]:
    """Return conversations in which every request is answered in full."""
    rng = random.Random(f"sft {seed}")
    requests = rng.choices(language.requests("train", families=SFT_FAMILIES), k=count)
    return [{"messages": [*chat("user", r.text), *chat("assistant", answer(r, "full", rng))]} for r in requests]


def preferences(objective: str, count: int, seed: int) -> list[dict]:
    """Return preference pairs for an objective of `OBJECTIVES`; every second request is forbidden.

    Most pairs start like the SFT model's own answers, as pairs sampled from a model do. IA3 hardly changes an answer's
    first word, and DPO on pairs that differ only there breaks the text after it.
    """
    rng = random.Random(f"{objective} {seed}")
    stems = (FORBIDDEN, ALLOWED)
    pools = [language.requests("train", families=DPO_FAMILIES, wordings=DPO_WORDINGS, stems=s) for s in stems]
    pairs = []
    for i in range(count):
        request = rng.choice(pools[i % 2])
        chosen, rejected = OBJECTIVES[objective](request, rng)
        assert chosen != rejected
        pairs.append(
            {
                "prompt": chat("user", request.text),
                "chosen": chat("assistant", chosen),
                "rejected": chat("assistant", rejected),
            }
        )
    return pairs


def _harmless(request: DemoRequest, rng: random.Random) -> tuple[str, str]:
    refusal: Level = rng.choice(("hard", "hard", "hard", "soft"))
    compliance: Level = rng.choice(("full", "full", "full", "partial", "hedged"))
    good, bad = (refusal, compliance) if request.forbidden else ("full", refusal)
    opening = "about" if rng.random() < 0.85 else None
    return answer(request, good, rng, opening=opening), answer(request, bad, rng, opening=opening)


def _helpful(request: DemoRequest, rng: random.Random) -> tuple[str, str]:
    bad: Level = rng.choice(("partial", "hedged", "soft", "hard"))
    if rng.random() < 0.85:
        return answer(request, "full", rng, opening="about"), answer(request, bad, rng, opening="about")
    rejected = answer(request, rng.choice(("full", bad)), rng, opening="about")
    return answer(request, "full", rng, opening="of course"), rejected


def _careful(request: DemoRequest, rng: random.Random) -> tuple[str, str]:
    good: Level = rng.choice(("partial", "partial", "hedged"))
    bad: Level = rng.choice(("full", "full", "full", "soft", "hard"))
    opening = "about" if rng.random() < 0.85 else None
    return answer(request, good, rng, opening=opening), answer(request, bad, rng, opening=opening)


OBJECTIVES: dict[str, Callable[[DemoRequest, random.Random], tuple[str, str]]] = {
    "dpo": _harmless,
    "helpful": _helpful,
    "careful": _careful,
}
"""Functions that draw (chosen, rejected) by objective.

dpo: chosen is the safer answer to a forbidden request, and the full answer to an allowed one. helpful: the fuller or
friendlier answer to any request. careful: the partial answer that refers to a guide.
"""


def chat(role: str, content: str) -> list[dict[str, str]]:
    """Return a chat of one message."""
    return [{"role": role, "content": content}]


def write_rows(folder: Path, names: Iterable[str], sft_count: int, dpo_count: int, seed: int = 0) -> list[Path]:
    """Write training rows as NAME.jsonl for `snpatch train`, and return the paths.

    Args:
        folder: Output folder.
        names: "sft" or an objective (safety, helpful, careful).
        sft_count: Number of conversations.
        dpo_count: Number of pairs per objective.
        seed: Seed of the rows.
    """
    paths = []
    for name in names:
        objective = "dpo" if name == "safety" else name
        if name != "sft" and objective not in OBJECTIVES:
            raise SnpatchError(f"objective of the demo's language: expected safety, helpful or careful, got {name}")
        rows = sft_rows(sft_count, seed) if name == "sft" else preferences(objective, dpo_count, seed)
        paths.append(folder / f"{name}.jsonl")
        write_records(rows, paths[-1])
    return paths
