"""Rankings of other tools: lists of neurons and scores in CSV, JSON, NumPy and torch files.

Nothing is guessed: integers in two columns are a list of (layer, neuron), a matrix of floats are scores. Content that
could be either, or that has no order, raises, and so does a column that is neither used nor known to be harmless:
ignored, it would leave the order of the rows as the ranking.
"""

import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from snpatch.data.file_reader import get_suffix, read_rows
from snpatch.data.source_row import Columns, SourceRow, list_columns, normalize_column
from snpatch.errors import SnpatchError, first_line, shown
from snpatch.op.plan import UNRANKED
from snpatch.utils.files import read_checkpoint
from snpatch.utils.optional import require

TORCH, NUMPY, TABLES = (".pt", ".pth", ".bin"), (".npy", ".npz"), (".csv", ".json", ".jsonl")
COLUMN_NAMES = {  # names of a field, in upper or lower case
    "layer": ("layer", "layer_idx", "layer_index", "layer_id"),
    "neuron": ("neuron", "neuron_idx", "neuron_index", "neuron_id", "feature"),
    "score": ("score", "scores", "change_score", "change_scores", "importance"),
    "rank": ("rank", "ranks"),
}
UNNAMED_KEYS = ("arr_0",)  # of np.savez
HARMLESS_COLUMNS = ("", "index", "id", "name", "names", "neuron_name", "layer_name", "description", "comment")
BESIDE_SCORE = ("gradient_rank",)  # the order before another score in apple-aiml-research/ml-refusal-neurons
NOTE_KEYS = (
    *HARMLESS_COLUMNS, "model", "model_name", "recipient", "donor", "method", "metric", "positions", "dataset",
    "source", "author", "date", "created", "version", "seed", "meta", "metadata", "notes",
)  # fmt: skip
ANY_COLUMNS: Columns = ((),)
FORMS = "expected (layer, neuron) or (layer, neuron, score) of each neuron, or scores [layers, neurons]"
MAX_UNPACKED_BYTES = 2**31  # of an .npz file
Size = tuple[int, int]  # (layers, neurons of a layer)
Shape = Size | Callable[[], Size] | None


@dataclass(frozen=True)
class Neurons:
    """Content of a file: scores or an order.

    Attributes:
        scores: [L, F] float64, of all neurons.
        order: [n, 2] int64 of (layer, neuron), the first to patch first.
        tied: Number of neurons in a list with the score of the one before them.
        shape: (L, F), if the file contains it.
        size: [L, F] of a matrix of scores or ranks, whose last layers may be missing.
    """

    scores: Tensor | None = None
    order: Tensor | None = None
    tied: int = 0
    shape: Size | None = None
    size: Size | None = None


def read_neurons(path: Path) -> Neurons | tuple:
    """Read a file by its suffix; of a torch file with the six tensors of the published code return these.

    A list with scores is ordered by them, largest first; a list with ranks by these, smallest first.
    """
    kind = get_suffix(path)
    if not path.exists():
        raise SnpatchError(f"{path}: no such file")
    if kind in TORCH:
        found = read_checkpoint(path)
        if isinstance(found, list | tuple) and len(found) == 6 and all(isinstance(one, Tensor) for one in found):
            return tuple(found)
        return _parse_value(found, path)
    if kind in NUMPY:
        return _parse_value(_numpy(path), path)
    if kind in TABLES:
        return _parse_file(path)
    raise SnpatchError(
        f"{path}: expected a ranking of snpatch (.safetensors), or one in {', '.join((*TABLES, *NUMPY, *TORCH))}"
    )


def to_tensor(value: object, name: str) -> Tensor:
    """Return the tensor of a tensor, an array, or nested lists of numbers."""
    if isinstance(value, Tensor) and value.dtype != torch.bool and not value.is_complex():
        return value
    try:
        if isinstance(value, np.ma.MaskedArray):
            raise ValueError("got a masked array. Fill it: array.filled(value)")
        if isinstance(value, Tensor):
            raise ValueError(f"got {value.dtype}")
        if (array := np.asarray(value)).dtype.kind not in "iuf" or _has_flags(value):
            raise ValueError(f"got {_describe(value, array.dtype)}")
        if array.dtype.kind == "u" and array.size and int(array.max()) >= 2**63:
            raise ValueError(f"got {array.max()}, which int64 cannot hold")
        return torch.from_numpy(array.astype("int64" if array.dtype.kind in "iu" else "float64"))
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise SnpatchError(
            f"{name}: expected numbers in a list of equal rows, an array or a tensor: {first_line(error)}"
        ) from error


def _describe(value: object, dtype: np.dtype) -> str:
    """Return the dtype of numbers or texts, the content of a mixed list, or the type of anything else."""
    if isinstance(value, np.ndarray) or (isinstance(value, list | tuple) and dtype.kind != "O"):
        return str(dtype)
    return shown(value) if value is None or isinstance(value, list | tuple) else f"a {type(value).__name__}"


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


def _parse_value(value: object, path: Path, name: str | None = None, shape: Size | None = None) -> Neurons:
    """Parse a table, a list of rows, an array or a tensor. name: its key in the file."""
    if isinstance(value, dict) and name is None:
        return _parse_table(value, path)
    if isinstance(value, list | tuple) and value and all(isinstance(one, dict) for one in value):
        rows = [SourceRow(str(path), "item", number, one) for number, one in enumerate(value, start=1)]
        return _parse_rows(rows, path, shape)
    if isinstance(value, dict):
        raise SnpatchError(f"{path}: {FORMS}, got another table, which has no order")
    return _parse_matrix(to_tensor(value, str(path)), path, name, shape)


def _parse_table(table: dict, path: Path) -> Neurons:
    """Parse columns, or the only list or matrix of a table; other keys must be known to be harmless."""
    names = {str(name): one for name, one in table.items() if not _is_note(str(name), one)}
    shape_name = next((name for name in names if normalize_column(name) == "shape"), None)
    shape = None if shape_name is None else _parse_shape(names.pop(shape_name), path)
    columns = _find_columns(names, path)
    if {"layer", "neuron"} <= columns.keys():
        _check_all_used(names, columns, path)
        fields = {field: to_tensor(names[name], f"{path}: {name}") for field, name in columns.items()}
        return _parse_columns(fields, path, shape)
    if len(names) != 1 or not isinstance(next(iter(names.values())), list | tuple | dict | Tensor | np.ndarray):
        lists = [name for name, one in names.items() if isinstance(one, list | Tensor | np.ndarray)]
        hint = ". Write one of its lists into a file of its own" if len(lists) > 1 else ""
        raise SnpatchError(f"{path}: {FORMS}, got a table of {list_columns(names)}{hint}")
    ((name, value),) = names.items()
    return _parse_value(value, path, None if normalize_column(name) in UNNAMED_KEYS else normalize_column(name), shape)


def _parse_matrix(array: Tensor, path: Path, name: str | None, shape: Size | None) -> Neurons:
    """Parse [n, 2] or [n, 3], or scores or ranks [L, F]; integers and unknown names are never scores."""
    if array.dim() != 2:
        raise SnpatchError(f"{path}: {FORMS}, got {list(array.shape)}")
    if not array.numel():
        raise SnpatchError(f"{path}: expected neurons, got an empty file")
    if name in COLUMN_NAMES["rank"]:
        return _parse_ranks(array, path, shape)
    columns, is_whole = array.T.unbind() if array.shape[1] in (2, 3) else (), not array.is_floating_point()
    if columns and (is_whole or (all(map(_is_whole, columns[:2])) and (len(columns) == 3 or name is None))):
        return _parse_columns(dict(zip(("layer", "neuron", "score"), columns, strict=False)), path, shape)
    if name not in COLUMN_NAMES["score"]:
        kind = "integers" if is_whole else "numbers"
        named = "" if name is None else f" under {name}"
        remedy = "Name them scores or rank (smallest first) in an .npz or .json file"
        if is_whole or name is not None:
            raise SnpatchError(f"{path}: {FORMS}, got {kind} {list(array.shape)}{named}. {remedy}.")
        if _is_permutation(array):
            raise SnpatchError(f"{path}: expected scores, got numbers that may be ranks, each once. {remedy}.")
    scores = array.double() if is_whole else array
    return Neurons(scores=scores, shape=shape, size=(len(array), array.shape[1]))


def _parse_ranks(array: Tensor, path: Path, shape: Size | None) -> Neurons:
    """Parse ranks [L, F], smallest first; UNRANKED as in a ranking's own `rank`."""
    ranks = array.double()
    is_ranked = ranks != UNRANKED
    order = _sort(torch.nonzero(is_ranked), {"rank": ranks[is_ranked]}, path).order
    return Neurons(order=order, shape=shape, size=(len(array), array.shape[1]))


def _parse_columns(fields: dict[str, Tensor], path: Path, shape: Size | None = None) -> Neurons:
    """Parse columns: layers, neurons and, if given, scores and ranks."""
    fields = {field: column.flatten() for field, column in fields.items()}
    if len(lengths := {len(one) for one in fields.values()}) > 1:
        raise SnpatchError(f"{path}: expected columns of one length, got {', '.join(map(str, sorted(lengths)))}")
    columns = [fields.pop(field) for field in ("layer", "neuron")]
    if not all(map(_is_whole, columns)):
        raise SnpatchError(f"{path}: expected layers and neurons as whole numbers, got another number")
    order = torch.stack([one.long() for one in columns], dim=1)
    if not len(order):
        raise SnpatchError(f"{path}: expected neurons, got an empty file")
    return replace(_sort(order, {field: one.double() for field, one in fields.items()}, path), shape=shape)


def _sort(order: Tensor, keys: dict[str, Tensor], path: Path) -> Neurons:
    """Order neurons by rank, smallest first, or by score, largest first; both must give one order."""
    for field, values in keys.items():
        if not bool(torch.isfinite(values).all()):
            raise SnpatchError(f"{path}: expected finite values of {field}, got one that is not")
    if not keys:
        return Neurons(order=order)
    ranks, scores = keys.get("rank"), keys.get("score")
    if ranks is not None and len(ranks.unique()) != len(ranks):
        raise SnpatchError(f"{path}: expected each rank once, got one twice")
    places = torch.argsort(require(scores) if ranks is None else -ranks, descending=True, stable=True)
    if scores is None:
        return Neurons(order=order[places])
    steps = scores[places].diff()
    if bool((steps > 0).any()):
        raise SnpatchError(f"{path}: expected rank and score to give one order, got two. Remove one of the columns.")
    return Neurons(order=order[places], tied=int((steps == 0).sum()))


def _parse_file(path: Path) -> Neurons:
    """Parse a CSV or JSON file."""
    rows = list(read_rows(path, ANY_COLUMNS))
    for row in rows:
        if row.error:
            raise SnpatchError(f"{row.location}: {row.error}")
    if len(rows) == 1 and isinstance(only := rows[0].value, dict) and get_suffix(path) != ".csv":
        is_row = {"layer", "neuron"} <= _find_columns(only, path).keys()
        if not is_row or any(isinstance(one, list | dict) for one in only.values()):
            return _parse_value(only, path)
    if rows and all(isinstance(row.value, list) for row in rows):
        return _parse_value([row.value for row in rows], path)
    return _parse_rows(rows, path)


def _parse_rows(rows: Sequence[SourceRow], path: Path, shape: Size | None = None) -> Neurons:
    """Parse tables of one neuron each, whose columns are those of the first."""
    if not rows:
        raise SnpatchError(f"{path}: expected neurons, got an empty file")
    for row in rows:
        if not isinstance(row.value, dict):
            raise SnpatchError(f"{row.location}: expected layer and neuron, got {shown(row.value)}")
    names = dict.fromkeys(str(name) for row in rows for name in row.value)
    columns = _find_columns(names, path)
    if not {"layer", "neuron"} <= columns.keys():
        raise SnpatchError(f"{path}: expected the columns layer, neuron, got {list_columns(names)}")
    _check_all_used(names, columns, path)
    fields: dict[str, list] = {field: [] for field in columns}
    for row in rows:
        for field, name in columns.items():
            if name not in row.value:
                raise SnpatchError(f"{row.location}: {name} is missing, which other rows have")
            fields[field].append(_parse_number(row, name, float if field in ("score", "rank") else int))
    tensors = {
        field: torch.tensor(values, dtype=torch.int64 if field in ("layer", "neuron") else torch.float64)
        for field, values in fields.items()
    }
    return _parse_columns(tensors, path, shape)


def _parse_number(row: SourceRow, name: str, kind: type) -> float | int:
    """Return a field of a row as float64 or int64."""
    value = row.value[name]
    try:
        if isinstance(value, bool) or (kind is int and isinstance(value, float) and not value.is_integer()):
            raise ValueError
        number = kind(value)
        if kind is int and abs(number) >= 2**63:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        wanted = "a number" if kind is float else "a whole number"
        raise SnpatchError(f"{row.location}: {name}: expected {wanted}, got {shown(value)}") from None
    if not np.isfinite(number):
        raise SnpatchError(f"{row.location}: {name}: expected a finite number, got {shown(value)}")
    return number


def _find_columns(names: Iterable[str], path: Path) -> dict[str, str]:
    """Return field -> column. Two columns that may be the same field raise."""
    columns = {}
    for field, spellings in COLUMN_NAMES.items():
        matching = [str(name) for name in names if normalize_column(name) in spellings]
        if len(matching) > 1:
            raise SnpatchError(f"{path}: expected one {field}, got the columns {', '.join(matching)}. Remove one.")
        if matching:
            columns[field] = matching[0]
    return columns


def _check_all_used(names: Iterable[str], columns: dict[str, str], path: Path) -> None:
    """Raise for a column that could order or select neurons and is not known."""
    harmless = HARMLESS_COLUMNS + (BESIDE_SCORE if "score" in columns else ())
    others = {name: normalize_column(name) for name in names if name not in columns.values()}
    unknown = [name for name, kind in others.items() if kind not in harmless and not kind.startswith("unnamed:")]
    if unknown:
        raise SnpatchError(
            f"{path}: expected layer, neuron and score or rank, got the columns {list_columns(names)}. Rename the one "
            f"that orders the neurons to score (largest first) or rank, and remove the others: {list_columns(unknown)}"
        )


def _is_note(name: str, value: object) -> bool:
    """Return whether a key of a table describes the ranking: a single value under a known name."""
    is_list = isinstance(value, list | tuple) or (isinstance(value, Tensor | np.ndarray) and value.ndim > 0)
    return normalize_column(name) in NOTE_KEYS and not is_list


def _is_whole(column: Tensor) -> bool:
    return not column.is_floating_point() or bool((column == column.round()).all())


def _is_permutation(array: Tensor) -> bool:
    """Return whether values are 0 to n - 1, or 1 to n, each once, as ranks are."""
    if array.numel() == 1 or not _is_whole(array):
        return False
    values = array.double().flatten().sort().values
    return bool((values.diff() == 1).all()) and float(values[0]) in (0.0, 1.0)


def _parse_shape(value: object, path: Path) -> Size | None:
    if value is None:
        return None
    shape = to_tensor(value, f"{path}: shape").flatten().tolist()
    if len(shape) != 2 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise SnpatchError(f"{path}: shape: expected [layers, neurons], got {shown(value)}")
    return shape[0], shape[1]
