"""Reports in a terminal: the view as a table, the sentences below it. The one file that needs rich for a report.

Names and sentences are rich's Text, as its markup would read `[red]` and `[link=...]` in them.
"""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from snpatch.errors import printable
from snpatch.report.formatting import format_value
from snpatch.report.report import Report, TableView


def print_report(report: Report, console: Console) -> None:
    """The table and the sentences."""
    print_table(report.display, console)
    for sentence in report.headline:
        print_line(sentence, console)


def print_table(view: TableView, console: Console) -> None:
    """The table alone."""
    table = Table(title=None if view.title is None else _text(view.title))
    for column in view.columns:
        table.add_column(_text(column))
    for row in view.rows:
        table.add_row(*(_text(format_value(value)) for value in row))
    console.print(table)


def print_line(sentence: str, console: Console) -> None:
    """Print a sentence as it is."""
    console.print(_text(sentence), soft_wrap=True)


def _text(text: str) -> Text:
    return Text(printable(text))
