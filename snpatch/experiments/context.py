"""ExperimentContext: an open config. What experiments share (engine, judges, prompts, rankings, texts) is made once.

Why rankings and texts are kept in the folder: experiments overlap (`exp all` patches the same neurons for five of its
tables), and a killed run must not start from nothing. What is handed out is noted in the provenance at every use.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path

from snpatch.data import Chat, Dataset
from snpatch.engine import Engine
from snpatch.errors import SnpatchError
from snpatch.executors.base import Progress
from snpatch.experiments.config import Contrast
from snpatch.experiments.provenance import Provenance
from snpatch.judges.factory import is_model_judge, open_judge
from snpatch.judges.protocol import Judge
from snpatch.patching.patch import Patch, recipient_name
from snpatch.ranking.ranking import Ranking
from snpatch.ranking.window import Window
from snpatch.sampling import Sampling
from snpatch.sweeps import judging, texts
from snpatch.sweeps.config import SweepConfig
from snpatch.sweeps.eval_config import EvalConfig
from snpatch.sweeps.perplexity import Perplexity, measure
from snpatch.sweeps.store import Store
from snpatch.sweeps.sweep import SweepResult, ask, sweep
from snpatch.sweeps.sweep_file import RankingSource, SweepSpec
from snpatch.sweeps.texts import RESTARTS
from snpatch.utils.files import file_stem
from snpatch.utils.hashing import RANKING_VERSION, hash_json

RANKINGS = "rankings"  # the folder's own for them
Progresses = Callable[[str], AbstractContextManager[Progress | None]]


@contextmanager
def silent(_name: str) -> Iterator[None]:
    yield None


class ExperimentContext:
    """Use as a context, or close it.

    world: what texts are written and judged with, a World or a SweepSpec. out: the folder that keeps rankings and
    texts. backend: of the engine and of score models; "auto" is the config's own. limit: only so many prompts of each
    set. skip_bad: see load_dataset. progress: name -> context that gives a Progress. command: that the tables are
    made by, as their provenance tells it. engine: further fields of EngineConfig, Capacity's or vLLM's arguments,
    before the config's own.
    """

    def __init__(
        self,
        config: EvalConfig,
        out: str | Path,
        *,
        backend: str = "auto",
        limit: int | None = None,
        skip_bad: bool = False,
        progress: Progresses = silent,
        command: str | None = None,
        **engine,
    ) -> None:
        self.config, self.out, self.progress, self._command = config, Path(out), progress, command
        self._backend = config.engine.backend if backend == "auto" else backend
        self._limit, self._skip_bad, self._engine_arguments = limit, skip_bad, engine
        self._sets: dict[str, Dataset] = {}
        self._judges: dict[str, Judge] = {}
        self._rankings: dict[tuple[str, ...], Ranking] = {}
        self._provenance = self.begin()

    def __enter__(self) -> "ExperimentContext":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close what was opened."""
        for judge in self._judges.values():
            if hasattr(judge, "close"):
                judge.close()
        self._judges = {}
        if "engine" in self.__dict__:
            self.__dict__.pop("engine").close()

    @cached_property
    def engine(self) -> Engine:
        return Engine.from_config(self.config.engine_config(self._backend, **self._engine_arguments))

    def begin(self) -> Provenance:
        """An experiment begins: what is handed out from here on is noted in what this gives."""
        config = self.config
        self._provenance = Provenance(
            command=self._command,
            model=config.engine.model,
            max_tokens=config.max_tokens,
            contrast_tokens=config.contrast_tokens,
        )
        return self._provenance

    def model(self, name: str) -> str:
        """The name of a model that is run or read: whoever uses the engine itself asks here first."""
        self.note_model(self.engine, name)
        return name

    def note_model(self, engine: Engine, name: str) -> None:
        """A model of some engine was run, which tells its backend and digests."""
        self._provenance.model(engine, name, self.config.engine.origin(name))

    def note_ranking(self, name: str, ranking: Ranking) -> None:
        """A ranking was used."""
        self._provenance.ranking(name, ranking)

    @property
    def sampling(self) -> Sampling:
        """How completions are written: greedy."""
        return Sampling(max_tokens=self.config.max_tokens)

    def judge(self, name: str) -> Judge:
        """The config's judge of this name."""
        if name not in self.config.judges:
            raise SnpatchError(f"no judge named {name!r}: the config has {', '.join(self.config.judges)}")
        if name not in self._judges:
            arguments = dict(self.config.judges[name])
            source = self.config.place(arguments.pop("source"))
            if is_model_judge(source):
                arguments.setdefault("backend", self._backend)
            self._judges[name] = open_judge(source, **arguments)
        self._provenance.judge(name, self.config.judges[name])
        return self._judges[name]

    @property
    def cost(self) -> dict[str, Judge]:
        """The cost judge, by its name."""
        return {self.config.cost: self.judge(self.config.cost)}

    def data(self, name: str) -> Dataset:
        """The config's set of this name."""
        if name not in self.config.sets:
            raise SnpatchError(f"no set named {name!r}: the config has {', '.join(self.config.sets)}")
        if name not in self._sets:
            data = self.config.sets[name].read(self.config.folder, self._skip_bad)
            data.print_row_notes(name)
            self._sets[name] = data if self._limit is None else data.first(min(self._limit, len(data)))
        self._provenance.set(name, self._sets[name])
        return self._sets[name]

    def prompts(self, name: str) -> list[Chat]:
        """The prompts of a set."""
        return self.data(name).prompts

    def ranking(self, contrast: Contrast | None = None, positions: str = "completion") -> Ranking:
        """The ranking of a contrast (default: safety), from `out` where the very same one was made before."""
        contrast = contrast or self.config.safety
        for model in (contrast.recipient, contrast.donor):
            self.model(model)
        self.data(contrast.prompts)
        parts = _parts(contrast, positions)
        if parts not in self._rankings:
            path, key = self.ranking_file(contrast, positions), self._key(contrast, positions)
            self._rankings[parts] = _kept(path, key) or self._made(contrast, positions, path, key)
        self._provenance.ranking(", ".join(parts), self._rankings[parts])
        return self._rankings[parts]

    def ranking_file(self, contrast: Contrast, positions: str = "completion") -> Path:
        """Where the ranking of a contrast is kept."""
        return self.out / RANKINGS / f"{file_stem('-'.join(_parts(contrast, positions)))}.safetensors"

    def k(self, value: int | float, ranking: Ranking) -> int:
        """A number of neurons: an int as it is, a float as that share of the ranked ones."""
        if isinstance(value, float):
            if not 0 <= value <= 1:
                raise SnpatchError(f"k: a share of the neurons must lie in 0.0..1.0, got {value}")
            return round(value * len(ranking))
        return value

    def windows(self, values: Sequence[int | float], ranking: Ranking) -> tuple[Window, ...]:
        """The top k of each value, each once."""
        return tuple(dict.fromkeys(Window(0, self.k(value, ranking)) for value in values))

    def sweep(
        self, prompts: str, rankings: dict[str, Ranking], judges: dict[str, Judge], config: SweepConfig
    ) -> SweepResult:
        """A sweep over a set of the config, whose texts are kept in `out`. Any that fails is an error."""
        for model in config.models:
            self.model(model)
        sets = {prompts: self.prompts(prompts)}
        with self.progress(f"sweep of {prompts}") as progress:
            name = f"{', '.join(rankings)} on {prompts}"
            result = sweep(self.engine, sets, rankings, judges, config, store=self.out, name=name, progress=progress)
        judging.check_scored(result.records)
        return result

    def run(self, spec: SweepSpec, *, restarts: int = RESTARTS, **how) -> SweepResult:
        """The sweep of a file, whose texts and scores are kept in `out`. What fails is told in the result.

        how: further arguments of sweeps.sweep.sweep.
        """
        judges = {name: self.judge(name) for name in spec.judged}  # first what is quick to fail
        how = {"store": self.out, "restarts": restarts, **how}
        sets, rankings = {name: self.prompts(name) for name in spec.swept}, self.rankings(spec)
        with self.progress("sweep") as progress:
            return sweep(self.engine, sets, rankings, judges, spec.plan, progress=progress, **how)

    def write_part(self, spec: SweepSpec, store: Store, worker: int, workers: int, restarts: int = RESTARTS) -> int:
        """Write and judge one worker's share of a sweep's texts, into a store of its own; how many texts that is.

        worker: counted from 1. Every `workers`-th text is its: all that share a prompt's beginning go round.
        """
        judges = {name: self.judge(name) for name in spec.judged}
        sets, rankings = {name: self.prompts(name) for name in spec.swept}, self.rankings(spec)
        asked = ask(self.engine, sets, rankings, spec.plan)
        keys = list(dict.fromkeys(item.key for item in asked.flat if item.key is not None))
        own = set(keys[worker - 1 :: workers])
        items = [item for item in asked.flat if item.key in own]
        with self.progress(f"worker {worker} of {workers}") as progress:
            texts.fill(self.engine, items, store, restarts=restarts, progress=progress)
        (records,) = texts.records([items], store)
        judging.judge_all(records, judges, store)
        return len(own)

    def rankings(self, spec: SweepSpec) -> dict[str, Ranking]:
        """The rankings of a sweep's file, by name."""
        for model in spec.plan.models:
            self.model(model)
        return {name: self._named_ranking(name, source) for name, source in spec.rankings.items()}

    def perplexity(
        self, text: str, patches: Sequence[Patch | str], window: int, bos_each_window: bool | str = "auto"
    ) -> list[Perplexity]:
        """Of each patched or unpatched model on a text of the config: see sweeps.perplexity.measure."""
        read = self.data(text).text
        for patch in patches:
            donors = [one.donor for one in patch.interventions] if isinstance(patch, Patch) else []
            for model in (recipient_name(patch), *donors):
                self.model(model)
        with self.progress(f"perplexity on {text}") as progress:
            return measure(self.engine, read, patches, window, bos_each_window=bos_each_window, progress=progress)

    def _named_ranking(self, name: str, source: str | RankingSource) -> Ranking:
        if isinstance(source, RankingSource):
            contrast = Contrast(source.recipient, source.donor, source.prompts, source.generate_with)
            return self.ranking(contrast, source.positions)
        ranking = Ranking.load(source, lambda: self.engine.geometry.shape)
        self.note_ranking(name, ranking)
        return ranking

    def _key(self, contrast: Contrast, positions: str) -> str:
        """Names everything that the ranking hangs on."""
        ids = self.engine.encode(self.prompts(contrast.prompts), contrast.recipient)
        models = [self.engine.fingerprint(name) for name in (contrast.recipient, contrast.donor)]
        parts = [RANKING_VERSION, *models, contrast.generate_with, positions, ids, self.config.contrast_tokens]
        return hash_json(parts)

    def _made(self, contrast: Contrast, positions: str, path: Path, key: str) -> Ranking:
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


def _parts(contrast: Contrast, positions: str) -> tuple[str, ...]:
    """What tells a ranking from the context's others."""
    parts = contrast.recipient, contrast.donor, contrast.prompts, positions
    return parts if contrast.generate_with == "recipient" else (*parts, "by donor")


def _kept(path: Path, key: str) -> Ranking | None:
    """The ranking of a file, if it is there and was made of the very same."""
    ranking = Ranking.load(path) if path.is_file() else None
    return ranking if ranking and ranking.meta.get("key") == key else None
