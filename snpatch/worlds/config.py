"""World: everything that experiments run on, in one TOML file: model, adapters, prompts, judges, settings.

Why a file: a table is worth what its provenance is, and this file is the whole of it. Paths in it are relative to its
folder; what is not there is taken for a hub name.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from snpatch.config import Capacity, EngineConfig, choose_backend, place
from snpatch.data import Dataset, load_dataset
from snpatch.errors import SnpatchError
from snpatch.judges.factory import is_function_judge
from snpatch.names import BASE, check_names
from snpatch.sampling import CONTRAST, GREEDY
from snpatch.schema import parse_toml, read
from snpatch.trust import ENGINE, check_arguments, refuse

JUDGE = ("source", "format", "label", "backend", "dtype", "batch_size", "device", "padding_side")  # of `open_judge`
NAMED_CONFIGS = {
    "demo": Path(__file__).parents[1] / "demo" / "model" / "experiment.toml",
}
"""Worlds that ship with the package. Those of the paper's models are made by `snpatch reproduce`."""
TOP = ("model", "adapters", "models", "template")  # fields of an engine that stand at the top of a file
ENGINE_KEYS = (*TOP, "engine", "vllm")  # all of a file that makes its engine


@dataclass(frozen=True)
class PromptSet:
    """Where prompts come from. source, format, split, column, revision: see snpatch.data.load_dataset.

    filter: a column and the values of it that are wanted. first: only the first so many; sample: so many drawn with
    `seed`.
    """

    source: str
    format: str | None = None
    split: str | None = None
    column: str | None = None
    revision: str | None = None
    filter: tuple[str, ...] = ()
    first: int | None = None
    sample: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.first is not None and self.sample is not None:
            raise SnpatchError(f"set {self.source}: give first or sample, not both")
        if self.seed and self.sample is None:
            raise SnpatchError(f"set {self.source}: expected seed with sample, got it alone. Give both, or neither.")

    def read(self, folder: Path, skip_bad: bool = False) -> Dataset:
        """The rows that are meant; a path is relative to the folder. skip_bad: see snpatch.data.load_dataset."""
        data = load_dataset(
            place(folder, self.source),
            format=self.format,
            split=self.split,
            column=self.column,
            revision=self.revision,
            skip_bad=skip_bad,
        )
        if self.filter:
            data = data.filter(*self.filter)
        if self.sample is not None:
            return data.sample(self.sample, self.seed)
        return data if self.first is None else data.first(self.first)


@dataclass(frozen=True)
class Contrast:
    """Whose activations are compared (Eq. 3): the generator writes the completions, `against` is the donor to be."""

    generator: str
    against: str
    prompts: str = "contrast"


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What texts are written and judged with: the content of a file, whose paths are relative to its folder.

    engine: model, adapters, models and what else an engine is started with, as the file has it; its vllm and capacity
    count where the backend is vllm. sets: of prompts. judges: name -> arguments of `open_judge`. max_tokens: of a
    completion; contrast_tokens: of a completion that a contrast reads.
    """

    folder: Path
    engine: EngineConfig
    sets: dict[str, PromptSet]
    judges: dict[str, dict]
    max_tokens: int = GREEDY.max_tokens
    contrast_tokens: int = CONTRAST.max_tokens

    def place(self, source: str) -> str:
        """A path of the file as it is seen from here; what is no file there is a name and stays as it is."""
        return place(self.folder, source)

    def engine_config(self, backend: str = "auto", **arguments) -> EngineConfig:
        """The engine on a backend; "auto" is the file's own. arguments: EngineConfig's, Capacity's or vLLM's, before
        the file's."""
        backend = choose_backend(self.engine.backend if backend == "auto" else backend)
        own = replace(self.engine, backend=backend).placed(self.folder)
        if backend == "transformers":
            own = replace(own, capacity=Capacity(), vllm={})
        return own.changed(**arguments)

    def known_set(self, name: str, where: str) -> None:
        """An error for a set that is not there."""
        if name not in self.sets:
            raise SnpatchError(f"{where}: no set named {name!r}: there are {', '.join(self.sets)}")

    def known_models(self, names: Iterable[str]) -> None:
        """An error for a model that is not there."""
        models = [BASE, *self.engine.sources]
        for name in names:
            if name not in models:
                raise SnpatchError(f"no model named {name!r}: there are {', '.join(models)}")


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig(EvalConfig):
    """An experiment config file's content: all that experiments run on.

    recipients: the models that are patched. contrasts: objective -> models to contrast; "safety" is the main one and
    its `against` the donor. seeds: training seed -> the safety contrast of that run. benchmarks: names of the sets
    that the models are attacked with. judges: the first is the cost. settings: experiment -> its settings.
    """

    contrasts: dict[str, Contrast]
    recipients: tuple[str, ...]
    benchmarks: tuple[str, ...]
    seeds: dict[str, Contrast] = field(default_factory=dict)
    settings: dict[str, dict] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if "safety" not in self.contrasts:
            raise SnpatchError("contrasts must have one named safety: its models are the experiments' main pair")
        if not self.judges or not self.recipients or not self.benchmarks:
            raise SnpatchError("needs at least one judge, one recipient and one benchmark")
        named = [*self.recipients]
        for contrast in (*self.contrasts.values(), *self.seeds.values()):
            named += [contrast.generator, contrast.against]
            self.known_set(contrast.prompts, "a contrast")
        self.known_models(named)
        for name in self.benchmarks:
            self.known_set(name, "benchmarks")
        if self.donor in self.recipients:
            raise SnpatchError(f"{self.donor!r} is recipient and donor")

    @property
    def safety(self) -> Contrast:
        return self.contrasts["safety"]

    @property
    def donor(self) -> str:
        return self.safety.against

    @property
    def cost(self) -> str:
        """The name of the judge that tells what is safe."""
        return next(iter(self.judges))


def load_experiment_config(source: str | Path, trust: bool = False) -> ExperimentConfig:
    """An experiment config by its name (`demo`) or its file. Unknown keys and broken references are errors.

    trust: take what may run code or open the host, see snpatch.trust; otherwise it is an error.
    """
    path = NAMED_CONFIGS.get(str(source), Path(source))
    try:
        data = parse_toml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SnpatchError(
            f"config {source}: no such file, and the named ones are {', '.join(NAMED_CONFIGS)}"
        ) from None
    except (OSError, ValueError) as error:
        raise SnpatchError(f"config {path}: not a TOML file: {error}") from error
    try:
        config = build_experiment_config(data, path.parent)
        if not trust:
            check_trusted(config.engine, config.judges, config.folder)
        return config
    except SnpatchError as error:
        raise SnpatchError(f"config {path}: {error}") from error


def check_trusted(engine: EngineConfig, judges: Mapping[str, Mapping], folder: Path) -> None:
    """Raise a SnpatchError for what of a file's engine and judges may run code or open the host."""
    check_arguments(engine.vllm, ENGINE, "vllm")
    for name, judge in judges.items():
        if is_function_judge(place(folder, judge["source"])):
            refuse(f"judges.{name}.source", judge["source"])
        check_arguments({n: value for n, value in judge.items() if n not in JUDGE}, ENGINE, f"judges.{name}")


def build_experiment_config(data: dict, folder: Path) -> ExperimentConfig:
    """An experiment config from its file's table. folder: what paths are relative to."""
    parts = parse_eval_config(data)
    for group in ("contrasts", "seeds"):
        parts[group] = {name: read(Contrast, f"{group}.{name}", one) for name, one in table(data, group).items()}
    for name in ("recipients", "benchmarks"):
        parts.setdefault(name, ())
    return read(ExperimentConfig, "the file", {"folder": folder, **parts})


def parse_eval_config(data: dict) -> dict:
    """A file's table with what makes a Setting read; all else as it stands."""
    parts = {name: part for name, part in data.items() if name not in ENGINE_KEYS}
    parts["engine"] = _engine_of(data)
    parts["sets"] = {name: read(PromptSet, f"sets.{name}", one) for name, one in table(data, "sets").items()}
    parts["judges"] = dict(table(data, "judges"))
    check_names(parts["judges"], "a judge")
    for name, judge in parts["judges"].items():
        if not isinstance(judge, dict) or not isinstance(judge.get("source"), str):
            raise SnpatchError(f"judges.{name}: wanted a table with source")
    return parts


def _engine_of(data: dict) -> EngineConfig:
    """Return the engine of a file: models at the top, its own fields and Capacity's under engine, vLLM's under vllm."""
    given = {name: data[name] for name in (*TOP, "vllm") if name in data}
    own, capacity = table(data, "engine"), {}
    sizes = [f.name for f in fields(Capacity)]
    known = [f.name for f in fields(EngineConfig) if f.name not in (*TOP, "capacity", "vllm")]
    for name, value in own.items():
        if name not in (*known, *sizes):
            where = "at the top of the file" if name in TOP else f"one of {', '.join((*known, *sizes))}"
            raise SnpatchError(f"engine: {name}: expected {where}. Arguments of vLLM's own are under vllm.")
        (capacity if name in sizes else given)[name] = value
    for name in table(data, "vllm"):
        if name in (*TOP, *known, *sizes):
            where = "at the top of the file" if name in TOP else "under engine"
            raise SnpatchError(f"vllm: {name}: expected {where}. Move it there.")
    return EngineConfig.from_table({**given, "capacity": capacity}, "the file")


def table(data: dict, name: str) -> dict:
    """A table of a file, empty where it has none of this name."""
    found = data.get(name, {})
    if not isinstance(found, dict):
        raise SnpatchError(f"{name}: wanted a table, got {found!r}")
    return found
