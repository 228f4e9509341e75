"""Published data sets, downloaded and cached by the `datasets` library.

Why some data sets are loaded by file: `datasets` refuses repositories that contain a loading script (LIMA) or files of
different columns (ShareGPT), and HarmBench is published on GitHub.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from snpatch.data.formats import Hub
from snpatch.data.source_row import Columns, SourceRow, check_columns
from snpatch.errors import SnpatchError, first_line
from snpatch.utils.optional import install_hint

try:
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub.utils import httpx
except ImportError as error:
    raise SnpatchError(f"data sets from the hub need more packages: {install_hint('data')}") from error


def fetch(
    hub: Hub, columns: Columns, split: str | None, revision: str | None
) -> tuple[Iterator[SourceRow], dict[str, Any]]:
    """Return (rows, provenance) of a published data set.

    Raises:
        SnpatchError: The hub cannot be reached, or the data set lacks the split or a column.
    """
    split = split or hub.split
    if hub.files:
        if split != hub.split and not any("{split}" in url for url in hub.files):
            raise SnpatchError(f"{hub.id}: has one split, {hub.split}, got {split!r}")
        names = {"split": split, "revision": revision or "main"}
        arguments = {"data_files": [url.format(**names) for url in hub.files], "split": "train"}
    else:
        arguments = {"name": hub.config, "data_dir": hub.data_dir, "split": split, "revision": revision}
    try:
        table = datasets.load_dataset(hub.path, **arguments)
    except (OSError, ValueError, RuntimeError, DatasetsError, httpx.HTTPError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise SnpatchError(f"cannot load {hub.id} ({split}) from the hub: {reason}") from error
    source = f"{hub.id}, {split}"
    check_columns(source, table.column_names, columns)
    rows = (SourceRow(source, "row", number, value) for number, value in enumerate(table, start=1))
    return rows, {"hub": hub.id, "split": split, "revision": revision}


def read_saved(folder: Path, columns: Columns, split: str | None) -> Iterator[SourceRow]:
    """Return the rows of a folder written by `save_to_disk`; split: required if it holds several."""
    try:
        table = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, DatasetsError) as error:
        raise SnpatchError(f"{folder}: cannot be read as a saved data set: {first_line(error)}") from error
    if isinstance(table, datasets.DatasetDict):
        if split not in table and (split is not None or len(table) != 1):
            raise SnpatchError(
                f"{folder}: holds the splits {', '.join(map(str, table))}: choose one with split, got {split}"
            )
        table = table[split or next(iter(table))]
    elif split is not None:
        raise SnpatchError(f"{folder}: split chooses among splits, this is one")
    check_columns(folder, table.column_names, columns)
    return (SourceRow(str(folder), "row", number, value) for number, value in enumerate(table, start=1))
