"""Notes: warnings about input that is valid but may surprise the user; one per kind, all kept."""

import logging


class Notes:
    """Notes of one engine. Each is logged as a warning and stays in `messages`."""

    def __init__(self) -> None:
        self._by_kind: dict[str, str] = {}

    @property
    def messages(self) -> tuple[str, ...]:
        """Return the notes in the order in which they were added."""
        return tuple(self._by_kind.values())

    def has(self, kind: str) -> bool:
        """Return whether there is a note of this kind."""
        return kind in self._by_kind

    def add(self, kind: str, note: str) -> None:
        """Log and keep a note, unless there is already one of its kind."""
        if not self.has(kind):
            self._by_kind[kind] = note
            logging.getLogger("snpatch").warning("snpatch: %s", note)
