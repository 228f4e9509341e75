"""SeenPrompts: the overlap of evaluation prompts with what rankings, models, judges and guards were made from.

Why it is counted in every run: an effect on prompts that a ranking or a training has seen says little about others, and
published sets share origins (hh-harmless, red-team-attempts and BeaverTails), so that repeats must be expected.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from snpatch.data import Dataset
from snpatch.data.overlap import Overlap, count_repeats, find_overlap, iter_user_texts, join_user_messages
from snpatch.data.prompt_set import PromptSet
from snpatch.errors import SnpatchError
from snpatch.sweeps.eval_config import EvalConfig
from snpatch.utils.schema import from_dict

TRAINING_RECORD = "training.json"  # in the folder of an adapter or checkpoint that snpatch trained


@dataclass(frozen=True)
class SetOverlap:
    """Repeats of a prompt set, and its overlap with each source of seen prompts.

    Attributes:
        name: Name of the set.
        prompts: Number of its prompts.
        repeats: Number of prompts that repeat an earlier one.
        overlaps: Source of seen prompts -> overlap.
        unread: Source -> reason why it could not be read.
        is_excluded: Whether the prompts of the overlaps were left out.
    """

    name: str
    prompts: int
    repeats: int
    overlaps: Mapping[str, Overlap]
    unread: Mapping[str, str]
    is_excluded: bool

    @property
    def indices(self) -> tuple[int, ...]:
        """Return the indices of all prompts of an overlap, rising."""
        return tuple(sorted({i for overlap in self.overlaps.values() for i in overlap.indices}))

    def to_dict(self) -> dict:
        """Return the counts as JSON data."""
        seen = {
            source: {"exact": len(overlap.exact), "near": len(overlap.near)}
            for source, overlap in self.overlaps.items()
        }
        return {
            "prompts": self.prompts,
            "repeats": self.repeats,
            "seen": seen,
            "unread": dict(self.unread),
            "excluded": len(self.indices) if self.is_excluded else 0,
        }

    @property
    def notes(self) -> list[str]:
        """Return a sentence per overlap, per unread source, and for repeats; none where there are none."""
        verb = "were left out because they are" if self.is_excluded else "are"
        notes = [
            f"{len(overlap.indices)} of {self.prompts} prompts of {self.name} {verb} also in {source} "
            f"({len(overlap.exact)} word for word, {len(overlap.near)} nearly)."
            for source, overlap in self.overlaps.items()
            if overlap.indices
        ]
        notes += [f"overlap of {self.name} with {source} is unknown: {why}" for source, why in self.unread.items()]
        if self.repeats:
            notes.append(
                f"{self.repeats} of {self.prompts} prompts of {self.name} repeat an earlier one, and intervals treat "
                "them as independent. Set distinct = true in the set to drop them."
            )
        return notes


class SeenPrompts:
    """Prompts that the rankings, models, judges or guards of a config were made from.

    Args:
        config: The config.
        read: Returns a prompt set of the config by its name.
    """

    def __init__(self, config: EvalConfig, read: Callable[[str], Dataset]) -> None:
        self._config, self._read = config, read

    def find_overlap(self, name: str, data: Dataset) -> SetOverlap:
        """Compare a prompt set with all seen prompts.

        Args:
            name: Name of the set.
            data: The set.
        """
        texts, (sources, unread) = [join_user_messages(chat) for chat in data.prompts], self._sources
        overlaps = {source: find_overlap(texts, seen_texts) for source, seen_texts in sources.items()}
        return SetOverlap(name, len(texts), count_repeats(texts), overlaps, unread, self._config.exclude_seen)

    @cached_property
    def _sources(self) -> tuple[dict[str, list[str]], dict[str, str]]:
        """Return the user messages of each source, and the reason for each that could not be read."""
        texts = {name: list(iter_user_texts(self._read(name))) for name in self._config.seen}
        unread = {}
        for folder in self._list_model_folders():
            if not (folder / TRAINING_RECORD).is_file():
                continue
            source = f"the training data of {folder.name}"
            try:
                data = _read_training_set(folder / TRAINING_RECORD).read(folder, skip_invalid=True)
                texts[source] = list(iter_user_texts(data))
            except SnpatchError as error:
                unread[source] = str(error)
        return texts, unread

    def _list_model_folders(self) -> list[Path]:
        """Return the local folders of the config's models and adapters, each once."""
        engine = self._config.engine.placed(self._config.folder)
        sources = [engine.model]
        for source in engine.sources.values():
            sources += [*([source.checkpoint] if source.checkpoint else []), *source.lora, *source.adapters]
        return [Path(source) for source in dict.fromkeys(map(str, sources)) if Path(source).is_dir()]


def _read_training_set(record: Path) -> PromptSet:
    """Return the training data that a training's record names."""
    try:
        values = json.loads(record.read_text(encoding="utf-8"))["provenance"]["source"]["prompt_set"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SnpatchError(f"{record}: names no training data ({type(error).__name__}: {error})") from error
    return from_dict(PromptSet, str(record), values)
