"""SweepSpec: a sweep as a file, TOML or JSON: what runs, on which prompts, before which judges.

Paths in it are relative to its folder.

    config = "demo"                 # or its own model, adapters, models, [engine], [vllm], [sets], [judges]

    [rankings]
    safety = "safety.safetensors"   # a file, or models to contrast:
    fresh = { recipient = "sft", donor = "dpo", prompts = "contrast" }

    [sweep]                         # SweepConfig's fields
    recipients = ["base", "sft"]
    donors = ["dpo"]
    windows = [0, 200, 1000, "1000:2000"]
    sets = ["harmful"]              # default: all
    judges = ["cost"]               # default: all

    [sampling]
    max_tokens = 128
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Self

from snpatch.config import EngineConfig, resolve_path
from snpatch.errors import SnpatchError
from snpatch.names import check_names
from snpatch.patching.spec import parse_window
from snpatch.ranking.window import Window
from snpatch.sampling import Sampling
from snpatch.sweeps.config import SweepConfig
from snpatch.sweeps.eval_config import (
    ENGINE_KEYS,
    EvalConfig,
    check_trusted,
    get_table,
    load_eval_config,
    parse_eval_config,
)
from snpatch.utils.files import write_text
from snpatch.utils.schema import coerce, from_dict, load_table

FILE = "spec.json"  # beside a sweep's results


@dataclass(frozen=True)
class RankingSource:
    """Models to contrast, see engine.contrast; prompts: a set of the file."""

    recipient: str
    donor: str
    prompts: str
    positions: str = "completion"
    generate_with: str = "recipient"


@dataclass(frozen=True, kw_only=True)
class SweepSpec(EvalConfig):
    """A sweep file's content. rankings: name -> file, or models to contrast. swept: sets that are written for; judged:
    judges that see the texts."""

    rankings: dict[str, str | RankingSource]
    plan: SweepConfig
    swept: tuple[str, ...]
    judged: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.rankings or not self.swept or not self.judged:
            raise SnpatchError("needs at least one ranking, one set and one judge")
        check_names(self.rankings, "a ranking")
        named = list(self.plan.models)
        for name, source in self.rankings.items():
            if isinstance(source, RankingSource):
                named += [source.recipient, source.donor]
                self.check_set(source.prompts, f"rankings.{name}")
        self.check_models(named)
        for name in self.swept:
            self.check_set(name, "sets")
        for name in self.judged:
            if name not in self.judges:
                raise SnpatchError(f"judges: no judge named {name!r}: there are {', '.join(self.judges)}")

    @classmethod
    def load(cls, path: str | Path, trust: bool = False) -> Self:
        """From a file. Unknown keys, wrong types and broken references are errors that name it.

        trust: take what may run code or open the host, see snpatch.trust; otherwise it is an error.
        """
        data = load_table(path, "sweep")
        try:
            spec = cls.of(data, Path(path).parent)
            if not trust:
                check_trusted(spec.engine, spec.judges, spec.folder)
            return spec
        except SnpatchError as error:
            raise SnpatchError(f"sweep {path}: {error}") from error

    @classmethod
    def of(cls, data: Mapping, folder: Path) -> Self:
        """From a table. folder: what paths are relative to."""
        if not isinstance(data, Mapping):
            raise SnpatchError(f"wanted a table, got {data!r}")
        data = dict(data)
        known = {"config", "rankings", "sweep", "sampling", "sets", "judges", "contrast_tokens", *ENGINE_KEYS}
        if "max_tokens" in data:
            raise SnpatchError("max_tokens: expected under sampling, got it at the top. Move it there.")
        if unknown := sorted(data.keys() - known):
            raise SnpatchError(f"there is no {', '.join(unknown)}; there are {', '.join(sorted(known))}")
        if "config" in data and "model" not in data and (given := [name for name in ENGINE_KEYS if name in data]):
            raise SnpatchError(
                f"{given[0]}: expected model with it, as the config has an engine of its own. Give model, or set it by "
                "the command's options."
            )
        parts = _from_config(data, folder) if "config" in data else {}
        if "model" in data or "config" not in data:
            parts["engine"] = replace(parse_eval_config(data)["engine"]).placed(folder)
        own = parse_eval_config({**data, "model": ""})
        parts["sets"] = {**parts.get("sets", {}), **{n: _placed(s, folder) for n, s in own["sets"].items()}}
        parts["judges"] = {**parts.get("judges", {}), **{n: _judge(j, folder) for n, j in own["judges"].items()}}
        swept = dict(get_table(data, "sweep"))
        names = {
            name: coerce(swept.pop(name, tuple(parts[name])), tuple[str, ...], f"sweep: {name}")
            for name in ("sets", "judges")
        }
        contrast_tokens = parts.get("contrast_tokens", cls.contrast_tokens)
        sampling = from_dict(Sampling, "sampling", {"max_tokens": parts.get("max_tokens", Sampling().max_tokens),
                                               **get_table(data, "sampling")})  # fmt: skip
        return cls(
            folder=folder,
            engine=parts["engine"],
            sets=parts["sets"],
            judges=parts["judges"],
            max_tokens=sampling.max_tokens,
            contrast_tokens=coerce(data.get("contrast_tokens", contrast_tokens), int, "contrast_tokens"),
            rankings={name: _ranking(name, one, folder) for name, one in get_table(data, "rankings").items()},
            plan=_plan(swept, sampling),
            swept=names["sets"],
            judged=names["judges"],
        )

    def save(self, path: str | Path) -> None:
        """Write JSON that `load` reads, from wherever it lies: paths of files are absolute."""
        data = {
            **engine_table(self.engine),
            "sets": {name: _said(one) for name, one in self.sets.items()},
            "judges": self.judges,
            "contrast_tokens": self.contrast_tokens,
            "rankings": {n: one if isinstance(one, str) else asdict(one) for n, one in self.rankings.items()},
            "sampling": {name: value for name, value in asdict(self.plan.sampling).items() if value is not None},
            "sweep": {
                **{f.name: getattr(self.plan, f.name) for f in fields(SweepConfig) if f.name != "sampling"},
                "windows": [f"{window.lo}:{window.hi}" for window in self.plan.windows],
                "sets": self.swept,
                "judges": self.judged,
            },
        }
        write_text(path, json.dumps({name: part for name, part in data.items() if part != {}}, indent=1) + "\n")


def engine_table(config: EngineConfig) -> dict:
    """An engine as such a file has it."""
    table = config.placed(Path()).to_dict()
    top = {name: table.pop(name) for name in ("model", "adapters", "models", "template", "vllm") if name in table}
    return {**top, "engine": {**table.pop("capacity", {}), **table}}


def _from_config(data: Mapping, folder: Path) -> dict:
    """Return a sweep's parts of the experiment config that the file names, with paths as seen from here."""
    config = load_eval_config(resolve_path(folder, str(data["config"])))  # `load` checks the merged config for trust
    return {
        "engine": config.engine.placed(config.folder),
        "sets": {name: _placed(one, config.folder) for name, one in config.sets.items()},
        "judges": {name: _judge(one, config.folder) for name, one in config.judges.items()},
        "max_tokens": config.max_tokens,
        "contrast_tokens": config.contrast_tokens,
    }


def _placed(one, folder: Path):
    return replace(one, source=_absolute(folder, one.source))


def _judge(arguments: dict, folder: Path) -> dict:
    return {**arguments, "source": _absolute(folder, arguments["source"])}


def _absolute(folder: Path, source: str) -> str:
    """A file's absolute path; what is no file there is a name and stays as it is."""
    found = Path(resolve_path(folder, source))
    return str(found.resolve()) if found.exists() else source


def _ranking(name: str, one: object, folder: Path) -> str | RankingSource:
    if isinstance(one, str):
        return str(Path(resolve_path(folder, one)).resolve())
    return from_dict(RankingSource, f"rankings.{name}", one)


def _plan(swept: dict, sampling: Sampling) -> SweepConfig:
    windows = swept.pop("windows", [])
    if not isinstance(windows, list | tuple):
        raise SnpatchError(f"sweep: windows: wanted a list of k or 'LO:HI', got {windows!r}")
    kept = {"windows": tuple(_window(one) for one in windows), "sampling": sampling}
    return from_dict(SweepConfig, "sweep", {**swept, **kept})


def _window(one: object) -> Window:
    if isinstance(one, str):
        return parse_window(one)
    return Window.of(tuple(one) if isinstance(one, list) else one)


def _said(one) -> dict:
    """A set as a table: what differs from the defaults."""
    return {
        name: value for name, value in asdict(one).items() if value not in (None, ()) and (name, value) != ("seed", 0)
    }
