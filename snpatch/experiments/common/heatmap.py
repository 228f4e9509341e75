"""Annotated heat map of a small matrix."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes

from snpatch.report.formatting import to_plot_label


def draw_heatmap(
    axis: Axes,
    values: np.ndarray,  # [rows, columns], NaN = undefined
    row_names: Sequence[str],
    column_names: Sequence[str],
    *,
    color_limits: tuple[float, float],
    colormap: str,
    format_cell: Callable[[int, int, float], str],
    is_dark: Callable[[float], bool],
    rotation: float = 30,
) -> None:
    """Draw the matrix with a text in each cell, white on the values that `is_dark` names."""
    low, high = color_limits
    axis.imshow(values, vmin=low, vmax=high, cmap=colormap, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        color = "white" if is_dark(value) else "black"
        axis.text(j, i, format_cell(i, j, value), ha="center", va="center", color=color, fontsize=9)
    axis.set_xticks(range(len(column_names)), list(map(to_plot_label, column_names)), rotation=rotation, ha="right")
    axis.set_yticks(range(len(row_names)), list(map(to_plot_label, row_names)))
