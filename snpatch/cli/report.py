"""`snpatch report`: a results folder as one HTML file."""

from pathlib import Path
from typing import Annotated

import typer

from snpatch.cli import options as o

FILE = "report.html"


def report(
    folder: Annotated[Path, typer.Argument(help="Results folder of `snpatch sweep`, `exp` or `demo`.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help=f"HTML file. Default: {FILE} in the folder.")] = None,
) -> None:
    """Write all results of a folder to one offline HTML file: curves, heat maps, tables, completions."""
    o.echo(f"wrote {write_folder_page(folder, out or folder / FILE)}")


def write_folder_page(folder: Path, path: Path) -> Path:
    """Write the page of a results folder and return its path."""
    from snpatch.report import page
    from snpatch.report.folder_page import load_page

    return page.write_page(path, load_page(folder))
