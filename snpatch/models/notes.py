"""Notes: what a user should know of a run although it is no error. Each kind is told once, and all are kept."""

import logging


class Notes:
    """Of one engine. They are logged as warnings and stay in `told`."""

    def __init__(self) -> None:
        self._by_kind: dict[str, str] = {}

    @property
    def told(self) -> tuple[str, ...]:
        """Return the notes in the order in which they came."""
        return tuple(self._by_kind.values())

    def add(self, kind: str, note: str) -> None:
        """Tell a note, unless one of its kind was told."""
        if kind not in self._by_kind:
            self._by_kind[kind] = note
            logging.getLogger("snpatch").warning("snpatch: %s", note)
