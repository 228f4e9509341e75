"""Cells: how figures read in tables and sentences. Numbers are short, what is undefined is empty or says so.

Why one place: a table in the terminal, a sentence of a headline and a page of the future must round alike.
"""

import re
from collections.abc import Callable, Mapping, Sequence

from snpatch.errors import one_line

MAX_LABEL = 60  # characters of a name in a plot
# What Markdown reads as more than text, with the beginnings of links that it finds by itself.
_MARKED = re.compile(r"([\\`*_\[\]<>|&~$@!#]|:(?=//)|(?<=www)\.)", re.IGNORECASE)


def format_value(value: object) -> str:
    """A cell's text: numbers short, None empty."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if value and (abs(value) < 0.01 or abs(value) >= 1e4) else f"{value:.2f}"
    return str(value)


def format_interval(row: Mapping[str, object], name: str, form: Callable[[object], str] = format_value) -> str:
    """ "low .. high" of a figure of the row, empty where it is undefined."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "" if low is None else f"{form(low)} .. {form(high)}"


def format_range(values: Sequence[float], form: Callable[[object], str] = format_value) -> str:
    """The range of several figures, or the one that they all are."""
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low} .. {high}"


def format_percent(value: float | None) -> str:
    """A share in whole per cent."""
    return "undefined" if value is None else f"{round(value, 2) + 0.0:.0%}"  # no -0%


def format_p_value(value: float | None) -> str:
    """Of a test; empty where there was nothing to test."""
    return "" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def to_plot_label(name: str) -> str:
    """Return a name as a plot of Matplotlib shows it: no formula, and in the legend whatever it begins with."""
    line = one_line(name)
    cut = line if len(line) <= MAX_LABEL else f"{line[:MAX_LABEL]}..."
    return (" " if cut.startswith("_") else "") + cut.replace("$", r"\$")


def escape_markdown(text: object) -> str:
    """Return a text as one line of Markdown that shows it as it is: no link, no HTML, no formatting."""
    return _MARKED.sub(r"\\\1", one_line(str(text)))
