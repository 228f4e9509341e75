"""The plan of a reproduction: which steps run and why, their estimated cost, and what has to be downloaded."""

from collections.abc import Sequence
from pathlib import Path

from snpatch.data import DATASETS
from snpatch.judges.factory import is_model_judge
from snpatch.report.report import TableView
from snpatch.reproduce.cost_model import CostEstimate, estimate_cost, model_size, read_sizes
from snpatch.reproduce.pipeline import ADAPTERS, Pipeline

JUDGE_PARAMETERS = 6.7e9  # of the paper's judges
STEP_COLUMNS = ("step", "state", "GPU hours", "disk, GB", "source of the estimate")
DOWNLOAD_COLUMNS = ("download", "kind", "GB")


def plan_steps(pipeline: Pipeline, only: Sequence[str] = (), start: str | None = None) -> TableView:
    """Return one row per step (reason, estimated cost, source of the estimate) and a total."""
    size = model_size(pipeline)
    rows, seconds, disk_gb, num_unknown, running = [], 0.0, 0.0, 0, set()
    requested = pipeline.requested_steps(tuple(only), start)
    for name in pipeline.steps.steps:
        reason = _reason(pipeline, name, running) or ("requested again" if name in requested else None)
        if reason and (obstacle := pipeline.find_obstacle(name)):
            reason = f"{reason}; skipped here: {obstacle}"
        is_selected = not only or name in only
        if reason and is_selected:
            running.add(name)
            cost = estimate_cost(pipeline, name, size)
            seconds += cost.seconds or 0
            disk_gb += cost.disk_gb
            num_unknown += cost.seconds is None
            state = reason
        else:
            cost = CostEstimate(pipeline.steps.seconds(name), source="measured: this step, in this folder")
            state = "done" if is_selected else "not requested"
        rows.append((name, state, _format_hours(cost.seconds), f"{cost.disk_gb:.3f}", cost.source))
    note = f"without {num_unknown} steps of unknown size" if num_unknown else ""
    rows.append(("total", "", _format_hours(seconds), f"{disk_gb:.3f}", note))
    return TableView(STEP_COLUMNS, tuple(rows))


def plan_downloads(pipeline: Pipeline) -> TableView:
    """Return the models, judges and datasets that are not local files, with their sizes if known.

    The hub's cache may contain them already.
    """
    size, config, data_sizes = model_size(pipeline), pipeline.config, read_sizes()
    has_tax = "alignment_tax" in pipeline.steps.steps  # alone reads a second model as judge
    models = [config.engine.model, *(s.checkpoint for s in config.engine.sources.values() if s.checkpoint)]
    judges = [judge["source"] for name, judge in config.judges.items() if has_tax or name == config.cost]
    data = list(config.sets.values())
    if pipeline.preset.training:
        trainings = [training for name, training in pipeline.trainings.items() if name in pipeline.steps.steps]
        data += [pipeline.preset.training.data[training.data] for training in trainings]
    model_gb = f"{2 * size.parameters / 1e9:.1f}" if size else "?"
    rows = [(model, "model", model_gb) for model in dict.fromkeys(models)]
    judge_gb = f"{2 * JUDGE_PARAMETERS / 1e9:.1f}"
    rows += [(judge, "judge", judge_gb) for judge in dict.fromkeys(judges) if is_model_judge(judge)]
    sources = dict.fromkeys(prompts.source for prompts in data if prompts.source in DATASETS)
    rows += [(name, "data", str(data_sizes.get(name, {}).get("gb", "?"))) for name in sources]
    return TableView(DOWNLOAD_COLUMNS, tuple(row for row in rows if not Path(config.resolve_path(row[0])).exists()))


def _reason(pipeline: Pipeline, name: str, running: set[str]) -> str | None:
    """Return why a step has to run, including a training among `running` whose adapter it reads."""
    if reason := pipeline.steps.reason(name):
        return reason
    adapters = pipeline.config.engine.adapters
    for input_name in pipeline.steps.known_inputs(name):
        kind, _, rest = input_name.partition("/")
        folders = adapters.get(rest, ()) if kind == "model" else (rest,) if kind == "adapter" else ()
        for folder in folders:
            if (training := Path(folder).name) in running and folder.startswith(ADAPTERS):
                return f"{training} runs before it"
    return None


def _format_hours(seconds: float | None) -> str:
    return "?" if seconds is None else f"{seconds / 3600:.2f}"
