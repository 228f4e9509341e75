"""Comparison of guards on the demo model: sets, protocols, controls and baselines."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from transformers import AutoModelForCausalLM

from snpatch import SnpatchError
from snpatch.data import question
from snpatch.demo import DEMO_MODEL
from snpatch.guard import fitting
from snpatch.guard.comparison import BAG_OF_WORDS, WORDS_STRENGTHS, ComparisonConfig, compare_guards
from snpatch.guard.config import GuardConfig
from snpatch.guard.guard import Guard
from snpatch.guard.labels import deduplicate
from snpatch.guard.residual import LAST_TOKEN, MEAN, capture_residuals
from snpatch.guard.scores import evaluate
from snpatch.guard.splits import CROSS_VALIDATED, PROTOCOLS

FAST = {"resamples": 100, "baselines": ()}


def test_compare_guards_covers_sets_ks_and_controls(demo, safety, sets, guard, executor_requests):
    width = demo.geometry.n_neurons
    config = ComparisonConfig((10, 60, width + 1), controls=2, control_kinds=("per_layer", "last_layer"), **FAST)
    comparison = compare_guards(demo, "sft", sets, {"safety": safety}, config)
    assert len(executor_requests) == (1 + 2 + 2) * 200, "one capture of each prompt for each order of neurons"
    assert [note.split(":")[0] for note in comparison.notes] == ["safety"]
    assert "has no last_layer control" in comparison.notes[0]
    rows = {(r.control, r.seed, r.k, r.train, r.test): r for r in comparison.rows}
    kinds = [(None, None), *((kind, seed) for kind in ("per_layer", "last_layer") for seed in range(2))]
    ks = {None: (10, 60, width + 1), "per_layer": (10, 60, width + 1), "last_layer": (10, 60)}
    expected = [(c, s, k, a, b) for c, s in kinds for k in ks[c] for a in sets for b in sets if a != b or c is None]
    assert sorted(rows, key=str) == sorted(expected, key=str)
    across = rows[None, None, 60, "beavertails", "redteam"]
    redteam = sets["redteam"]
    own = evaluate(guard.predict(demo, redteam.prompts), redteam.labels, resamples=100)
    assert (across.scores.accuracy, across.scores.auc) == (own.accuracy, pytest.approx(own.auc))
    assert across.scores.brier == pytest.approx(own.brier)
    x = demo.capture(redteam.prompts, "sft", safety, 60)
    scores = fitting.predict_out_of_fold(x, redteam.labels, GuardConfig())
    assert rows[None, None, 60, "redteam", "redteam"].scores == evaluate(scores, redteam.labels, resamples=100)
    control, beavertails = safety.random_control(width + 1, seed=1), sets["beavertails"]
    x = demo.capture(beavertails.prompts, "sft", control, 10)
    random = Guard.fit(x, beavertails.labels, control, prompts=beavertails.prompts, model="sft", fingerprint="")
    p = random.probability(demo.capture(redteam.prompts, "sft", control, 10))
    row = rows["per_layer", 1, 10, "beavertails", "redteam"]
    assert row.scores.brier == pytest.approx(evaluate(p, redteam.labels).brier)
    flat = across.flat()
    assert (flat["features"], flat["train"], flat["accuracy"]) == ("safety", "beavertails", across.scores.accuracy)
    assert json.loads(json.dumps(flat)) == flat
    means = {(row.features, row.control, row.k): row for row in comparison.means}
    accuracies = [rows[None, None, 60, a, b].scores.accuracy for a in sets for b in sets if a != b]
    assert means["safety", None, 60].accuracy == pytest.approx(np.mean(accuracies))
    difference = next(d for d in comparison.differences if (d.k, d.reference) == (60, "random last_layer"))
    control_accuracies = [
        rows["last_layer", seed, 60, a, b].scores.accuracy for a in sets for b in sets if a != b for seed in (0, 1)
    ]
    assert difference.accuracy_difference == pytest.approx(np.mean(accuracies) - np.mean(control_accuracies))
    assert difference.accuracy_difference_low <= difference.accuracy_difference <= difference.accuracy_difference_high
    assert comparison.protocol == PROTOCOLS["pairwise"]


def test_merged_protocol_tests_on_all_other_sets_as_one(demo, safety, sets):
    three = {**sets, "third": replace(sets["redteam"], **{
        "prompts": [[{"role": "user", "content": f"please , {question(p)}"}] for p in sets["redteam"].prompts[:40]]
        + sets["redteam"].prompts[40:60] + sets["beavertails"].prompts[:1],
        "labels": np.append(sets["redteam"].labels[:60], sets["beavertails"].labels[:1]),
    })}  # fmt: skip
    config = ComparisonConfig([20], train=["beavertails"], protocol="merged", controls=0, **FAST)
    comparison = compare_guards(demo, "sft", three, {"safety": safety}, config)
    assert [(r.test, r.scores.n) for r in comparison.rows] == [("beavertails", 100), ("merged", 140)]
    assert comparison.notes[-1] == "third: 21 prompts are also in beavertails or an earlier set, and left out"
    assert comparison.protocol == PROTOCOLS["merged"]
    pipeline = fitting.fit_classifier(
        demo.capture(three["beavertails"].prompts, "sft", safety, 20), three["beavertails"].labels, GuardConfig()
    )
    merged = [*three["redteam"].prompts, *three["third"].prompts[:40]]
    labels = np.append(three["redteam"].labels, three["third"].labels[:40])
    predicted = pipeline.predict(demo.capture(merged, "sft", safety, 20).numpy())
    assert comparison.means[0].accuracy == pytest.approx((predicted == labels).mean())


def test_single_set_is_tested_by_cross_validation(demo, safety, sets):
    one = {"redteam": sets["redteam"]}
    config = ComparisonConfig([20], controls=1, control_kinds=("everywhere",), **FAST)
    comparison = compare_guards(demo, "sft", one, {"safety": safety}, config)
    assert [(r.control, r.train, r.test) for r in comparison.rows] == [
        (control, "redteam", "redteam") for control in (None, "everywhere")
    ]
    assert comparison.protocol == CROSS_VALIDATED
    x = demo.capture(sets["redteam"].prompts, "sft", safety, 20)
    p = fitting.predict_out_of_fold(x, sets["redteam"].labels, GuardConfig())
    assert comparison.means[0].accuracy == ((p > 0.5) == sets["redteam"].labels).mean()


def test_compare_guards_leaves_out_training_prompts(demo, safety, sets):
    beavertails, redteam = sets["beavertails"], sets["redteam"]
    loud = [[{"role": "user", "content": f" {question(p).upper()}"}] for p in beavertails.prompts[:40]]
    overlapping_sets = {**sets, "mixed": replace(redteam, **{
        "prompts": [*loud, *redteam.prompts[:60]],
        "labels": np.append(beavertails.labels[:40], redteam.labels[:60]),
    })}  # fmt: skip
    config = ComparisonConfig([5], train=["beavertails"], controls=0, **FAST)
    comparison = compare_guards(demo, "sft", overlapping_sets, {"safety": safety}, config)
    assert [(r.test, r.scores.n) for r in comparison.rows] == [("beavertails", 100), ("redteam", 100), ("mixed", 60)]
    assert comparison.notes[-1] == "mixed: 40 prompts are also in beavertails and left out"
    assert len(deduplicate([*loud, *beavertails.prompts])) == 100
    repeated_sets = {
        "redteam": replace(redteam, prompts=[*redteam.prompts, redteam.prompts[0]], labels=np.append(redteam.labels, 1))
    }
    same_sets = {"beavertails": beavertails, "again": beavertails}
    for invalid_sets, arguments, says in (
        (repeated_sets, {}, "redteam has 101 prompts, only 100 different ones"),
        (same_sets, {}, "again: expected prompts to test on, got only ones of beavertails, which trains"),
        (sets, {"train": ["lima"]}, "out of beavertails, redteam, got \\['lima'\\]"),
        (sets, {"guard": GuardConfig(folds=60)}, "beavertails: of 100 prompts"),
        (sets, {"ks": [0]}, "k: expected numbers of at least 1"),
        (sets, {"baselines": ["bert"]}, "baselines: expected names out of words, residual, got \\['bert'\\]"),
        (sets, {"protocol": "both"}, "protocol: expected one of pairwise, merged, got 'both'"),
    ):
        with pytest.raises(SnpatchError, match=says):
            compare_guards(demo, "sft", invalid_sets, {"safety": safety}, ComparisonConfig(**{"ks": [5], **arguments}))


def test_few_prompts_of_a_class_give_a_warning(demo, safety, sets):
    few = {"few": replace(sets["redteam"], **{
        "prompts": sets["redteam"].prompts[44:70], "labels": sets["redteam"].labels[44:70]
    })}  # fmt: skip
    comparison = compare_guards(demo, "sft", few, {"safety": safety}, ComparisonConfig([5], controls=0, **FAST))
    (note,) = comparison.notes
    assert note.startswith("few: of 26 prompts 6 are harmful and 20 harmless; with fewer than 20 of a class")


def test_baselines_read_words_and_the_residual_stream(demo, safety, sets):
    config = ComparisonConfig([20], controls=0, resamples=100)
    comparison = compare_guards(demo, "sft", sets, {"safety": safety}, config)
    rows = {(r.features, r.train): r for r in comparison.rows if r.train != r.test}
    beavertails, redteam = sets["beavertails"], sets["redteam"]
    counts = CountVectorizer(binary=True, token_pattern=fitting.WORDS)
    x = counts.fit_transform([question(p) for p in beavertails.prompts])
    strength = rows[BAG_OF_WORDS, "beavertails"].C
    assert strength in WORDS_STRENGTHS
    classifier = LogisticRegression(C=strength, max_iter=1000).fit(x, beavertails.labels)
    accuracy = classifier.score(counts.transform([question(p) for p in redteam.prompts]), redteam.labels)
    assert rows[BAG_OF_WORDS, "beavertails"].scores.accuracy == pytest.approx(accuracy)
    references = [d.reference for d in comparison.differences]
    assert references == [BAG_OF_WORDS, LAST_TOKEN, MEAN, "majority class"]
    assert rows[LAST_TOKEN, "beavertails"].scores.auc > 0.9


def test_residual_stream_is_that_of_peft_and_transformers(demo, sets):
    prompts = sets["redteam"].prompts[:6]
    ids = demo.encode(prompts, "sft")
    assert len(set(map(len, ids))) > 1, "padded"
    captured = capture_residuals(demo, ids, "sft")
    reference = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(DEMO_MODEL / "base"), DEMO_MODEL / "sft")
    norm = reference.get_submodule("base_model.model.model.norm")
    rows = []
    with torch.inference_mode(), norm.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0][0])):
        for prompt in ids:
            reference(torch.tensor([prompt]))
    torch.testing.assert_close(
        torch.from_numpy(captured[LAST_TOKEN]), torch.stack([r[-1] for r in rows]), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        torch.from_numpy(captured[MEAN]), torch.stack([r.mean(0) for r in rows]), rtol=1e-4, atol=1e-4
    )
