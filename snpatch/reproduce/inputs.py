"""What steps read, by name, and how each is told by its content: models, sets, judges, settings.

Why names from the hub stand for themselves: to look at what they hold would download it, and a plan must not.
"""

from dataclasses import asdict
from pathlib import Path

from snpatch import __version__, experiments
from snpatch.errors import SnpatchError
from snpatch.models.digest import digest_of_adapter, digest_of_checkpoint
from snpatch.reproduce.steps import digest_of, short
from snpatch.worlds.world import PromptSet, World

MADE_OF = ("template", "dtype", "allow_untested")  # of the engine, what tables hang on
PARTS = ("recipients", "benchmarks", "max_tokens", "contrast_tokens")


class Inputs:
    """world: as the pipeline has it. trainings: name of an adapter -> (settings, rows). how: what else all experiments
    hang on (limit, backend)."""

    def __init__(self, world: World, trainings: dict, how: dict) -> None:
        self._world, self._trainings, self._how = world, trainings, how

    def digest(self, name: str) -> str:
        """The content of what a name stands for."""
        kind, _, rest = name.partition("/")
        return short(getattr(self, f"_{kind}")(rest))

    def _snpatch(self, _: str) -> object:
        return __version__

    def _common(self, _: str) -> object:
        """What every experiment hangs on."""
        kept = {name: getattr(self._world.engine, name) for name in MADE_OF}
        parts = {name: getattr(self._world, name) for name in PARTS}
        return [kept, parts, asdict(self._world.safety), self._how]

    def _contrasts(self, _: str) -> object:
        return {name: asdict(one) for name, one in self._world.contrasts.items()}

    def _seeds(self, _: str) -> object:
        return {name: asdict(one) for name, one in self._world.seeds.items()}

    def _contrast(self, name: str) -> object:
        group, _, key = name.partition("/")
        return asdict(getattr(self._world, group)[key])

    def _settings(self, name: str) -> object:
        return asdict(experiments.settings_of(name, self._world.settings.get(name, {})))

    def _training(self, name: str) -> object:
        settings, rows = self._trainings[name]
        return [asdict(settings), asdict(rows)]

    def _rows(self, name: str) -> object:
        return self._source(self._trainings[name][1])

    def _set(self, name: str) -> object:
        return [asdict(self._world.sets[name]), self._source(self._world.sets[name])]

    def _source(self, rows: PromptSet) -> str:
        path = Path(self._world.place(rows.source))
        return digest_of(path) if path.exists() else rows.source

    def _judge(self, name: str) -> object:
        arguments = self._world.judges[name]
        return [arguments, _checkpoint(self._world.place(arguments["source"]))]

    def _adapter(self, folder: str) -> object:
        return digest_of_adapter(self._world.place(folder))

    def _model(self, name: str) -> object:
        engine = self._world.engine.placed(self._world.folder)
        source = engine.sources.get(name)
        if source is None and name != "base":
            raise SnpatchError(f"no model named {name!r}")
        parts = [_checkpoint(engine.model)]
        if source is not None:
            parts += [source.weights and _checkpoint(source.weights)]
            parts += [digest_of_adapter(folder) for folder in (*source.lora, *source.adapters)]
        return parts


def used_by(name: str, provenance: dict) -> list[str]:
    """The names of all that an experiment's table hangs on. provenance: the table's own."""
    read = ["snpatch", "common", f"settings/{name}"]
    for kind, group in (("model", "models"), ("set", "sets"), ("judge", "judges")):
        read += [f"{kind}/{one}" for one in provenance[group]]
    if name in ("preference", "tax"):
        read.append("contrasts")
    if name == "stability":
        read.append("seeds")
    return read


def _checkpoint(source: str) -> str:
    """A local checkpoint by its bytes; anything else by its name."""
    return digest_of_checkpoint(source) if Path(source).is_dir() else source
