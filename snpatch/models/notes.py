"""Notes: what may matter to a user although it is no error. Each kind is logged once, and all are kept."""

import logging


class Notes:
    """The notes of one engine. Each is logged as a warning and stays in `messages`."""

    def __init__(self) -> None:
        self._by_kind: dict[str, str] = {}

    @property
    def messages(self) -> tuple[str, ...]:
        """Return the notes in the order in which they came."""
        return tuple(self._by_kind.values())

    def has(self, kind: str) -> bool:
        """Return whether there is a note of a kind."""
        return kind in self._by_kind

    def add(self, kind: str, note: str) -> None:
        """Log and keep a note, unless there is one of its kind."""
        if not self.has(kind):
            self._by_kind[kind] = note
            logging.getLogger("snpatch").warning("snpatch: %s", note)
