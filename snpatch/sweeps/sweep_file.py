"""SweepSpec: a sweep as a TOML or JSON file: the grid, its prompt sets and its judges.

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
from snpatch.data.prompt_set import PromptSet
from snpatch.errors import SnpatchError, unknown_name
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
from snpatch.utils.schema import check_keys, coerce, from_dict, load_table

SPEC_FILE = "spec.json"  # in a sweep's output folder
TOP_LEVEL_KEYS = (
    "config", "rankings", "sweep", "sampling", "sets", "judges", "contrast_tokens", "seen_sets", "exclude_seen",
    *ENGINE_KEYS,
)  # fmt: skip


@dataclass(frozen=True)
class RankingSource:
    """Models to contrast (see Engine.contrast) on a prompt set of the file."""

    recipient: str
    donor: str
    prompts: str
    positions: str = "completion"
    generate_with: str = "recipient"


@dataclass(frozen=True, kw_only=True)
class SweepSpec(EvalConfig):
    """Content of a sweep file.

    Attributes:
        rankings: Rankings by name: a file, or models to contrast.
        sweep: The grid.
        set_names: Prompt sets to generate completions for.
        judge_names: Judges that score the completions.
    """

    rankings: dict[str, str | RankingSource]
    sweep: SweepConfig
    set_names: tuple[str, ...]
    judge_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.rankings or not self.set_names or not self.judge_names:
            parts = {"rankings": self.rankings, "sets": self.set_names, "judges": self.judge_names}
            missing = [name for name, values in parts.items() if not values]
            raise SnpatchError(f"{', '.join(missing)}: expected at least one, got none")
        check_names(self.rankings, "a ranking")
        models = list(self.sweep.models)
        for name, source in self.rankings.items():
            if isinstance(source, RankingSource):
                models += [source.recipient, source.donor]
                self.check_set(source.prompts, f"rankings.{name}")
        self.check_models(models)
        for name in self.set_names:
            self.check_set(name, "sets")
        for name in self.seen_sets:
            self.check_set(name, "seen_sets")
        for name in self.judge_names:
            if name not in self.judges:
                raise unknown_name("judges: judge", name, self.judges)

    @property
    def contrast_sets(self) -> tuple[str, ...]:
        """Names of the prompt sets that contrasts read."""
        return tuple(source.prompts for source in self.rankings.values() if isinstance(source, RankingSource))

    @property
    def evaluation_sets(self) -> tuple[str, ...]:
        """Names of the prompt sets that completions are generated for."""
        return self.set_names

    @classmethod
    def load(cls, path: str | Path, trust: bool = False) -> Self:
        """Load a sweep file.

        Args:
            path: TOML or JSON file.
            trust: Accept what can run code or open the host (see snpatch.trust).

        Raises:
            SnpatchError: The file has unknown keys, wrong types or broken references, or needs trust.
        """
        data = load_table(path, "sweep")
        try:
            spec = cls.from_dict(data, Path(path).parent)
            if not trust:
                check_trusted(spec.engine, spec.judges, spec.folder)
            return spec
        except SnpatchError as error:
            raise SnpatchError(f"sweep {path}: {error}") from error

    @classmethod
    def from_dict(cls, data: object, folder: Path) -> Self:
        """Build a sweep from the table of its file, whose paths are relative to `folder`."""
        if not isinstance(data, Mapping):
            raise SnpatchError(f"expected a table, got {data!r}")
        data = dict(data)
        _check_keys(data)
        parts = _parts_of_config(data, folder) if "config" in data else {}
        if "model" in data or "config" not in data:
            parts["engine"] = parse_eval_config(data)["engine"].placed(folder)
        own_parts = parse_eval_config({**data, "model": ""})
        own_sets = {name: _resolve_set(prompt_set, folder) for name, prompt_set in own_parts["sets"].items()}
        own_judges = {name: _resolve_judge(arguments, folder) for name, arguments in own_parts["judges"].items()}
        parts["sets"] = {**parts.get("sets", {}), **own_sets}
        parts["judges"] = {**parts.get("judges", {}), **own_judges}
        grid = dict(get_table(data, "sweep"))
        names = {}
        for group in ("sets", "judges"):
            names[group] = coerce(grid.pop(group, tuple(parts[group])), tuple[str, ...], f"sweep: {group}")
        contrast_tokens = data.get("contrast_tokens", parts.get("contrast_tokens", cls.contrast_tokens))
        default = {"max_tokens": parts.get("max_tokens", Sampling().max_tokens)}
        sampling = from_dict(Sampling, "sampling", {**default, **get_table(data, "sampling")})
        rankings = get_table(data, "rankings")
        seen_sets = data.get("seen_sets", parts.get("seen_sets", ()))
        exclude_seen = data.get("exclude_seen", parts.get("exclude_seen", False))
        return cls(
            folder=folder,
            engine=parts["engine"],
            sets=parts["sets"],
            judges=parts["judges"],
            max_tokens=sampling.max_tokens,
            contrast_tokens=coerce(contrast_tokens, int, "contrast_tokens"),
            seen_sets=coerce(seen_sets, tuple[str, ...], "seen_sets"),
            exclude_seen=coerce(exclude_seen, bool, "exclude_seen"),
            rankings={name: _parse_ranking(name, source, folder) for name, source in rankings.items()},
            sweep=_parse_grid(grid, sampling),
            set_names=names["sets"],
            judge_names=names["judges"],
        )

    def save(self, path: str | Path) -> None:
        """Write a JSON file that `load` reads from any folder: its paths are absolute."""
        sampling = {name: value for name, value in asdict(self.sweep.sampling).items() if value is not None}
        data = {
            **engine_table(self.engine),
            "sets": {name: _set_table(prompt_set) for name, prompt_set in self.sets.items()},
            "judges": self.judges,
            "contrast_tokens": self.contrast_tokens,
            "seen_sets": self.seen_sets,
            "exclude_seen": self.exclude_seen,
            "rankings": {
                n: source if isinstance(source, str) else asdict(source) for n, source in self.rankings.items()
            },
            "sampling": sampling,
            "sweep": {
                **{f.name: getattr(self.sweep, f.name) for f in fields(SweepConfig) if f.name != "sampling"},
                "windows": [f"{window.lo}:{window.hi}" for window in self.sweep.windows],
                "sets": self.set_names,
                "judges": self.judge_names,
            },
        }
        write_text(path, json.dumps({name: part for name, part in data.items() if part != {}}, indent=1) + "\n")


def engine_table(config: EngineConfig) -> dict:
    """Return an engine as a config file describes it."""
    table = config.placed(Path()).to_dict()
    top = {name: table.pop(name) for name in ("model", "adapters", "models", "template", "vllm") if name in table}
    return {**top, "engine": {**table.pop("capacity", {}), **table}}


def _check_keys(data: dict) -> None:
    if "max_tokens" in data:
        raise SnpatchError("max_tokens: expected under sampling, got it at the top. Move it there.")
    check_keys(data, sorted(TOP_LEVEL_KEYS))
    engine_keys = [name for name in ENGINE_KEYS if name in data]
    if "config" in data and "model" not in data and engine_keys:
        raise SnpatchError(
            f"{engine_keys[0]}: expected model with it, as the config has an engine of its own. Give model, or set it "
            "by the command's options."
        )


def _parts_of_config(data: Mapping, folder: Path) -> dict:
    """Return what the experiment config that the file names contributes, with resolved paths."""
    config = load_eval_config(resolve_path(folder, str(data["config"])))  # `load` checks the merged file for trust
    return {
        "engine": config.engine.placed(config.folder),
        "sets": {name: _resolve_set(prompt_set, config.folder) for name, prompt_set in config.sets.items()},
        "judges": {name: _resolve_judge(arguments, config.folder) for name, arguments in config.judges.items()},
        "max_tokens": config.max_tokens,
        "contrast_tokens": config.contrast_tokens,
        "seen_sets": config.seen_sets,
        "exclude_seen": config.exclude_seen,
    }


def _resolve_set(prompt_set: PromptSet, folder: Path) -> PromptSet:
    return replace(prompt_set, source=_resolve(folder, prompt_set.source))


def _resolve_judge(arguments: dict, folder: Path) -> dict:
    return {**arguments, "source": _resolve(folder, arguments["source"])}


def _resolve(folder: Path, source: str) -> str:
    """Return the absolute path of a file; return a source that is no file there (a name) unchanged."""
    path = Path(resolve_path(folder, source))
    return str(path.resolve()) if path.exists() else source


def _parse_ranking(name: str, source: object, folder: Path) -> str | RankingSource:
    if isinstance(source, str):
        return str(Path(resolve_path(folder, source)).resolve())
    return from_dict(RankingSource, f"rankings.{name}", source)


def _parse_grid(grid: dict, sampling: Sampling) -> SweepConfig:
    windows = grid.pop("windows", [])
    if not isinstance(windows, list | tuple):
        raise SnpatchError(f"sweep: windows: expected a list of k or 'LO:HI', got {windows!r}")
    parsed = {"windows": tuple(_parse_window(window) for window in windows), "sampling": sampling}
    return from_dict(SweepConfig, "sweep", {**grid, **parsed})


def _parse_window(window) -> Window:
    if isinstance(window, str):
        return parse_window(window)
    return Window.of(tuple(window) if isinstance(window, list) else window)


def _set_table(prompt_set: PromptSet) -> dict:
    """Return a prompt set as a table of the fields that differ from their defaults."""
    return {
        name: value
        for name, value in asdict(prompt_set).items()
        if value not in (None, ()) and (name, value) != ("seed", 0)
    }
