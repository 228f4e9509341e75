"""The steps of a reproduction (rows, trainings, contrasts, experiments) and the experiment config that they make."""

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import tomli_w

from snpatch import experiments
from snpatch.config import EngineConfig, check_choice
from snpatch.data import DATASETS
from snpatch.errors import ReceiptError, SnpatchError
from snpatch.experiments.config import Contrast, build_experiment_config
from snpatch.experiments.context import RANKINGS_FOLDER, ExperimentContext, ProgressFactory, no_progress
from snpatch.ranking.ranking import Ranking
from snpatch.report import files
from snpatch.reproduce import ability, launching
from snpatch.reproduce.inputs import InputFingerprints
from snpatch.reproduce.preset import SAFETY, Preset, Training, generated_path
from snpatch.reproduce.steps import Step, StepResult, Steps
from snpatch.sweeps.sweep_file import engine_table
from snpatch.training.settings import TrainSettings
from snpatch.utils.files import write_text
from snpatch.utils.optional import require
from snpatch.utils.schema import load_table

CONFIG_FILE, OPTIONS_FILE = "experiment.toml", "options.json"
ADAPTERS = "adapters"
TRAINING_OUTPUTS = ("adapter_model.safetensors", "adapter_config.json", "chat_template.jinja", "training.json")
CONTRAST_STEPS = (("contrasts", "contrast"), ("seeds", "contrast-seed"))  # table of the config -> prefix of its steps


@dataclass(frozen=True)
class AdapterTraining:
    """An adapter to train.

    Args:
        name: Name of the adapter and of its step.
        data: Name of its training data in the preset.
        settings: Settings.
        sft: Adapter that DPO starts from; None for SFT.
    """

    name: str
    data: str
    settings: TrainSettings
    sft: str | None = None


class Pipeline:
    """A preset and the folder in which it is reproduced.

    Args:
        preset: Preset.
        out: Output folder.
        provided_adapters: Adapters by name that exist already, with their folders; they are not trained.
        launcher: Command that starts trainings ("accelerate launch"; default: this Python).
        limit: Maximum number of prompts per set.
        skip_invalid: Skip broken rows.
        progress: See ExperimentContext.
        command: See ExperimentContext.
        options: Options that the folder is made with; the same folder with other options is an error.
        **engine: Fields of the engine (backend, dtype, arguments of vLLM) that override the preset's.
    """

    def __init__(
        self,
        preset: Preset,
        out: str | Path,
        *,
        provided_adapters: dict[str, str] | None = None,
        launcher: str = "",
        limit: int | None = None,
        skip_invalid: bool = False,
        progress: ProgressFactory = no_progress,
        command: str | None = None,
        options: dict | None = None,
        **engine: object,
    ) -> None:
        self.preset, self.out, self.limit, self.skip_invalid = preset, Path(out), limit, skip_invalid
        folders = provided_adapters or {}
        self.provided_adapters = {name: str(Path(folder).resolve()) for name, folder in folders.items()}
        self._launcher = launching.parse_launcher(launcher)
        self._options = options or {}
        trainings = _list_trainings(preset.training) if preset.training else ()
        self.trainings = {training.name: training for training in trainings}
        self._check_provided_adapters()
        backend = engine.pop("backend", EngineConfig.backend)
        self._context_arguments = {"backend": backend, "limit": limit, "skip_invalid": skip_invalid}
        self._context_arguments |= {"progress": progress, "command": command}
        config = build_experiment_config(self._config_table(), self.out)
        self.preset_engine = config.engine
        self.config = replace(config, engine=config.engine.changed(**engine))
        self._check_template()
        self.skipped: dict[str, str] = {}  # experiment or step -> reason why it cannot run here
        targets = [*self._ability_targets()] if preset.ability.tasks else []
        self.ability_targets = {target.step: target for target in targets}
        self.inputs = self._build_inputs()
        self.steps = Steps(self.out, list(self._build_steps()), self.inputs.fingerprint)
        self._steps_of_context: list[str] = []

    def list_finished(self) -> list[str]:
        """Return the experiments and evaluations of general ability whose tables exist and are current."""
        names = [*self.preset.experiments, *self.ability_targets]
        return [name for name in names if name in self.steps.steps and self.steps.reason(name) is None]

    def requested_steps(self, only: tuple[str, ...] = (), start: str | None = None) -> set[str]:
        """Return the steps that run even if they are done: those in `only`, and `start` with all after it."""
        names = list(self.steps.steps)
        for name in (*only, *([start] if start else ())):
            check_choice("step", name, names)
        return set(only) | set(names[names.index(start) :] if start else ())

    def run(
        self, only: tuple[str, ...] = (), start: str | None = None, log: Callable[[str], None] = print
    ) -> list[str]:
        """Run the steps that are not done, in order.

        Args:
            only: Run these steps alone, done or not; their inputs must exist.
            start: Run this step and all after it, done or not.
            log: Called with one line per step.

        Returns:
            Names of the experiments and evaluations of general ability that failed.

        Raises:
            SnpatchError: A step before the experiments failed.
            ReceiptError: The engine did not apply a patch in full. Everything that this engine has made is archived.
        """
        requested, names, failed = self.requested_steps(only, start), list(self.steps.steps), []
        self.out.mkdir(parents=True, exist_ok=True)
        self._store_options()
        self._write_config()
        self._archive_experiments(self.steps.orphaned_steps)
        with self._closing():
            for number, name in enumerate(names, start=1):
                if only and name not in only:
                    continue
                reason = self.steps.reason(name)
                is_done = reason is None and name not in requested
                if not is_done and (obstacle := self.find_obstacle(name)):
                    self.skipped[name] = obstacle
                    log(f"[{number}/{len(names)}] {name}: skipped: {obstacle}")
                    continue
                log(f"[{number}/{len(names)}] {name}: {'done' if is_done else reason or 'requested again'}")
                if not is_done and (error := self._run_step(name)):
                    failed.append(name)
                    log(f"{name}: failed: {error}")
        self._archive_experiments(self.steps.outdated_steps)
        return failed

    def _run_step(self, name: str) -> SnpatchError | None:
        """Run a step; return the error of a failed experiment or evaluation."""
        try:
            self.steps.run(name)
        except ReceiptError as error:
            for step in self._steps_of_context:
                self.steps.archive(step, [self.out / RANKINGS_FOLDER])
            archived = ", ".join(self._steps_of_context) or "nothing"
            raise ReceiptError(
                f"{name}: {error}. Archived the results of this engine: {archived}. Run again"
            ) from error
        except SnpatchError as error:
            if name not in experiments.NAMES and name not in self.ability_targets:
                raise SnpatchError(f"{name}: {error}") from error
            return error
        return None

    def _archive_experiments(self, names: list[str]) -> None:
        """Archive results that do not fit the current config, so that all tables in the folder fit each other."""
        for name in names:
            if name in experiments.NAMES:
                self.steps.archive(name)

    def _check_provided_adapters(self) -> None:
        for name, folder in self.provided_adapters.items():
            if name not in self.trainings:
                known = ", ".join(self.trainings) or "none"
                raise SnpatchError(f"--use-adapter: expected an adapter of this preset ({known}), got {name}")
            if not Path(folder).is_dir():
                raise SnpatchError(f"--use-adapter {name}: expected a folder, got {folder}")

    def _check_template(self) -> None:
        """Raise if models would be trained with another template than the engine uses."""
        template = self.config.engine.template
        for training in self.trainings.values():
            if template not in ("auto", training.settings.template):
                raise SnpatchError(
                    f"template: expected {training.settings.template}, with which {training.name} is trained, got "
                    f"{template} for the engine"
                )

    def _build_inputs(self) -> InputFingerprints:
        training = self.preset.training
        data = training.data if training else {}
        trainings = {name: (entry.settings, data[entry.data]) for name, entry in self.trainings.items()}
        generator = None
        if training and training.generated_by:
            from snpatch.demo.build import Recipe

            generator = [training.generated_by, self._generated_data(), asdict(Recipe())]
        return InputFingerprints(self.config, trainings, generator, self.limit, self.skip_invalid, self.preset.ability)

    def _build_steps(self) -> Iterator[Step]:
        training = self.preset.training
        if training and training.generated_by:
            yield Step("rows", self._generate_rows, "rows of the demo's language", ("generator",), self.out / "data")
        for adapter in self.trainings.values():
            if adapter.name not in self.provided_adapters:
                yield self._training_step(adapter)
        for table, prefix in CONTRAST_STEPS:
            for name, contrast in getattr(self.config, table).items():
                if table == "contrasts" or contrast not in self.config.contrasts.values():
                    yield self._contrast_step(f"{prefix}-{name}", f"{table}/{name}", contrast)
        for name in self.preset.experiments:
            settings = experiments.resolve_settings(self.config, name)
            if missing := experiments.find_missing(self.config, name, settings):
                self.skipped[name] = missing
            else:
                command = f"snpatch exp {name} --config {CONFIG_FILE}"
                yield Step(name, lambda name=name: self._run_experiment(name), command)
        for target in self.ability_targets.values():
            yield self._ability_step(target)

    # Rows and trainings

    def _generated_data(self) -> list[str]:
        """Return the names of the training data that the demo's language generates."""
        training = require(self.preset.training)
        return [name for name, data in training.data.items() if data.source == generated_path(name)]

    def _generate_rows(self) -> StepResult:
        from snpatch.demo.build import Recipe
        from snpatch.demo.corpus import write_rows

        recipe = Recipe()
        paths = write_rows(self.out / "data", self._generated_data(), recipe.sft_rows, recipe.dpo_rows)
        return StepResult((), paths)

    def _training_step(self, training: AdapterTraining) -> Step:
        folder, data = self.out / ADAPTERS / training.name, require(self.preset.training).data[training.data]
        inputs = ["model/base", f"training/{training.name}", f"rows/{training.name}"]
        if training.sft:
            inputs.append(f"adapter/{self._adapter_folder(training.sft)}")
        command = launching.build_train_command(
            self._launcher,
            self.config.resolve_path(self.config.engine.model),
            data,
            data.source if data.source in DATASETS else str(self.out / data.source),
            folder,
            training.settings,
            self.out / self._adapter_folder(training.sft) if training.sft else None,
            self.skip_invalid,
        )

        def run() -> StepResult:
            launching.run(command)
            return StepResult((), [folder / name for name in TRAINING_OUTPUTS])

        return Step(training.name, run, shlex.join(command), tuple(inputs), folder)

    def _adapter_folder(self, name: str) -> str:
        """Return an adapter's folder as the config names it."""
        return self.provided_adapters.get(name, f"{ADAPTERS}/{name}")

    # The experiment config

    def _config_table(self) -> dict:
        """Return the table of the experiment config: the preset's, with the trained models."""
        training = self.preset.training
        if training is None:
            return self.preset.config
        adapters, contrasts, seeds = {}, {}, {}
        for seed in training.seeds:
            sft_folder, dpo_folder = (self._adapter_folder(f"{kind}-{seed}") for kind in ("sft", "dpo"))
            sft, dpo = (kind if seed == training.seeds[0] else f"{kind}-{seed}" for kind in ("sft", "dpo"))
            adapters |= {sft: [sft_folder], dpo: [sft_folder, dpo_folder]}
            seeds[str(seed)] = {"recipient": sft, "donor": dpo}
        contrasts[SAFETY] = seeds[str(training.seeds[0])]
        for objective in training.objectives:
            adapters[objective] = [*adapters["sft"], self._adapter_folder(objective)]
            contrasts[objective] = {"recipient": "sft", "donor": objective}
        return {**self.preset.config, "adapters": adapters, "contrasts": contrasts, "seeds": seeds}

    def _write_config(self) -> None:
        """Write the experiment config, for `snpatch exp --config`."""
        table = {name: part for name, part in self._config_table().items() if name not in ("engine", "vllm")}
        table = {**table, **_without_none(engine_table(self.config.engine))}
        text = f"# Made by `snpatch reproduce`: {self.preset.title or self.preset.name}.\n" + tomli_w.dumps(table)
        write_text(self.out / CONFIG_FILE, text)

    def _store_options(self) -> None:
        """Store the options of the folder; raise if it was made with other options."""
        path, options = self.out / OPTIONS_FILE, json.loads(json.dumps(self._options))
        if not path.is_file():
            write_text(path, json.dumps(options, indent=1) + "\n")
            return
        stored = load_table(path, "options")
        if not isinstance(stored, dict):
            raise SnpatchError(f"{path}: expected a JSON object. Remove it to continue")
        if changed := [name for name in {**stored, **options} if stored.get(name) != options.get(name)]:
            name = changed[0]
            raise SnpatchError(
                f"{self.out}: expected {name} = {stored.get(name)}, with which it was made, got {options.get(name)}. "
                f"Repeat the option, choose another folder, or remove {OPTIONS_FILE} to change it"
            )

    # Contrasts and experiments

    @cached_property
    def context(self) -> ExperimentContext:
        """Return the context of contrasts and experiments, opened at first use.

        Opening it freezes the inputs' hashes.
        """
        self.inputs.freeze()
        return ExperimentContext(self.config, self.out, **self._context_arguments)

    def _close_context(self) -> None:
        if "context" in self.__dict__:
            self.__dict__.pop("context").close()
        self.inputs.thaw()

    @contextmanager
    def _closing(self) -> Iterator[None]:
        """Close the context afterwards if it was opened."""
        try:
            yield
        finally:
            self._close_context()

    def _contrast_step(self, step: str, name: str, contrast: Contrast) -> Step:
        def run() -> StepResult:
            provenance = self.context.start_provenance()
            self._steps_of_context.append(step)
            self.context.ranking(contrast)
            inputs = self.inputs.contrast_inputs(name, provenance.to_dict({}))
            return StepResult(inputs, [self.context.ranking_file(contrast)])

        return Step(step, run, f"change scores of {contrast.recipient} and {contrast.donor}")

    def _run_experiment(self, name: str) -> StepResult:
        context = self.context
        self._steps_of_context.append(name)
        report = experiments.run(name, context)
        outputs = files.write_report(report, self.out)
        if name == "safeguard":
            outputs.append(self.out / "guard.safetensors")
        return StepResult(self.inputs.experiment_inputs(name, report.provenance), outputs)

    # General ability

    def _ability_targets(self) -> Iterator[ability.AbilityTarget]:
        """Yield the recipients, unpatched and patched, and the donor."""
        for recipient in self.config.recipients:
            yield ability.AbilityTarget(recipient)
            yield ability.AbilityTarget(recipient, self.config.donor)
        yield ability.AbilityTarget(self.config.donor)

    def find_obstacle(self, step: str) -> str | None:
        """Return why a step cannot run on this machine; None if nothing is known to prevent it."""
        return ability.find_obstacle(self.preset.ability) if step in self.ability_targets else None

    def _ability_step(self, target: ability.AbilityTarget) -> Step:
        models = dict.fromkeys(filter(None, (target.recipient, target.donor)))
        inputs = ["snpatch", "engine", "ability", *(f"model/{model}" for model in models)]
        if target.donor:
            safety = self.config.safety
            inputs += ["contrast_tokens", "contrast/contrasts/safety", f"set/{safety.prompts}", "settings/transfer"]
        tasks = ",".join(self.preset.ability.tasks)
        command = f"{ability.PROGRAM} --tasks {tasks} (one process per task), of {target.label}"
        return Step(target.step, lambda: self._run_ability(target), command, tuple(inputs))

    def _run_ability(self, target: ability.AbilityTarget) -> StepResult:
        """Evaluate a model on all tasks, in processes of their own, with the neurons of `transfer`."""
        settings = experiments.resolve_settings(self.config, "transfer")
        ranking_file, patch = self.context.ranking_file(self.config.safety), {}
        if target.donor:
            if not ranking_file.is_file():
                raise SnpatchError(f"{ranking_file}: expected the safety ranking, got no file. Run contrast-{SAFETY}")
            k = self.context.num_neurons(settings.k, Ranking.load(ranking_file))
            patch = {"ranking": str(ranking_file.resolve()), "k": k, "positions": settings.positions}
        self._close_context()  # its engine would hold the GPU's memory
        engine = self.config.engine_config(self._context_arguments["backend"])
        model_args = ability.build_model_args(engine, target, patch)
        return StepResult((), ability.evaluate(self.preset.ability, target, model_args, self.out))


def _list_trainings(training: Training) -> Iterator[AdapterTraining]:
    """Yield adapters in training order: the main pair, its objectives, then the pairs of further seeds."""
    for seed in training.seeds:
        sft_settings, dpo_settings = (replace(settings, seed=seed) for settings in (training.sft, training.dpo))
        sft = f"sft-{seed}"
        yield AdapterTraining(sft, "sft", sft_settings)
        yield AdapterTraining(f"dpo-{seed}", SAFETY, dpo_settings, sft)
        if seed == training.seeds[0]:
            for objective in training.objectives:
                yield AdapterTraining(objective, objective, dpo_settings, sft)


def _without_none(data: object) -> Any:
    """Remove None values, which TOML cannot express."""
    if isinstance(data, dict):
        return {name: _without_none(value) for name, value in data.items() if value is not None}
    return [_without_none(value) for value in data] if isinstance(data, list | tuple) else data
