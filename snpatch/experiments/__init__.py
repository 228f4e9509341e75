"""The paper's experiments, one module each, with frozen settings and `run(context, settings) -> Report`.

Why a function per experiment and no base class: experiments share only how settings are resolved and how provenance is
recorded, and `run` here does both. This module imports no torch, because the CLI lists the experiments.
"""

import inspect
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from typing import TYPE_CHECKING

from snpatch.errors import SnpatchError, unknown_name
from snpatch.experiments.requirements import find_missing
from snpatch.report.report import Report
from snpatch.utils.schema import from_dict

if TYPE_CHECKING:
    from snpatch.experiments.config import ExperimentConfig
    from snpatch.experiments.context import ExperimentContext

DESCRIPTIONS = {
    "curve": "cost against k, with random controls",
    "sliding_window": "effect of a window that slides over the ranks",
    "necessity": "effect of all but the top k, of the reverse patch, and of a masked adapter",
    "curve_over_seeds": "the curve of every training seed: mean and interval over seeds (Figure 2)",
    "transfer": "mean cost, effect and perplexity on every benchmark (Tables 1 and 8)",
    "stability": "agreement of the rankings of several training seeds",
    "objectives": "agreement of the rankings of several objectives",
    "model_pairs": "neurons found by comparing other pairs of models, on the text of either (D.1)",
    "specificity": "neurons found on other prompt sets (C.4)",
    "alignment_tax": "cost and reward when two objectives patch each other (Table 3)",
    "competition": "a model of one objective, patched from a model of two (E.4)",
    "perplexity": "perplexity on unrelated text against k",
    "distribution": "distribution of change scores by layer",
    "neuron_tokens": "tokens that the top neurons promote",
    "positions": "rankings computed at different token positions",
    "guard": "accuracy of guards by k and across prompt sets, against controls and baselines",
    "safeguard": "harm that a guard prevents, and harmless prompts that it refuses",
    "judge_agreement": "two judges on the same completions (E.1)",
}
NAMES = tuple(DESCRIPTIONS)


def parse_settings(name: str, values: Mapping[str, object], overrides: Mapping[str, object] | None = None):
    """Build an experiment's Settings from values and overrides by name. Raise for an unknown name."""
    if name not in NAMES:
        raise unknown_name("experiment", name, NAMES)
    merged = {**values, **overrides} if overrides else values
    kind = inspect.signature(_import_experiment(name).run).parameters["settings"].annotation
    return from_dict(kind, f"settings of {name}", merged)


def resolve_settings(config: "ExperimentConfig", name: str, overrides: Mapping[str, object] | None = None):
    """Build an experiment's Settings from an experiment config and overrides."""
    return parse_settings(name, config.settings.get(name, {}), overrides)


def run(name: str, context: "ExperimentContext", settings: Mapping[str, object] | None = None) -> Report:
    """Run an experiment.

    Args:
        name: One of NAMES.
        context: Open experiment config.
        settings: Override the config's settings, which override the paper's defaults.

    Returns:
        The report, with provenance.

    Raises:
        SnpatchError: An unknown name or setting, or a config that lacks what the experiment needs.
    """
    resolved = resolve_settings(context.config, name, settings)
    if missing := find_missing(context.config, name, resolved):
        raise SnpatchError(missing)
    provenance = context.start_provenance()
    report = _import_experiment(name).run(context, resolved)
    return provenance.complete(report, asdict(resolved))


def _import_experiment(name: str):
    return import_module(f"snpatch.experiments.{name}")
