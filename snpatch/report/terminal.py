"""Reports in a terminal: the view as a table, the sentences below it. The one file that needs rich for a report."""

from rich.console import Console
from rich.table import Table

from snpatch.report.cells import cell
from snpatch.report.report import Report, View


def show(report: Report, console: Console) -> None:
    """The table and the sentences."""
    show_view(report.shown, console)
    for sentence in report.headline:
        console.print(sentence, highlight=False, soft_wrap=True)


def show_view(view: View, console: Console) -> None:
    """The table alone."""
    table = Table(*view.columns, title=view.title)
    for row in view.rows:
        table.add_row(*map(cell, row))
    console.print(table)
