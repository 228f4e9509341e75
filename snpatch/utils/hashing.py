"""Content hashes: the keys of stored completions, rankings and finished steps, and the versions that are part of them.

Keys do not contain the package version because a release that changes no result must not discard stored work.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `snpatch --help` does not wait for torch
    from torch import Tensor

DIGITS = 16
REQUEST_DIGITS = 32  # of stored completions and cached prompts, of which there are many

# Raise a version by hand when the same inputs can give another result. Work of older versions is then computed again.
GENERATION_VERSION = 1  # completions: op, sampling, receipts
RANKING_VERSION = 2  # rankings: statistics, scores, order of ties
SCORE_VERSION = 1  # scores of a judge: the part of a completion that it reads
TABLE_VERSION = 3  # tables of experiments, from the same completions and rankings
ROWS_VERSION = 1  # training rows, from the same source and seed


def hash_json(data: object, digits: int = DIGITS) -> str:
    """Return the content hash of JSON data.

    Args:
        data: Dicts (the order of keys does not count), lists, tuples, strings, numbers, booleans and None.
        digits: Hexadecimal digits to keep.

    Raises:
        TypeError: `data` holds something that JSON has no form for.
    """
    return hash_bytes(json.dumps(data, sort_keys=True).encode(), digits)


def hash_tensor(tensor: "Tensor", *extra: object, digits: int = DIGITS) -> str:
    """Return the content hash of a tensor's values and of the `repr` of each `extra`.

    An `extra` is, for example, a shape.
    """
    values = tensor.detach().cpu().contiguous().numpy().tobytes()
    return hash_bytes(values + "".join(map(repr, extra)).encode(), digits)


def hash_file(path: Path, digits: int = DIGITS) -> str:
    """Return the content hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:digits]


def hash_bytes(content: bytes, digits: int = DIGITS) -> str:
    """Return the first `digits` hexadecimal digits of the SHA-256 of `content`."""
    return hashlib.sha256(content).hexdigest()[:digits]
