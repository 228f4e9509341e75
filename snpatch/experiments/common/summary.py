"""Summary: report.md for people and report.json for programs, of all experiments whose tables lie in a folder.

Why each table's provenance is compared first: a folder may hold tables of another config, of other weights or of other
settings, and beside each other they would read as one result.
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

COMPARED = ("models", "sets", "judges", "max_tokens", "contrast_tokens", "settings", "snpatch")


def write(context: ExperimentContext, given: Mapping[str, Mapping[str, object]] | None = None) -> dict[str, str]:
    """Write both into the context's folder; what was left out: name -> why.

    given: experiment -> settings that go before the config's own, as its table was made with.
    """
    found, left_out = {}, {}
    parts = ["# Experiments\n"]
    for name in NAMES:
        path = context.out / f"{name}.json"
        if not path.is_file():
            continue
        data = _read(path)
        told = data.get("provenance", {})
        settings = asdict(resolve_settings(context.config, name, (given or {}).get(name)))
        if other := _other(told, context, settings):
            left_out[name] = other
            continue
        found[name] = {"headline": data["headline"], "provenance": told}
        parts.append(section(name, data))
    if left_out:
        parts.append("## Left out\n")
        parts += [f"- [{name}.json]({name}.json): {escape_markdown(why)}" for name, why in left_out.items()]
        parts.append("")
    write_text(context.out / "report.md", "\n".join(parts))
    write_text(context.out / "report.json", json.dumps(found, indent=1) + "\n")
    return left_out


def section(name: str, data: Mapping) -> str:
    """What a report says of an experiment. data: the content of its NAME.json."""
    told = data["provenance"]
    sentences = "".join(f"- {escape_markdown(sentence)}\n" for sentence in data["headline"])
    model, backend, seconds = (escape_markdown(told[part]) for part in ("model", "backend", "seconds"))
    return (
        f"## {name}\n\n{sentences}\nModel {model}, {backend}, {seconds} s; table: "
        f"[{name}.csv]({name}.csv), settings and provenance: [{name}.json]({name}.json).\n\n![{name}]({name}.png)\n"
    )


def _read(path: Path) -> dict:
    """The file's object; of a file that holds none, an empty one, which is of no config."""
    try:
        data = parse_json(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return data if isinstance(data, dict) and isinstance(data.get("provenance"), dict) else {}


def _other(told: dict, context: ExperimentContext, settings: dict) -> str | None:
    """What a table hangs on that is not the context's; None: it is the table that the context would make."""
    used = context.start_provenance()
    try:
        for model in told.get("models") or ():
            context.model(model)
        for name in told.get("sets") or ():
            context.data(name)
    except SnpatchError as error:
        return f"of another config: {error}"
    judges = {name: context.config.judges.get(name) for name in told.get("judges") or ()}
    now = json.loads(json.dumps(used.to_dict(settings) | {"judges": judges}))
    kept, wanted = _comparable(told), _comparable(now)
    return next((f"made with other {what}" for what in COMPARED if kept.get(what) != wanted[what]), None)


def _comparable(told: dict) -> dict:
    """A file whose hash is there is the same wherever it lies; of all versions, snpatch's is what keys hang on."""
    sets = {
        name: {key: value for key, value in one.items() if key != "path" or "sha256" not in one}
        for name, one in (told.get("sets") or {}).items()
    }
    return told | {"sets": sets, "snpatch": told.get("versions", {}).get("snpatch")}
