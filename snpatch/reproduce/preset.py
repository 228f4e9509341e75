"""Preset: all that a reproduction is told, from one TOML file: the world, the training, sizes for estimates.

Why the world's table stays a table: the pipeline adds what it trains and writes it as world.toml, which `snpatch exp` and
people read.
"""

import tomllib
from dataclasses import dataclass, replace
from pathlib import Path

from snpatch import experiments
from snpatch.errors import SnpatchError
from snpatch.schema import read, value_of
from snpatch.training.objectives import SFT, objective
from snpatch.training.settings import DpoSettings, TrainSettings
from snpatch.worlds.world import NAMED, PromptSet
from snpatch.worlds.world import table as table_of

FOLDER = Path(__file__).parent / "presets"
NAMES = (
    "llama2-7b",
    "mistral-7b",
    "gemma-7b",
    "qwen3-4b-saferl",
    "tulu-2-7b",
    "llama-3-8b-sft-dpo",
    "demo",
)
SAFETY = "safety"
KEYS = ("extends", "title", "published", "from_world", "experiments", "world", "training", "size")


@dataclass(frozen=True)
class Size:
    """Of the model, for estimates. kv_bytes: of a token's keys and values, in bfloat16."""

    parameters: int
    kv_bytes: int


@dataclass(frozen=True)
class Training:
    """What is trained. seeds: the first one's pair is the main one. data: "sft" and objectives -> their rows.

    written_by: "demo" where the rows are drawn from the demo's language first.
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
        if self.written_by not in (None, "demo"):
            raise SnpatchError(f"training.written_by: there is only demo, got {self.written_by!r}")
        for settings in (self.sft, self.dpo):
            if settings.peft != "ia3":
                raise SnpatchError(
                    f"training.settings: peft = {settings.peft}: one engine runs one further set of weights, and SFT and "
                    "DPO would be two; train them with `snpatch train`, and give a preset of public pairs"
                )


@dataclass(frozen=True, kw_only=True)
class Preset:
    """name: of the preset or the file's stem. folder: what paths of files in it are relative to. world: a world file's
    table, without what is trained. published: the model of the paper's whose numbers are shown beside the measured."""

    name: str
    folder: Path
    world: dict
    title: str = ""
    training: Training | None = None
    experiments: tuple[str, ...] = experiments.NAMES
    published: str | None = None
    size: Size | None = None


def load_preset(source: str, model: str | None = None, seeds: tuple[int, ...] = ()) -> Preset:
    """A preset by its name, or a file of one. model: where its model lies; seeds: before the preset's own."""
    path = FOLDER / f"{source}.toml" if source in NAMES else Path(source)
    if not path.is_file():
        raise SnpatchError(f"no preset {source!r}: there are {', '.join(NAMES)}, or give a preset's file (.toml)")
    table = _extended(path)
    try:
        preset = _preset(path, table)
        if model is not None:
            preset = replace(preset, world={**preset.world, "model": model})
        if "model" not in preset.world:
            raise SnpatchError("world.model is missing")
        if seeds:
            if preset.training is None:
                raise SnpatchError("seeds are for presets that train, and this one does not")
            preset = replace(preset, training=replace(preset.training, seeds=seeds))
        return preset
    except SnpatchError as error:
        raise SnpatchError(f"preset {source}: {error}") from error


def _extended(path: Path) -> dict:
    """A file's tables over those of the preset that it extends."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SnpatchError(f"preset {path}: not a TOML file: {error}") from error
    if unknown := sorted(table.keys() - set(KEYS)):
        raise SnpatchError(f"preset {path}: there is no {', '.join(unknown)}; there are {', '.join(KEYS)}")
    below = table.pop("extends", None)
    if below is None:
        return table
    found = FOLDER / f"{below}.toml"
    if not found.is_file():
        raise SnpatchError(f"preset {path}: extends {below!r}, and there is no such preset")
    return _over(_extended(found), table)


def _over(below: dict, above: dict) -> dict:
    both = {n: _over(below[n], above[n]) for n in below.keys() & above.keys() if isinstance(below[n], dict)}
    return {**below, **above, **both}


def _preset(path: Path, table: dict) -> Preset:
    parts = {name: value_of(table[name], str, name) for name in ("title", "published") if name in table}
    world, folder = dict(table_of(table, "world")), path.parent
    if "from_world" in table:
        named = NAMED.get(table["from_world"])
        if named is None:
            raise SnpatchError(f"from_world: there are {', '.join(NAMED)}, got {table['from_world']!r}")
        shipped = tomllib.loads(named.read_text(encoding="utf-8"))
        world = _over({n: v for n, v in shipped.items() if n not in ("adapters", "contrasts", "seeds")}, world)
        folder = named.parent
    if "experiments" in table:
        parts["experiments"] = value_of(table["experiments"], tuple[str, ...], "experiments")
        if unknown := [name for name in parts["experiments"] if name not in experiments.NAMES]:
            raise SnpatchError(f"experiments: there is no {unknown[0]}; there are {', '.join(experiments.NAMES)}")
    if "size" in table:
        parts["size"] = read(Size, "size", table["size"])
    if "training" in table:
        parts["training"] = _training(table_of(table, "training"))
    elif "contrasts" not in world:
        raise SnpatchError("needs either [training], or world.contrasts of models that are there")
    return Preset(name=path.stem, folder=folder, world=world, **parts)


def _training(table: dict) -> Training:
    settings, own = table_of(table, "settings"), table_of(table, "dpo")
    given = table_of(table, "data")
    parts = {name: table[name] for name in ("seeds", "objectives", "written_by") if name in table}
    unknown = sorted(table.keys() - {"seeds", "objectives", "written_by", "settings", "dpo", "data"})
    if unknown:
        raise SnpatchError(f"training: there is no {', '.join(unknown)}")
    names = ("sft", SAFETY, *parts.get("objectives", ()))
    if strangers := sorted(given.keys() - set(names)):
        raise SnpatchError(f"training.data: {strangers[0]} is not trained; there are {', '.join(names)}")
    data = {name: read(PromptSet, f"training.data.{name}", one) for name, one in given.items()}
    for name in names:
        if name in data:
            continue
        if parts.get("written_by"):
            data[name] = PromptSet(f"data/{name}.jsonl")
        else:
            data[name] = SFT if name == "sft" else objective(name)
    return Training(
        seeds=value_of(parts.get("seeds", ()), tuple[int, ...], "training.seeds"),
        objectives=value_of(parts.get("objectives", ()), tuple[str, ...], "training.objectives"),
        data=data,
        sft=read(TrainSettings, "training.settings", settings),
        dpo=read(DpoSettings, "training.dpo", {**settings, **own}),
        written_by=parts.get("written_by"),
    )
