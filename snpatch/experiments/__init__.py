"""The paper's experiments, one a file: each has frozen `Settings` and `run(context, settings) -> Report`.

Why `run` here and not a base class: an experiment is a function; what all share is how its settings are found and what
its tables' provenance says.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib import import_module

from snpatch.errors import SnpatchError
from snpatch.experiments.config import ExperimentConfig
from snpatch.experiments.context import ExperimentContext
from snpatch.report.report import Report
from snpatch.utils.schema import from_dict

NAMES = (
    "curve",
    "sliding_window",
    "transfer",
    "stability",
    "objectives",
    "alignment_tax",
    "perplexity",
    "distribution",
    "neuron_tokens",
    "positions",
    "guard",
    "safeguard",
)


def parse_settings(name: str, values: Mapping[str, object], given: Mapping[str, object] | None = None):
    """An experiment's Settings from values by name, those given before the others; unknown ones are errors."""
    if name not in NAMES:
        raise SnpatchError(f"no experiment named {name!r}: there are {', '.join(NAMES)}")
    return from_dict(_module(name).Settings, f"settings of {name}", {**values, **given} if given else values)


def resolve_settings(config: ExperimentConfig, name: str, given: Mapping[str, object] | None = None):
    """An experiment's Settings in an experiment config: the config's own, those given before them."""
    return parse_settings(name, config.settings.get(name, {}), given)


def run(name: str, context: ExperimentContext, settings: Mapping[str, object] | None = None) -> Report:
    """Run an experiment on a context. settings: go before the config's own, and these before the paper's defaults."""
    chosen = resolve_settings(context.config, name, settings)
    used = context.start_provenance()
    report = _module(name).run(context, chosen)
    return replace(report, provenance=used.to_dict(asdict(chosen)))


def _module(name: str):
    return import_module(f"snpatch.experiments.{name}")
