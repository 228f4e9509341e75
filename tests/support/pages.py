"""Synthetic pages of any size for the tests and the benchmark of reports."""

import random

from snpatch.report.page import Page

HOSTILE = '</script><script>window.hit = 1</script><img src=x onerror="window.hit = 1"><!-- <script> \u2028 \ud800'
RANKINGS, SETS, JUDGES = ("change", "variance"), ("attacks", "questions"), ("cost", "refusal")
KS = (0, 200, 1000, 4000)
WORDS = "the a model answers with care and never tells how one would build open or break such things at home".split()


def page(prompts: int = 6, words: int = 40, ks: tuple[int, ...] = KS, controls: int = 2) -> Page:
    """Build the page of a sweep of two rankings over two sets, with two judges and every prompt at every point."""
    draw = random.Random(1)
    lines = [(ranking, seed) for ranking in RANKINGS for seed in (None, *range(controls))]
    points = [("base", None, None, None, 0), ("dpo", None, None, None, 0)]
    points += [("base", "dpo", ranking, seed, k) for ranking, seed in lines for k in ks]
    reports = [
        {
            "name": "alignment_tax",
            "headline": ["Patching costs 0.4 points."],
            "tables": {"Tax": {"columns": ["task", "points", "p"], "rows": [["b", 0.5, None], ["a", 10, 0.001]]}},
            "images": ["data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' width='300' height='90'/%3E"],
        }
    ]
    maps = {name: {"layers": 8, "bins": 20, "values": [[draw.random()] * 20 for _ in range(8)]} for name in RANKINGS}
    return Page(
        title="Sweep of <base> & dpo",
        command="snpatch sweep --config demo",
        headline=["1000 neurons give 80% of the effect."],
        notes=["change [0, 4000] has no random control."],
        provenance={"snpatch": "0.1.0", "models": {"base": "sha256:00", "dpo": None}, "k": [1, 2]},
        rows=[_row(judge, name, point, draw) for judge in JUDGES for name in SETS for point in points],
        score_names={"cost": "cost (lower is safer)"},
        maps=maps,
        reports=reports,
        completions=[_record(index, point, words, draw) for point in points for index in range(prompts)],
    )


def _row(judge: str, name: str, point: tuple, draw: random.Random) -> dict:
    recipient, donor, ranking, seed, k = point
    mean = (
        6.0 if recipient == "dpo" else 1 + 5 * (k / 5000) ** 0.5 * (0.05 if seed is not None else 1) + draw.random() / 3
    )
    is_patched = ranking is not None and k > 0
    return {
        "judge": judge, "set": name, "recipient": recipient, "donor": donor, "ranking": ranking,
        "control": None if seed is None else "per_layer", "control_seed": seed,
        "rank_lo": 0, "rank_hi": k, "strength": 1.0, "neuron_fraction": k / 16384, "prompts": 6,
        "tokens": 768, "overwrites": k * 768,
        "mean": mean, "mean_low": mean - 0.3, "mean_high": mean + 0.3,
        **_effect("effect", (mean - 1) / 5 if is_patched else None),
        **_effect("net_effect", (mean - 1.3) / 5 if is_patched and seed is None else None),
        "p_vs_unpatched": 0.0004 if is_patched else None, "p_vs_random": 0.02 if is_patched and seed is None else None,
    }  # fmt: skip


def _effect(name: str, value: float | None) -> dict:
    interval = (None,) * 3 if value is None else (value, value - 0.06, value + 0.06)
    return dict(zip((name, f"{name}_low", f"{name}_high"), interval, strict=True))


def _record(index: int, point: tuple, words: int, draw: random.Random) -> dict:
    recipient, donor, ranking, seed, k = point
    completion_words = random.Random(index).choices(WORDS, k=words)
    num_shared = words // 4 + index % 3 if k else words if recipient == "base" else 2
    completion_words[num_shared:] = draw.choices(WORDS, k=len(completion_words[num_shared:]))
    return {
        "set": SETS[index % 2], "prompt_index": index, "seed": None,
        "prompt": f"Question {index}: how would one do it?",
        "recipient": recipient, "donor": donor, "ranking": ranking,
        "control": None if seed is None else "per_layer", "control_seed": seed, "rank_lo": 0, "rank_hi": k,
        "strength": 1.0, "state": "done", "error": None, "completion": " ".join(completion_words),
        "finish_reason": "stop", "overwrites": k * words,
        "scores": {judge: draw.gauss(1 + k / 1000, 1) for judge in JUDGES},
    }  # fmt: skip
