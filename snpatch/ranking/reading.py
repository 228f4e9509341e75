"""Rankings of other tools: lists of neurons and scores in CSV, JSON, NumPy and torch files.

Nothing is guessed: integers in two columns are a list of (layer, neuron), a matrix of floats are scores. Content that
could be either, or that has no order, raises.
"""

import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from snpatch.data.file_reader import get_suffix, read_rows
from snpatch.data.source_row import SourceRow, list_columns
from snpatch.errors import SnpatchError, first_line, shown
from snpatch.utils.files import read_checkpoint

TORCH, NUMPY, TABLES = (".pt", ".pth", ".bin"), (".npy", ".npz"), (".csv", ".json", ".jsonl")
COLUMN_NAMES = {  # of a row's fields, in upper or lower case
    "layer": ("layer", "layer_idx", "layer_index", "layer_id"),
    "neuron": ("neuron", "neuron_idx", "neuron_index", "neuron_id", "feature"),
    "score": ("score", "change_score", "importance"),
    "rank": ("rank",),
}
VALUE_KEYS = ("neurons", "order", "ranking", "scores", "rank")  # of the list or matrix, if it has a name
FORMS = "expected (layer, neuron) or (layer, neuron, score) of each neuron, or scores [layers, neurons]"
MAX_UNPACKED_BYTES = 2**31  # of an .npz file
Shape = tuple[int, int] | Callable[[], tuple[int, int]] | None  # (layers, neurons of a layer), or a function


@dataclass(frozen=True)
class Neurons:
    """Content of a file: scores or an order.

    Attributes:
        scores: [L, F] float64, of all neurons.
        order: [n, 2] int64 of (layer, neuron), the first to patch first.
        tied: Number of neurons in a list with the score of the one before them.
        shape: (L, F), if the file contains it.
    """

    scores: Tensor | None = None
    order: Tensor | None = None
    tied: int = 0
    shape: tuple[int, int] | None = None


def read_neurons(path: Path) -> Neurons | tuple:
    """Read a file by its suffix; of a torch file with the six tensors of the published code return these.

    A list with scores is ordered by them, largest first; a list with ranks by these, smallest first.
    """
    kind = get_suffix(path)
    if not path.exists():
        raise SnpatchError(f"{path}: no such file")
    if kind in TORCH:
        content = read_checkpoint(path)
        if isinstance(content, list | tuple) and len(content) == 6 and all(isinstance(t, Tensor) for t in content):
            return tuple(content)
        return _of_value(content, path)
    if kind in NUMPY:
        return _of_value(_numpy(path), path)
    if kind in TABLES:
        return _of_rows(path)
    raise SnpatchError(
        f"{path}: expected a ranking of snpatch (.safetensors), or one in {', '.join((*TABLES, *NUMPY, *TORCH))}"
    )


def to_tensor(value: object, name: str) -> Tensor:
    """Return the tensor of a tensor, an array, or nested lists of numbers."""
    if isinstance(value, Tensor):
        return value
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "iuf" or _has_flags(value):
            raise ValueError(f"got {array.dtype}")
        return torch.from_numpy(array.astype("int64" if array.dtype.kind in "iu" else "float64"))
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise SnpatchError(
            f"{name}: expected numbers in a list of equal rows, an array or a tensor: {error}"
        ) from error


def _has_flags(value: object) -> bool:
    """Return whether nested lists contain a bool, which numpy would convert to a number."""
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(map(_has_flags, value)))


def _numpy(path: Path) -> object:
    """Return an array, or a dict of arrays. Pickles and files that unpack to too many bytes raise."""
    try:
        if get_suffix(path) == ".npy":
            return np.array(np.load(path, mmap_mode="r", allow_pickle=False))
        with zipfile.ZipFile(path) as packed:
            if (size := sum(entry.file_size for entry in packed.infolist())) > MAX_UNPACKED_BYTES:
                raise ValueError(f"{size} bytes when unpacked, expected at most {MAX_UNPACKED_BYTES}")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # for a damaged header numpy raises errors of tokenize, ast and zlib
        raise SnpatchError(f"{path}: not a NumPy file of plain numbers: {first_line(error)}") from error


def _of_value(value: object, path: Path) -> Neurons:
    """Parse an array, a tensor, or a dict with one of them."""
    shape = None
    if isinstance(value, dict):
        folded = {str(name).lower(): item for name, item in value.items()}
        if {"layer", "neuron"} <= folded.keys():
            columns = [folded[name] for name in ("layer", "neuron", "score") if name in folded]
            return _of_columns([to_tensor(column, f"{path}: a column").flatten() for column in columns], path)
        shape = _parse_shape(folded.get("shape"), path)
        names = [name for name in VALUE_KEYS if name in folded] or [name for name in folded if name != "shape"]
        if len(names) != 1:
            lists = [name for name, item in folded.items() if isinstance(item, list | Tensor | np.ndarray)]
            hint = ". Write one of its lists into a file of its own" if len(lists) > 1 else ""
            raise SnpatchError(f"{path}: {FORMS}, got a table of {list_columns(folded)}{hint}")
        value = folded[names[0]]
    if isinstance(value, dict):
        raise SnpatchError(f"{path}: {FORMS}, got another table, which has no order")
    array = to_tensor(value, str(path))
    if array.dim() != 2:
        raise SnpatchError(f"{path}: {FORMS}, got {list(array.shape)}")
    columns = array.T.unbind() if array.shape[1] in (2, 3) else ()
    if columns and not array.is_floating_point():
        return _of_columns(columns, path, shape)
    if len(columns) == 3 and all(map(_is_whole, columns[:2])):
        return _of_columns(columns, path, shape)
    if not array.is_floating_point():
        raise SnpatchError(f"{path}: {FORMS}, got integers {list(array.shape)}")
    return Neurons(scores=array, shape=shape)


def _of_columns(columns: Sequence[Tensor], path: Path, shape: tuple[int, int] | None = None) -> Neurons:
    """Parse columns: layers, neurons and, if given, scores."""
    if len({len(column) for column in columns}) > 1:
        lengths = ", ".join(str(len(column)) for column in columns)
        raise SnpatchError(f"{path}: expected columns of one length, got {lengths}")
    if not all(map(_is_whole, columns[:2])):
        raise SnpatchError(f"{path}: expected layers and neurons as whole numbers, got another number")
    order = torch.stack([column.long() for column in columns[:2]], dim=1)
    return _sorted(order, columns[2].double(), path, shape) if len(columns) == 3 else Neurons(order=order, shape=shape)


def _is_whole(values: Tensor) -> bool:
    return not values.is_floating_point() or bool((values == values.round()).all())


def _sorted(order: Tensor, scores: Tensor, path: Path, shape: tuple[int, int] | None = None) -> Neurons:
    if not bool(torch.isfinite(scores).all()):
        raise SnpatchError(f"{path}: expected finite scores, got one that is not")
    scores, places = torch.sort(scores, descending=True, stable=True)
    return Neurons(order=order[places], tied=int((scores.diff() == 0).sum()), shape=shape)


def _of_rows(path: Path) -> Neurons:
    rows = list(read_rows(path, _fault))
    only = rows[0].value if len(rows) == 1 else None
    if isinstance(only, dict) and (_fault(only) or any(isinstance(item, list) for item in only.values())):
        return _of_value(only, path)
    if rows and all(isinstance(row.value, list) for row in rows):
        return _of_value([row.value for row in rows], path)
    table = [_numbers(row) for row in rows]
    if not table:
        raise SnpatchError(f"{path}: expected neurons, got an empty file")
    for field in ("rank", "score"):
        if len({field in row for row in table}) > 1:
            raise SnpatchError(f"{path}: expected a {field} in every row or in none, got some")
    order = torch.tensor([[row["layer"], row["neuron"]] for row in table], dtype=torch.int64)
    if "rank" in table[0]:
        ranks = torch.tensor([row["rank"] for row in table], dtype=torch.float64)
        if len(ranks.unique()) != len(ranks):
            raise SnpatchError(f"{path}: expected each rank once, got one twice")
        return _sorted(order, -ranks, path)
    if "score" in table[0]:
        return _sorted(order, torch.tensor([row["score"] for row in table], dtype=torch.float64), path)
    return Neurons(order=order)


def _numbers(row: SourceRow) -> dict[str, float | int]:
    """Return the fields of a row as numbers; layer and neuron are integers."""
    if row.error or not isinstance(row.value, dict):
        raise SnpatchError(f"{row.location}: {row.error or f'expected layer and neuron, got {shown(row.value)}'}")
    numbers = {}
    for field, name in _columns(row.value).items():
        value, kind = row.value[name], float if field == "score" else int
        try:
            if isinstance(value, bool) or (kind is int and isinstance(value, float) and not value.is_integer()):
                raise ValueError
            numbers[field] = kind(value)
        except (TypeError, ValueError):
            expected = "a number" if kind is float else "a whole number"
            raise SnpatchError(f"{row.location}: {name}: expected {expected}, got {shown(value)}") from None
    if missing := {"layer", "neuron"} - numbers.keys():
        raise SnpatchError(f"{row.location}: {' and '.join(sorted(missing))} is missing")
    if numbers.get("score") is not None and not np.isfinite(numbers["score"]):
        raise SnpatchError(f"{row.location}: score: expected a finite number, got {numbers['score']}")
    return numbers


def _columns(names: Iterable[str]) -> dict[str, str]:
    """Return field -> column."""
    columns = {}
    for field, spellings in COLUMN_NAMES.items():
        for name in names:
            if str(name).strip().lower().replace(" ", "_") in spellings:
                columns.setdefault(field, name)
    return columns


def _fault(names: Iterable[str]) -> str | None:
    names = list(names)
    return None if {"layer", "neuron"} <= _columns(names).keys() else f"layer, neuron, got {list_columns(names)}"


def _parse_shape(value: object, path: Path) -> tuple[int, int] | None:
    if value is None:
        return None
    shape = to_tensor(value, f"{path}: shape").flatten().tolist()
    if len(shape) != 2 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise SnpatchError(f"{path}: shape: expected [layers, neurons], got {shown(value)}")
    return tuple(shape)
