"""The steps of a reproduction: rows, trainings, contrasts, experiments; and the config that they make."""

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import tomli_w

from snpatch import experiments
from snpatch.config import EngineConfig
from snpatch.data import DATASETS
from snpatch.errors import ReceiptError, SnpatchError
from snpatch.experiments.config import Contrast, build_experiment_config
from snpatch.experiments.context import RANKINGS_FOLDER, ExperimentContext, ProgressFactory, no_progress
from snpatch.report import files
from snpatch.reproduce import launching
from snpatch.reproduce.inputs import Inputs
from snpatch.reproduce.preset import SAFETY, Preset, Training, written
from snpatch.reproduce.steps import Done, Step, Steps
from snpatch.sweeps.sweep_file import engine_table
from snpatch.training.settings import TrainSettings
from snpatch.utils.files import write_text
from snpatch.utils.schema import load_table

CONFIG_FILE, OPTIONS = "experiment.toml", "options.json"
ADAPTERS = "adapters"
TRAINED = ("adapter_model.safetensors", "adapter_config.json", "chat_template.jinja", "training.json")  # of a training
CONTRASTS = (("contrasts", "contrast"), ("seeds", "contrast-seed"))  # tables of the config -> names of their steps


@dataclass(frozen=True)
class Pair:
    """An adapter that is trained. rows: name of its data. sft: the adapter that it goes on from, of DPO."""

    name: str
    rows: str
    settings: TrainSettings
    sft: str | None = None


class Pipeline:
    """A preset in a folder.

    taken: adapters by name that are not trained but lie in a folder already. launcher: what starts a training
    ("accelerate launch"; default: this Python). limit, skip_invalid, progress, command: see ExperimentContext. engine:
    further fields of the config's engine (backend, dtype, vLLM's arguments), before the preset's own. options: what the
    folder is made with, for people; the same folder with others is an error.
    """

    def __init__(
        self,
        preset: Preset,
        out: str | Path,
        *,
        taken: dict[str, str] | None = None,
        launcher: str = "",
        limit: int | None = None,
        skip_invalid: bool = False,
        progress: ProgressFactory = no_progress,
        command: str | None = None,
        options: dict | None = None,
        **engine: object,
    ) -> None:
        self.preset, self.out, self.limit = preset, Path(out), limit
        self.taken = {name: str(Path(folder).resolve()) for name, folder in (taken or {}).items()}
        self._launcher, self.skip_invalid = launching.launcher_of(launcher), skip_invalid
        self._options = options or {}
        self.pairs = {pair.name: pair for pair in _pairs(preset.training)} if preset.training else {}
        self._check_taken()
        backend = engine.pop("backend", EngineConfig.backend)
        self._context_arguments = {"backend": backend, "limit": limit, "skip_invalid": skip_invalid}
        self._context_arguments |= {"progress": progress, "command": command}
        config = build_experiment_config(self._table(), self.out)
        self.own_engine = config.engine
        self.config = replace(config, engine=config.engine.changed(**engine))
        self._check_template()
        self.skipped: dict[str, str] = {}  # experiments that cannot be run in this config -> why
        self.inputs = self._made_inputs()
        self.steps = Steps(self.out, list(self._steps()), self.inputs.digest)
        self._run_by_lab: list[str] = []

    def chosen(self, only: tuple[str, ...] = (), start: str | None = None) -> set[str]:
        """The steps that are asked for, done or not. only: these; start: this one and all after it."""
        names = list(self.steps.steps)
        for name in (*only, *([start] if start else ())):
            if name not in names:
                raise SnpatchError(f"no step named {name!r}: there are {', '.join(names)}")
        return set(only) | set(names[names.index(start) :] if start else ())

    def run(
        self, only: tuple[str, ...] = (), start: str | None = None, tell: Callable[[str], None] = print
    ) -> list[str]:
        """Run what is not done, in order; the names of experiments that failed.

        only: these steps alone, done or not; what they read must be there. start: this step and all after it, done or
        not. What a step had made before is put away into `replaced`. A training that fails ends the run; so does a
        ReceiptError, after which all that this engine has made is put away, too.
        """
        forced, names, failed = self.chosen(only, start), list(self.steps.steps), []
        self.out.mkdir(parents=True, exist_ok=True)
        self._keep_options()
        self._write_config()
        for name in self.steps.strangers:
            if name in experiments.NAMES:
                self.steps.put_away(name)
        with self._closing():
            for number, name in enumerate(names, start=1):
                if only and name not in only:
                    continue
                reason = self.steps.reason(name)
                if reason is None and name not in forced:
                    tell(f"[{number}/{len(names)}] {name}: done")
                    continue
                tell(f"[{number}/{len(names)}] {name}: {reason or 'asked for again'}")
                try:
                    self.steps.run(name)
                except ReceiptError as error:
                    for one in self._run_by_lab:
                        self.steps.put_away(one, [self.out / RANKINGS_FOLDER])
                    made = ", ".join(self._run_by_lab) or "nothing"
                    raise ReceiptError(f"{name}: {error}; put away with it: {made}; run again") from error
                except SnpatchError as error:
                    if name not in experiments.NAMES:
                        raise SnpatchError(f"{name}: {error}") from error
                    failed.append(name)
                    tell(f"{name}: failed: {error}")
        for name in self.steps.stale:
            if name in experiments.NAMES:  # its tables would stand beside the others as if they were of one config
                self.steps.put_away(name)
        return failed

    def _check_taken(self) -> None:
        for name, folder in self.taken.items():
            if name not in self.pairs:
                raise SnpatchError(
                    f"--use-adapter: {name} is not trained here; there are {', '.join(self.pairs) or 'none'}"
                )
            if not Path(folder).is_dir():
                raise SnpatchError(f"--use-adapter {name}: {folder}: no such folder")

    def _check_template(self) -> None:
        """An error where models would be trained with another template than they are asked with."""
        asked = self.config.engine.template
        for pair in self.pairs.values():
            if asked not in ("auto", pair.settings.template):
                raise SnpatchError(
                    f"template: the engine's is {asked}, {pair.name} is trained with {pair.settings.template}"
                )

    def _made_inputs(self) -> Inputs:
        training = self.preset.training
        trainings = {name: (pair.settings, training.data[pair.rows]) for name, pair in self.pairs.items()}
        writes = None
        if training and training.written_by:
            from snpatch.demo.build import Recipe

            writes = [training.written_by, self._written(), asdict(Recipe())]
        return Inputs(self.config, trainings, writes, self.limit, self.skip_invalid)

    def _steps(self) -> Iterator[Step]:
        training = self.preset.training
        if training and training.written_by:
            yield Step("rows", self._write_rows, "rows of the demo's language", ("writing",), self.out / "data")
        for pair in self.pairs.values():
            if pair.name not in self.taken:
                yield self._training(pair)
        for group, prefix in CONTRASTS:
            for name, contrast in getattr(self.config, group).items():
                if group == "contrasts" or contrast not in self.config.contrasts.values():
                    yield self._contrast(f"{prefix}-{name}", f"{group}/{name}", contrast)
        for name in self.preset.experiments:
            if why := self._lacks(name):
                self.skipped[name] = why
            else:
                yield Step(name, lambda name=name: self._experiment(name), f"snpatch exp {name} --config {CONFIG_FILE}")

    def _lacks(self, name: str) -> str | None:
        """Why an experiment cannot be run in this config."""
        config = self.config
        if name == "stability" and len(config.seeds) < 2:
            return "needs two training seeds"
        if name == "objectives" and len(config.contrasts) < 2:
            return "needs two objectives"
        if name == "alignment_tax":
            wanted = experiments.resolve_settings(config, name).objectives
            if missing := [one for one in wanted if one not in config.contrasts]:
                return f"needs the objective {missing[0]}"
        return None

    # Rows and trainings

    def _written(self) -> list[str]:
        """Names of the rows that no file gives."""
        return [name for name, rows in self.preset.training.data.items() if rows.source == written(name)]

    def _write_rows(self) -> Done:
        from snpatch.demo.rows import write_rows

        return Done((), write_rows(self.out / "data", self._written()))

    def _training(self, pair: Pair) -> Step:
        folder, rows = self.out / ADAPTERS / pair.name, self.preset.training.data[pair.rows]
        reads = ["model/base", f"training/{pair.name}", f"rows/{pair.name}"]
        if pair.sft:
            reads.append(f"adapter/{self._folder(pair.sft)}")
        command = launching.train_command(
            self._launcher,
            self.config.resolve_path(self.config.engine.model),
            rows,
            rows.source if rows.source in DATASETS else str(self.out / rows.source),
            folder,
            pair.settings,
            self.out / self._folder(pair.sft) if pair.sft else None,
            self.skip_invalid,
        )

        def run() -> Done:
            launching.run(command)
            return Done((), [folder / name for name in TRAINED])

        return Step(pair.name, run, shlex.join(command), tuple(reads), folder)

    def _folder(self, name: str) -> str:
        """Where an adapter lies, as the config's file has it."""
        return self.taken.get(name, f"{ADAPTERS}/{name}")

    # The config, contrasts and experiments

    def _table(self) -> dict:
        """The config's table: the preset's, and what is trained."""
        training = self.preset.training
        if training is None:
            return self.preset.config
        adapters, contrasts, seeds = {}, {}, {}
        for seed in training.seeds:
            sft, dpo = (self._folder(f"{kind}-{seed}") for kind in ("sft", "dpo"))
            recipient, donor = (kind if seed == training.seeds[0] else f"{kind}-{seed}" for kind in ("sft", "dpo"))
            adapters |= {recipient: [sft], donor: [sft, dpo]}
            seeds[str(seed)] = {"recipient": recipient, "donor": donor}
        contrasts[SAFETY] = seeds[str(training.seeds[0])]
        for objective in training.objectives:
            adapters[objective] = [*adapters["sft"], self._folder(objective)]
            contrasts[objective] = {"recipient": "sft", "donor": objective}
        return {**self.preset.config, "adapters": adapters, "contrasts": contrasts, "seeds": seeds}

    def _write_config(self) -> None:
        """The config as a file, for `snpatch exp --config` and for people."""
        table = {name: part for name, part in self._table().items() if name not in ("engine", "vllm")}
        table = {**table, **_plain(engine_table(self.config.engine))}
        text = f"# Made by `snpatch reproduce`: {self.preset.title or self.preset.name}.\n" + tomli_w.dumps(table)
        write_text(self.out / CONFIG_FILE, text)

    def _keep_options(self) -> None:
        """Note what the folder is made with; an error if it was made with something else."""
        path, options = self.out / OPTIONS, json.loads(json.dumps(self._options))
        if path.is_file():
            kept = load_table(path, "options")
            if not isinstance(kept, dict):
                raise SnpatchError(f"{path}: wanted a JSON object; remove it to go on")
            if other := [name for name in {**kept, **options} if kept.get(name) != options.get(name)]:
                raise SnpatchError(
                    f"{self.out}: was made with {other[0]} = {kept.get(other[0])}, now it is {options.get(other[0])}: "
                    f"give the same, take another folder, or remove {OPTIONS} to change it"
                )
        else:
            write_text(path, json.dumps(options, indent=1) + "\n")

    @cached_property
    def context(self) -> ExperimentContext:
        self.inputs.freeze()
        return ExperimentContext(self.config, self.out, **self._context_arguments)

    @contextmanager
    def _closing(self) -> Iterator[None]:
        try:
            yield
        finally:
            if "context" in self.__dict__:
                self.__dict__.pop("context").close()
            self.inputs.thaw()

    def _contrast(self, step: str, name: str, contrast: Contrast) -> Step:
        def run() -> Done:
            used = self.context.start_provenance()
            self._run_by_lab.append(step)
            self.context.ranking(contrast)
            return Done(self.inputs.used_by_contrast(name, used.to_dict({})), [self.context.ranking_file(contrast)])

        return Step(step, run, f"change scores of {contrast.recipient} and {contrast.donor}")

    def _experiment(self, name: str) -> Done:
        context = self.context
        self._run_by_lab.append(name)
        report = experiments.run(name, context)
        made = files.write_report(report, self.out)
        if name == "safeguard":
            made.append(self.out / "guard.safetensors")
        return Done(self.inputs.used_by(name, report.provenance), made)


def _pairs(training: Training) -> Iterator[Pair]:
    """Adapters in the order of their training: the main pair, its objectives, then further seeds."""
    for seed in training.seeds:
        sft, dpo = (replace(settings, seed=seed) for settings in (training.sft, training.dpo))
        on = f"sft-{seed}"
        yield Pair(on, "sft", sft)
        yield Pair(f"dpo-{seed}", SAFETY, dpo, on)
        if seed == training.seeds[0]:
            for objective in training.objectives:
                yield Pair(objective, objective, dpo, on)


def _plain(data: object) -> object:
    """Without what TOML has no word for."""
    if isinstance(data, dict):
        return {name: _plain(one) for name, one in data.items() if one is not None}
    return [_plain(one) for one in data] if isinstance(data, list | tuple) else data
