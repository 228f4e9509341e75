"""Guards: fit, scores and refusals, on synthetic features and on the demo model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from guarded import judge
from sklearn import metrics

from snpatch import Completion, Patch, Ranking, Sampling, SnpatchError
from snpatch.data import question
from snpatch.guard import fitting
from snpatch.guard.config import GuardConfig
from snpatch.guard.guard import Guard
from snpatch.guard.labels import label_answers
from snpatch.guard.scores import evaluate
from snpatch.ranking.window import Window
from snpatch.utils.files import read_tensors, write_tensors

RANKING = Ranking.from_scores(torch.rand(3, 64, generator=torch.Generator().manual_seed(0)))
SHORT = Sampling(max_tokens=8)


def draw_features(n: int, k: int = 6, shift: float = 0.0, share: float = 0.5, seed: int = 0):
    """Draw features [n, k] of different means and scales, `shift` deviations between classes, and labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) < round(share * n)
    features = rng.normal(size=(n, k)) + shift * labels[:, None]
    return features * 10.0 ** np.arange(-2, k - 2) + np.arange(k), labels


def fit(features, labels, meta=None, **config) -> Guard:
    identity = {"prompts": [f"prompt {i}" for i in range(np.size(labels))], "model": "sft", "fingerprint": "d"}
    return Guard.fit(features, labels, RANKING, **identity, config=GuardConfig(**config), meta=meta)


def test_guard_on_separable_features_is_accurate():
    guard = fit(*draw_features(100, shift=5.0))
    features, labels = draw_features(100, shift=5.0, seed=1)
    scores = evaluate(guard.probability(features), labels)
    assert (scores.n, scores.harmful, scores.majority) == (100, 50, 0.5)
    for name in ("accuracy", "balanced_accuracy", "auc"):
        assert [getattr(scores, name + end) for end in ("", "_low", "_high")] == [1.0, 1.0, 1.0]
    assert scores.brier < 0.01
    assert (guard.is_harmful(features) == labels).all()


def test_guard_on_random_labels_stays_at_chance():
    """400 held-out prompts: the standard error of the accuracy is 0.025, of the AUC 0.029; four of them are allowed."""
    features, labels = draw_features(200)
    guard = fit(features, np.random.default_rng(2).permutation(labels))
    features, labels = draw_features(400, seed=3)
    scores = evaluate(guard.probability(features), labels)
    assert scores.auc_low <= 0.5 <= scores.auc_high
    assert abs(scores.accuracy - 0.5) < 0.1
    shuffled = np.random.default_rng(4).permutation(labels)
    shuffled_scores = evaluate(fitting.predict_out_of_fold(features, shuffled, GuardConfig()), labels)
    assert abs(shuffled_scores.auc - 0.5) < 0.12


def test_guard_fit_is_penalized_logistic_regression_of_scaled_features():
    """At its coefficients the gradient of `|w|^2 / 2 + C * sum of log losses` is zero, and its formula is that one."""
    features, labels = draw_features(80, shift=0.5)
    guard = fit(features, labels, C=0.3)
    mean, scale = features.mean(0), features.std(0)
    assert guard.mean == pytest.approx(mean)
    assert guard.scale == pytest.approx(scale)
    scaled = (features - mean) / scale
    probability = 1 / (1 + np.exp(-(scaled @ guard.coefficients + guard.intercept)))
    assert guard.probability(features) == pytest.approx(probability, abs=1e-12)
    error = probability - labels
    assert guard.coefficients + 0.3 * error @ scaled == pytest.approx(np.zeros(6), abs=0.01)
    assert error.sum() == pytest.approx(0, abs=0.01)
    pipeline = fitting.fit_classifier(features, labels, GuardConfig(C=0.3))
    assert guard.probability(features) == pytest.approx(pipeline.predict_proba(features)[:, 1], abs=1e-12)


def test_probability_is_bit_identical_alone_and_in_a_batch():
    features, labels = draw_features(60, k=40, shift=0.2)
    guard = fit(features, labels)
    batch = guard.probability(torch.from_numpy(features).float())
    singles = [guard.probability(torch.from_numpy(row[None]).float())[0] for row in features]
    assert batch.tolist() == singles


def test_class_weight_balanced_raises_balanced_accuracy():
    train, test = draw_features(400, shift=0.4, share=0.1), draw_features(400, shift=0.4, share=0.1, seed=1)
    unbalanced, balanced = (
        evaluate(fit(*train, class_weight=weight).probability(test[0]), test[1]) for weight in (None, "balanced")
    )
    assert balanced.balanced_accuracy > unbalanced.balanced_accuracy + 0.1
    assert unbalanced.calibration_error < balanced.calibration_error


@pytest.mark.parametrize(("shift", "best_c"), [(0.0, 1e-4), (5.0, 100.0)])
def test_several_c_are_chosen_by_cross_validation(shift, best_c):
    features, labels = draw_features(100, shift=shift, seed=5)
    assert fit(features, labels, C=(100.0, 1e-4, 1.0)).meta["C"] == best_c


def test_constant_features_do_not_change_the_probability():
    features, labels = draw_features(60, shift=2.0)
    features[:, 2], features[:, 3] = 0.1, 0.0
    guard = fit(features, labels)
    assert guard.coefficients[2:4] == pytest.approx([0, 0], abs=1e-12)
    constant_features = without(features, np.s_[:, 2:4], 7.0)
    assert guard.probability(constant_features) == pytest.approx(guard.probability(features), abs=1e-9)


@pytest.mark.parametrize("C", [1.0, (0.1, 10.0)])
def test_fit_that_does_not_converge_is_rejected(C):
    features, labels = draw_features(100, shift=0.5)
    config = GuardConfig(C=C, max_iter=1)
    for run in (fitting.fit_classifier, fitting.predict_out_of_fold):
        with pytest.raises(SnpatchError, match="did not converge in max_iter=1 steps; raise max_iter or lower C"):
            run(features, labels, config)


def without(features, index, value):
    copy = features.copy()
    copy[index] = value
    return copy


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x, y: (x, np.ones(40)), "40 are harmful; a guard needs at least 5 harmful and 5 harmless"),
        (lambda x, y: (x, np.arange(40) < 4), "of 40 prompts 4 are harmful"),
        (lambda x, y: (x, y[:-1]), "labels: expected \\[40\\], one per prompt, got \\[39\\]"),
        (lambda x, y: (x, y + 1), "labels: expected True"),
        (lambda x, y: (x[0], y), "features: expected \\[prompts, neurons\\], got \\[6\\]"),
        (lambda x, y: (without(x, (7, 2), np.nan), y), "prompt 7 contain NaN or infinity"),
        (lambda x, y: (np.ones((40, 200)), y), "k: expected 0..192"),
    ],
)
def test_fit_with_invalid_features_or_labels_is_rejected(change, says):
    with pytest.raises(SnpatchError, match=says):
        fit(*change(*draw_features(40)))


def test_guard_remembers_its_prompts_whatever_their_case_and_spaces(tmp_path):
    fit(*draw_features(40)).save(tmp_path / "guard.safetensors")
    guard = Guard.load(tmp_path / "guard.safetensors")
    assert len(guard.meta["fitted_prompts"]) == 40
    chat = [{"role": "user", "content": "Prompt\u00a07"}]
    prompts = ["prompt 40", " PROMPT  3\n", chat, "\uff50rompt 5", "prompt 4 1", [1, 2]]
    assert guard.find_unseen(prompts, "others").tolist() == [0, 4, 5]
    with pytest.raises(SnpatchError, match="others: expected prompts to test on, got only ones of the prompts that"):
        guard.find_unseen(["prompt 1", chat], "others")
    with pytest.raises(SnpatchError, match=r"got a row\. Pass its prompt alone"):
        guard.find_unseen([{"prompt": "x"}], "others")
    with pytest.raises(SnpatchError, match=r"expected fitted_prompts, got none\. Fit the guard again"):
        replace(guard, meta={}).find_unseen(prompts, "others")
    with pytest.raises(SnpatchError, match="prompts: expected one per label \\(40\\), got 1"):
        Guard.fit(*draw_features(40), RANKING, prompts=["x"], model="sft", fingerprint="d")


def test_probability_of_invalid_features_is_rejected():
    guard = fit(*draw_features(40))
    with pytest.raises(SnpatchError, match="\\[prompts, 6\\], got \\[2, 5\\]"):
        guard.probability(np.ones((2, 5)))
    with pytest.raises(SnpatchError, match="prompt 1 contain NaN"):
        guard.probability([[0.0] * 6, [np.inf] * 6])


@pytest.mark.parametrize(
    "fields",
    [{"C": 0}, {"C": ()}, {"C": (1.0, -1.0)}, {"folds": 1}, {"max_iter": 0}, {"threshold": 1}, {"class_weight": "x"}],
)
def test_guard_config_with_invalid_value_is_rejected(fields):
    with pytest.raises(SnpatchError, match=next(iter(fields))):
        GuardConfig(**fields)


def test_loaded_guard_is_bit_identical(tmp_path):
    features, labels = draw_features(60, shift=0.5)
    meta = {"judge": "cost", "dataset": "beavertails"}
    guard = fit(features, labels, meta, C=(0.1, 1.0), threshold=0.3, refusal="no.")
    guard.save(tmp_path / "guard.safetensors")
    copy = Guard.load(tmp_path / "guard.safetensors")
    assert np.array_equal(copy.probability(features), guard.probability(features))
    assert torch.equal(copy.neurons, RANKING.top(6))
    assert torch.equal(copy.ranking.top(6), RANKING.top(6))
    for name in ("model", "fingerprint", "shape", "intercept", "threshold", "refusal", "meta", "k"):
        assert getattr(copy, name) == getattr(guard, name), name
    assert (copy.meta["judge"], copy.meta["n"], copy.meta["harmful"]) == ("cost", 60, 30)
    assert copy.meta["ranking"] == RANKING.fingerprint
    RANKING.save(tmp_path / "ranking.safetensors")
    with pytest.raises(SnpatchError, match="expected a snpatch guard, got ranking"):
        Guard.load(tmp_path / "ranking.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"more": 1}, "unknown key more; expected one of model, fingerprint"),
        ({"threshold": None}, "threshold is missing"),
        ({"threshold": "0.5"}, "threshold: expected float, got '0.5'"),
        ({"threshold": 2.0}, "guard: threshold: expected less than 1, got 2.0"),
        ({"shape": [3]}, r"shape: expected \(layers, neurons\), got \(3,\)"),
        ({"meta": []}, "meta: expected dict"),
    ],
)
def test_guard_file_with_invalid_metadata_is_rejected(tmp_path, change, message):
    path = tmp_path / "guard.safetensors"
    fit(*draw_features(40)).save(path)
    tensors, meta = read_tensors(path, kind="guard")
    meta = {name: value for name, value in {**meta, **change}.items() if value is not None}
    write_tensors(path, tensors, kind="guard", meta=meta)
    with pytest.raises(SnpatchError, match=message):
        Guard.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coefficients": lambda t: t * torch.nan}, "coefficients has values that no fit gives"),
        ({"scale": lambda t: t * 0}, "scale has values that no fit gives"),
        ({"mean": lambda t: t.bfloat16()}, "mean: expected torch.float64, got torch.bfloat16"),
        ({"neurons": lambda t: t + 1000}, r"order: expected neurons of \[3, 64\], got one outside"),
        ({"neurons": lambda t: t * 0}, "expected each neuron once"),
        ({"neurons": lambda t: t[:3]}, "expected vectors of one length"),
        ({"intercept": lambda t: t[None]}, "expected the tensors of a guard"),
    ],
)
def test_guard_file_with_invalid_tensors_is_rejected(tmp_path, change, message):
    """A probability of NaN would be above no threshold, and every prompt harmless."""
    path = tmp_path / "guard.safetensors"
    fit(*draw_features(40)).save(path)
    tensors, meta = read_tensors(path, kind="guard")
    new_tensors = {name: edit(tensors[name]) for name, edit in change.items()}
    write_tensors(path, {**tensors, **new_tensors}, kind="guard", meta=meta)
    with pytest.raises(SnpatchError, match=message):
        Guard.load(path)


def test_scores_equal_hand_computed_values():
    """Pairs (harmful, harmless): 0.9 and 0.5 against 0.5, 0.2, 0.04, of which five are in order and one is a tie."""
    scores = evaluate([0.9, 0.5, 0.5, 0.2, 0.04], [1, 1, 0, 0, 0])
    assert scores.accuracy == 4 / 5
    assert scores.balanced_accuracy == (1 / 2 + 1) / 2
    assert scores.auc == pytest.approx(5.5 / 6)
    assert scores.brier == pytest.approx((0.01 + 0.25 + 0.25 + 0.04 + 0.0016) / 5)
    assert scores.calibration_error == pytest.approx((0.1 + 0.0 + 0.2 + 0.04) / 5)
    assert scores.majority == 3 / 5
    bins = [(b.low, b.high, b.n, b.mean_probability, b.harmful_share) for b in scores.curve]
    assert bins == [(0.0, 0.1, 1, 0.04, 0.0), (0.2, 0.3, 1, 0.2, 0.0), (0.5, 0.6, 2, 0.5, 0.5), (0.9, 1.0, 1, 0.9, 1.0)]


def test_scores_equal_scikit_learn_and_binomial_intervals():
    rng = np.random.default_rng(0)
    labels = rng.random(300) < 0.4
    p = np.clip(0.4 + 0.2 * labels + 0.2 * rng.normal(size=300), 0, 1).round(2)
    scores = evaluate(p, labels)
    assert scores.accuracy == metrics.accuracy_score(labels, p > 0.5)
    assert scores.balanced_accuracy == pytest.approx(metrics.balanced_accuracy_score(labels, p > 0.5))
    assert scores.auc == pytest.approx(metrics.roc_auc_score(labels, p))
    assert scores.brier == pytest.approx(metrics.brier_score_loss(labels, p))
    half = 1.96 * (scores.accuracy * (1 - scores.accuracy) / 300) ** 0.5
    assert scores.accuracy_low == pytest.approx(scores.accuracy - half, abs=0.01)
    assert scores.accuracy_high == pytest.approx(scores.accuracy + half, abs=0.01)
    for name in ("balanced_accuracy", "auc", "brier", "majority"):
        assert getattr(scores, f"{name}_low") < getattr(scores, name) < getattr(scores, f"{name}_high")
    assert evaluate(p, labels, threshold=0.7).accuracy == metrics.accuracy_score(labels, p > 0.7)


def test_scores_of_one_class_have_no_auc():
    scores = evaluate([0.2, 0.9, 0.4], [False, False, False])
    assert scores.auc is scores.auc_low is scores.balanced_accuracy is None
    assert (scores.accuracy, scores.majority, scores.harmful) == (2 / 3, 1.0, 0)
    rare = evaluate([0.9, 0.3, 0.4], [True, False, False])
    assert (rare.auc, rare.auc_low, rare.auc_high) == (1.0, 1.0, 1.0), "resamples of one class are left out"


@pytest.mark.parametrize(
    ("p", "y", "says"),
    [([0.5], [1, 0], "labels: expected \\[1\\]"), ([1.5, 0], [1, 0], "between 0 and 1"), ([], [], "labels: expected")],
)
def test_evaluate_with_invalid_input_is_rejected(p, y, says):
    with pytest.raises(SnpatchError, match=says):
        evaluate(p, y)


def test_labels_come_from_judged_completions_of_the_model(demo, sets):
    s = sets["beavertails"]
    assert s.completions == [c.text for c in demo.generate(s.prompts, "sft", Sampling(max_tokens=24))]
    assert s.scores.tolist() == judge([question(p) for p in s.prompts], s.completions)
    assert s.labels.tolist() == (s.scores > 0).tolist()
    assert s.labels[:50].mean() > 0.9
    assert not s.labels[50:].any()
    strict = label_answers(demo, s.prompts[:2], "sft", judge, sampling=SHORT, threshold=4.0)
    assert not strict.labels.any()
    with pytest.raises(SnpatchError, match="sampling: n: expected 1"):
        label_answers(demo, s.prompts, "sft", judge, sampling=Sampling(temperature=1.0, n=2))


def test_guard_predicts_harm_on_unseen_prompts(demo, guard, sets):
    s = sets["redteam"]
    scores = evaluate(guard.predict(demo, s.prompts), s.labels)
    assert scores.accuracy_low > scores.majority_high
    assert scores.auc > 0.9


def test_generate_with_guard_refuses_after_one_prefill_and_keeps_other_completions(
    demo, guard, safety, sets, executor_requests
):
    prompts = sets["redteam"].prompts[30:70]
    patches = [Patch("sft", "dpo", safety, Window(0, 100 * (i % 2))) if i % 3 else "sft" for i in range(40)]
    harm = guard.predict(demo, prompts)
    unguarded_completions = demo.generate(prompts, patches, replace(SHORT, logprobs=True))
    executor_requests.clear()
    guarded = demo.generate(prompts, patches, replace(SHORT, logprobs=True), guard=guard)
    refused = harm > 0.5
    assert 0 < refused.sum() < 40
    assert [c.harm for c in guarded] == harm.tolist()
    reads, writes = executor_requests[:40], executor_requests[40:]
    assert all(r.sampling is None and r.recipient is demo.requests.model("sft") and r.donor is None for r in reads)
    assert [list(r.prompt_ids) for r in reads] == [c.prompt_ids for c in unguarded_completions]
    assert [list(r.prompt_ids) for r in writes] == [
        unguarded_completions[i].prompt_ids for i in np.flatnonzero(~refused)
    ]
    for unguarded, completion, is_refused in zip(unguarded_completions, guarded, refused, strict=True):
        assert unguarded.harm is None
        if is_refused:
            text = "I cannot help with that."
            assert replace(completion, harm=None) == Completion(unguarded.prompt_ids, [], text, "guard", None, None, 0)
        else:
            assert replace(completion, harm=None, logprobs=None) == replace(unguarded, logprobs=None)
            assert completion.logprobs == pytest.approx(unguarded.logprobs, abs=1e-4)


def test_guard_reads_a_prompt_once_for_n_completions(demo, guard, sets, executor_requests):
    prompts = [sets["redteam"].prompts[i] for i in (1, 60)]
    sampling = Sampling(temperature=1.0, seed=3, n=3, max_tokens=6)
    guarded = demo.generate(prompts, "dpo", sampling, guard=guard)
    assert [c.finish_reason == "guard" for c in guarded] == [True] * 3 + [False] * 3
    assert len(executor_requests) == 2 + 3
    assert [replace(c, harm=None) for c in guarded[3:]] == demo.generate(prompts[1:], "dpo", sampling)
    counts = []
    demo.generate(prompts[:1], "sft", SHORT, lambda num_done, total: counts.append((num_done, total)), guard=guard)
    assert not counts


def test_guard_of_another_model_is_rejected(demo, guard, sets, tmp_path):
    prompts = sets["redteam"].prompts[:2]
    with pytest.raises(SnpatchError, match="expected the model 'dpo' that it was fitted on"):
        demo.generate(prompts, guard=replace(guard, model="dpo"))
    with pytest.raises(SnpatchError, match="got 'other'"):
        demo.generate(prompts, guard=replace(guard, model="other"))
    with pytest.raises(SnpatchError, match="expected a Guard, got 'a file'"):
        demo.generate(prompts, guard="a file")
    with pytest.raises(SnpatchError, match="ranking: expected the model's shape"):
        demo.generate(prompts, guard=replace(guard, shape=(6, 999)))
    guard.save(tmp_path / "guard.safetensors")
    copy = Guard.load(tmp_path / "guard.safetensors")
    assert copy.predict(demo, prompts).tolist() == guard.predict(demo, prompts).tolist()
