"""Formatting of numbers and names in tables, sentences, plots and Markdown.

Why one module: a table in the terminal, a sentence of a headline and the HTML page must round alike.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from snpatch.errors import one_line

MAX_LABEL_CHARS = 60
SCORE_DIRECTIONS = {
    "cost": "lower is safer",
    "reward": "higher is better",
    "refusal": "1 = answered, -1 = refused",
}
# Characters that Markdown interprets, and the beginnings of links that it detects without markup.
_MARKDOWN_SYNTAX = re.compile(r"([\\`*_\[\]<>|&~$@!#]|:(?=//)|(?<=www)\.)", re.IGNORECASE)


def format_value(value: object) -> str:
    """Return the text of a table cell: numbers short, None empty."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if value and (abs(value) < 0.01 or abs(value) >= 1e4) else f"{value:.2f}"
    return str(value)


def format_interval(row: Mapping[str, Any], name: str, form: Callable[[Any], str] = format_value) -> str:
    """Return "low .. high" from a row's columns `{name}_low` and `{name}_high`; empty if undefined."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "" if low is None else f"{form(low)} .. {form(high)}"


def format_with_interval(row: Mapping[str, Any], name: str, form: Callable[[Any], str] = format_value) -> str:
    """Return "value [low .. high]" from a row's columns; without brackets if the interval is undefined."""
    interval = format_interval(row, name, form)
    return f"{form(row[name])} [{interval}]" if interval else form(row[name])


def format_range(values: Sequence[float], form: Callable[[Any], str] = format_value) -> str:
    """Return "smallest .. largest" of several values, or one value if both are formatted alike."""
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low} .. {high}"


def format_percent(value: float | None) -> str:
    """Return a fraction as a whole percentage."""
    return "undefined" if value is None else f"{round(value, 2) + 0.0:.0%}"  # + 0.0: no -0%


def format_p_value(value: float | None) -> str:
    """Return the p value of a test; empty if nothing was tested."""
    return "" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def describe_score(judge: str) -> str:
    """Return a judge's name with the direction of its scores, if the name is one that snpatch gives."""
    return f"{judge} ({SCORE_DIRECTIONS[judge]})" if judge in SCORE_DIRECTIONS else judge


def to_plot_label(name: str) -> str:
    """Return a name that Matplotlib draws literally: `$` starts no formula, `_` hides no legend entry."""
    line = one_line(name)
    cut = line if len(line) <= MAX_LABEL_CHARS else f"{line[:MAX_LABEL_CHARS]}..."
    return (" " if cut.startswith("_") else "") + cut.replace("$", r"\$")


def escape_markdown(text: object) -> str:
    """Return a text as one line of Markdown that renders literally: no link, no HTML, no formatting."""
    return _MARKDOWN_SYNTAX.sub(r"\\\1", one_line(str(text)))
