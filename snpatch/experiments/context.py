"""ExperimentContext: an open config. What experiments share (engine, judges, prompts, rankings) is made once.

Why the folder stores rankings and completions: experiments overlap (`exp all` patches the same neurons for five of its
tables), and a killed run must not start from nothing. Each use is recorded in the provenance.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import cast

import numpy as np

from snpatch.data import Chat, Dataset
from snpatch.engine import Engine
from snpatch.errors import SnpatchError, unknown_name
from snpatch.executors.base import Progress
from snpatch.experiments.config import Contrast, ExperimentConfig
from snpatch.experiments.provenance import FingerprintSource, Provenance
from snpatch.experiments.seen_prompts import SeenPrompts, SetOverlap
from snpatch.judges.factory import is_model_judge, open_judge
from snpatch.judges.protocol import Judge
from snpatch.patching.patch import Patch, recipient_name
from snpatch.ranking.ranking import Ranking
from snpatch.ranking.window import Window
from snpatch.sampling import Sampling
from snpatch.sweeps import coherence, generation, judging
from snpatch.sweeps.config import SweepConfig
from snpatch.sweeps.eval_config import EvalConfig
from snpatch.sweeps.generation import MAX_RESTARTS
from snpatch.sweeps.perplexity import Perplexity, measure_perplexity
from snpatch.sweeps.store import Store
from snpatch.sweeps.sweep import SweepResult, plan_sweep, sweep
from snpatch.sweeps.sweep_file import RankingSource, SweepSpec
from snpatch.utils.files import file_stem
from snpatch.utils.hashing import RANKING_VERSION, hash_json

RANKINGS_FOLDER = "rankings"  # in the output folder
ProgressFactory = Callable[[str], AbstractContextManager[Progress | None]]  # name of a task -> its progress


@contextmanager
def no_progress(_name: str) -> Iterator[None]:
    """Report no progress."""
    yield None


class ExperimentContext:
    """Open config with its engine, judges, prompts and rankings. Use as a context, or close it.

    Args:
        config: An ExperimentConfig or a SweepSpec.
        out: Folder that stores rankings and completions.
        backend: Backend of the engine and of score models; "auto" is the config's.
        limit: Use only the first prompts of each set.
        skip_invalid: See load_dataset.
        progress: Returns a context that gives a Progress, for the name of a task.
        command: The command, for the provenance of tables.
        engine: Fields of EngineConfig or Capacity, or vLLM arguments; they override the config's.
    """

    def __init__(
        self,
        config: EvalConfig,
        out: str | Path,
        *,
        backend: str = "auto",
        limit: int | None = None,
        skip_invalid: bool = False,
        progress: ProgressFactory = no_progress,
        command: str | None = None,
        **engine,
    ) -> None:
        self.config = cast(ExperimentConfig, config)  # of a SweepSpec only the fields of EvalConfig are read
        self.out, self.progress, self._command = Path(out), progress, command
        self._backend = config.engine.backend if backend == "auto" else backend
        self._limit, self._skip_invalid, self._engine_arguments = limit, skip_invalid, engine
        self._sets: dict[str, Dataset] = {}  # as they are used
        self._read_sets: dict[str, Dataset] = {}  # with seen prompts
        self._overlaps: dict[str, SetOverlap] = {}
        self._seen_prompts = SeenPrompts(config, self._read_set)
        self._judges: dict[str, Judge] = {}
        self._rankings: dict[tuple[str, ...], Ranking] = {}
        self._provenance = self.start_provenance()

    def __enter__(self) -> "ExperimentContext":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close engine and judges."""
        for judge in self._judges.values():
            if close := getattr(judge, "close", None):
                close()
        self._judges = {}
        if "engine" in self.__dict__:
            self.__dict__.pop("engine").close()

    @cached_property
    def engine(self) -> Engine:
        """Return the engine, opened at its first use. Call `model` for each model that it runs."""
        return Engine.from_config(self.config.engine_config(self._backend, **self._engine_arguments))

    def start_provenance(self) -> Provenance:
        """Return a new provenance, in which each use is recorded from now on."""
        self._provenance = Provenance(
            command=self._command,
            model=self.config.engine.model,
            max_tokens=self.config.max_tokens,
            contrast_tokens=self.config.contrast_tokens,
        )
        return self._provenance

    def model(self, name: str) -> str:
        """Record the use of a model.

        Args:
            name: Name of the model.

        Returns:
            The name.

        Raises:
            SnpatchError: The engine has no such model.
        """
        self.record_model(self.engine, name)
        return name

    def record_model(self, engine: FingerprintSource, name: str) -> None:
        """Record the use of a model of some engine.

        Args:
            engine: Engine that has the model.
            name: Name of the model.
        """
        self._provenance.model(engine, name, self.config.engine.origin(name))

    def record_ranking(self, name: str, ranking: Ranking) -> None:
        """Record the use of a ranking.

        Args:
            name: Name of the ranking in the provenance.
            ranking: The ranking.
        """
        self._provenance.ranking(name, ranking)

    @property
    def sampling(self) -> Sampling:
        """Return the sampling of completions, which is greedy."""
        return Sampling(max_tokens=self.config.max_tokens)

    def judge(self, name: str) -> Judge:
        """Return a judge of the config; open it at its first use.

        Args:
            name: Name of the judge.

        Raises:
            SnpatchError: The config has no such judge, or it cannot be opened.
        """
        if name not in self.config.judges:
            raise unknown_name("judge", name, self.config.judges)
        if name not in self._judges:
            arguments = dict(self.config.judges[name])
            source = self.config.resolve_path(arguments.pop("source"))
            if is_model_judge(source):
                arguments.setdefault("backend", self._backend)
            self._judges[name] = open_judge(source, **arguments)
        self._provenance.judge(name, self.config.judges[name])
        return self._judges[name]

    @property
    def cost(self) -> dict[str, Judge]:
        """Return the cost judge, by its name."""
        return {self.config.cost: self.judge(self.config.cost)}

    def data(self, name: str) -> Dataset:
        """Return a prompt set of the config; read it at its first use.

        An evaluation set is compared with the prompts that the config's rankings and models have seen, and with
        `exclude_seen` it is without them.

        Args:
            name: Name of the set.

        Raises:
            SnpatchError: The config has no such set, it cannot be read, or all its prompts have been seen.
        """
        if name not in self._sets:
            data = self._read_set(name)
            is_evaluated = name in self.config.evaluation_sets or name not in self.config.seen
            if is_evaluated and not data.is_text:
                self._overlaps[name] = overlap = self._seen_prompts.find_overlap(name, data)
                if overlap.is_excluded and overlap.indices:
                    data = data.leave_out(overlap.indices, "also in seen prompts")
            self._sets[name] = data
        self._provenance.set(name, self._sets[name])
        if name in self._overlaps:
            self._provenance.overlap(self._overlaps[name])
            for seen in self.config.seen if self.config.exclude_seen else ():
                self._provenance.set(seen, self._read_set(seen))
        return self._sets[name]

    def _read_set(self, name: str) -> Dataset:
        if name not in self.config.sets:
            raise unknown_name("prompt set", name, self.config.sets)
        if name not in self._read_sets:
            data = self.config.sets[name].read(self.config.folder, self._skip_invalid)
            data.log_row_notes(name)
            self._read_sets[name] = data if self._limit is None else data.first(min(self._limit, len(data)))
        return self._read_sets[name]

    def prompts(self, name: str) -> list[Chat]:
        """Return the prompts of a set.

        Args:
            name: Name of the set.

        Raises:
            SnpatchError: The config has no such set, or the set is running text.
        """
        return self.data(name).prompts

    def clusters(self, sets: Iterable[str], config: SweepConfig) -> dict[str, list[str]] | None:
        """Return the cluster of each prompt of each set; None if the sweep has no `cluster_by`.

        Args:
            sets: Names of prompt sets of the config.
            config: The grid.

        Raises:
            SnpatchError: A prompt has no such column.
        """
        if not config.cluster_by:
            return None
        return {name: self.data(name).labels(config.cluster_by) for name in sets}

    def ranking(self, contrast: Contrast | None = None, positions: str = "completion") -> Ranking:
        """Return the ranking of a contrast; compute it unless the folder has it.

        Args:
            contrast: The contrast. Default: safety.
            positions: Positions to compare; see Engine.contrast.

        Raises:
            SnpatchError: An unknown model or set, or no neuron differs between the two models.
        """
        contrast = contrast or self.config.safety
        for model in (contrast.recipient, contrast.donor):
            self.model(model)
        self.data(contrast.prompts)
        names = _ranking_names(contrast, positions)
        if names not in self._rankings:
            path, key = self.ranking_file(contrast, positions), self._ranking_key(contrast, positions)
            self._rankings[names] = _load_ranking(path, key) or self._compute_ranking(contrast, positions, path, key)
        self._provenance.ranking(", ".join(names), self._rankings[names])
        return self._rankings[names]

    def ranking_file(self, contrast: Contrast, positions: str = "completion") -> Path:
        """Return the file that stores the ranking of a contrast.

        Args:
            contrast: The contrast.
            positions: Compared positions.
        """
        return self.out / RANKINGS_FOLDER / f"{file_stem('-'.join(_ranking_names(contrast, positions)))}.safetensors"

    def num_neurons(self, k: int | float, ranking: Ranking) -> int:
        """Return k as a number of neurons.

        Args:
            k: A number of neurons, or a float: a fraction of the ranked neurons.
            ranking: The ranking.

        Raises:
            SnpatchError: A fraction is outside 0.0..1.0.
        """
        if isinstance(k, float):
            if not 0 <= k <= 1:
                raise SnpatchError(f"k: expected a fraction of the neurons in 0.0..1.0, got {k}")
            return round(k * len(ranking))
        return k

    def top_windows(self, ks: Sequence[int | float], ranking: Ranking) -> tuple[Window, ...]:
        """Return the window of the top k neurons for each different k.

        Args:
            ks: Numbers or fractions of neurons; see `num_neurons`.
            ranking: The ranking.

        Raises:
            SnpatchError: A fraction is outside 0.0..1.0.
        """
        return tuple(dict.fromkeys(Window(0, self.num_neurons(k, ranking)) for k in ks))

    def sweep(
        self, experiment: str, prompts: str, rankings: dict[str, Ranking], judges: dict[str, Judge], config: SweepConfig
    ) -> SweepResult:
        """Run a sweep over a prompt set of the config.

        Args:
            experiment: Separates its completions in the store from those of other sweeps of the same prompts.
            prompts: Name of the set.
            rankings: Rankings by name.
            judges: Judges by name.
            config: The grid.

        Raises:
            SnpatchError: A completion or a score fails, or the grid is invalid.
        """
        for model in config.models:
            self.model(model)
        sets = {prompts: self.prompts(prompts)}
        if config.harmless:
            sets[config.harmless] = self.prompts(config.harmless)
            judges = {**judges, config.refusal_judge: self.judge(config.refusal_judge)}
        with self.progress(f"sweep of {prompts}") as progress:
            name = f"{experiment} on {prompts}"
            result = sweep(
                self.engine, sets, rankings, judges, config,
                clusters=self.clusters(sets, config), store=self.out, name=name, progress=progress,
            )  # fmt: skip
        judging.check_scored(result.records)
        return result

    def score(self, patches: Sequence[Patch | str], prompts: str, judge: str) -> np.ndarray:
        """Generate and judge a completion of each prompt under each patch.

        Args:
            patches: Patches, and names of models to run unpatched.
            prompts: Name of a prompt set.
            judge: Name of a judge.

        Returns:
            Scores [patches, prompts].

        Raises:
            SnpatchError: A completion or a score fails.
        """
        chats, opened_judge = self.prompts(prompts), self.judge(judge)
        with Store(self.out) as store, self.progress(f"completions of {prompts}") as progress:
            records = generation.generate_completions(
                self.engine, chats, patches, self.sampling, store=store, progress=progress
            )
            flat_records = list(chain.from_iterable(records))
            judging.judge_all(flat_records, {judge: opened_judge}, store)
        judging.check_scored(flat_records)
        scores = [record["scores"][judge] for record in flat_records]
        return np.array(scores).reshape(len(patches), len(chats))

    def run_sweep(self, spec: SweepSpec, store: Store, max_restarts: int = MAX_RESTARTS) -> SweepResult:
        """Run the sweep of a file. Its result lists failures.

        Args:
            spec: The sweep file.
            store: Store of completions and scores.
            max_restarts: Maximum number of restarts after engine crashes.

        Raises:
            SnpatchError: The sweep is invalid, or a judge can score nothing.
        """
        judges, sets, rankings = self._open_sweep(spec)
        with self.progress("sweep") as progress:
            return sweep(
                self.engine, sets, rankings, judges, spec.sweep,
                clusters=self.clusters(sets, spec.sweep), store=store, max_restarts=max_restarts, progress=progress,
            )  # fmt: skip

    def write_shard(
        self, spec: SweepSpec, store: Store, shard: int, num_shards: int, max_restarts: int = MAX_RESTARTS
    ) -> int:
        """Generate and judge one shard of a sweep.

        A shard has every `num_shards`-th completion, so that each has some of those that share a prompt's prefix.

        Args:
            spec: The sweep file.
            store: Store of the shard.
            shard: Number of the shard, counted from 1.
            num_shards: Number of shards.
            max_restarts: Maximum number of restarts after engine crashes.

        Returns:
            Number of completions of the shard.
        """
        judges, sets, rankings = self._open_sweep(spec)
        plan = plan_sweep(self.engine, sets, rankings, spec.sweep, self.clusters(sets, spec.sweep))
        keys = list(dict.fromkeys(task.key for task in plan.flat_tasks if task.key is not None))
        shard_keys = set(keys[shard - 1 :: num_shards])
        tasks = [task for task in plan.flat_tasks if task.key in shard_keys]
        with self.progress(f"shard {shard} of {num_shards}") as progress:
            generation.generate_missing(self.engine, tasks, store, max_restarts=max_restarts, progress=progress)
        (records,) = generation.build_records([tasks], store)
        judging.judge_all(records, judges, store)
        if spec.sweep.coherence:
            coherence.read_missing(
                self.engine,
                {task.key: task.request for task in tasks if task.key and task.request},
                {key: models for key, models in plan.readers.items() if key in shard_keys},
                {model: self.engine.fingerprint(model) for model in spec.sweep.models},
                store,
                max_restarts=max_restarts,
            )
        return len(shard_keys)

    def sweep_rankings(self, spec: SweepSpec) -> dict[str, Ranking]:
        """Return the rankings of a sweep file, by name.

        Args:
            spec: The sweep file.

        Raises:
            SnpatchError: A ranking cannot be loaded or computed.
        """
        for model in spec.sweep.models:
            self.model(model)
        return {name: self._sweep_ranking(name, source) for name, source in spec.rankings.items()}

    def perplexity(
        self, text: str, patches: Sequence[Patch | str], window: int, bos_each_window: bool | str = "auto"
    ) -> list[Perplexity]:
        """Return the perplexity of each patched or unpatched model on a text of the config.

        See `measure_perplexity`.

        Args:
            text: Name of a set of running text.
            patches: Patches, and names of models to run unpatched.
            window: Tokens per window.
            bos_each_window: Whether each window begins with BOS.
        """
        content = self.data(text).text
        for patch in patches:
            donors = [] if isinstance(patch, str) else [intervention.donor for intervention in patch.interventions]
            for model in (recipient_name(patch), *donors):
                if isinstance(model, str):
                    self.model(model)
        with self.progress(f"perplexity on {text}") as progress:
            return measure_perplexity(
                self.engine, content, patches, window, bos_each_window=bos_each_window, progress=progress
            )

    def _open_sweep(self, spec: SweepSpec) -> tuple[dict[str, Judge], dict[str, list[Chat]], dict[str, Ranking]]:
        """Return judges, prompt sets and rankings of a sweep file; first those whose errors come quickly."""
        judges = {name: self.judge(name) for name in spec.judge_names}
        sets = {name: self.prompts(name) for name in spec.set_names}
        return judges, sets, self.sweep_rankings(spec)

    def _sweep_ranking(self, name: str, source: str | RankingSource) -> Ranking:
        if isinstance(source, RankingSource):
            contrast = Contrast(source.recipient, source.donor, source.prompts, source.generate_with)
            return self.ranking(contrast, source.positions)
        ranking = Ranking.load(source, lambda: self.engine.geometry.shape)
        self.record_ranking(name, ranking)
        return ranking

    def _ranking_key(self, contrast: Contrast, positions: str) -> str:
        """Return the content hash of everything that determines the ranking."""
        ids = self.engine.encode(self.prompts(contrast.prompts), contrast.recipient)
        models = [self.engine.fingerprint(name) for name in (contrast.recipient, contrast.donor)]
        parts = [RANKING_VERSION, *models, contrast.generate_with, positions, ids, self.config.contrast_tokens]
        return hash_json(parts)

    def _compute_ranking(self, contrast: Contrast, positions: str, path: Path, key: str) -> Ranking:
        with self.progress(f"contrast of {contrast.recipient} and {contrast.donor}") as progress:
            ranking = self.engine.contrast(
                self.prompts(contrast.prompts),
                contrast.recipient,
                contrast.donor,
                generate_with=contrast.generate_with,
                positions=positions,
                sampling=Sampling(max_tokens=self.config.contrast_tokens),
                progress=progress,
            )
        ranking.meta.update(key=key, data=self.data(contrast.prompts).provenance)
        ranking.save(path)
        return ranking


def _ranking_names(contrast: Contrast, positions: str) -> tuple[str, ...]:
    """Return what identifies a ranking within the context."""
    names = contrast.recipient, contrast.donor, contrast.prompts, positions
    return names if contrast.generate_with == "recipient" else (*names, "by donor")


def _load_ranking(path: Path, key: str) -> Ranking | None:
    """Return the ranking of a file, or None if there is none with this key."""
    ranking = Ranking.load(path) if path.is_file() else None
    return ranking if ranking and ranking.meta.get("key") == key else None
