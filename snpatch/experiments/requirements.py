"""Requirements of experiments on their config: contrasts, training seeds, judges and prompt sets.

Why one module: `snpatch exp all` and `snpatch reproduce` skip an experiment with this reason before anything is
generated, and an experiment that is requested by its name fails with it.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from snpatch.experiments.config import ExperimentConfig

MIN_SEEDS = 2


def find_missing(config: "ExperimentConfig", name: str, settings: Any) -> str | None:
    """Return what a config lacks to run an experiment, as "needs ..."; None if it lacks nothing.

    Args:
        config: The experiment config.
        name: Name of the experiment.
        settings: Its resolved settings.
    """
    check = _CHECKS.get(name)
    return check(config, settings) if check else None


def _check_contrasts(config: "ExperimentConfig", names: Iterable[str]) -> str | None:
    missing = [name for name in names if name not in config.contrasts]
    return f"needs the contrast {missing[0]}, got {', '.join(config.contrasts)}" if missing else None


def _check_seeds(config: "ExperimentConfig", _settings: Any) -> str | None:
    if len(config.seeds) >= MIN_SEEDS:
        return None
    return f"needs at least two training seeds in the experiment config, got {', '.join(config.seeds) or 'none'}"


def _check_objectives(config: "ExperimentConfig", _settings: Any) -> str | None:
    if len(config.contrasts) >= 2:
        return None
    return f"needs at least two objectives in the experiment config, got {', '.join(config.contrasts)}"


def _check_judges(config: "ExperimentConfig", settings: Any) -> str | None:
    num_judges = len(settings.judges or config.judges)
    return None if num_judges >= 2 else f"needs two judges, got {num_judges}"


_CHECKS: dict[str, Callable[["ExperimentConfig", Any], str | None]] = {
    "curve_over_seeds": _check_seeds,
    "stability": _check_seeds,
    "objectives": _check_objectives,
    "alignment_tax": lambda config, settings: _check_contrasts(config, (*settings.objectives, *settings.neurons)),
    "competition": lambda config, settings: _check_contrasts(config, (settings.recipient, settings.donor)),
    "judge_agreement": _check_judges,
}
