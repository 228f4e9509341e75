"""`snpatch report`: a folder of results as one HTML file."""

from pathlib import Path
from typing import Annotated

import typer

from snpatch.cli import options as o

FILE = "report.html"


def report(
    folder: Annotated[Path, typer.Argument(help="Folder that `snpatch sweep`, `exp` or `demo` wrote to.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help=f"The file; default: {FILE} in the folder.")] = None,
) -> None:
    """Write one HTML file of all results in a folder: curves, maps, tables, every text. It needs no network."""
    o.echo(f"wrote {write_folder_page(folder, out or folder / FILE)}")


def write_folder_page(folder: Path, path: Path) -> Path:
    """The page of a folder."""
    from snpatch.report import page
    from snpatch.report.folder_page import load_page

    return page.write_page(path, load_page(folder))
