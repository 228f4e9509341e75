"""Summary of a results folder: report.md for people and report.json for programs.

Why each table's provenance is checked: a folder may hold tables of another config, other weights or other settings,
and next to each other they would look like one result.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from snpatch.errors import SnpatchError
from snpatch.experiments import NAMES, resolve_settings
from snpatch.experiments.context import ExperimentContext
from snpatch.report.formatting import escape_markdown
from snpatch.utils.files import write_text
from snpatch.utils.schema import parse_json

COMPARED_FACTS = ("models", "sets", "judges", "max_tokens", "contrast_tokens", "settings", "snpatch")


def write_summary(
    context: ExperimentContext, overrides: Mapping[str, Mapping[str, object]] | None = None
) -> dict[str, str]:
    """Write report.md and report.json into the context's folder.

    Args:
        context: Its folder is summarized. Only tables that it would compute alike are included.
        overrides: Experiment -> settings that its table was made with, if not the config's.

    Returns:
        Experiments whose table was left out -> the reason.
    """
    included, left_out = {}, {}
    parts = ["# Experiments\n"]
    for name in NAMES:
        path = context.out / f"{name}.json"
        if not path.is_file():
            continue
        table = _load_table(path)
        provenance = table.get("provenance", {})
        settings = asdict(resolve_settings(context.config, name, (overrides or {}).get(name)))
        if difference := _find_difference(provenance, context, settings):
            left_out[name] = difference
            continue
        included[name] = {"headline": table["headline"], "notes": table.get("notes", []), "provenance": provenance}
        parts.append(format_section(name, table))
    if left_out:
        parts.append("## Left out\n")
        parts += [f"- [{name}.json]({name}.json): {escape_markdown(reason)}" for name, reason in left_out.items()]
        parts.append("")
    write_text(context.out / "report.md", "\n".join(parts))
    write_text(context.out / "report.json", json.dumps(included, indent=1) + "\n")
    return left_out


def format_section(name: str, table: Mapping) -> str:
    """Return an experiment's section of report.md. table: the content of its NAME.json."""
    provenance = table["provenance"]
    lines = [*table["headline"], *table.get("notes", [])]
    sentences = "".join(f"- {escape_markdown(line)}\n" for line in lines)
    model, backend, seconds = (escape_markdown(provenance[fact]) for fact in ("model", "backend", "seconds"))
    return (
        f"## {name}\n\n{sentences}\nModel {model}, {backend}, {seconds} s; table: "
        f"[{name}.csv]({name}.csv), settings and provenance: [{name}.json]({name}.json).\n\n![{name}]({name}.png)\n"
    )


def _load_table(path: Path) -> dict:
    """Return the JSON object in the file, or {} if it is not a result file."""
    try:
        table = parse_json(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return table if isinstance(table, dict) and isinstance(table.get("provenance"), dict) else {}


def _find_difference(provenance: dict, context: ExperimentContext, settings: dict) -> str | None:
    """Return a dependency of a table that differs from the context, or None.

    None means that the context would compute the same table.
    """
    current = context.start_provenance()
    try:
        for model in provenance.get("models") or ():
            context.model(model)
        for name in provenance.get("sets") or ():
            context.data(name)
    except SnpatchError as error:
        return f"of another config: {error}"
    judges = {name: context.config.judges.get(name) for name in provenance.get("judges") or ()}
    expected = _to_comparable(json.loads(json.dumps(current.to_dict(settings) | {"judges": judges})))
    stored = _to_comparable(provenance)
    return next((f"made with other {fact}" for fact in COMPARED_FACTS if stored.get(fact) != expected[fact]), None)


def _to_comparable(provenance: dict) -> dict:
    """Drop paths of files that have a hash, and all versions but snpatch's."""
    sets = {
        name: {key: value for key, value in source.items() if key != "path" or "sha256" not in source}
        for name, source in (provenance.get("sets") or {}).items()
    }
    return provenance | {"sets": sets, "snpatch": provenance.get("versions", {}).get("snpatch")}
