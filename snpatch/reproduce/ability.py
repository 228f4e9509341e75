"""General ability of the models by lm-evaluation-harness: tasks, commands and results (the paper's B.2).

Why a process per task: lm-eval's number of examples and its limit hold for all tasks of a call. A process also frees
the GPU for the next engine.
"""

import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from snpatch.config import EngineConfig
from snpatch.errors import SnpatchError
from snpatch.reproduce import launching
from snpatch.utils.files import write_text
from snpatch.utils.optional import install_hint
from snpatch.utils.schema import from_dict

PROGRAM = "snpatch-lm-eval"
OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
TRUE_TEXTS = ("1", "on", "true", "yes")  # of huggingface_hub's variables


@dataclass(frozen=True)
class AbilityTask:
    """A task of lm-eval, or a group of tasks.

    Args:
        metric: Key of its result, such as "exact_match,strict-match".
        num_fewshot: Examples in the prompt.
        limit: Rows of each task; None for all.
    """

    metric: str
    num_fewshot: int
    limit: int | None = None


@dataclass(frozen=True)
class Ability:
    """Tasks that each model is evaluated on, patched and not.

    Args:
        tasks: Tasks by their names in lm-eval.
        include_path: Folder of further task files; "" for none. Such files may run code.
    """

    tasks: dict[str, AbilityTask] = field(default_factory=dict)
    include_path: str = ""

    def __post_init__(self) -> None:
        for name in self.tasks:
            if not re.fullmatch(r"[\w-]+", name):
                raise SnpatchError(f"ability.tasks: expected names of lm-eval's tasks, got {name!r}")


@dataclass(frozen=True)
class AbilityTarget:
    """A model that is evaluated.

    Args:
        recipient: Model that answers.
        donor: Model that it is patched from; None if it runs unpatched.
    """

    recipient: str
    donor: str | None = None

    @property
    def step(self) -> str:
        """Name of its step."""
        return f"ability-{self.recipient}{'-patched' if self.donor else ''}"

    @property
    def label(self) -> str:
        """Name in tables, with "+" if it is patched."""
        return f"{self.recipient}{'+' if self.donor else ''}"


def parse_ability(table: Mapping) -> Ability:
    """Build the tasks from a preset's table."""
    tasks = table.get("tasks", {})
    if not isinstance(tasks, Mapping):
        raise SnpatchError(f"ability.tasks: expected a table, got {tasks!r}")
    parsed = {name: from_dict(AbilityTask, f"ability.tasks.{name}", task) for name, task in tasks.items()}
    return from_dict(Ability, "ability", {**table, "tasks": parsed})


def find_obstacle(ability: Ability) -> str | None:
    """Return why the tasks cannot run here; None if nothing is known to prevent it."""
    if importlib.util.find_spec("lm_eval") is None:
        return f"lm-evaluation-harness is not installed: {install_hint('eval')}"
    offline = [name for name in OFFLINE_VARIABLES if os.environ.get(name, "").lower() in TRUE_TEXTS]
    if offline and not ability.include_path:
        return f"its datasets are on the hub, and {offline[0]} is set"
    return None


def build_model_args(engine: EngineConfig, target: AbilityTarget, patch: Mapping) -> dict:
    """Return a target as lm-eval's model arguments.

    Args:
        engine: The engine, with absolute paths. Only the target's models are passed.
        target: The target.
        patch: Ranking file, k and positions of the patch; empty for an unpatched model.
    """
    table, names = engine.to_dict(), (target.recipient, target.donor)
    adapters, sources = table.pop("adapters", {}), table.pop("models", {})
    kinds = {"adapters": {name: adapters[name] for name in names if name in adapters}, "checkpoint": {}, "lora": {}}
    for name in names:
        for kind, value in sources.get(name, {}).items():
            kinds[kind][name] = value
    arguments = {**table.pop("capacity", {}), **table.pop("vllm", {}), **table, "recipient": target.recipient}
    arguments |= {kind: models for kind, models in kinds.items() if models}
    return arguments | ({"donor": target.donor, **patch} if target.donor else {})


def build_command(ability: Ability, name: str, model_args: Mapping, folder: Path) -> list[str]:
    """Return the command that evaluates a model on one task and writes its results into the folder."""
    program = shutil.which(PROGRAM, path=str(Path(sys.executable).parent)) or shutil.which(PROGRAM)
    if program is None:
        raise SnpatchError(f"{PROGRAM}: expected it next to {sys.executable} or on PATH. Install snpatch again")
    task = ability.tasks[name]
    command = [program, "--model", "snpatch", "--model_args", json.dumps(model_args), "--tasks", name]
    command += ["--num_fewshot", str(task.num_fewshot), "--output_path", str(folder)]
    command += ["--limit", str(task.limit)] if task.limit is not None else []
    return command + (["--include_path", ability.include_path] if ability.include_path else [])


def evaluate(ability: Ability, target: AbilityTarget, model_args: Mapping, out: Path) -> list[Path]:
    """Evaluate a model on all tasks and write its figures; return the written paths.

    Args:
        ability: The tasks.
        target: The model.
        model_args: Its arguments, see `build_model_args`.
        out: Folder of the reproduction.
    """
    rows, folder = [], out / "ability" / target.step
    for name, task in ability.tasks.items():
        launching.run(build_command(ability, name, model_args, folder / name), "lm-eval")
        rows.append({"model": target.label, **read_result(folder / name, name, task)})
    path = out / f"{target.step}.json"
    write_text(path, json.dumps({"rows": rows}, indent=1) + "\n")
    return [path, folder]


def read_result(folder: Path, name: str, task: AbilityTask) -> dict:
    """Return the figures of the newest results in a folder.

    Args:
        folder: Output folder of the command.
        name: Name of the task.
        task: The task.

    Raises:
        SnpatchError: The folder has no results, or they lack the metric.
    """
    paths = sorted(folder.rglob("results_*.json"), key=lambda path: path.stat().st_mtime_ns)
    if not paths:
        raise SnpatchError(f"{folder}: expected results of {name}, got none. See lm-eval's output above")
    results = json.loads(paths[-1].read_text(encoding="utf-8"))
    figures = {**results.get("groups", {}), **results["results"]}.get(name, {})
    if task.metric not in figures:
        raise SnpatchError(f"{name}: expected the metric {task.metric}, got {', '.join(figures) or 'none'}")
    metric, _, filter_name = task.metric.partition(",")
    counts = [count["effective"] for count in results.get("n-samples", {}).values()]
    return {
        "task": name,
        "metric": task.metric,
        "value": figures[task.metric],
        "stderr": figures.get(f"{metric}_stderr,{filter_name}"),
        "num_fewshot": task.num_fewshot,
        "rows": sum(counts),
    }
