"""Preset: all that a reproduction is told: the config, the training, sizes for estimates.

Why the config's table stays a table: the pipeline adds what it trains and writes it as experiment.toml, which
`snpatch exp` and people read.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from snpatch import experiments
from snpatch.data.prompt_set import PromptSet
from snpatch.errors import SnpatchError
from snpatch.reproduce.paper import check_known
from snpatch.reproduce.preset_file import FOLDER, read_preset
from snpatch.sweeps.eval_config import check_trusted, get_table, parse_eval_config
from snpatch.training.objectives import SFT, get_objective
from snpatch.training.settings import DpoSettings, TrainSettings
from snpatch.utils.files import file_stem
from snpatch.utils.schema import coerce, from_dict

NAMES = ("llama2-7b", "mistral-7b", "gemma-7b", "qwen3-4b-saferl", "tulu-2-7b", "llama-3-8b-sft-dpo", "demo")
SAFETY = "safety"
TRAINED = ("adapters", "contrasts", "seeds")  # an experiment config's tables that follow from a training
NOT_OBJECTIVES = ("base", "sft", "dpo", "rows", *experiments.NAMES)  # names of models and of steps


@dataclass(frozen=True)
class Size:
    """Of the model, for estimates. kv_bytes: of a token's keys and values, in bfloat16."""

    parameters: int
    kv_bytes: int


@dataclass(frozen=True)
class Training:
    """What is trained. seeds: the first one's pair is the main one. data: "sft" and objectives -> their rows.

    written_by: "demo" where rows that no file gives are drawn from the demo's language first.
    """

    seeds: tuple[int, ...]
    objectives: tuple[str, ...]
    data: dict[str, PromptSet]
    sft: TrainSettings
    dpo: DpoSettings
    written_by: str | None = None

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise SnpatchError(f"training.seeds: wanted one or more, each once, got {list(self.seeds)}")
        if SAFETY in self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise SnpatchError(f"training.objectives: those beside {SAFETY}, each once, got {list(self.objectives)}")
        for name in self.objectives:
            if file_stem(name) != name or name in NOT_OBJECTIVES or name.startswith(("sft-", "dpo-", "contrast-")):
                raise SnpatchError(
                    f"training.objectives: {name!r} is the name of a model or a step, or no file's: choose another"
                )
        if self.written_by not in (None, "demo"):
            raise SnpatchError(f"training.written_by: there is only demo, got {self.written_by!r}")
        for settings in (self.sft, self.dpo):
            if settings.method != "ia3":
                raise SnpatchError(
                    f"training.settings: method = {settings.method}: one engine runs one further set of weights, "
                    "and SFT and DPO would be two; train them with `snpatch train`, and give a preset of public pairs"
                )


@dataclass(frozen=True, kw_only=True)
class Preset:
    """name: the preset, or its file's stem. config: an experiment config's table without what is trained; paths in it
    are absolute. published: the model of the paper's whose numbers are shown beside the measured."""

    name: str
    config: dict
    title: str = ""
    training: Training | None = None
    experiments: tuple[str, ...] = experiments.NAMES
    published: str | None = None
    size: Size | None = None

    def __post_init__(self) -> None:
        check_known(self.published)


def load_preset(source: str, model: str | None = None, seeds: tuple[int, ...] = (), trust: bool = False) -> Preset:
    """A preset by its name, or a file of one. model: where its model lies; seeds: before the preset's own.

    trust: take what of a file may run code or open the host, see snpatch.trust; otherwise it is an error.
    """
    path = FOLDER / f"{source}.toml" if source in NAMES else Path(source)
    if not path.is_file():
        raise SnpatchError(f"no preset {source!r}: there are {', '.join(NAMES)}, or give a preset's file (.toml)")
    table = read_preset(path)
    try:
        preset = _preset(path.stem, table)
        if model is not None:
            given = str(Path(model).resolve()) if Path(model).exists() else model
            preset = replace(preset, config={**preset.config, "model": given}, size=None)
        if "model" not in preset.config:
            raise SnpatchError("config.model is missing")
        if seeds:
            if preset.training is None:
                raise SnpatchError("seeds are for presets that train, and this one does not")
            preset = replace(preset, training=replace(preset.training, seeds=seeds))
        if not trust:
            parts = parse_eval_config(preset.config)
            check_trusted(parts["engine"], parts["judges"], path.parent)
        return preset
    except SnpatchError as error:
        raise SnpatchError(f"preset {source}: {error}") from error


def _preset(name: str, table: dict) -> Preset:
    parts = {one: coerce(table[one], str, one) for one in ("title", "published") if one in table}
    config = get_table(table, "config")
    if "experiments" in table:
        parts["experiments"] = coerce(table["experiments"], tuple[str, ...], "experiments")
    for one in (*parts.get("experiments", ()), *get_table(config, "settings")):
        experiments.parse_settings(one, get_table(config, "settings").get(one, {}))
    if "size" in table:
        parts["size"] = from_dict(Size, "size", table["size"])
    if "training" in table:
        parts["training"] = _training(get_table(table, "training"))
        if given := [one for one in TRAINED if one in config]:
            raise SnpatchError(f"config.{given[0]}: follows from [training], and cannot be given beside it")
    elif "contrasts" not in config:
        raise SnpatchError("needs either [training], or config.contrasts of models that are there")
    return Preset(name=name, config=config, **parts)


def _training(table: dict) -> Training:
    known = ("seeds", "objectives", "written_by", "settings", "dpo", "data")
    if unknown := sorted(table.keys() - set(known)):
        raise SnpatchError(f"training: there is no {', '.join(unknown)}; there are {', '.join(known)}")
    settings, own, given = (get_table(table, name) for name in ("settings", "dpo", "data"))
    objectives = coerce(table.get("objectives", ()), tuple[str, ...], "training.objectives")
    names = ("sft", SAFETY, *objectives)
    if strangers := sorted(given.keys() - set(names)):
        raise SnpatchError(f"training.data: {strangers[0]} is not trained; there are {', '.join(names)}")
    data = {name: from_dict(PromptSet, f"training.data.{name}", one) for name, one in given.items()}
    for name in names:
        if name not in data and table.get("written_by"):
            data[name] = PromptSet(written(name))
        elif name not in data:
            data[name] = SFT if name == "sft" else get_objective(name)
    return Training(
        seeds=coerce(table.get("seeds", ()), tuple[int, ...], "training.seeds"),
        objectives=objectives,
        data=data,
        sft=from_dict(TrainSettings, "training.settings", settings),
        dpo=from_dict(DpoSettings, "training.dpo", {**settings, **own}),
        written_by=table.get("written_by"),
    )


def written(name: str) -> str:
    """Where rows lie, in a reproduction's folder, that it writes itself."""
    return f"data/{name}.jsonl"
