"""Cells: how figures read in tables and sentences. Numbers are short, what is undefined is empty or says so.

Why one place: a table in the terminal, a sentence of a headline and a page of the future must round alike.
"""

from collections.abc import Callable, Mapping, Sequence


def cell(value: object) -> str:
    """A cell's text: numbers short, None empty."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if value and (abs(value) < 0.01 or abs(value) >= 1e4) else f"{value:.2f}"
    return str(value)


def printable(text: str) -> str:
    """Return a text as one line that any terminal shows: control characters and lone surrogates become escapes."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def span(row: Mapping[str, object], name: str, form: Callable[[object], str] = cell) -> str:
    """ "low .. high" of a figure of the row, empty where it is undefined."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "" if low is None else f"{form(low)} .. {form(high)}"


def between(values: Sequence[float], form: Callable[[object], str] = cell) -> str:
    """The range of several figures, or the one that they all are."""
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low} .. {high}"


def percent(value: float | None) -> str:
    """A share in whole per cent."""
    return "undefined" if value is None else f"{round(value, 2) + 0.0:.0%}"  # no -0%


def p_value(value: float | None) -> str:
    """Of a test; empty where there was nothing to test."""
    return "" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"
