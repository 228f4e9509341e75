"""Reports in a terminal: the view as a table, the sentences below it. The one file that needs rich for a report.

Names and sentences are rich's Text, as its markup would read `[red]` and `[link=...]` in them.
"""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from snpatch.errors import printable
from snpatch.report.cells import cell
from snpatch.report.report import Report, View


def show(report: Report, console: Console) -> None:
    """The table and the sentences."""
    show_view(report.shown, console)
    for sentence in report.headline:
        say(sentence, console)


def show_view(view: View, console: Console) -> None:
    """The table alone."""
    table = Table(title=None if view.title is None else _text(view.title))
    for column in view.columns:
        table.add_column(_text(column))
    for row in view.rows:
        table.add_row(*(_text(cell(value)) for value in row))
    console.print(table)


def say(sentence: str, console: Console) -> None:
    """Print a sentence as it is."""
    console.print(_text(sentence), soft_wrap=True)


def _text(text: str) -> Text:
    return Text(printable(text))
