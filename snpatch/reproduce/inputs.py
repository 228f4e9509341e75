"""Content hashes of the inputs of steps: models, datasets, judges, settings.

A hub name is hashed as a name, because hashing its files would download them and a plan must not. Hashes of datasets
and judges are frozen while an experiment context is open: it reads each once, so later changes were not read.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from snpatch import experiments
from snpatch.config import EngineConfig
from snpatch.data.prompt_set import PromptSet
from snpatch.errors import SnpatchError
from snpatch.experiments.config import ExperimentConfig
from snpatch.judges.factory import is_model_judge
from snpatch.models.fingerprint import fingerprint_adapter, fingerprint_checkpoint, fingerprint_tokenizer_files
from snpatch.reproduce.ability import Ability
from snpatch.reproduce.steps import fingerprint_path
from snpatch.utils.hashing import GENERATION_VERSION, RANKING_VERSION, ROWS_VERSION, TABLE_VERSION, hash_json

# Fields of an engine that do not change its results, or that are hashed with its models.
ENGINE_FIELDS_IGNORED = (
    "model", "adapters", "models", "backend", "device", "batch_size", "token_budget", "capacity", "vllm",
)  # fmt: skip
VLLM_FIELDS_IGNORED = (
    "gpu_memory_utilization", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "tensor_parallel_size",
    "enforce_eager", "swap_space",
)  # fmt: skip
CONFIG_VALUES = (  # fields of an experiment config
    "recipients", "benchmarks", "max_tokens", "contrast_tokens", "cost", "seen_sets", "exclude_seen",
)  # fmt: skip
SWEEP_INPUTS = ("recipients", "benchmarks", "max_tokens")
EXPERIMENT_INPUTS = {  # experiment -> inputs that its provenance does not name
    "curve": SWEEP_INPUTS,
    "sliding_window": SWEEP_INPUTS,
    "positions": SWEEP_INPUTS,
    "curve_over_seeds": (*SWEEP_INPUTS, "seeds"),
    "transfer": SWEEP_INPUTS,
    "model_pairs": SWEEP_INPUTS,
    "specificity": SWEEP_INPUTS,
    "perplexity": ("recipients",),
    "alignment_tax": ("benchmarks", "max_tokens", "judges", "contrasts"),
    "competition": (*SWEEP_INPUTS, "contrasts"),
    "judge_agreement": (*SWEEP_INPUTS, "judges"),
    "guard": ("benchmarks", "max_tokens"),
    "safeguard": ("benchmarks", "max_tokens"),
    "objectives": ("contrasts", *SWEEP_INPUTS),
    "stability": ("seeds", *SWEEP_INPUTS),
}
PROVENANCE_INPUTS = (("model", "models"), ("set", "sets"), ("judge", "judges"))  # kind of input -> key of a provenance


class InputFingerprints:
    """Content hashes by input name, for example `model/sft`, `set/contrast` or `settings/curve`.

    Args:
        config: Experiment config of the pipeline.
        trainings: Adapter name -> (settings, training data).
        generator: Description of the generated training rows; None if there are none.
        limit: Maximum number of prompts per set.
        skip_invalid: Skip broken rows.
        ability: Tasks of general ability.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        trainings: Mapping,
        generator: object,
        limit: int | None,
        skip_invalid: bool,
        ability: Ability,
    ) -> None:
        self._config, self._trainings, self._generator = config, trainings, generator
        self._limit, self._skip_invalid = limit, skip_invalid
        self._frozen: dict[str, str] = {}
        self._contents: dict[str, Callable[[str], object]] = {  # kind of input -> its content as JSON data
            "snpatch": lambda _: [GENERATION_VERSION, RANKING_VERSION, TABLE_VERSION],
            "engine": lambda _: engine_content(config.engine),
            "judges": lambda _: list(config.judges),
            "contrasts": lambda _: {name: asdict(contrast) for name, contrast in config.contrasts.items()},
            "seeds": lambda _: {name: asdict(contrast) for name, contrast in config.seeds.items()},
            "contrast": self._contrast,
            "settings": lambda name: asdict(experiments.resolve_settings(config, name)),
            "training": self._training,
            "rows": lambda name: self._data_source(trainings[name][1]),
            "ability": lambda _: asdict(ability),
            "generator": lambda _: [generator, ROWS_VERSION],
            "set": self._prompt_set,
            "judge": self._judge,
            "adapter": lambda folder: fingerprint_adapter(config.resolve_path(folder)),
            "model": self._model,
            **{name: lambda _, name=name: getattr(config, name) for name in CONFIG_VALUES},
        }

    def fingerprint(self, name: str) -> str:
        """Return the content hash of an input."""
        if name in self._frozen:
            return self._frozen[name]
        kind, _, rest = name.partition("/")
        if kind not in self._contents:
            raise SnpatchError(f"unknown to this version of snpatch ({kind})")
        try:
            return hash_json(self._contents[kind](rest))
        except KeyError as error:
            raise SnpatchError(f"removed from the preset ({error.args[0]})") from None

    def freeze(self) -> None:
        """Fix the hashes of datasets and judges, which an opened context reads once."""
        self.thaw()
        names = [f"set/{name}" for name in self._config.sets] + [f"judge/{name}" for name in self._config.judges]
        self._frozen = {name: self.fingerprint(name) for name in names}

    def thaw(self) -> None:
        """Forget the fixed hashes."""
        self._frozen = {}

    def experiment_inputs(self, name: str, provenance: dict) -> list[str]:
        """Return the names of all inputs of an experiment's table."""
        inputs = ["snpatch", "engine", "cost", "contrast_tokens", "contrast/contrasts/safety", f"settings/{name}"]
        return [
            *inputs, "seen_sets", "exclude_seen", *EXPERIMENT_INPUTS.get(name, ()), *self.provenance_inputs(provenance)
        ]  # fmt: skip

    def contrast_inputs(self, name: str, provenance: dict) -> list[str]:
        """Return the names of all inputs of a contrast's ranking."""
        return ["snpatch", "engine", "contrast_tokens", f"contrast/{name}", *self.provenance_inputs(provenance)]

    @staticmethod
    def provenance_inputs(provenance: dict) -> list[str]:
        """Return the names of the models, datasets and judges in a provenance."""
        return [f"{kind}/{name}" for kind, key in PROVENANCE_INPUTS for name in provenance[key]]

    def _contrast(self, name: str) -> object:
        group, _, key = name.partition("/")
        return asdict(getattr(self._config, group)[key])

    def _training(self, name: str) -> object:
        settings, data = self._trainings[name]
        return [asdict(settings), asdict(data), self._skip_invalid]

    def _prompt_set(self, name: str) -> object:
        prompts = self._config.sets[name]
        return [asdict(prompts), self._data_source(prompts), self._limit, self._skip_invalid]

    def _data_source(self, data: PromptSet) -> str:
        path = Path(self._config.resolve_path(data.source))
        return fingerprint_path(path) if path.exists() else data.source

    def _judge(self, name: str) -> object:
        arguments = self._config.judges[name]
        source = self._config.resolve_path(arguments["source"])
        content = _checkpoint_content(source) if is_model_judge(source) else _function_content(source)
        return [arguments, content]

    def _model(self, name: str) -> object:
        engine = self._config.engine.placed(self._config.folder)
        parts = [_checkpoint_content(engine.model)]
        if name != "base":
            source = engine.sources[name]
            parts += [source.checkpoint and _checkpoint_content(source.checkpoint)]
            parts += [fingerprint_adapter(folder) for folder in (*source.lora, *source.adapters)]
        return parts


def engine_content(engine: EngineConfig) -> dict:
    """Return the fields of an engine that change its results, without its models."""
    values = asdict(engine)
    content = {name: value for name, value in values.items() if name not in ENGINE_FIELDS_IGNORED}
    return content | {name: value for name, value in values["vllm"].items() if name not in VLLM_FIELDS_IGNORED}


def _function_content(source: str) -> str:
    """Return the content hash of a Python judge's file.

    It is "" for other judges, which their arguments describe.
    """
    try:
        spec = importlib.util.find_spec(source.partition(":")[0]) if ":" in source else None
    except ImportError:
        return ""
    return fingerprint_path(Path(spec.origin)) if spec and spec.origin else ""


def _checkpoint_content(source: str) -> object:
    """Return the content hashes of a local checkpoint and its tokenizer; for a hub name, return the name."""
    return [fingerprint_checkpoint(source), fingerprint_tokenizer_files(source)] if Path(source).is_dir() else source
