"""Rows of Parquet files. Apart from the other kinds because it alone needs pyarrow.

Why few rows at a time: a value that many rows share is stored once, and would take its room once for each.
"""

from collections.abc import Iterator
from pathlib import Path

from snpatch.data.source_row import Columns, Row, check_columns
from snpatch.errors import SnpatchError

BATCH_ROWS = 64

try:
    import pyarrow
    from pyarrow.parquet import ParquetFile
except ImportError as error:
    raise SnpatchError("reading Parquet needs more packages: pip install 'snpatch[data]'") from error


def parquet_rows(path: Path, columns: Columns) -> Iterator[Row]:
    """See files.read_rows."""
    try:
        with ParquetFile(path) as file:
            check_columns(path, file.schema_arrow.names, columns)
            values = (value for batch in file.iter_batches(BATCH_ROWS) for value in batch.to_pylist())
            for number, value in enumerate(values, start=1):
                yield Row(str(path), "row", number, value)
    except RecursionError:
        raise SnpatchError(f"{path}: cannot be read: its columns are nested too deep") from None
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise SnpatchError(f"{path}: cannot be read: {error}") from error
