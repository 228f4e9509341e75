"""The steps of a reproduction: rows, trainings, contrasts, experiments, report; and the world that they make.

Why each training is a process of its own: it frees the GPU for the engine when it ends, and accelerate can start it on
several.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import tomli_w

from snpatch import experiments
from snpatch.config import place
from snpatch.errors import ReceiptError, SnpatchError
from snpatch.files import write_text
from snpatch.report import files
from snpatch.reproduce.inputs import Inputs, used_by
from snpatch.reproduce.preset import SAFETY, Preset, Training
from snpatch.reproduce.steps import Done, Step, Steps
from snpatch.training.settings import TrainSettings
from snpatch.worlds.lab import Lab, Progresses, silent
from snpatch.worlds.world import Contrast, PromptSet, world_of

WORLD = "world.toml"
ADAPTERS = "adapters"
CONTRASTS = (("contrasts", "contrast"), ("seeds", "contrast-seed"))  # a world's tables -> their steps' names


@dataclass(frozen=True)
class Pair:
    """An adapter that is trained. rows: name of its data. sft: the adapter that it goes on from, of DPO."""

    name: str
    rows: str
    settings: TrainSettings
    sft: str | None = None


class Pipeline:
    """A preset in a folder. taken: adapters by name that are not trained but lie in a folder already.

    launcher: what starts a training ("accelerate launch"; default: this Python). limit: only so many prompts of each
    set. lab: further arguments of Lab (backend, an engine's). progress: see Lab.
    """

    def __init__(
        self,
        preset: Preset,
        out: Path,
        *,
        taken: dict[str, str] | None = None,
        launcher: str = "",
        limit: int | None = None,
        progress: Progresses = silent,
        command: str | None = None,
        **lab: object,
    ) -> None:
        self.preset, self.out, self._taken = preset, Path(out), dict(taken or {})
        self._launcher = shlex.split(launcher) or [sys.executable]
        self._lab_arguments = {"limit": limit, "progress": progress, "command": command, **lab}
        self.pairs = {pair.name: pair for pair in _pairs(preset.training)} if preset.training else {}
        if strangers := sorted(self._taken.keys() - self.pairs.keys()):
            raise SnpatchError(
                f"--take: {strangers[0]} is not trained here; there are {', '.join(self.pairs) or 'none'}"
            )
        for name, folder in self._taken.items():
            if not Path(folder).is_dir():
                raise SnpatchError(f"--take {name}: {folder}: no such folder")
        self._skipped: dict[str, str] = {}
        self.world = world_of(self._table(), self.out)
        trainings = {name: (pair.settings, self._rows(pair.rows)) for name, pair in self.pairs.items()}
        inputs = Inputs(self.world, trainings, {"limit": limit, "skip_bad": lab.get("skip_bad", False)})
        self.steps = Steps(self.out, list(self._steps()), inputs.digest)

    @property
    def skipped(self) -> dict[str, str]:
        """Experiments that the preset cannot run: name -> why."""
        return self._skipped

    def run(
        self, only: tuple[str, ...] = (), start: str | None = None, tell: Callable[[str], None] = print
    ) -> list[str]:
        """Run what is not done, in order; the names of experiments that failed.

        only: these steps alone, done or not; what they read must be there. start: this step and all after it, done or
        not. A training that fails ends the run; so does a ReceiptError, which an engine is not to be trusted after.
        """
        names = list(self.steps.steps)
        for name in (*only, *([start] if start else ())):
            if name not in names:
                raise SnpatchError(f"no step named {name!r}: there are {', '.join(names)}")
        forced = set(only) | set(names[names.index(start) :] if start else ())
        failed = []
        self.out.mkdir(parents=True, exist_ok=True)
        self._write_world()
        with self._closing():
            for number, name in enumerate(names, start=1):
                reason = self.steps.reason(name)
                if (only and name not in only) or (reason is None and name not in forced):
                    if not only:
                        tell(f"[{number}/{len(names)}] {name}: done")
                    continue
                if name in forced and reason is None:
                    self.steps.again(name)
                tell(f"[{number}/{len(names)}] {name}: {reason or 'asked for again'}")
                try:
                    self.steps.run(name)
                except ReceiptError:
                    raise
                except SnpatchError as error:
                    if name not in experiments.NAMES:
                        raise SnpatchError(f"{name}: {error}") from error
                    failed.append(name)
                    tell(f"{name}: failed: {error}")
        return failed

    def _steps(self) -> Iterator[Step]:
        training = self.preset.training
        if training and training.written_by:
            yield Step("rows", self._write_rows, "rows of the demo's language", folder=self.out / "data")
        for pair in self.pairs.values():
            if pair.name not in self._taken:
                yield self._training(pair)
        for group, prefix in CONTRASTS:
            for name, contrast in getattr(self.world, group).items():
                if group == "seeds" and contrast in self.world.contrasts.values():
                    continue
                yield self._contrast(f"{prefix}-{name}", f"{group}/{name}", contrast)
        for name in self.preset.experiments:
            if why := self._lacks(name):
                self._skipped[name] = why
            else:
                yield Step(name, lambda name=name: self._experiment(name), f"snpatch exp {name} --world {WORLD}")

    def _lacks(self, name: str) -> str | None:
        """Why an experiment cannot be run in this world."""
        world = self.world
        if name == "stability" and len(world.seeds) < 2:
            return "needs two training seeds"
        if name == "preference" and len(world.contrasts) < 2:
            return "needs two objectives"
        if name == "tax":
            wanted = experiments.settings_of(name, world.settings.get(name, {})).objectives
            if missing := [one for one in wanted if one not in world.contrasts]:
                return f"needs the objective {missing[0]}"
        return None

    # Rows and trainings

    def _rows(self, name: str) -> PromptSet:
        """A set to train on, whose path is seen from the world's folder."""
        training = self.preset.training
        rows = training.data[name]
        found = Path(place(self.preset.folder, rows.source))
        if training.written_by or not found.exists():
            return rows
        return replace(rows, source=str(found.resolve()))

    def _write_rows(self) -> Done:
        from snpatch.demo.rows import write_rows

        made = write_rows(self.out / "data", [name for name in self.preset.training.data])
        return Done((), made)

    def _training(self, pair: Pair) -> Step:
        folder = self.out / ADAPTERS / pair.name
        reads = ["model/base", f"training/{pair.name}", f"rows/{pair.name}"]
        if pair.sft:
            reads.append(f"adapter/{self._folder(pair.sft)}")

        def run() -> Done:
            done = subprocess.run(self._command(pair), env=dict(os.environ, HF_HUB_DISABLE_TELEMETRY="1"))
            if done.returncode == 130:
                raise KeyboardInterrupt
            if done.returncode:
                raise SnpatchError(f"the training ended with exit code {done.returncode}; see above")
            return Done((), [folder])

        return Step(pair.name, run, shlex.join(self._command(pair)), tuple(reads), folder)

    def _command(self, pair: Pair) -> list[str]:
        """`snpatch train` for an adapter."""
        rows = self._rows(pair.rows)
        source = self.world.place(rows.source)
        kind = "dpo" if pair.sft else "sft"
        command = [
            *self._launcher,
            "-m",
            "snpatch.cli",
            "train",
            kind,
            self.world.place(self.world.engine.model),
            source,
        ]
        command += ["--out", str(self.out / ADAPTERS / pair.name)]
        if pair.sft:
            command += ["--sft", self.world.place(self._folder(pair.sft))]
        for option, name in (("format", "format"), ("split", "split"), ("column", "column"), ("revision", "revision"),
                             ("limit", "first"), ("sample", "sample")):  # fmt: skip
            if getattr(rows, name) is not None:
                command += [f"--{option}", str(getattr(rows, name))]
        if rows.sample is not None:
            command += ["--sample-seed", str(rows.seed)]
        if rows.where:
            command += ["--where", f"{rows.where[0]}={','.join(rows.where[1:])}"]
        for f in fields(pair.settings):
            value, option = getattr(pair.settings, f.name), f.name.replace("_", "-")
            if value == f.default:
                continue
            if isinstance(value, bool):
                command.append(f"--{option}" if value else f"--no-{option}")
            else:
                for one in value if isinstance(value, tuple) else (value,):
                    command += [f"--{option}", str(one)]
        return command

    def _folder(self, name: str) -> str:
        """Where an adapter lies, as the world's file has it."""
        return str(Path(self._taken[name]).resolve()) if name in self._taken else f"{ADAPTERS}/{name}"

    # The world, contrasts and experiments

    def _table(self) -> dict:
        """The world's table: the preset's, seen from the folder, and what is trained."""
        table = {name: dict(v) if isinstance(v, dict) else v for name, v in self.preset.world.items()}
        table["model"] = _seen(self.preset.folder, table["model"])
        for group in ("sets", "judges"):
            table[group] = {
                name: {**one, "source": _seen(self.preset.folder, one["source"])} for name, one in table[group].items()
            }
        if "models" in table:
            table["models"] = {
                name: _seen(self.preset.folder, one) if isinstance(one, str) else one
                for name, one in table["models"].items()
            }
        training = self.preset.training
        if training is None:
            return table
        adapters, contrasts, seeds = {}, {}, {}
        for seed in training.seeds:
            sft, dpo = f"sft-{seed}", f"dpo-{seed}"
            models = [_model(training, kind, seed) for kind in ("sft", "dpo")]
            adapters[models[0]] = [self._folder(sft)]
            adapters[models[1]] = [self._folder(sft), self._folder(dpo)]
            seeds[str(seed)] = {"generator": models[0], "against": models[1]}
        contrasts[SAFETY] = seeds[str(training.seeds[0])]
        for objective in training.objectives:
            adapters[objective] = [self._folder(f"sft-{training.seeds[0]}"), self._folder(objective)]
            contrasts[objective] = {"generator": "sft", "against": objective}
        return {**table, "adapters": adapters, "contrasts": contrasts, "seeds": seeds}

    def _write_world(self) -> None:
        """The world as a file, for `snpatch exp --world` and for people."""
        text = f"# Made by `snpatch reproduce`: {self.preset.title or self.preset.name}.\n" + tomli_w.dumps(
            self._table()
        )
        path = self.out / WORLD
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)

    @cached_property
    def lab(self) -> Lab:
        return Lab(self.world, self.out, **self._lab_arguments)

    @contextmanager
    def _closing(self) -> Iterator[None]:
        try:
            yield
        finally:
            if "lab" in self.__dict__:
                self.__dict__.pop("lab").close()

    def _contrast(self, step: str, name: str, contrast: Contrast) -> Step:
        def run() -> Done:
            used = self.lab.begin()
            self.lab.ranking(contrast)
            told = used.told({})
            read = [f"{kind}/{one}" for kind, group in (("model", "models"), ("set", "sets")) for one in told[group]]
            path = (
                self.out
                / "rankings"
                / f"{contrast.generator}-{contrast.against}-{contrast.prompts}-emitted.safetensors"
            )
            return Done(["snpatch", "common", f"contrast/{name}", *read], [path])

        return Step(step, run, f"change scores of {contrast.generator} and {contrast.against}")

    def _experiment(self, name: str) -> Done:
        report = experiments.run(name, self.lab)
        return Done(used_by(name, report.provenance), files.write(report, self.out))


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


def _model(training: Training, kind: str, seed: int) -> str:
    """A model's name in the world: the main pair's has no seed."""
    return kind if seed == training.seeds[0] else f"{kind}-{seed}"


def _seen(folder: Path, source: str) -> str:
    """A path of the preset's folder as an absolute one; a name, or an absolute path, as it stands."""
    found = Path(place(folder, source))
    return str(found.resolve()) if found.exists() else source
