"""Reports in a terminal: tables and sentences, printed with rich.

Names and sentences are printed as rich.text.Text, because rich's markup would interpret `[red]` and `[link=...]`.
"""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from snpatch.errors import printable
from snpatch.report.formatting import format_value
from snpatch.report.report import Report, TableView


def print_report(report: Report, console: Console) -> None:
    """Print the report's tables and sentences."""
    for table in report.displays:
        print_table(table, console)
    for sentence in [*report.headline, *report.notes]:
        print_line(sentence, console)


def print_table(view: TableView, console: Console) -> None:
    """Print one table."""
    table = Table(title=None if view.title is None else _text(view.title))
    for column in view.columns:
        table.add_column(_text(column))
    for row in view.rows:
        table.add_row(*(_text(format_value(value)) for value in row))
    console.print(table)


def print_line(sentence: str, console: Console) -> None:
    """Print a sentence literally."""
    console.print(_text(sentence), soft_wrap=True)


def _text(text: str) -> Text:
    return Text(printable(text))
