"""The paper's experiments, one a file: each has frozen `Settings` and `run(lab, settings) -> Report`.

Why `run` here and not a base class: an experiment is a function; what all share is how its settings are found and what
its tables' provenance says.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path

from snpatch.errors import SnpatchError
from snpatch.files import write_text
from snpatch.report.report import Report
from snpatch.worlds.lab import Lab
from snpatch.worlds.world import made

NAMES = (
    "curve",
    "windows",
    "transfer",
    "stability",
    "preference",
    "tax",
    "perplexity",
    "distribution",
    "words",
    "positions",
    "guard",
    "safeguard",
)


def settings_of(name: str, values: Mapping[str, object], given: Mapping[str, object] | None = None):
    """An experiment's Settings from values by name, those given before the others; unknown ones are errors."""
    if name not in NAMES:
        raise SnpatchError(f"no experiment named {name!r}: there are {', '.join(NAMES)}")
    return made(_module(name).Settings, f"settings of {name}", {**values, **given} if given else values)


def run(name: str, lab: Lab, settings: Mapping[str, object] | None = None) -> Report:
    """Run an experiment on a lab. settings: go before the world's own, and these before the paper's defaults."""
    chosen = settings_of(name, lab.world.settings.get(name, {}), settings)
    started = time.monotonic()
    lab.begin()
    report = _module(name).run(lab, chosen)
    return replace(report, provenance=lab.provenance(asdict(chosen), time.monotonic() - started))


def write_summary(folder: str | Path) -> None:
    """report.md, and report.json for programs: what each experiment whose table lies in the folder found."""
    folder, found = Path(folder), {}
    parts = ["# Experiments\n"]
    for name in NAMES:
        path = folder / f"{name}.json"
        if path.is_file():
            data = json.loads(path.read_text(encoding="utf-8"))
            told = data["provenance"]
            found[name] = {"headline": data["headline"], "provenance": told}
            parts.append(f"## {name}\n")
            parts += [f"- {sentence}" for sentence in data["headline"]]
            parts.append(
                f"\nModel {told['model']}, {told['backend']}, {told['seconds']} s; table: [{name}.csv]({name}.csv), "
                f"settings and provenance: [{name}.json]({name}.json).\n\n![{name}]({name}.png)\n"
            )
    write_text(folder / "report.md", "\n".join(parts))
    write_text(folder / "report.json", json.dumps(found, indent=1) + "\n")


def _module(name: str):
    return import_module(f"snpatch.experiments.{name}")
