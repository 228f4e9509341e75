"""`snpatch demo`: the main experiment on the demo model; or a rebuild of that model."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from snpatch.cli import options as o
from snpatch.cli.dataclass_options import FieldOptions, Fields, with_options
from snpatch.cli.report import FILE, write_folder_page
from snpatch.config import EngineConfig
from snpatch.errors import ReceiptError, SnpatchError
from snpatch.ranking.window import MAGNITUDE, RANDOM_CONTROLS

if TYPE_CHECKING:
    from rich.progress import Progress

    from snpatch.report.report import Report, TableView

EXPERIMENT = "curve"
SHOWN_K = (0.05, 0.1, 0.2, 0.5)  # fractions of the ranked neurons in the table
STEPS = (
    "Load the models",
    "Rank the neurons by their change score",
    "Patch the top k, generate and judge",
    "Write tables, plot and report",
)

app = typer.Typer(help="The demo model: find its safety neurons and sweep k; or rebuild the model.")


@app.callback(invoke_without_command=True)
@with_options(engine=FieldOptions(EngineConfig, ("backend",)))
def demo(
    context: typer.Context,
    engine: Fields,
    out: Annotated[Path, typer.Option("--out", "-o", help="Output folder for tables, plot and report.")] = Path(
        "snpatch-demo"
    ),
    as_json: o.AsJson = False,
) -> None:
    """Rank neurons by SFT against DPO, patch the top k into SFT and base, and judge the completions."""
    if context.invoked_subcommand:
        return
    with StepDisplay(STEPS) as steps:
        result, paths = _run(out, engine, steps)
    if as_json:
        content = {"name": result.name, "tables": result.tables, "headline": result.headline, "notes": result.notes}
        o.echo(json.dumps({**content, "files": [str(path) for path in paths]}))
        return
    from snpatch.report import terminal

    with o.console() as console:
        terminal.print_table(build_table(result), console)
        terminal.print_line(summarize(result), console)
        terminal.print_line(f"Report: {out / FILE}", console)


@app.command("build")
def build(
    out: Annotated[Path, typer.Argument(help="Folder: new, empty, or a demo model to complete.")],
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
) -> None:
    """Build the demo model from scratch: base, SFT, DPO objectives, a second seed, score models.

    Takes minutes.
    """
    try:
        from snpatch.demo.build import build as build_demo_model
    except ImportError as error:  # the message names the extra to install
        raise SnpatchError(str(error)) from error
    build_demo_model(out, seed)


def _run(out: Path, engine: Fields, steps: "StepDisplay") -> tuple["Report", list[Path]]:
    """Run the experiment and write its files; return its report and their paths."""
    from snpatch import experiments
    from snpatch.experiments.common import summary
    from snpatch.experiments.config import load_experiment_config
    from snpatch.experiments.context import ExperimentContext
    from snpatch.report import files
    from snpatch.utils.files import check_writable

    check_writable(out / f"{EXPERIMENT}.csv")
    config = load_experiment_config("demo")
    with ExperimentContext(config, out, progress=steps.progress, command=o.command_line(), **engine) as context:
        with steps.next():
            _ = context.engine, context.cost  # both are loaded at their first use
        with steps.next():
            context.ranking()
        with steps.next():
            try:
                result = experiments.run(EXPERIMENT, context)
            except ReceiptError as error:
                for name in ("report.md", "report.json"):
                    (out / name).unlink(missing_ok=True)
                raise ReceiptError(f"{EXPERIMENT}: {error}. Run the demo again") from error
        with steps.next():
            paths = files.write_report(result, out)
            summary.write_summary(context, {EXPERIMENT: {}})
            write_folder_page(out, out / FILE)
    return result, paths


class StepDisplay:
    """Progress of the steps on stderr: a bar with its time per step, or one line per step if it is no terminal."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names, self._number = names, 0
        self._bars: Progress | None = None
        self._update: Callable[[int, int], None] = lambda done, total: None

    def __enter__(self) -> "StepDisplay":
        import sys

        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[count]:>11}", markup=False),
                TimeElapsedColumn(),
            )
            self._bars = Progress(*columns, console=Console(stderr=True))
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    @contextmanager
    def next(self) -> Iterator[None]:
        """Start the next step, and end it afterwards."""
        label = f"{self._number + 1}/{len(self._names)} {self._names[self._number]}"
        self._number += 1
        start = time.monotonic()
        if self._bars is None:
            yield
            o.echo(f"{label}: {time.monotonic() - start:.0f} s", is_error=True)
            return
        bars, task = self._bars, self._bars.add_task(f"{label:<44}", total=None, count="")
        self._update = lambda done, total: bars.update(task, completed=done, total=total, count=f"{done}/{total}")
        yield
        if bars.tasks[task].total is None:
            bars.update(task, completed=1, total=1)
        self._update = lambda done, total: None

    @contextmanager
    def progress(self, _name: str) -> Iterator[Callable[[int, int], None]]:
        """Give the progress callback of an ExperimentContext; it moves the bar of the current step."""
        yield lambda done, total: self._update(done, total)


def _unpatched_and_patched(result: "Report") -> tuple[dict[str, dict], list[dict]]:
    """Return the unpatched row of each model, and the rows of the safety ranking without controls."""
    rows = _cost_rows(result)
    unpatched = {row["recipient"]: row for row in rows if not row["ranking"]}
    patched = [row for row in rows if row["ranking"] and row["control"] is None]
    return unpatched, patched


def _cost_rows(result: "Report") -> list[dict]:
    """Return the rows of the first judge and set: the cost of answers to forbidden requests."""
    rows = result.tables[EXPERIMENT]
    return [row for row in rows if (row["judge"], row["set"]) == (rows[0]["judge"], rows[0]["set"])]


def _control_effects(result: "Report", row: dict, kinds: Sequence[str]) -> list[float]:
    """Return the effects of the controls of these kinds with the same recipient and k."""
    key = ("recipient", "rank_lo", "rank_hi")
    same = [r for r in _cost_rows(result) if all(r[name] == row[name] for name in key)]
    return [r["effect"] for r in same if r["control"] in kinds and r["effect"] is not None]


def build_table(result: "Report") -> "TableView":
    """Return the table of the demo: each recipient unpatched and at some k, then the donor."""
    from snpatch.report.formatting import format_interval, format_percent, format_range, format_value
    from snpatch.report.report import TableView

    unpatched, patched = _unpatched_and_patched(result)
    num_ranked = max(row["rank_hi"] for row in patched)
    cells = []
    for recipient in dict.fromkeys(row["recipient"] for row in patched):
        cells.append((recipient, "unpatched", format_value(unpatched[recipient]["mean"]), "", "", "", ""))
        line = [row for row in patched if row["recipient"] == recipient]
        for fraction in SHOWN_K[: 4 if len(cells) == 1 else 3]:
            row = min(line, key=lambda row: abs(row["rank_hi"] - fraction * num_ranked))
            random, largest = (_control_effects(result, row, kinds) for kinds in (RANDOM_CONTROLS, (MAGNITUDE,)))
            interval = format_interval(row, "effect", format_percent)
            cells.append(
                (
                    recipient,
                    f"{row['rank_hi']} ({row['neuron_fraction']:.1%})",
                    format_value(row["mean"]),
                    f"{format_percent(row['effect'])} ({interval})",
                    format_range(random, format_percent) if random else "",
                    format_range(largest, format_percent) if largest else "",
                    "" if row["broken"] is None else format_percent(row["broken"]),
                )
            )
    donor = patched[0]["donor"]
    cells.append((donor, "unpatched", format_value(unpatched[donor]["mean"]), "100%", "", "", ""))
    columns = ("model", "neurons", "mean cost", "effect (95 % CI)", "random", "most active", "broken")
    return TableView(columns, tuple(cells))


def summarize(result: "Report") -> str:
    """Return one sentence about a tenth of the ranked neurons in the first recipient."""
    from snpatch.report.formatting import format_percent, format_range

    unpatched, patched = _unpatched_and_patched(result)
    line = [row for row in patched if row["recipient"] == patched[0]["recipient"]]
    row = min(line, key=lambda row: abs(row["rank_hi"] - 0.1 * max(r["rank_hi"] for r in line)))
    neurons = f"{row['rank_hi']} neurons ({row['neuron_fraction']:.1%})"
    parts = [
        f"Patching {neurons} of {row['donor']} into {row['recipient']} moves the mean cost "
        f"{format_percent(row['effect'])} of the way to {row['donor']}'s"
    ]
    for label, kinds in (("random neurons", RANDOM_CONTROLS), ("the most active neurons", (MAGNITUDE,))):
        if effects := _control_effects(result, row, kinds):
            parts.append(f"{label} {format_range(effects, format_percent)}")
    if row["broken"] is not None:
        parts.append(f"{format_percent(row['broken'])} of the texts are broken")
    if row["harmless_refused"] is not None:
        before = unpatched[row["recipient"]]["harmless_refused"]
        refused, before = format_percent(row["harmless_refused"]), format_percent(before)
        parts.append(f"{refused} of the harmless requests are refused (unpatched {before})")
    return f"{'; '.join(parts)}."
