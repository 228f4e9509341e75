"""Sweeps: their points, Eq. 4 and its intervals, random controls, resuming."""

import csv
import io
import json
import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save

from snpatch import Engine, Patch, Ranking, Sampling, SnpatchError, Window
from snpatch.experiments.common.sweep_report import build_headline, build_sweep_report
from snpatch.report import files, terminal
from snpatch.statistics import causal_effect, interval, paired_p
from snpatch.sweeps.config import SweepConfig
from snpatch.sweeps.store import OLD_STORE_FILE, STORE_FILE, Store
from snpatch.sweeps.sweep import sweep

GOLDEN = Path(__file__).parents[1] / "goldens" / "A"
PROMPTS = [
    [{"role": "user", "content": prompt["content"]}]
    for prompt in json.loads((GOLDEN / "prompts.json").read_text())["prompts"][:5]
]
GREEDY = Sampling(max_tokens=6)


@pytest.fixture(scope="module")
def engine():
    adapters = {"sft": GOLDEN / "adapters/sft", "dpo": [GOLDEN / "adapters/sft", GOLDEN / "adapters/dpo"]}
    return Engine(GOLDEN / "model", adapters, backend="transformers", template="tulu")


@pytest.fixture(scope="module")
def ranking(engine):
    return engine.contrast(PROMPTS, "sft", "dpo", sampling=GREEDY, exclude_layers=())


def judge(prompts, completions):
    """Return scores that depend only on the completion."""
    return [sum(map(ord, completion)) % 97 / 10 for completion in completions]


def run(engine, ranking, store=None, judge=judge, **changes):
    config = SweepConfig(**{"recipients": ("sft", "base"), "donors": "dpo", "windows": (0, 70, (70, 300), 1408),
                            "controls": 2, "sampling": GREEDY, "resamples": 200, **changes})  # fmt: skip
    judges = judge if isinstance(judge, dict) else {"cost": judge}
    return sweep(engine, PROMPTS, {"safety": ranking}, judges, config, store=store)


def test_each_point_equals_a_separate_engine_run(engine, ranking):
    result = run(engine, ranking)
    points = {(r["recipient"], r["ranking"], r["control_seed"], r["rank_lo"], r["rank_hi"]) for r in result.records}
    controlled = [(0, 0), (0, 70), (70, 300)]
    assert len(points) == 3 + 2 * (4 + 2 * len(controlled)), "all 1408 neurons leave none for a disjoint control"
    for recipient, name, seed, lo, hi in points:
        patch = recipient
        if name is not None and seed is None:
            patch = Patch(recipient, "dpo", ranking, Window(lo, hi))
        elif name is not None:
            patch = Patch(recipient, "dpo", ranking.random_control((lo, hi), seed=seed), hi - lo)
        expected = [completion.text for completion in engine.generate(PROMPTS, patch, GREEDY)]
        mine = [
            r["completion"]
            for r in result.records
            if (r["recipient"], r["ranking"], r["control_seed"], r["rank_lo"], r["rank_hi"])
            == (recipient, name, seed, lo, hi)
        ]
        assert mine == expected
    assert any("[0, 1408) has no random control" in note for note in result.notes)


def test_rows_have_means_effects_and_intervals_of_the_scores(engine, ranking):
    result = run(engine, ranking)
    scores = {}
    for record in result.records:
        key = record["recipient"], record["ranking"], record["control_seed"], record["rank_lo"], record["rank_hi"]
        scores.setdefault(key, []).append(judge([], [record["completion"]])[0])
    for row in result.rows:
        mine = np.array(scores[row.recipient, row.ranking, row.control_seed, row.rank_lo, row.rank_hi])
        assert row.mean == pytest.approx(mine.mean())
        assert row.mean_low <= row.mean <= row.mean_high
        assert row.neuron_fraction == (row.rank_hi - row.rank_lo) / 1408
        if row.ranking is None:
            assert row.effect is None
            continue
        recipient = np.array(scores[row.recipient, None, None, 0, 0]).mean()
        donor = np.array(scores["dpo", None, None, 0, 0]).mean()
        assert row.effect == pytest.approx((mine.mean() - recipient) / (donor - recipient))
        assert row.effect_low <= row.effect <= row.effect_high
    by_window = {(row.recipient, row.rank_hi): row for row in result.rows if row.ranking and row.control_seed is None}
    for recipient in ("sft", "base"):
        assert by_window[recipient, 0].effect == 0
        assert by_window[recipient, 1408].effect == pytest.approx(1)


def test_causal_effect_on_constructed_scores():
    """Check Eq. 4 and its paired resampling: halving each prompt's own gap has effect 0.5 without spread."""
    gap = np.array([1.0, 5.0, 2.0, 9.0])
    recipient = np.array([3.0, 1.0, 4.0, 2.0])
    donor = recipient - gap
    assert causal_effect(recipient - gap / 2, recipient, donor) == pytest.approx((0.5, 0.5, 0.5))
    assert causal_effect(recipient, recipient, donor)[0] == 0
    assert causal_effect(donor, recipient, donor)[0] == pytest.approx(1)
    assert causal_effect(recipient + gap, recipient, donor)[0] == pytest.approx(-1), "worse than before"
    assert causal_effect(recipient - 2 * gap, recipient, donor)[0] == pytest.approx(2), "past the donor"
    assert causal_effect(recipient, recipient, recipient) == (None, None, None)
    one_sided = np.array([gap[0], 0, 0, 0])  # all of the first prompt's gap, none of the others'
    value, low, high = causal_effect(recipient - one_sided, recipient, donor)
    assert value == pytest.approx(1 / 17)
    assert low == 0
    assert high > value


def test_interval_covers_the_mean_at_its_confidence():
    draw = np.random.default_rng(1)
    covered = [low <= 0 <= high for _, low, high in (interval(np.mean, draw.normal(size=40)) for _ in range(300))]
    assert 0.88 < np.mean(covered) < 0.99


def test_paired_p_is_the_t_test_over_prompts():
    before, after = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.5, 1.0, 2.0, 4.5])
    difference = after - before
    t = difference.mean() / (difference.std(ddof=1) / 2)
    from scipy.stats import t as student

    assert paired_p(after, before) == pytest.approx(2 * student.sf(abs(t), 3))
    assert paired_p(before, before) is None
    assert paired_p([1.0], [2.0]) is None


def test_promise_8_killed_sweep_resumes(engine, ranking, tmp_path, written):
    whole = run(engine, ranking)
    written.clear()
    run(engine, ranking, store=tmp_path)
    keys = list(written)
    assert len(keys) == len(set(keys)) > 30
    with sqlite3.connect(tmp_path / STORE_FILE) as file:  # as if it had been killed after the 20th text
        file.executemany("DELETE FROM texts WHERE key = ?", [(key,) for key in keys[20:]])
        file.execute("DELETE FROM work")
    written.clear()
    resumed = run(engine, ranking, store=tmp_path)
    assert sorted(written) == sorted(keys[20:])
    assert resumed.records == whole.records
    assert resumed.rows == whole.rows
    written.clear()
    other = Ranking.from_order(ranking.top(100).flip(0), ranking.shape)
    run(engine, other, store=tmp_path, windows=(50,), controls=0)
    assert len(written) == 2 * len(PROMPTS), "another ranking must not find the first one's texts"


def model_with(folder, **files) -> Path:
    """Return a copy of the golden model with other files."""
    shutil.copytree(GOLDEN / "model", folder)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


@pytest.fixture
def written(monkeypatch):
    """Return a list that collects the keys of stored completions."""
    keys, original = [], Store.add

    def keep(self, key, text):
        keys.append(key)
        return original(self, key, text)

    monkeypatch.setattr(Store, "add", keep)
    return keys


SFT, DPO = GOLDEN / "adapters/sft", [GOLDEN / "adapters/sft", GOLDEN / "adapters/dpo"]
SMALL = {"windows": (70,), "controls": 0, "recipients": ("sft",)}


def another_byte() -> bytes:
    weights = load_file(GOLDEN / "model/model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"].view(torch.uint8)[0, 0] ^= 1
    return save(weights)


def another_config() -> bytes:
    config = json.loads((GOLDEN / "model/config.json").read_text())
    return json.dumps(config | {"rms_norm_eps": 2e-6}).encode()


@pytest.mark.parametrize(
    ("is_new", "files", "adapters", "options"),
    [
        (False, {}, {"sft": SFT, "dpo": DPO}, {}),
        (False, {}, {"more": DPO, "dpo": DPO, "sft": SFT}, {"batch_size": 2}),
        (True, {"model__safetensors": another_byte()}, {"sft": SFT, "dpo": DPO}, {}),
        (True, {"config__json": another_config()}, {"sft": SFT, "dpo": DPO}, {}),
        (True, {}, {"sft": DPO, "dpo": SFT}, {}),
        (True, {}, {"sft": SFT, "dpo": DPO}, {"dtype": "bfloat16"}),
    ],
    ids=["another place", "more adapters", "another byte", "another config", "other adapters", "another type"],
)
def test_completions_are_stored_by_content(engine, ranking, tmp_path, written, is_new, files, adapters, options):
    """Find completions of equal models in other folders, but not of models that differ in one byte."""
    first = run(engine, ranking, store=tmp_path, **SMALL)
    assert len(written) == 2 * len(PROMPTS) + len(PROMPTS)
    written.clear()
    same = {"dtype": engine.config.dtype, "template": engine.config.template}
    folder = model_with(tmp_path / "copy", **files)
    other = Engine(folder, adapters, backend="transformers", **{**same, **options})
    found = run(other, ranking, store=tmp_path, **SMALL)
    assert bool(written) == is_new
    assert is_new or found.records == first.records


def test_completions_of_renamed_models_are_found(engine, ranking, tmp_path, written):
    first = run(engine, ranking, store=tmp_path, **SMALL)
    written.clear()
    same = {"dtype": engine.config.dtype, "template": engine.config.template}
    renamed = Engine(GOLDEN / "model", {"s": SFT, "d": DPO}, backend="transformers", **same)
    config = SweepConfig(("s",), "d", (70,), controls=0, sampling=GREEDY)
    found = sweep(renamed, PROMPTS, {"safety": ranking}, {"cost": judge}, config, store=tmp_path)
    assert not written
    assert [r["completion"] for r in found.records] == [r["completion"] for r in first.records]


def test_promise_4_overflowing_strength_fails_only_its_own_completions(engine, ranking, tmp_path):
    """Store and judge no such completion; all others equal those of a sweep without that strength."""
    seen = []

    def watching(prompts, completions):
        seen.extend(completions)
        return judge(prompts, completions)

    windows = (0, 70, 1408)
    want = run(engine, ranking, controls=0, windows=windows).records
    result = run(engine, ranking, tmp_path, watching, controls=0, windows=windows, strengths=(1.0, 1e19))
    broken = [r for r in result.records if r["strength"] == 1e19 and r["rank_hi"]]
    assert len(broken) == 2 * 2 * len(PROMPTS)
    for record in broken:
        assert record["completion"] is None
        assert "overflowed in float32" in record["error"]
        assert "under its patch" in record["error"]
        assert record["scores"] == {"cost": None}
    others = [r for r in result.records if r["strength"] != 1e19]
    assert [r["completion"] for r in others] == [r["completion"] for r in want]
    assert set(seen) == {r["completion"] for r in result.records if r not in broken}
    assert {row.failed for row in result.rows if row.strength == 1e19 and row.rank_hi} == {len(PROMPTS)}
    assert {row.failed for row in result.rows if row.strength != 1e19} == {0}
    with Store(tmp_path) as store:
        assert store.status().failed == len(broken)


def test_sweep_without_or_with_overlapping_controls(engine, ranking):
    assert not [r for r in run(engine, ranking, controls=0).rows if r.control_seed is not None]
    overlapping = run(engine, ranking, disjoint=False)
    assert not overlapping.notes
    assert {r.rank_hi for r in overlapping.rows if r.control_seed is not None} == {0, 70, 300, 1408}


def test_controls_are_drawn_from_all_neurons_outside_their_window(ranking):
    """Do not draw from outside the largest window: that would leave only neurons that change little."""
    reached = set()
    for seed in range(40):
        control = ranking.random_control((0, 70), seed=seed)
        reached |= set(ranking.rank[tuple(control.top(70).t())].tolist())
    assert min(reached) >= 70
    assert len(reached & set(range(70, 300))) > 150


def test_store_separates_templates_and_samples(engine, ranking, tmp_path):
    adapters = {"sft": GOLDEN / "adapters/sft", "dpo": [GOLDEN / "adapters/sft", GOLDEN / "adapters/dpo"]}
    template = b"{% for m in messages %}{{ m['content'] }}{% endfor %}"
    folder = model_with(tmp_path / "bare", chat_template__jinja=template)
    bare = Engine(folder, adapters, backend="transformers", template="tokenizer")
    small = {"windows": (70,), "controls": 0, "recipients": ("sft",)}
    first = run(engine, ranking, store=tmp_path, **small)
    second = run(bare, ranking, store=tmp_path, **small)
    assert [r["completion"] for r in second.records] == [r["completion"] for r in run(bare, ranking, **small).records]
    assert [r["completion"] for r in first.records] != [r["completion"] for r in second.records]
    config = SweepConfig(("sft",), "dpo", (70,), controls=0, sampling=Sampling(temperature=1.0, max_tokens=6))
    sampled = sweep(engine, [PROMPTS[0]] * 4, {"safety": ranking}, {"cost": judge}, config, store=tmp_path)
    assert len({r["completion"] for r in sampled.records if r["ranking"]}) > 1


def test_folder_of_older_version_raises(engine, ranking, tmp_path):
    (tmp_path / OLD_STORE_FILE).write_text("{}\n")
    with pytest.raises(SnpatchError, match=f"{OLD_STORE_FILE} is from an older snpatch, .* Move it away"):
        run(engine, ranking, store=tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"windows": ()}, "windows: expected at least one value"),
        ({"windows": (1409,)}, r"k: expected 0\.\.1408 \(number of ranked neurons\), got 1409"),
        ({"recipients": ("sft", "dpo")}, "expected a model that is no recipient, got 'dpo'"),
        ({"recipients": ("tulu",)}, "got 'tulu'"),
        ({"controls": -1}, "controls"),
        ({"control_kind": "nowhere", "controls": 0}, "control_kind: expected one of"),
        ({"confidence": 2.0}, "confidence"),
        ({"judge": lambda prompts, completions: [float("nan")] * len(prompts)}, "'cost'.*finite score, got nan"),
        ({"judge": lambda prompts, completions: [1.0]}, "'cost'.*one a completion, got 1"),
    ],
)
def test_sweep_with_invalid_config_raises(engine, ranking, changes, message):
    with pytest.raises(SnpatchError, match=message):
        run(engine, ranking, **changes)


def test_report_writes_tables_plots_and_headline(engine, ranking, tmp_path):
    result = run(engine, ranking, judge={"cost": judge, "length": lambda p, c: [len(text) for text in c]})
    report = build_sweep_report(result, "curve")
    paths = files.write_report(report, tmp_path)
    assert sorted(path.name for path in paths) == sorted(path.name for path in tmp_path.iterdir())
    rows = list(csv.DictReader((tmp_path / "curve.csv").open()))
    assert [float(row["mean"]) for row in rows] == [row.mean for row in result.rows]
    assert [row["mean"] for row in json.loads((tmp_path / "curve.json").read_text())["rows"]] == [
        row.mean for row in result.rows
    ]
    assert len((tmp_path / "curve-records.jsonl").read_text().splitlines()) == len(result.records)
    for plot in ("curve", "curve-length"):
        assert (tmp_path / f"{plot}.png").read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in (tmp_path / f"{plot}.svg").read_text()
    assert [line.split(":")[0] for line in build_headline(result)] == ["sft", "base"] * 2


def test_each_judge_scores_all_completions(engine, ranking):
    both = run(engine, ranking, judge={"cost": judge, "length": lambda p, c: [len(text) for text in c]})
    assert both.judges == ["cost", "length"]
    alone = run(engine, ranking)
    assert [row for row in both.rows if row.judge == "cost"] == alone.rows
    for row in both.rows:
        key = row.recipient, row.ranking, row.control_seed, row.rank_lo, row.rank_hi
        mine = [
            r
            for r in both.records
            if (r["recipient"], r["ranking"], r["control_seed"], r["rank_lo"], r["rank_hi"]) == key
        ]
        assert row.mean == pytest.approx(np.mean([record["scores"][row.judge] for record in mine]))


def test_p_values_compare_with_recipient_and_random_neurons(engine, ranking):
    result = run(engine, ranking)
    scores = {}
    for r in result.records:
        scores.setdefault((r["recipient"], r["ranking"], r["control_seed"], r["rank_lo"], r["rank_hi"]), []).append(
            r["scores"]["cost"]
        )
    row = next(
        r for r in result.rows if (r.recipient, r.ranking, r.control_seed, r.rank_hi) == ("sft", "safety", None, 300)
    )
    own, plain = np.array(scores["sft", "safety", None, 70, 300]), np.array(scores["sft", None, None, 0, 0])
    random = np.mean([scores["sft", "safety", seed, 70, 300] for seed in range(2)], axis=0)
    assert row.p_vs_unpatched == paired_p(own, plain)
    assert row.p_vs_random == paired_p(own, random)
    assert next(r for r in result.rows if r.ranking and r.rank_hi == 0).p_vs_unpatched is None
    assert next(r for r in result.rows if r.ranking and r.rank_hi == 1408).p_vs_random is None


def with_donor_gain(result, gain):
    """Set the records' unpatched scores so that the donor's mean cost is `gain` lower, with some spread."""
    records = []
    for record in result.records:
        if record["ranking"] is None:
            cost = record["prompt_index"] % 2 - (gain if record["recipient"] == "dpo" else 0)
            spread = 0.1 * (record["prompt_index"] % 3 - 1) if record["recipient"] == "dpo" else 0
            record = record | {"scores": {"cost": cost + spread}}
        records.append(record)
    return replace(result, records=records)


def test_headline_names_smallest_window_within_ninety_percent_of_best(engine, ranking):
    result = with_donor_gain(run(engine, ranking, windows=(1408, 70, 1400), controls=0), gain=5)
    rows = [row for row in result.rows if row.recipient == "sft" and row.ranking]
    best = max(row.effect for row in rows)
    smallest = min((row for row in rows if row.effect >= 0.9 * best), key=lambda row: row.neuron_fraction)
    sentence = build_headline(result)[0]
    assert f"top {smallest.rank_hi} neurons of ranking safety (" in sentence
    assert "(95% CI " in sentence
    assert sentence.endswith("of the safety gain of dpo; no random control.")


@pytest.mark.parametrize(
    ("gain", "difference"), [(0, "-0.02 (95% CI -0.08 .. 0.04"), (-5, "+4.98 (95% CI 4.92 .. 5.04")]
)
def test_headline_of_a_donor_without_gain_says_so(engine, ranking, gain, difference):
    result = with_donor_gain(run(engine, ranking, windows=(70,), controls=0), gain)
    sentences = build_headline(result)
    assert len(sentences) == 2
    for recipient, sentence in zip(("sft", "base"), sentences, strict=True):
        assert sentence == f"{recipient}: the mean cost of dpo differs by {difference}, 5 prompts): no gain to recover."


def test_sweep_table_fits_100_columns(engine, ranking):
    both = {"cost": judge, "length": lambda prompts, completions: [float(len(text)) for text in completions]}
    report = build_sweep_report(run(engine, ranking, judge=both), "sweep")
    assert [table.title for table in report.displays] == ["mean cost (lower is safer)", "mean length"]
    screen = Console(width=100, file=io.StringIO())
    terminal.print_report(replace(report, headline=[]), screen)
    lines = screen.file.getvalue().splitlines()
    assert "…" not in screen.file.getvalue()
    unpatched = 3
    assert sum(line.startswith("│") for line in lines) == 2 * (unpatched + 2 * 4)


def test_sweep_without_prompts_raises(engine, ranking):
    config = SweepConfig(("sft",), "dpo", (1,))
    with pytest.raises(SnpatchError, match="one prompt"):
        sweep(engine, [], {"safety": ranking}, {"cost": judge}, config)


def test_headline_without_recovered_gain_says_so(engine, ranking):
    nothing = Ranking.from_order(torch.tensor([[0, 0]]), ranking.shape)
    result = with_donor_gain(run(engine, nothing, windows=(0,), controls=0), gain=5)
    assert build_headline(result)[0] == "sft: no window of ranking safety recovers any of the safety gain."
