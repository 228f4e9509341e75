"""Reports in a terminal: the view as a table, the sentences below it. The one file that needs rich for a report."""

from rich.console import Console
from rich.table import Table

from snpatch.report.cells import cell
from snpatch.report.report import Report


def show(report: Report, console: Console) -> None:
    """The table and the sentences."""
    table = Table(*report.shown.columns, title=report.shown.title)
    for row in report.shown.rows:
        table.add_row(*map(cell, row))
    console.print(table)
    for sentence in report.headline:
        console.print(sentence, highlight=False, soft_wrap=True)
