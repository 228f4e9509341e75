"""What steps read, by name, and how each is told by its content: models, sets, judges, settings.

Why names from the hub stand for themselves: to look at what they hold would download it, and a plan must not. Why some
digests are kept once taken: a context reads a set once, and what is changed afterwards was not read.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from snpatch import experiments
from snpatch.config import EngineConfig
from snpatch.data.prompt_set import PromptSet
from snpatch.errors import SnpatchError
from snpatch.experiments.config import ExperimentConfig
from snpatch.judges.factory import is_model_judge
from snpatch.models.fingerprint import fingerprint_adapter, fingerprint_checkpoint, fingerprint_tokenizer_files
from snpatch.reproduce.steps import digest_of, short
from snpatch.utils.hashing import GENERATION_VERSION, RANKING_VERSION, ROWS_VERSION, TABLE_VERSION

# Of the engine: what only says where and how fast it runs, or is told apart as a model.
NOT_CONTENT = ("model", "adapters", "models", "backend", "device", "batch_size", "token_budget", "capacity", "vllm")
NOT_CONTENT_VLLM = """gpu_memory_utilization max_model_len max_num_seqs max_num_batched_tokens tensor_parallel_size
enforce_eager swap_space""".split()
# Values of an experiment config, by field name.
CONFIG_VALUES = ("recipients", "benchmarks", "max_tokens", "contrast_tokens", "cost")
SWEPT = ("recipients", "benchmarks", "max_tokens")
USES = {  # experiment -> what of the config it hangs on besides what its provenance tells
    "curve": SWEPT,
    "sliding_window": SWEPT,
    "positions": SWEPT,
    "transfer": SWEPT,
    "perplexity": ("recipients",),
    "alignment_tax": ("benchmarks", "max_tokens", "judges"),
    "guard": ("benchmarks", "max_tokens"),
    "safeguard": ("benchmarks", "max_tokens"),
}


class Inputs:
    """config: as the pipeline has it. trainings: name of an adapter -> (settings, rows). writes: what rows are drawn
    from. limit, skip_invalid: the context's."""

    def __init__(
        self, config: ExperimentConfig, trainings: Mapping, writes: object, limit: int | None, skip_invalid: bool
    ) -> None:
        self._config, self._trainings, self._writes = config, trainings, writes
        self._limit, self._skip_invalid = limit, skip_invalid
        self._frozen: dict[str, str] = {}

    def digest(self, name: str) -> str:
        """The content of what a name stands for."""
        if name in self._frozen:
            return self._frozen[name]
        kind, _, rest = name.partition("/")
        if kind in CONFIG_VALUES:
            return short(getattr(self._config, kind))
        content = getattr(self, f"_{kind}", None)
        if content is None:
            raise SnpatchError(f"this version knows no input {kind}")
        try:
            return short(content(rest))
        except KeyError as error:
            raise SnpatchError(f"there is no {error.args[0]} any more") from None

    def freeze(self) -> None:
        """A context opens, which reads each of these once."""
        self.thaw()
        names = [f"set/{name}" for name in self._config.sets] + [f"judge/{name}" for name in self._config.judges]
        self._frozen = {name: self.digest(name) for name in names}

    def thaw(self) -> None:
        """The context is closed."""
        self._frozen = {}

    def used_by(self, name: str, told: dict) -> list[str]:
        """All that an experiment's table hangs on. told: its provenance."""
        read = ["snpatch", "engine", "cost", "contrast_tokens", "contrast/contrasts/safety", f"settings/{name}"]
        read += [*USES.get(name, ()), *self.told(told)]
        if name == "objectives":
            read += ["contrasts"]
        if name == "alignment_tax":
            read += [
                f"contrast/contrasts/{objective}"
                for objective in experiments.resolve_settings(self._config, name).objectives
            ]
        if name == "stability":
            read += ["seeds"]
        return read

    def used_by_contrast(self, name: str, told: dict) -> list[str]:
        """All that a ranking hangs on. name: of the contrast; told: the context's provenance of it."""
        return ["snpatch", "engine", "contrast_tokens", f"contrast/{name}", *self.told(told)]

    @staticmethod
    def told(provenance: dict) -> list[str]:
        """What a provenance names."""
        groups = (("model", "models"), ("set", "sets"), ("judge", "judges"))
        return [f"{kind}/{one}" for kind, group in groups for one in provenance[group]]

    # By the first part of a name: what stands for its content, as JSON data.

    def _snpatch(self, _: str) -> object:
        return [GENERATION_VERSION, RANKING_VERSION, TABLE_VERSION]

    def _engine(self, _: str) -> object:
        return engine_content(self._config.engine)

    def _judges(self, _: str) -> object:
        return list(self._config.judges)

    def _contrasts(self, _: str) -> object:
        return {name: asdict(one) for name, one in self._config.contrasts.items()}

    def _seeds(self, _: str) -> object:
        return {name: asdict(one) for name, one in self._config.seeds.items()}

    def _contrast(self, name: str) -> object:
        group, _, key = name.partition("/")
        return asdict(getattr(self._config, group)[key])

    def _settings(self, name: str) -> object:
        return asdict(experiments.resolve_settings(self._config, name))

    def _training(self, name: str) -> object:
        settings, rows = self._trainings[name]
        return [asdict(settings), asdict(rows), self._skip_invalid]

    def _rows(self, name: str) -> object:
        return self._source(self._trainings[name][1])

    def _writing(self, _: str) -> object:
        return [self._writes, ROWS_VERSION]

    def _set(self, name: str) -> object:
        return [asdict(self._config.sets[name]), self._source(self._config.sets[name]), self._limit, self._skip_invalid]

    def _source(self, rows: PromptSet) -> str:
        path = Path(self._config.resolve_path(rows.source))
        return digest_of(path) if path.exists() else rows.source

    def _judge(self, name: str) -> object:
        arguments = self._config.judges[name]
        source = self._config.resolve_path(arguments["source"])
        if is_model_judge(source):
            return [arguments, _checkpoint(source)]
        return [arguments, _module(source)]

    def _adapter(self, folder: str) -> object:
        return fingerprint_adapter(self._config.resolve_path(folder))

    def _model(self, name: str) -> object:
        engine = self._config.engine.placed(self._config.folder)
        parts = [_checkpoint(engine.model)]
        if name != "base":
            source = engine.sources[name]
            parts += [source.checkpoint and _checkpoint(source.checkpoint)]
            parts += [fingerprint_adapter(folder) for folder in (*source.lora, *source.adapters)]
        return parts


def engine_content(engine: EngineConfig) -> dict:
    """Of an engine, what its results hang on besides its models."""
    parts = asdict(engine)
    own = {name: value for name, value in parts.items() if name not in NOT_CONTENT}
    return own | {name: value for name, value in parts["vllm"].items() if name not in NOT_CONTENT_VLLM}


def _module(source: str) -> str:
    """The file of a Python judge; of any other that is no model, nothing but its name."""
    try:
        found = importlib.util.find_spec(source.partition(":")[0]) if ":" in source else None
    except ImportError:
        return ""
    return digest_of(Path(found.origin)) if found and found.origin else ""


def _checkpoint(source: str) -> object:
    """A local checkpoint and its tokenizer by their bytes; anything else by its name."""
    return [fingerprint_checkpoint(source), fingerprint_tokenizer_files(source)] if Path(source).is_dir() else source
