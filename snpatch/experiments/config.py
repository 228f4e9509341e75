"""ExperimentConfig: everything that experiments run on, in one TOML file: model, adapters, prompts, judges, settings.

Why a file: a table is worth as much as its provenance, and this file is all of it. Its paths are relative to its
folder; a source that is no path there is a hub name.
"""

from dataclasses import dataclass, field
from pathlib import Path

from snpatch.errors import SnpatchError
from snpatch.names import ROLES
from snpatch.sweeps.config import SweepConfig
from snpatch.sweeps.eval_config import EvalConfig, check_trusted, get_table, parse_eval_config, read_config_file
from snpatch.utils import schema
from snpatch.utils.schema import from_dict

PAPER_K = (0, 200, 400, 600, 800, 1000, 1200, 1500, *range(2000, 10_000, 1000), *range(10_000, 20_001, 2000))


@dataclass(frozen=True)
class Contrast:
    """Models whose activations are compared (Eq. 3).

    Attributes:
        recipient: Model to patch.
        donor: Model whose activations are copied.
        prompts: Name of a prompt set.
        generate_with: Model that generates the completions, "recipient" or "donor".
    """

    recipient: str
    donor: str
    prompts: str = "contrast"
    generate_with: str = field(default="recipient", metadata={"choices": ROLES})

    def __post_init__(self) -> None:
        schema.validate(self)

    @property
    def generator(self) -> str:
        """Name of the model that generates the completions."""
        return self.recipient if self.generate_with == "recipient" else self.donor


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig(EvalConfig):
    """Content of an experiment config file.

    Attributes:
        contrasts: Models to contrast, by objective. "safety" is the main contrast.
        recipients: Models that are patched.
        benchmarks: Names of the prompt sets that the models are attacked with.
        seeds: The safety contrast of each further training run, by training seed.
        harmless: Prompt set of harmless prompts, whose refusals are reported with each effect (none if empty). It
            needs a judge named "refusal".
        settings: Settings of an experiment, by its name.
        judges: See EvalConfig; the first judge is the cost.
    """

    contrasts: dict[str, Contrast]
    recipients: tuple[str, ...]
    benchmarks: tuple[str, ...]
    seeds: dict[str, Contrast] = field(default_factory=dict)
    harmless: str = ""
    settings: dict[str, dict] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if "safety" not in self.contrasts:
            names = ", ".join(self.contrasts) or "none"
            raise SnpatchError(f"contrasts: expected one named safety (the main pair), got {names}")
        if missing := [name for name in ("judges", "recipients", "benchmarks") if not getattr(self, name)]:
            raise SnpatchError(f"{', '.join(missing)}: expected at least one, got none")
        models = [*self.recipients]
        for contrast in (*self.contrasts.values(), *self.seeds.values()):
            models += [contrast.recipient, contrast.donor]
            self.check_set(contrast.prompts, "a contrast")
        self.check_models(models)
        for name in self.benchmarks:
            self.check_set(name, "benchmarks")
        for name in self.seen_sets:
            self.check_set(name, "seen_sets")
        if self.harmless:
            self.check_set(self.harmless, "harmless")
            if SweepConfig.refusal_judge not in self.judges:
                raise SnpatchError(
                    f"harmless: expected a judge named {SweepConfig.refusal_judge}, got {', '.join(self.judges)}. Add "
                    f'[judges.{SweepConfig.refusal_judge}] with source = "refusal".'
                )
        if self.donor in self.recipients:
            raise SnpatchError(
                f"donor: expected a model that is no recipient, got {self.donor!r}. Remove it from the recipients."
            )

    @property
    def contrast_sets(self) -> tuple[str, ...]:
        """Names of the prompt sets that contrasts read."""
        return tuple(contrast.prompts for contrast in (*self.contrasts.values(), *self.seeds.values()))

    @property
    def evaluation_sets(self) -> tuple[str, ...]:
        """Names of the benchmarks."""
        return self.benchmarks

    @property
    def safety(self) -> Contrast:
        """Return the contrast named "safety", whose models are the experiments' main pair."""
        return self.contrasts["safety"]

    @property
    def donor(self) -> str:
        """Return the name of the main pair's donor, which is never one of the `recipients`."""
        return self.safety.donor

    @property
    def cost(self) -> str:
        """Name of the judge that measures safety."""
        return next(iter(self.judges))


def load_experiment_config(source: str | Path, trust: bool = False) -> ExperimentConfig:
    """Load an experiment config by its name or from its file.

    Args:
        source: "demo", or the path of a TOML file.
        trust: Accept what can run code or open the host (see snpatch.trust).

    Raises:
        SnpatchError: The file has unknown keys, broken references, or needs trust.
    """
    path, table = read_config_file(source)
    try:
        config = build_experiment_config(table, path.parent)
        if not trust:
            check_trusted(config.engine, config.judges, config.folder)
        return config
    except SnpatchError as error:
        raise SnpatchError(f"config {path}: {error}") from error


def build_experiment_config(data: dict, folder: Path) -> ExperimentConfig:
    """Build an experiment config from the table of its file, whose paths are relative to `folder`."""
    parts = parse_eval_config(data)
    for group in ("contrasts", "seeds"):
        contrasts = get_table(data, group)
        parts[group] = {name: from_dict(Contrast, f"{group}.{name}", entry) for name, entry in contrasts.items()}
    for name in ("recipients", "benchmarks"):
        parts.setdefault(name, ())
    return from_dict(ExperimentConfig, "the file", {"folder": folder, **parts})
