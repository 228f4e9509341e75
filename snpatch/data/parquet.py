"""Rows of Parquet files, in a module of their own because only they need pyarrow.

Why few rows at a time: a value that many rows share is stored once in the file, and once per row in memory.
"""

from collections.abc import Iterator
from pathlib import Path

from snpatch.data.source_row import Columns, SourceRow, check_columns
from snpatch.errors import SnpatchError
from snpatch.utils.optional import install_hint

BATCH_ROWS = 64

try:
    import pyarrow
    from pyarrow.parquet import ParquetFile
except ImportError as error:
    raise SnpatchError(f"reading Parquet needs more packages: {install_hint('data')}") from error


def read_parquet_rows(path: Path, columns: Columns) -> Iterator[SourceRow]:
    """Yield the rows of a Parquet file; see file_reader.read_rows."""
    try:
        with ParquetFile(path) as file:
            check_columns(path, file.schema_arrow.names, columns)
            values = (value for batch in file.iter_batches(BATCH_ROWS) for value in batch.to_pylist())
            for number, value in enumerate(values, start=1):
                yield SourceRow(str(path), "row", number, value)
    except RecursionError:
        raise SnpatchError(f"{path}: cannot be read: its columns are nested too deep") from None
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise SnpatchError(f"{path}: cannot be read: {error}") from error
