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
from snpatch.experiments.common.sweep_headline import build_headline
from snpatch.experiments.common.sweep_report import build_sweep_report
from snpatch.report import files, terminal
from snpatch.significance import control_p, paired_p
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
    """Return scores that depend only on the completion, and establish the gap of dpo to both recipients."""
    return [sum(map(ord, completion)) % 150 / 10 for completion in completions]


def run(engine, ranking, store=None, judge=judge, **changes):
    config = SweepConfig(**{"recipients": ("sft", "base"), "donors": "dpo", "windows": (0, 70, (70, 300), 1408),
                            "controls": 2, "extra_controls": (), "sampling": GREEDY, "resamples": 200,
                            **changes})  # fmt: skip
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
        completions = [
            r["completion"]
            for r in result.records
            if (r["recipient"], r["ranking"], r["control_seed"], r["rank_lo"], r["rank_hi"])
            == (recipient, name, seed, lo, hi)
        ]
        assert completions == expected
    assert any("[0, 1408) has no random control" in note for note in result.notes)


def test_rows_have_means_effects_and_intervals_of_the_scores(engine, ranking):
    result = run(engine, ranking)
    scores = {}
    for record in result.records:
        key = record["recipient"], record["ranking"], record["control_seed"], record["rank_lo"], record["rank_hi"]
        scores.setdefault(key, []).append(judge([], [record["completion"]])[0])
    for row in result.rows:
        row_scores = np.array(scores[row.recipient, row.ranking, row.control_seed, row.rank_lo, row.rank_hi])
        assert row.mean == pytest.approx(row_scores.mean())
        assert row.mean_low <= row.mean <= row.mean_high
        assert row.neuron_fraction == (row.rank_hi - row.rank_lo) / 1408
        if row.ranking is None:
            assert row.effect is None
            continue
        recipient = np.array(scores[row.recipient, None, None, 0, 0]).mean()
        donor = np.array(scores["dpo", None, None, 0, 0]).mean()
        assert row.effect == pytest.approx((row_scores.mean() - recipient) / (donor - recipient))
        assert row.effect_low <= row.effect <= row.effect_high
    by_window = {(row.recipient, row.rank_hi): row for row in result.rows if row.ranking and row.control_seed is None}
    for recipient in ("sft", "base"):
        assert by_window[recipient, 0].effect == 0
        assert by_window[recipient, 1408].effect == pytest.approx(1)


def test_promise_8_killed_sweep_resumes(engine, ranking, tmp_path, stored_keys):
    uninterrupted = run(engine, ranking)
    stored_keys.clear()
    run(engine, ranking, store=tmp_path)
    keys = list(stored_keys)
    assert len(keys) == len(set(keys)) > 30
    with sqlite3.connect(tmp_path / STORE_FILE) as file:  # as if it had been killed after the 20th text
        file.executemany("DELETE FROM texts WHERE key = ?", [(key,) for key in keys[20:]])
        file.execute("DELETE FROM work")
    stored_keys.clear()
    resumed = run(engine, ranking, store=tmp_path)
    assert sorted(stored_keys) == sorted(keys[20:])
    assert resumed.records == uninterrupted.records
    assert resumed.rows == uninterrupted.rows
    stored_keys.clear()
    other_ranking = Ranking.from_order(ranking.top(100).flip(0), ranking.shape)
    run(engine, other_ranking, store=tmp_path, windows=(50,), controls=0)
    assert len(stored_keys) == 2 * len(PROMPTS), "another ranking must not find the first one's texts"


def model_with(folder, **files) -> Path:
    """Return a copy of the golden model with other files."""
    shutil.copytree(GOLDEN / "model", folder)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


@pytest.fixture
def stored_keys(monkeypatch):
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
def test_completions_are_stored_by_content(engine, ranking, tmp_path, stored_keys, is_new, files, adapters, options):
    """Find completions of equal models in other folders, but not of models that differ in one byte."""
    first = run(engine, ranking, store=tmp_path, **SMALL)
    assert len(stored_keys) == 2 * len(PROMPTS) + len(PROMPTS)
    stored_keys.clear()
    shared_options = {"dtype": engine.config.dtype, "template": engine.config.template}
    folder = model_with(tmp_path / "copy", **files)
    copy_engine = Engine(folder, adapters, backend="transformers", **{**shared_options, **options})
    result = run(copy_engine, ranking, store=tmp_path, **SMALL)
    assert bool(stored_keys) == is_new
    assert is_new or result.records == first.records


def test_completions_of_renamed_models_are_found(engine, ranking, tmp_path, stored_keys):
    first = run(engine, ranking, store=tmp_path, **SMALL)
    stored_keys.clear()
    options = {"dtype": engine.config.dtype, "template": engine.config.template}
    renamed_engine = Engine(GOLDEN / "model", {"s": SFT, "d": DPO}, backend="transformers", **options)
    config = SweepConfig(("s",), "d", (70,), controls=0, extra_controls=(), sampling=GREEDY)
    result = sweep(renamed_engine, PROMPTS, {"safety": ranking}, {"cost": judge}, config, store=tmp_path)
    assert not stored_keys
    assert [r["completion"] for r in result.records] == [r["completion"] for r in first.records]


def test_promise_4_overflowing_strength_fails_only_its_own_completions(engine, ranking, tmp_path):
    """Store and judge no such completion; all others equal those of a sweep without that strength."""
    judged_texts = []

    def record_and_judge(prompts, completions):
        judged_texts.extend(completions)
        return judge(prompts, completions)

    windows = (0, 70, 1408)
    want = run(engine, ranking, controls=0, windows=windows).records
    result = run(engine, ranking, tmp_path, record_and_judge, controls=0, windows=windows, strengths=(1.0, 1e19))
    failed_records = [r for r in result.records if r["strength"] == 1e19 and r["rank_hi"]]
    assert len(failed_records) == 2 * 2 * len(PROMPTS)
    for record in failed_records:
        assert record["completion"] is None
        assert "overflowed in float32" in record["error"]
        assert "under its patch" in record["error"]
        assert record["scores"] == {"cost": None}
    finite_records = [r for r in result.records if r["strength"] != 1e19]
    assert [r["completion"] for r in finite_records] == [r["completion"] for r in want]
    assert set(judged_texts) == {r["completion"] for r in result.records if r not in failed_records}
    assert {row.failed for row in result.rows if row.strength == 1e19 and row.rank_hi} == {len(PROMPTS)}
    assert {row.failed for row in result.rows if row.strength != 1e19} == {0}
    with Store(tmp_path) as store:
        assert store.status().failed == len(failed_records)


def test_sweep_without_or_with_overlapping_controls(engine, ranking):
    assert not [r for r in run(engine, ranking, controls=0).rows if r.control_seed is not None]
    overlapping = run(engine, ranking, disjoint=False)
    assert not any("control" in note for note in overlapping.notes)
    assert {r.rank_hi for r in overlapping.rows if r.control_seed is not None} == {0, 70, 300, 1408}


@pytest.fixture(scope="module")
def overlapping(engine, ranking):
    """Return a sweep with a window that leaves too few neurons in a layer, [0, 600), and one with all, [0, 1408)."""
    return run(engine, ranking, windows=(70, 600, 1408), controls=3)


@pytest.fixture(scope="module")
def overlap(ranking):
    """Return the fraction of [0, 600) for which its layers have no other neurons, counted by hand."""
    width = ranking.shape[1]
    missing = [max(0, 2 * count - width) for count in ranking.layer_counts(600).tolist()]
    return sum(missing) / 600


def test_window_with_too_few_other_neurons_has_overlapping_controls(engine, ranking, overlapping, overlap):
    assert 0 < overlap < 0.5
    shares = {(row.control_seed, row.rank_hi): row.control_overlap for row in overlapping.rows if row.ranking}
    assert shares == {
        **{(seed, 70): 0 for seed in (None, 0, 1, 2)},
        **{(seed, 600): overlap for seed in (None, 0, 1, 2)},
        (None, 1408): None,
    }
    assert {row.control_overlap for row in overlapping.rows if row.ranking is None} == {None}
    for seed in range(3):
        control = ranking.random_control(600, seed=seed, fill_up=True)
        expected = [c.text for c in engine.generate(PROMPTS, Patch("sft", "dpo", control, 600), GREEDY)]
        key = "sft", "safety", seed, 600
        assert expected == [
            r["completion"]
            for r in overlapping.records
            if (r["recipient"], r["ranking"], r["control_seed"], r["rank_hi"]) == key
        ]


def test_overlapping_controls_are_compared_and_noted_once(overlapping, overlap):
    scores = {}
    for r in overlapping.records:
        scores.setdefault((r["recipient"], r["control_seed"], r["rank_hi"]), []).append(r["scores"]["cost"])
    for row in overlapping.rows:
        if row.ranking and row.rank_hi == 600 and row.control_seed is None:
            random = [scores[row.recipient, seed, 600] for seed in range(3)]
            assert row.p_vs_random == pytest.approx(control_p(scores[row.recipient, None, 600], random, row.gap))
            assert row.net_effect is not None
    whole, note, *_ = overlapping.notes
    assert whole == (
        "safety [0, 1408) has no random control: no other neurons are left, so a control would be the window itself"
    )
    assert note == (
        "safety: random controls overlap with the window where too few other neurons are left: "
        f"[0, 600) by {overlap:.1%}; net_effect and p_vs_random are conservative there"
    )


def test_overlapping_controls_leave_other_rows_and_stored_completions_unchanged(
    engine, ranking, overlapping, tmp_path, stored_keys
):
    run(engine, ranking, store=tmp_path, windows=(70, 1408))
    before = len(stored_keys)
    again = run(engine, ranking, store=tmp_path, windows=(70, 600, 1408))
    added = {(r["control_seed"], r["rank_hi"]) for r in again.records if r["rank_hi"] == 600}
    assert added == {(None, 600), (0, 600), (1, 600)}
    assert len(stored_keys) - before == 2 * 3 * len(PROMPTS), "of two recipients, and nothing else is generated again"
    alone = run(engine, ranking, windows=(70, 1408), controls=3)
    # Those of all windows of a curve, and one that depends on the batch by rounding.
    joint = dict.fromkeys(("band_low", "band_high", "q_vs_random", "p_holm_vs_random", "logprob"))
    others = [replace(row, **joint) for row in overlapping.rows if row.rank_hi != 600]
    assert others == [replace(row, **joint) for row in alone.rows]
    logprobs = [row.logprob for row in overlapping.rows if row.rank_hi != 600]
    assert logprobs == pytest.approx([row.logprob for row in alone.rows], abs=1e-4)


def test_controls_of_last_layer_too_small_for_the_window_are_absent(engine, ranking):
    result = run(engine, ranking, windows=(353,), control_kind="last_layer", recipients=("sft",))
    assert not [row for row in result.rows if row.control_seed is not None]
    note, *_ = result.notes
    assert note.startswith(
        "safety [0, 353) has no random control: random_control: expected 353 neurons to draw from in"
    )


def test_report_marks_overlapping_controls(overlapping, overlap):
    report = build_sweep_report(overlapping, "sweep")
    (rows,) = report.tables.values()
    assert {row["rank_hi"] for row in rows if row["control_overlap"]} == {600}
    assert report.notes.count(overlapping.notes[1]) == 1
    reported = replace(overlapping, config=replace(overlapping.config, report_k=600))
    assert all(f"({overlap:.1%} of them in the window: conservative)" in line for line in build_headline(reported))


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
    template_engine = Engine(folder, adapters, backend="transformers", template="tokenizer")
    grid = {"windows": (70,), "controls": 0, "recipients": ("sft",)}
    first = run(engine, ranking, store=tmp_path, **grid)
    second = run(template_engine, ranking, store=tmp_path, **grid)
    assert [r["completion"] for r in second.records] == [
        r["completion"] for r in run(template_engine, ranking, **grid).records
    ]
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
        ({"report_k": 1.5}, r"report_k: expected a number of neurons, or a fraction in 0.0..1.0, got 1.5"),
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
    assert json.loads((tmp_path / "curve.json").read_text())["notes"] == result.notes != []
    assert len((tmp_path / "curve-records.jsonl").read_text().splitlines()) == len(result.records)
    for plot in ("curve", "curve-length"):
        assert (tmp_path / f"{plot}.png").read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in (tmp_path / f"{plot}.svg").read_text()
    assert [line.split(":")[0] for line in build_headline(result)] == ["sft", "base"] * 2


def test_each_judge_scores_all_completions(engine, ranking):
    result = run(engine, ranking, judge={"cost": judge, "length": lambda p, c: [len(text) for text in c]})
    assert result.judges == ["cost", "length"]
    cost_result = run(engine, ranking)
    assert [row for row in result.rows if row.judge == "cost"] == cost_result.rows
    for row in result.rows:
        key = row.recipient, row.ranking, row.control_seed, row.rank_lo, row.rank_hi
        records = [
            r
            for r in result.records
            if (r["recipient"], r["ranking"], r["control_seed"], r["rank_lo"], r["rank_hi"]) == key
        ]
        assert row.mean == pytest.approx(np.mean([record["scores"][row.judge] for record in records]))


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
    patched_scores = np.array(scores["sft", "safety", None, 70, 300])
    recipient_scores = np.array(scores["sft", None, None, 0, 0])
    random_scores = [scores["sft", "safety", seed, 70, 300] for seed in range(2)]
    assert row.p_vs_unpatched == paired_p(patched_scores, recipient_scores)
    assert row.p_vs_random == pytest.approx(control_p(patched_scores, random_scores, row.gap))
    assert next(r for r in result.rows if r.ranking and r.rank_hi == 0).p_vs_unpatched is None
    assert next(r for r in result.rows if r.ranking and r.rank_hi == 1408).p_vs_random is None


def test_sweep_table_fits_100_columns(engine, ranking):
    judges = {"cost": judge, "length": lambda prompts, completions: [float(len(text)) for text in completions]}
    report = build_sweep_report(run(engine, ranking, judge=judges), "sweep")
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


def test_sweep_over_clusters_needs_a_label_for_each_prompt(engine, ranking):
    config = SweepConfig(("sft",), "dpo", (70,), controls=0, sampling=GREEDY, cluster_by="category")
    arguments = engine, PROMPTS, {"safety": ranking}, {"cost": judge}, config
    with pytest.raises(SnpatchError, match="clusters: expected the category of each prompt, got none"):
        sweep(*arguments)
    with pytest.raises(SnpatchError, match=r"clusters: expected the number of prompts .* \{'prompts': 5\}, got"):
        sweep(*arguments, clusters={"prompts": ["a", "b"]})
    result = sweep(*arguments, clusters={"prompts": ["a", "a", "b", "b", "c"]})
    assert "prompts: intervals are over 3 clusters of prompts; fewer than 10 make them rough" in result.notes


def test_rows_count_broken_texts_and_compare_the_others(engine, ranking):
    """Compare with Engine.logprobs, and Eq. 4 over the prompts whose texts are not broken."""
    constants = run(engine, ranking, recipients=("sft",), windows=(70, 1000), strengths=(1.0, -9.0), controls=0)
    by_strength = {(row.strength, row.rank_hi): row for row in constants.rows if row.ranking}
    own = [r for r in constants.records if r["ranking"] is None]
    ids = engine.encode(PROMPTS, "sft")

    def likelier(records):
        prompts, texts = [ids[r["prompt_index"]] for r in records], [r["token_ids"] for r in records]
        values = [engine.logprobs(prompts, model, completions=texts) for model in ("sft", "dpo")]
        return np.array([[float(v.values.mean()) for v in by_model] for by_model in values]).max(axis=0)

    limit = likelier(own).min()  # the first percentile of ten texts
    num_broken = 0
    for (strength, k), row in by_strength.items():
        records = [r for r in constants.records if (r["strength"], r["rank_hi"]) == (strength, k)]
        logprobs = likelier(records)
        assert row.logprob == pytest.approx(logprobs.mean(), abs=1e-4)
        is_broken = logprobs < limit - 1e-3
        assert row.broken == pytest.approx(is_broken.mean())
        assert row.coherent_prompts == (~is_broken).sum()
        assert row.mean_tokens == np.mean([len(r["token_ids"]) for r in records])
        num_broken += is_broken.sum()
    assert num_broken > 0
    assert by_strength[1.0, 70].broken < by_strength[-9.0, 1000].broken
    unpatched = [row for row in constants.rows if row.ranking is None]
    assert all(row.broken is None and row.logprob is not None for row in unpatched)


def test_texts_are_read_once_and_again_only_by_new_models(engine, ranking, tmp_path, monkeypatch):
    read = []
    original = engine.requests.reading
    monkeypatch.setattr(
        engine.requests, "reading", lambda ids, models, texts: read.extend(models) or original(ids, models, texts)
    )
    run(engine, ranking, store=tmp_path, recipients=("sft",), windows=(70,), controls=0, coherence=False)
    assert not read
    run(engine, ranking, store=tmp_path, recipients=("sft",), windows=(70,), controls=0)
    assert set(read) == {"sft", "dpo"}
    read.clear()
    run(engine, ranking, store=tmp_path, recipients=("sft",), windows=(70,), controls=0)
    assert not read
    run(engine, ranking, store=tmp_path, recipients=("sft", "base"), windows=(70,), controls=0)
    assert "base" in read, "the texts of base, and those of the donor by base"


def test_extra_controls_patch_their_own_neurons_with_their_own_strength(engine, ranking):
    kinds = ("magnitude", "matched", "equal_energy")
    result = run(engine, ranking, recipients=("sft",), windows=(0, 70), extra_controls=kinds)
    own = next(row for row in result.rows if row.rank_hi == 70 and row.control is None)
    random = [ranking.random_control(70, seed=seed) for seed in range(2)]
    factors = [(ranking.energy(ranking, 70) / ranking.energy(control, 70)) ** 0.5 for control in random]
    patches = {
        ("magnitude", None): Patch("sft", "dpo", ranking.magnitude_control(70), 70),
        ("matched", None): Patch("sft", "dpo", ranking.matched_control(70), 70),
        **{("per_layer", seed): Patch("sft", "dpo", random[seed], 70) for seed in range(2)},
        **{("equal_energy", s): Patch("sft", "dpo", random[s], 70, strength=factors[s]) for s in range(2)},
    }
    controls = {(row.control, row.control_seed): row for row in result.rows if row.control is not None}
    assert controls.keys() == patches.keys(), "a window of no neurons has random controls of none alone"
    for key, patch in patches.items():
        texts = [c.text for c in engine.generate(PROMPTS, patch, GREEDY)]
        records = [r for r in result.records if (r["control"], r["control_seed"], r["rank_hi"]) == (*key, 70)]
        assert [r["completion"] for r in records] == texts
        assert controls[key].strength == 1.0
    assert [controls["equal_energy", s].energy for s in range(2)] == pytest.approx([own.energy] * 2)
    assert controls["per_layer", 0].energy < own.energy < 1
    assert own.net_of_magnitude == pytest.approx(own.effect - controls["magnitude", None].effect)


def test_ranking_without_statistics_has_no_extra_controls(engine, ranking):
    order = Ranking.from_order(ranking.top(200), ranking.shape)
    result = run(
        engine, order, recipients=("sft",), windows=(70,), controls=1, extra_controls=("magnitude", "equal_energy")
    )
    assert {row.control for row in result.rows} == {None, "per_layer"}
    notes = [note for note in result.notes if "has no" in note]
    assert notes == [
        "safety [0, 70) has no magnitude control: ranking: expected statistics or moments of the recipient, got none. "
        "Make it with Engine.contrast.",
        "safety [0, 70) has no equal_energy control: expected a ranking with the statistics of a pair, and neurons "
        "that differ between them",
    ]
    with pytest.raises(
        SnpatchError, match="extra_controls: expected one of magnitude, matched, equal_energy, got 'all'"
    ):
        run(engine, ranking, extra_controls=("all",))


def test_harmless_prompts_that_a_patch_refuses_are_counted(engine, ranking):
    def refusal(prompts, completions):
        return [-1.0 if sum(map(ord, completion)) % 3 else 1.0 for completion in completions]

    config = SweepConfig(
        ("sft",), "dpo", (70,), controls=1, extra_controls=(), sampling=GREEDY, resamples=200, harmless="benign"
    )
    sets, judges = {"attacks": PROMPTS[:3], "benign": PROMPTS[3:]}, {"cost": judge, "refusal": refusal}
    result = sweep(engine, sets, {"safety": ranking}, judges, config)
    for row in result.rows:
        texts = [
            r["completion"] for r in result.records if r["set"] == "benign"
            and (r["recipient"], r["ranking"], r["control"]) == (row.recipient, row.ranking, row.control)
        ]  # fmt: skip
        assert row.harmless_refused == np.mean([score < 0 for score in refusal(texts, texts)])
        assert row.harmless_refused_low <= row.harmless_refused <= row.harmless_refused_high
    with pytest.raises(SnpatchError, match="refusal_judge: expected one of the judges, cost, got refusal"):
        sweep(engine, sets, {"safety": ranking}, {"cost": judge}, config)
    with pytest.raises(SnpatchError, match="harmless: expected one of the sets, prompts, got benign"):
        sweep(engine, PROMPTS, {"safety": ranking}, judges, config)
