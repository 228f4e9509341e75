"""PromptSet: a source of prompts as a value, as config files name it; its rows are read only when they are needed."""

from dataclasses import dataclass
from pathlib import Path

from snpatch.config import resolve_path
from snpatch.data.dataset import Dataset
from snpatch.data.loading import load_dataset
from snpatch.errors import SnpatchError


@dataclass(frozen=True)
class PromptSet:
    """Source of prompts, and which of its rows are used.

    Attributes:
        source: See load_dataset; so are format, split, column and revision.
        filter: A column and the values of its rows that are used; empty: all rows.
        first: Number of rows from the start.
        last: Number of rows from the end, of which a sample is drawn.
        sample: Number of rows drawn with `seed`.
        seed: Seed of the sample.
        distinct: See load_dataset.
    """

    source: str
    format: str | None = None
    split: str | None = None
    column: str | None = None
    revision: str | None = None
    filter: tuple[str, ...] = ()
    first: int | None = None
    last: int | None = None
    sample: int | None = None
    seed: int = 0
    distinct: bool | None = None

    def __post_init__(self) -> None:
        if self.first is not None and (self.sample is not None or self.last is not None):
            other = "sample" if self.last is None else "last"
            raise SnpatchError(f"set {self.source}: give first or {other}, not both")
        if self.seed and self.sample is None:
            raise SnpatchError(f"set {self.source}: expected seed with sample, got it alone. Give both, or neither.")

    def read(self, folder: Path, skip_invalid: bool = False) -> Dataset:
        """Read the rows; a path is relative to the folder. skip_invalid: see load_dataset."""
        data = load_dataset(
            resolve_path(folder, self.source),
            format=self.format,
            split=self.split,
            column=self.column,
            revision=self.revision,
            distinct=self.distinct,
            skip_invalid=skip_invalid,
        )
        if self.filter:
            data = data.filter(*self.filter)
        if self.last is not None:
            data = data.last(self.last)
        if self.sample is not None:
            return data.sample(self.sample, self.seed)
        return data if self.first is None else data.first(self.first)
