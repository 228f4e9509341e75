"""The output folder of a training: what it was started with, its checkpoints, and training.json.

The folder is resumed only by a training with the same inputs; training.json is written last and marks it as done.
"""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from matplotlib.figure import Figure

from snpatch.data.dataset import TrainingRows
from snpatch.errors import SnpatchError
from snpatch.models.fingerprint import fingerprint_adapter, fingerprint_checkpoint, fingerprint_tokenizer_files
from snpatch.models.hub import resolve_model_folder
from snpatch.op import ops
from snpatch.report import files
from snpatch.report.report import Report, TableView
from snpatch.training.row_filters import RowStats, count_dropped
from snpatch.training.settings import TrainSettings
from snpatch.utils.environment import describe_environment
from snpatch.utils.files import check_writable, write_text

RECORD = "training"  # OUT/training.json marks a finished training
CHECKPOINTS, INPUTS_FILE, LOCK = "checkpoints", "inputs.json", "lock"
COLUMNS = {  # column of the table -> TRL's name for it
    "epoch": "epoch",
    "loss": "loss",
    "accuracy": "rewards/accuracies",
    "margin": "rewards/margins",
    "token_accuracy": "mean_token_accuracy",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
}


def is_done(out: Path) -> bool:
    """Return whether the folder contains a finished training."""
    return (out / f"{RECORD}.json").is_file()


def read_headline(out: Path) -> list[str]:
    """Return the summary lines of a finished training."""
    return json.loads((out / f"{RECORD}.json").read_text(encoding="utf-8"))["headline"]


def describe_inputs(
    kind: str, model: str | Path, sft: Path | None, data: Sequence[Mapping], settings: TrainSettings
) -> dict:
    """Return everything that determines the result, files and rows as content hashes."""
    digest = hashlib.sha256()
    for row in data:
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    dropped = count_dropped(data)
    return {
        "kind": kind,
        "model": fingerprint_checkpoint(model),
        "tokenizer": fingerprint_tokenizer_files(resolve_model_folder(model)),
        "sft": sft and fingerprint_adapter(sft),
        "data": {"rows": len(data), "sha256": digest.hexdigest(), **({"dropped": dropped} if dropped else {})},
        "settings": json.loads(json.dumps(asdict(settings))),
    }


def start_or_load(out: Path, inputs: dict, is_main_process: bool) -> dict | None:
    """Return the figures of a finished training with these inputs.

    Otherwise prepare the folder and return None.

    Raises:
        SnpatchError: The folder contains a training with other inputs, or a model from elsewhere.
    """
    record, started = out / f"{RECORD}.json", out / CHECKPOINTS / INPUTS_FILE
    if record.is_file():
        figures = _read_table(record, "provenance", "figures")
        _check_same_inputs(out, inputs, _read_table(record, "provenance", "inputs"))
        if is_main_process:  # a kill after the record was written leaves checkpoints
            shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
        return figures
    if started.is_file():
        _check_same_inputs(out, inputs, _read_table(started))
    check_writable(record)
    if not started.is_file() and (any(out.glob("adapter_model.*")) or (out / "config.json").exists()):
        raise SnpatchError(f"{out}: expected a new or empty folder, it contains a model from elsewhere. Choose another")
    if is_main_process:
        write_text(started, json.dumps(inputs, indent=1) + "\n")
    return None


def _read_table(path: Path, *keys: str) -> dict:
    """Return the JSON object under nested keys of a file."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        for key in keys:
            table = table[key]
        return dict(table)
    except (ValueError, KeyError, TypeError) as error:
        raise SnpatchError(f"{path}: damaged ({error}). Remove its folder, or choose another") from error


def _check_same_inputs(out: Path, inputs: dict, stored: dict) -> None:
    """Raise with the first input, or the first setting, that differs from the stored ones."""
    name = next((name for name in inputs if stored.get(name) != inputs[name]), None)
    if name is None:
        return
    expected, actual = inputs[name], stored.get(name)
    if name == "settings":
        actual = actual or {}
        name = next(field for field in {**actual, **expected} if actual.get(field) != expected.get(field))
        expected, actual = expected.get(name), actual.get(name)
    raise SnpatchError(
        f"{out}: expected a training with {name} = {expected}, it contains one with {actual}. Choose another folder, "
        "or remove this one"
    )


@contextmanager
def lock_folder(out: Path, is_main_process: bool) -> Iterator[None]:
    """Hold the folder's lock; raise if another training holds it."""
    with open(out / CHECKPOINTS / LOCK, "w") as file:
        try:
            if is_main_process:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SnpatchError(f"{out}: another process is training in this folder. Choose another") from None
        yield


def find_checkpoint(out: Path) -> Path | None:
    """Return the last complete checkpoint; trainer_state.json is the file that is written last."""
    checkpoints = sorted((out / CHECKPOINTS).glob("checkpoint-*"), key=checkpoint_step)
    for path in reversed(checkpoints):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return path
    return None


def checkpoint_step(checkpoint: Path) -> int:
    """Return the step at which a checkpoint was saved."""
    return int(checkpoint.name.split("-")[1])


def remove_other_checkpoints(out: Path, checkpoint: Path | None, reference: str) -> None:
    """Remove all checkpoints but one, and from that one the folder of TRL's reference adapter.

    Next to the reference, transformers would not load the trained adapter. The reference is rebuilt from SFT's folder.
    """
    for path in (out / CHECKPOINTS).glob("checkpoint-*"):
        if path != checkpoint:
            shutil.rmtree(path)
    if checkpoint:
        shutil.rmtree(checkpoint / reference, ignore_errors=True)


def build_table(log_history: Sequence[Mapping]) -> list[dict]:
    """Return one row per step from the log of transformers' trainer."""
    return [
        {"step": entry["step"], **{name: entry[key] for name, key in COLUMNS.items() if key in entry}}
        for entry in log_history
        if "loss" in entry
    ]


def write_record(
    out: Path, inputs: dict, data: Sequence[Mapping], figures: dict, stats: RowStats, table: list[dict]
) -> None:
    """Write training.csv, .json, .png and .svg, and remove the checkpoints."""
    files.write_report(_build_report(inputs, data, figures, stats, table), out)
    shutil.rmtree(out / CHECKPOINTS)


def _build_report(inputs: dict, data: Sequence[Mapping], figures: dict, stats: RowStats, table: list[dict]) -> Report:
    last = table[-1]
    headline = [f"{inputs['kind']}: {figures['steps']} steps, loss {table[0]['loss']:.4f} -> {last['loss']:.4f}"]
    if "margin" in last:
        headline[0] += f", margin {last['margin']:.3f}, accuracy {last['accuracy']:.0%}"
    if names := figures["unchanged_parameters"]:
        headline.append(f"{len(names)} trained parameters did not change, {names[0]} first")
    if figures["changed_fraction"] < 0.5:
        headline.append(
            f"only {figures['changed_fraction']:.1%} of the trained values changed after rounding to the saved dtype"
        )
    columns = [name for name in figures if name not in ("dropped", "unchanged_parameters")]
    displays = (TableView.from_rows([figures], {name: name for name in columns}),)
    source = {"source": data.source} if isinstance(data, TrainingRows) else {}
    provenance = {"inputs": inputs, "figures": figures, **source, **describe_environment(ops.implementations())}
    return Report(
        RECORD, {RECORD: table}, {RECORD: plot(table)}, displays, [*headline, *stats.summary_lines], provenance
    )


def plot(table: list[dict]) -> Figure:
    """Plot loss, margin and accuracies against the step."""
    names = [name for name in ("loss", "margin", "accuracy", "token_accuracy") if name in table[0]]
    figure = Figure(figsize=(4.5 * len(names), 3.6), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        axis.plot([row["step"] for row in table], [row[name] for row in table])
        axis.set(xlabel="step", ylabel=name.replace("_", " "))
        axis.grid(alpha=0.3)
    return figure
