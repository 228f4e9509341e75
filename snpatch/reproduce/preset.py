"""Presets: the experiment config, trainings and model size of a reproduction, and the TOML files that hold them.

The config stays a table because the pipeline adds what it trains and writes it as experiment.toml, which `snpatch exp`
and users read. A preset that extends another replaces single datasets, judges and models as a whole, because half of
one and half of another would be a third that nobody wrote.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from snpatch import experiments
from snpatch.data.prompt_set import PromptSet
from snpatch.errors import SnpatchError, shown
from snpatch.reproduce.ability import Ability, parse_ability
from snpatch.reproduce.paper import check_paper_model
from snpatch.sweeps.eval_config import NAMED_CONFIGS, check_trusted, get_table, parse_eval_config
from snpatch.training.paper_data import SFT, get_objective
from snpatch.training.settings import DpoSettings, TrainSettings
from snpatch.trust import refuse
from snpatch.utils.files import file_stem
from snpatch.utils.schema import coerce, from_dict, parse_toml

PRESET_NAMES = (
    "llama2-7b", "mistral-7b", "gemma-7b", "qwen2.5-3b", "qwen3-4b-saferl", "tulu-2-7b", "llama-3-8b-sft-dpo", "demo",
)  # fmt: skip
PRESET_FOLDER = Path(__file__).parent / "presets"
SAFETY = "safety"
TRAINED_TABLES = ("adapters", "contrasts", "seeds")  # tables of a config that follow from its trainings
RESERVED_NAMES = ("base", "sft", "dpo", "rows", *experiments.NAMES)  # models and steps
PRESET_KEYS = ("extends", "title", "published", "from_config", "experiments", "config", "training", "size", "ability")
TRAINING_KEYS = ("seeds", "objectives", "generated_by", "settings", "dpo", "data")
RESERVED_PREFIXES = ("sft-", "dpo-", "contrast-", "ability-")  # of models and steps
PATH_KEYS = ("source", "checkpoint", "lora", "adapters")  # their values are paths or names
PATH_TABLES = {"config": ("sets", "judges", "models", "adapters"), "training": ("data",)}
ENTRY_TABLES = {"config": ("sets", "judges"), "training": ("data",)}  # merged entry by entry
FIELD_TABLES = {"config": ("settings",), "training": ("settings", "dpo")}  # merged field by field


@dataclass(frozen=True)
class Size:
    """Size of a model, for estimates.

    Args:
        parameters: Number of parameters.
        kv_bytes: Bytes of keys and values per token, in bfloat16.
    """

    parameters: int
    kv_bytes: int


@dataclass(frozen=True)
class Training:
    """Trainings of a preset.

    Args:
        seeds: Training seeds; the first one's pair is the main pair.
        objectives: DPO objectives besides safety.
        data: "sft" and objectives -> training data.
        sft: Settings of SFT.
        dpo: Settings of DPO.
        generated_by: "demo" if data without a file is generated from the demo's language.
    """

    seeds: tuple[int, ...]
    objectives: tuple[str, ...]
    data: dict[str, PromptSet]
    sft: TrainSettings
    dpo: DpoSettings
    generated_by: str | None = None

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise SnpatchError(f"training.seeds: expected one or more different seeds, got {list(self.seeds)}")
        if SAFETY in self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise SnpatchError(
                f"training.objectives: expected different objectives besides {SAFETY}, got {list(self.objectives)}"
            )
        for name in self.objectives:
            if file_stem(name) != name or name in RESERVED_NAMES or name.startswith(RESERVED_PREFIXES):
                raise SnpatchError(
                    f"training.objectives: expected file names that are no model or step, got {name!r}. Choose another"
                )
        if self.generated_by not in (None, "demo"):
            raise SnpatchError(f"training.generated_by: expected demo, got {self.generated_by!r}")
        for settings in (self.sft, self.dpo):
            if settings.method != "ia3":
                raise SnpatchError(
                    f"training.settings: expected method = ia3, got {settings.method}. An engine has one set of "
                    "secondary weights, and SFT and DPO would need two; train them with `snpatch train` and write a "
                    "preset of public pairs"
                )


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A reproduction of one model.

    Args:
        name: Name of a shipped preset, or the stem of a preset file.
        config: Table of the experiment config without trained models; its paths are absolute.
        title: Title of the report.
        training: Trainings; None for a pair of published checkpoints.
        experiments: Experiments to run.
        published: Model of the paper whose numbers are shown next to the measured ones.
        size: Size of the model, for estimates.
        ability: Tasks of general ability.
    """

    name: str
    config: dict
    title: str = ""
    training: Training | None = None
    experiments: tuple[str, ...] = experiments.NAMES
    published: str | None = None
    size: Size | None = None
    ability: Ability = field(default_factory=Ability)

    def __post_init__(self) -> None:
        check_paper_model(self.published)


def load_preset(source: str, model: str | None = None, seeds: tuple[int, ...] = (), trust: bool = False) -> Preset:
    """Load a preset by name or from a file.

    Args:
        source: Name of a shipped preset, or a TOML file.
        model: Folder or name of the model, in place of the preset's.
        seeds: Training seeds, in place of the preset's.
        trust: Accept settings of a file that may run code or open the host, see snpatch.trust.

    Raises:
        SnpatchError: The preset is invalid, or needs `trust`.
    """
    path = PRESET_FOLDER / f"{source}.toml" if source in PRESET_NAMES else Path(source)
    if not path.is_file():
        raise SnpatchError(f"preset: expected one of {', '.join(PRESET_NAMES)}, or a TOML file, got {source!r}")
    table = read_preset_file(path)
    try:
        preset = _build_preset(path.stem, table)
        if model is not None:
            location = str(Path(model).resolve()) if Path(model).exists() else model
            preset = replace(preset, config={**preset.config, "model": location}, size=None)
        if "model" not in preset.config:
            raise SnpatchError("config.model is missing")
        if seeds:
            if preset.training is None:
                raise SnpatchError("seeds: expected a preset with trainings, this one has none")
            preset = replace(preset, training=replace(preset.training, seeds=seeds))
        if not trust:
            parts = parse_eval_config(preset.config)
            check_trusted(parts["engine"], parts["judges"], path.parent)
            if preset.ability.include_path:
                refuse("ability.include_path", preset.ability.include_path)
        return preset
    except SnpatchError as error:
        raise SnpatchError(f"preset {source}: {error}") from error


def generated_path(name: str) -> str:
    """Return the path of generated training data within the folder of a reproduction."""
    return f"data/{name}.jsonl"


def _build_preset(name: str, table: dict) -> Preset:
    parts = {key: coerce(table[key], str, key) for key in ("title", "published") if key in table}
    config = get_table(table, "config")
    if "experiments" in table:
        parts["experiments"] = coerce(table["experiments"], tuple[str, ...], "experiments")
    settings = get_table(config, "settings")
    for experiment in (*parts.get("experiments", ()), *settings):
        experiments.parse_settings(experiment, settings.get(experiment, {}))
    if "size" in table:
        parts["size"] = from_dict(Size, "size", table["size"])
    if "ability" in table:
        parts["ability"] = parse_ability(table["ability"])
    if "training" in table:
        parts["training"] = _build_training(get_table(table, "training"))
        if given := [key for key in TRAINED_TABLES if key in config]:
            raise SnpatchError(f"config.{given[0]}: follows from [training]. Remove one of them")
    elif "contrasts" not in config:
        raise SnpatchError("expected [training], or config.contrasts of existing models")
    return Preset(name=name, config=config, **parts)


def _build_training(table: dict) -> Training:
    if unknown := sorted(table.keys() - set(TRAINING_KEYS)):
        raise SnpatchError(f"training: expected {', '.join(TRAINING_KEYS)}, got {', '.join(unknown)}")
    settings, dpo_settings, data_tables = (get_table(table, name) for name in ("settings", "dpo", "data"))
    objectives = coerce(table.get("objectives", ()), tuple[str, ...], "training.objectives")
    names = ("sft", SAFETY, *objectives)
    if unknown := sorted(data_tables.keys() - set(names)):
        raise SnpatchError(f"training.data: expected {', '.join(names)}, got {unknown[0]}")
    data = {name: from_dict(PromptSet, f"training.data.{name}", entry) for name, entry in data_tables.items()}
    for name in names:
        if name not in data and table.get("generated_by"):
            data[name] = PromptSet(generated_path(name))
        elif name not in data:
            data[name] = SFT if name == "sft" else get_objective(name)
    return Training(
        seeds=coerce(table.get("seeds", ()), tuple[int, ...], "training.seeds"),
        objectives=objectives,
        data=data,
        sft=from_dict(TrainSettings, "training.settings", settings),
        dpo=from_dict(DpoSettings, "training.dpo", {**settings, **dpo_settings}),
        generated_by=table.get("generated_by"),
    )


def read_preset_file(path: Path) -> dict:
    """Return a preset file's tables.

    They are merged over the preset that it extends and the config that it starts from.
    """
    try:
        table = parse_toml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SnpatchError(f"preset {path}: not a TOML file: {error}") from error
    if unknown := sorted(table.keys() - set(PRESET_KEYS)):
        raise SnpatchError(f"preset {path}: expected {', '.join(PRESET_KEYS)}, got {', '.join(unknown)}")
    try:
        return _merge_parents(path, table)
    except SnpatchError as error:
        raise SnpatchError(f"preset {path}: {error}") from error


def _merge_parents(path: Path, table: dict) -> dict:
    for name in ("config", "training", "size", "ability"):
        get_table(table, name)
    table = _resolve_paths(table, path.parent)
    if "from_config" in table:
        table = _merge(_named_config(table["from_config"]), table)
    if "extends" not in table:
        return table
    shipped = {file.stem: file for file in PRESET_FOLDER.glob("*.toml")}
    parent = table.pop("extends")
    if not isinstance(parent, str) or parent not in shipped:
        raise SnpatchError(f"extends: expected a shipped preset, got {shown(parent)}")
    return _merge(read_preset_file(shipped[parent]), table)


def _named_config(name: object) -> dict:
    """Return the tables of a shipped experiment config, without its trained models."""
    path = NAMED_CONFIGS.get(name) if isinstance(name, str) else None
    if path is None:
        raise SnpatchError(f"from_config: expected {', '.join(NAMED_CONFIGS)}, got {name!r}")
    config = parse_toml(path.read_text(encoding="utf-8"))
    untrained = {key: part for key, part in config.items() if key not in TRAINED_TABLES}
    return _resolve_paths({"config": untrained}, path.parent)


def _merge(parent: dict, child: dict) -> dict:
    """Merge one preset's tables over another's."""
    merged = {**parent, **child}
    for group in ("config", "training"):
        if group not in parent or group not in child:
            continue
        parts = merged[group] = {**parent[group], **child[group]}
        for name in (*ENTRY_TABLES[group], *FIELD_TABLES[group]):
            if name in parent[group] and name in child[group]:
                low, high = get_table(parent[group], name), get_table(child[group], name)
                parts[name] = {**low, **high}
                if name in FIELD_TABLES[group]:
                    shared = [key for key in low.keys() & high.keys() if isinstance(low[key], dict)]
                    parts[name] |= {key: {**low[key], **get_table(high, key)} for key in shared}
    return merged


def _resolve_paths(table: dict, folder: Path) -> dict:
    """Return the tables with absolute paths for files and folders that exist in the folder.

    All other names stay as they are.
    """
    groups = {group: dict(table.get(group, {})) for group in (*PATH_TABLES, "ability")}
    for group, name in (("config", "model"), ("ability", "include_path")):
        if name in groups[group]:
            groups[group][name] = _resolve_value(groups[group][name], folder)
    for group, names in PATH_TABLES.items():
        for name in names:
            entries = groups[group].get(name)
            if isinstance(entries, dict):
                groups[group][name] = {key: _resolve_value(value, folder) for key, value in entries.items()}
    return {**table, **{group: values for group, values in groups.items() if values}}


def _resolve_value(value: object, folder: Path) -> object:
    """Resolve a path, a list of paths, or the paths of an entry."""
    if isinstance(value, str):
        return str((folder / value).resolve()) if value and (folder / value).exists() else value
    if isinstance(value, list):
        return [_resolve_value(item, folder) for item in value]
    if isinstance(value, dict):
        return {key: _resolve_value(part, folder) if key in PATH_KEYS else part for key, part in value.items()}
    return value
