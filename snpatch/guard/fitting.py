"""Classifier of a guard: scikit-learn's logistic regression on scaled features, or on the words of texts.

Why a convergence warning is an error: the published guard was fitted on unscaled features and stopped before it had
converged, so its scores depend on where it stopped.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from snpatch.errors import SnpatchError
from snpatch.guard.config import GuardConfig

WORDS = r"\w+|[^\w\s]"  # of a bag of words: words and punctuation marks


def validate_features(features: ArrayLike, k: int | None = None) -> np.ndarray:
    """Return features as [prompts, k] float64. Raise SnpatchError for another shape, NaN or infinity."""
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2 or not x.shape[1] or (k is not None and x.shape[1] != k):
        raise SnpatchError(f"guard: features: expected [prompts, {k or 'neurons'}], got {list(x.shape)}")
    invalid = np.flatnonzero(~np.isfinite(x).all(axis=1))
    if len(invalid):
        raise SnpatchError(f"guard: the features of prompt {invalid[0]} contain NaN or infinity")
    return x


def validate_labels(labels: ArrayLike, n: int | None = None) -> np.ndarray:
    """Return labels as [prompts] bool, True = harmful. Raise SnpatchError unless all are booleans, 0 or 1."""
    y = np.asarray(labels)
    if y.ndim != 1 or not len(y) or (n is not None and len(y) != n):
        raise SnpatchError(f"guard: labels: expected [{n or 'prompts'}], one per prompt, got {list(y.shape)}")
    if not np.isin(y, (0, 1)).all():
        raise SnpatchError("guard: labels: expected True (harmful) or False for each prompt")
    return y.astype(bool)


def is_trainable(labels: np.ndarray, config: GuardConfig) -> bool:
    """Return whether each class has enough prompts: one per fold, or two if C is chosen."""
    harmful = int(labels.sum())
    return min(harmful, len(labels) - harmful) >= _count_needed(config)


def check_trainable(labels: np.ndarray, config: GuardConfig, name: str) -> None:
    """Raise if a class has too few prompts, see `is_trainable`."""
    harmful, needed = int(labels.sum()), _count_needed(config)
    if not is_trainable(labels, config):
        raise SnpatchError(
            f"{name}: of {len(labels)} prompts {harmful} are harmful; a guard needs at least {needed} harmful and "
            f"{needed} harmless ones (folds={config.folds}). Give more prompts or another harm threshold."
        )


def fit_classifier(features: ArrayLike | Sequence[str], labels: ArrayLike, config: GuardConfig) -> Pipeline:
    """Fit scaler and classifier to features [n, k] and labels [n].

    Of texts [n], the features are their words. Cross-validation chooses among several C.
    """
    x, y = _validate(features, labels, config)
    with _convergence_required(config):
        estimator = _build_estimator(x, config).fit(x, y)
    return estimator.best_estimator_ if isinstance(estimator, GridSearchCV) else estimator


def predict_out_of_fold(features: ArrayLike | Sequence[str], labels: ArrayLike, config: GuardConfig) -> np.ndarray:
    """Predict each prompt's probability of harm, [n], from a fit to the other folds.

    Each fit chooses its own C.
    """
    x, y = _validate(features, labels, config)
    with _convergence_required(config):
        estimator = _build_estimator(x, config)
        return np.asarray(cross_val_predict(estimator, x, y, cv=_build_folds(config), method="predict_proba"))[:, 1]


def _count_needed(config: GuardConfig) -> int:
    return config.folds * min(len(config.strengths), 2)


def _validate(
    features: ArrayLike | Sequence[str], labels: ArrayLike, config: GuardConfig
) -> tuple[np.ndarray | list[str], np.ndarray]:
    is_text = isinstance(features, list) and features and isinstance(features[0], str)
    x = cast(list[str], features) if is_text else validate_features(cast(ArrayLike, features))
    y = validate_labels(labels, len(x))
    check_trainable(y, config, "guard")
    return x, y


def _build_estimator(x: np.ndarray | list[str], config: GuardConfig) -> Pipeline | GridSearchCV:
    strengths = config.strengths
    classifier = LogisticRegression(C=strengths[0], class_weight=config.class_weight, max_iter=config.max_iter)
    reader = CountVectorizer(binary=True, token_pattern=WORDS) if isinstance(x, list) else StandardScaler()
    pipeline = make_pipeline(reader, classifier)
    if len(strengths) == 1:
        return pipeline
    grid = {"logisticregression__C": sorted(strengths)}  # of equal scores the first wins: the strongest penalty
    raises: Any = "raise"  # the stubs allow only numbers
    return GridSearchCV(pipeline, grid, scoring="neg_log_loss", cv=_build_folds(config), error_score=raises)


def _build_folds(config: GuardConfig) -> StratifiedKFold:
    return StratifiedKFold(config.folds, shuffle=True, random_state=config.seed)


@contextmanager
def _convergence_required(config: GuardConfig) -> Iterator[None]:
    try:
        # One thread, because a second one slows down matrices this small (6x on a busy machine).
        with warnings.catch_warnings(), threadpool_limits(1):
            warnings.simplefilter("error", ConvergenceWarning)
            yield
    except ConvergenceWarning:
        raise SnpatchError(
            f"guard: the fit did not converge in max_iter={config.max_iter} steps; raise max_iter or lower C "
            f"({', '.join(map(str, config.strengths))})"
        ) from None
