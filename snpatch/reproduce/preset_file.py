"""Presets as files: one TOML file over another, with paths as they are seen from each file's folder.

Why single sets, judges and models are replaced whole: half of one and half of the other would be a third that nobody
wrote.
"""

from pathlib import Path

from snpatch.errors import SnpatchError, shown
from snpatch.sweeps.eval_config import NAMED_CONFIGS, get_table
from snpatch.utils.schema import parse_toml

FOLDER = Path(__file__).parent / "presets"
KEYS = ("extends", "title", "published", "from_config", "experiments", "config", "training", "size")
PATHS = ("source", "checkpoint", "lora", "adapters")  # keys whose values are paths or names
BY_NAME = {"config": ("sets", "judges"), "training": ("data",)}  # tables of wholes
BY_FIELD = {"config": ("settings",), "training": ("settings", "dpo")}  # tables of tables, or of values


def read_preset(path: Path) -> dict:
    """A file's tables over those of the preset that it extends, and of the config that it is from."""
    try:
        table = parse_toml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SnpatchError(f"preset {path}: not a TOML file: {error}") from error
    if unknown := sorted(table.keys() - set(KEYS)):
        raise SnpatchError(f"preset {path}: there is no {', '.join(unknown)}; there are {', '.join(KEYS)}")
    try:
        return _whole(path, table)
    except SnpatchError as error:
        raise SnpatchError(f"preset {path}: {error}") from error


def _whole(path: Path, table: dict) -> dict:
    for name in ("config", "training", "size"):
        get_table(table, name)
    table = _seen(table, path.parent)
    if "from_config" in table:
        named = NAMED_CONFIGS.get(table["from_config"]) if isinstance(table["from_config"], str) else None
        if named is None:
            raise SnpatchError(f"from_config: there are {', '.join(NAMED_CONFIGS)}, got {table['from_config']!r}")
        shipped = parse_toml(named.read_text(encoding="utf-8"))
        kept = {name: part for name, part in shipped.items() if name not in ("adapters", "contrasts", "seeds")}
        table = _over(_seen({"config": kept}, named.parent), table)
    if "extends" not in table:
        return table
    shipped = {one.stem: one for one in FOLDER.glob("*.toml")}
    below = table.pop("extends")
    if not isinstance(below, str) or below not in shipped:
        raise SnpatchError(f"extends {shown(below)}, and there is no such preset")
    return _over(read_preset(shipped[below]), table)


def _over(below: dict, above: dict) -> dict:
    """One preset's tables over another's."""
    both = {**below, **above}
    for group in ("config", "training"):
        if group not in below or group not in above:
            continue
        parts = both[group] = {**below[group], **above[group]}
        for name in (*BY_NAME[group], *BY_FIELD[group]):
            if name in below[group] and name in above[group]:
                low, high = get_table(below[group], name), get_table(above[group], name)
                parts[name] = {**low, **high}
                if name in BY_FIELD[group]:
                    shared = [one for one in low.keys() & high.keys() if isinstance(low[one], dict)]
                    parts[name] |= {one: {**low[one], **get_table(high, one)} for one in shared}
    return both


def _seen(table: dict, folder: Path) -> dict:
    """The tables with what is a file in the folder as an absolute path; all else is a name and stays as it is."""

    def seen(one: object) -> object:
        if isinstance(one, str):
            return str((folder / one).resolve()) if one and (folder / one).exists() else one
        if isinstance(one, list):
            return [seen(each) for each in one]
        if isinstance(one, dict):
            return {name: seen(part) if name in PATHS else part for name, part in one.items()}
        return one

    def each(tables: object) -> object:
        return {name: seen(one) for name, one in tables.items()} if isinstance(tables, dict) else tables

    config, training = dict(table.get("config", {})), dict(table.get("training", {}))
    if "model" in config:
        config["model"] = seen(config["model"])
    for group, names in ((config, ("sets", "judges", "models", "adapters")), (training, ("data",))):
        group |= {name: each(group[name]) for name in names if name in group}
    return {**table, **({"config": config} if config else {}), **({"training": training} if training else {})}
