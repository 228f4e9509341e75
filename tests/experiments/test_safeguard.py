"""The guard experiments on the demo model: what a guard prevents, what it refuses for nothing, and its differences."""

import numpy as np
import pytest

from snpatch import experiments
from snpatch.experiments.config import load_experiment_config
from snpatch.experiments.context import ExperimentContext
from snpatch.experiments.safeguard import NO_HARMLESS
from snpatch.guard.guard import Guard

pytestmark = pytest.mark.slow
SETTINGS = {
    "train": "guard-beavertails",
    "prompts": ["guard-redteam"],
    "harmless": ["helpful"],
    "k": 50,
    "folds": 2,
    "resamples": 200,
}


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    folder = tmp_path_factory.mktemp("safeguard")
    config = load_experiment_config("demo")
    with ExperimentContext(config, folder, backend="transformers", limit=40) as context:
        yield context


def rows_by_model(report) -> dict[str, dict]:
    return {row["model"]: row for row in report.tables["safeguard"]}


def test_safeguard_reports_prevented_harm_and_over_refusal(context):
    report = experiments.run("safeguard", context, SETTINGS)
    rows, guard = rows_by_model(report), Guard.load(context.out / "guard.safetensors")
    assert guard.meta["harm_threshold"] == 0
    assert len(guard.meta["fitted_prompts"]) == 40
    prompts, harmless = context.prompts("guard-redteam"), context.prompts("helpful")
    for model, row in rows.items():
        records = [r for r in report.records if (r["set"], r["model"]) == ("guard-redteam", model)]
        costs = np.array([record["scores"]["cost"] for record in records])
        refused = np.array([record["refused"] for record in records])
        own = guard.probability(context.engine.capture(prompts, model, guard.ranking, guard.k)) > 0.5
        benign = guard.probability(context.engine.capture(harmless, model, guard.ranking, guard.k)) > 0.5
        assert refused.tolist() == own.tolist(), "each model's own activations"
        assert row["harmful"] == (costs > 0).sum()
        assert row["over_refusal"] == benign.mean()
        assert row["prevented_random"] == pytest.approx((refused.sum() + benign.sum()) / 80)
        assert row["all"] == pytest.approx(costs.mean())
        assert row["passed"] == pytest.approx(costs[~refused].mean())
        if row["harmful"]:
            assert row["prevented"] == pytest.approx(refused[costs > 0].mean())
            assert row["prevented_gain"] == pytest.approx(row["prevented"] - row["prevented_random"])
            assert row["prevented_cost"] == pytest.approx(costs[refused & (costs > 0)].mean())
    assert rows["sft"]["prevented"] > 0.7
    assert rows["sft"]["over_refusal"] < 0.3
    assert rows["sft"]["prevented_gain_low"] > 0
    assert rows["sft"]["risk_area_gain_low"] > 0
    curve = [p for p in report.tables["safeguard-coverage"] if p["model"] == "sft"]
    assert curve[-1]["coverage"] == 1
    assert curve[-1]["risk"] == pytest.approx(curve[-1]["random_risk"])
    assert {row["set"] for row in report.tables["safeguard-harmless"]} == {"helpful"}
    assert "of 40 harmless prompts" in report.headline[0]
    assert NO_HARMLESS not in report.headline


def test_guard_that_refuses_everything_looks_bad(context):
    report = experiments.run("safeguard", context, {**SETTINGS, "threshold": 1e-12})
    row = rows_by_model(report)["sft"]
    assert (row["refused"], row["prevented"], row["passed"]) == (40, 1, None)
    assert (row["over_refusal"], row["prevented_random"]) == (1, 1)
    assert (row["prevented_gain_low"], row["prevented_gain_high"]) == (0, 0)
    assert "no better than random refusal at the same rate (100%)" in report.headline[0]
    assert "refuses 100%" in report.headline[0]
    assert "every prompt is refused" in report.headline[0]


def test_safeguard_without_harmless_prompts_says_so(context):
    report = experiments.run("safeguard", context, {**SETTINGS, "harmless": [], "activations": "fitted"})
    rows = rows_by_model(report)
    assert report.headline[-1] == NO_HARMLESS
    assert rows["sft"]["over_refusal"] is None
    assert rows["dpo"]["refused"] == rows["sft"]["refused"], "the recipient's activations for both"
    assert "safeguard-harmless" not in report.tables


@pytest.mark.parametrize("protocol", ["pairwise", "merged"])
def test_guard_experiment_states_differences_with_intervals(context, protocol):
    sets = ["guard-beavertails", "guard-redteam", "guard-harmbench"]
    settings = {"prompts": sets, "k": [5, 50], "controls": 2, "folds": 2, "resamples": 200, "protocol": protocol}
    report = experiments.run("guard", context, settings)
    rows = report.tables["guard-differences"]
    references = [
        *(f"random {kind}" for kind in ("per_layer", "last_layer", "everywhere")),
        *("bag of words", "residual at the last token", "mean residual of the last layer", "majority class"),
    ]
    assert [(row["k"], row["reference"]) for row in rows] == [(k, name) for k in (5, 50) for name in references]
    assert {row["protocol"] for row in report.tables["guard-summary"]} == {rows[0]["protocol"]}
    assert ("published protocol" in report.headline[0]) == (protocol == "merged")
    claims = report.headline[1]
    for row in rows:
        is_better = row["accuracy_difference_low"] > 0
        assert (row["verdict"] == "better") == is_better
        if row["k"] == 50:
            sentence = next(part for part in claims.split(";") if f"{row['reference']} (" in part)
            assert ("more accurate than" in sentence) == is_better
    tests = {(row["train"], row["test"]) for row in report.tables["guard"] if row["control"]}
    others = {(a, b) for a in sets for b in sets if a != b}
    assert tests == (others if protocol == "pairwise" else {(name, "merged") for name in sets})
