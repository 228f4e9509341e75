"""EvalConfig: the part of a config file that sweeps and experiments share: engine, prompt sets, judges and lengths.

Why sources keep the text of the file: a path is relative to the file's folder, and what is no path there is a hub name.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from snpatch.config import Capacity, EngineConfig, resolve_backend, resolve_path
from snpatch.data.prompt_set import PromptSet
from snpatch.errors import SnpatchError, unknown_name
from snpatch.judges.factory import is_function_judge
from snpatch.names import BASE, check_names
from snpatch.sampling import CONTRAST, GREEDY
from snpatch.trust import ENGINE, check_arguments, refuse
from snpatch.utils.schema import from_dict, parse_toml

NAMED_CONFIGS = {"demo": Path(__file__).parents[1] / "demo" / "model" / "experiment.toml"}
"""Experiment configs that ship with the package. `snpatch reproduce` makes those of the paper's models."""
TOP_LEVEL_KEYS = ("model", "adapters", "models", "template")  # fields of EngineConfig that a file has at its top level
ENGINE_KEYS = (*TOP_LEVEL_KEYS, "engine", "vllm")  # all keys of a file that describe its engine
EXPERIMENT_KEYS = (
    "contrasts",
    "recipients",
    "benchmarks",
    "seeds",
    "harmless",
    "settings",
)  # what an ExperimentConfig adds
JUDGE_KEYS = ("source", "format", "label", "backend", "dtype", "batch_size", "device", "padding_side")  # of open_judge


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Engine, prompt sets and judges of a config file, with its paths relative to `folder`.

    Attributes:
        folder: Folder of the file.
        engine: The engine. `engine.vllm` and `engine.capacity` apply only where the backend is vllm.
        sets: Prompt sets by name.
        judges: Arguments of `open_judge` by the judge's name.
        max_tokens: Length limit of a completion, in tokens.
        contrast_tokens: Length limit of a completion that a contrast reads, in tokens.
        seen_sets: Names of further prompt sets that models, judges or guards were made from; see `seen`.
        exclude_seen: Leave out evaluation prompts that are also in a seen set or in a model's training data.
    """

    folder: Path
    engine: EngineConfig
    sets: dict[str, PromptSet]
    judges: dict[str, dict]
    max_tokens: int = GREEDY.max_tokens
    contrast_tokens: int = CONTRAST.max_tokens
    seen_sets: tuple[str, ...] = ()
    exclude_seen: bool = False

    @property
    def seen(self) -> tuple[str, ...]:
        """Names of the prompt sets with which evaluation prompts are compared: the contrasts' and `seen_sets`."""
        return tuple(dict.fromkeys((*self.contrast_sets, *self.seen_sets)))

    @property
    def contrast_sets(self) -> tuple[str, ...]:
        """Names of the prompt sets that contrasts read."""
        return ()

    @property
    def evaluation_sets(self) -> tuple[str, ...]:
        """Names of the prompt sets that are evaluated even if a contrast reads them, too."""
        return ()

    def resolve_path(self, source: str) -> str:
        """Resolve a path of the file; return a source that is no path there (a hub name) unchanged."""
        return resolve_path(self.folder, source)

    def engine_config(self, backend: str = "auto", **arguments) -> EngineConfig:
        """Return the engine's config for a backend.

        Args:
            backend: "auto" keeps the file's backend.
            arguments: Fields of EngineConfig or Capacity, or vLLM arguments; they override the file's.
        """
        backend = resolve_backend(self.engine.backend if backend == "auto" else backend)
        engine = replace(self.engine, backend=backend).placed(self.folder)
        if backend == "transformers":
            engine = replace(engine, capacity=Capacity(), vllm={})
        return engine.changed(**arguments)

    def check_set(self, name: str, context: str) -> None:
        """Raise unless there is a set of this name."""
        if name not in self.sets:
            raise unknown_name(f"{context}: prompt set", name, self.sets)

    def check_models(self, names: Iterable[str]) -> None:
        """Raise unless the engine has models of these names."""
        models = [BASE, *self.engine.sources]
        for name in names:
            if name not in models:
                raise unknown_name("model", name, models)


def load_eval_config(source: str | Path) -> EvalConfig:
    """Load the shared part of an experiment config.

    It is not checked who may run its code (see check_trusted).
    """
    path, table = read_config_file(source)
    try:
        parts = parse_eval_config(table)
        return from_dict(EvalConfig, "the file", {
            "folder": path.parent, **{name: part for name, part in parts.items() if name not in EXPERIMENT_KEYS}
        })  # fmt: skip
    except SnpatchError as error:
        raise SnpatchError(f"config {path}: {error}") from error


def read_config_file(source: str | Path) -> tuple[Path, dict]:
    """Return path and table of a config, by its name ("demo") or its TOML file."""
    path = NAMED_CONFIGS.get(str(source), Path(source))
    try:
        return path, parse_toml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        names = ", ".join(NAMED_CONFIGS)
        raise SnpatchError(f"config {source}: expected a file or one of {names}, got neither") from None
    except (OSError, ValueError) as error:
        raise SnpatchError(f"config {path}: not a TOML file: {error}") from error


def parse_eval_config(data: dict) -> dict:
    """Return a file's table with engine, sets and judges parsed, and all other keys unchanged."""
    parts = {name: part for name, part in data.items() if name not in ENGINE_KEYS}
    parts["engine"] = _parse_engine(data)
    parts["sets"] = {
        name: from_dict(PromptSet, f"sets.{name}", entry) for name, entry in get_table(data, "sets").items()
    }
    parts["judges"] = dict(get_table(data, "judges"))
    check_names(parts["judges"], "a judge")
    for name, judge in parts["judges"].items():
        if not isinstance(judge, dict) or not isinstance(judge.get("source"), str):
            raise SnpatchError(f"judges.{name}: expected a table with source")
    return parts


def check_trusted(engine: EngineConfig, judges: Mapping[str, Mapping], folder: Path) -> None:
    """Raise if the engine or judges of a file can run code or open the host (see snpatch.trust)."""
    check_arguments(engine.vllm, ENGINE, "vllm")
    for name, judge in judges.items():
        if is_function_judge(resolve_path(folder, judge["source"])):
            refuse(f"judges.{name}.source", judge["source"])
        check_arguments({key: value for key, value in judge.items() if key not in JUDGE_KEYS}, ENGINE, f"judges.{name}")


def get_table(data: dict, name: str) -> dict:
    """Return a table of a file; an empty one if the file has none of this name."""
    table = data.get(name, {})
    if not isinstance(table, dict):
        raise SnpatchError(f"{name}: expected a table, got {table!r}")
    return table


def _parse_engine(data: dict) -> EngineConfig:
    """Return a file's engine.

    Models are at the top level, other fields and Capacity's under engine, vLLM's under vllm.
    """
    arguments = {name: data[name] for name in (*TOP_LEVEL_KEYS, "vllm") if name in data}
    capacity = {}
    capacity_keys = [f.name for f in fields(Capacity)]
    engine_keys = [f.name for f in fields(EngineConfig) if f.name not in (*TOP_LEVEL_KEYS, "capacity", "vllm")]
    for name, value in get_table(data, "engine").items():
        if name not in (*engine_keys, *capacity_keys):
            expected = "at the top of the file"
            if name not in TOP_LEVEL_KEYS:
                expected = f"one of {', '.join((*engine_keys, *capacity_keys))}"
            raise SnpatchError(f"engine: {name}: expected {expected}. Arguments of vLLM's own are under vllm.")
        (capacity if name in capacity_keys else arguments)[name] = value
    for name in get_table(data, "vllm"):
        if name in (*TOP_LEVEL_KEYS, *engine_keys, *capacity_keys):
            expected = "at the top of the file" if name in TOP_LEVEL_KEYS else "under engine"
            raise SnpatchError(f"vllm: {name}: expected {expected}. Move it there.")
    return EngineConfig.from_dict({**arguments, "capacity": capacity}, "the file")
