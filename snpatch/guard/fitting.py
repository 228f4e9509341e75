"""The classifier behind a guard: scikit-learn's logistic regression on scaled features.

Why a warning is an error here: the published guard was fitted on unscaled features and stopped before it had
converged, so that its figures hang on where it stopped.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import ArrayLike
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from snpatch.errors import SnpatchError
from snpatch.guard.config import GuardConfig


def validate_features(features: ArrayLike, k: int | None = None) -> np.ndarray:
    """[prompts, k] float64; anything else, NaN or infinity is a SnpatchError."""
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2 or not x.shape[1] or (k is not None and x.shape[1] != k):
        raise SnpatchError(f"guard: features must be [prompts, {k or 'neurons'}], got {list(x.shape)}")
    bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
    if len(bad):
        raise SnpatchError(f"guard: the features of prompt {bad[0]} hold NaN or infinity")
    return x


def validate_labels(labels: ArrayLike, n: int | None = None) -> np.ndarray:
    """[prompts] bool, True for harmful; anything but booleans, zeros and ones is a SnpatchError."""
    y = np.asarray(labels)
    if y.ndim != 1 or not len(y) or (n is not None and len(y) != n):
        raise SnpatchError(f"guard: labels must be [{n or 'prompts'}], one for each prompt, got {list(y.shape)}")
    if not np.isin(y, (0, 1)).all():
        raise SnpatchError("guard: labels must be True (harmful) or False for each prompt")
    return y.astype(bool)


def check_trainable(labels: np.ndarray, config: GuardConfig, name: str) -> None:
    """An error where a class is too small for the folds: choosing C inside a fold needs twice as many."""
    needed = config.folds * min(len(config.C), 2)
    harmful = int(labels.sum())
    if min(harmful, len(labels) - harmful) < needed:
        raise SnpatchError(
            f"{name}: of {len(labels)} prompts {harmful} are harmful; a guard needs at least {needed} harmful and "
            f"{needed} harmless ones (folds={config.folds}): give more prompts, or another threshold of harm"
        )


def fit_classifier(features: ArrayLike, labels: ArrayLike, config: GuardConfig) -> Pipeline:
    """Scaler and classifier, fitted to features [n, k] and labels [n]; C is chosen where the config has several."""
    x, y = _validate(features, labels, config)
    with _must_converge(config):
        fitted = _estimator(config).fit(x, y)
    return fitted.best_estimator_ if isinstance(fitted, GridSearchCV) else fitted


def predict_out_of_fold(features: ArrayLike, labels: ArrayLike, config: GuardConfig) -> np.ndarray:
    """Probability of harm [n] of each prompt from a fit to the other folds, in which C is chosen anew."""
    x, y = _validate(features, labels, config)
    with _must_converge(config):
        return cross_val_predict(_estimator(config), x, y, cv=_folds(config), method="predict_proba")[:, 1]


def _validate(features: ArrayLike, labels: ArrayLike, config: GuardConfig) -> tuple[np.ndarray, np.ndarray]:
    x = validate_features(features)
    y = validate_labels(labels, len(x))
    check_trainable(y, config, "guard")
    return x, y


def _estimator(config: GuardConfig) -> Pipeline | GridSearchCV:
    classifier = LogisticRegression(C=config.C[0], class_weight=config.class_weight, max_iter=config.max_iter)
    pipeline = make_pipeline(StandardScaler(), classifier)
    if len(config.C) == 1:
        return pipeline
    grid = {"logisticregression__C": sorted(config.C)}  # of equals the first is taken: the strongest penalty
    return GridSearchCV(pipeline, grid, scoring="neg_log_loss", cv=_folds(config), error_score="raise")


def _folds(config: GuardConfig) -> StratifiedKFold:
    return StratifiedKFold(config.folds, shuffle=True, random_state=config.seed)


@contextmanager
def _must_converge(config: GuardConfig) -> Iterator[None]:
    try:
        # One thread: on matrices this small a second one costs more than it does (6x, on a busy machine).
        with warnings.catch_warnings(), threadpool_limits(1):
            warnings.simplefilter("error", ConvergenceWarning)
            yield
    except ConvergenceWarning:
        raise SnpatchError(
            f"guard: the fit did not converge in max_iter={config.max_iter} steps; raise max_iter or lower C "
            f"({', '.join(map(str, config.C))})"
        ) from None
