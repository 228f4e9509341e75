"""The exceptions for what a user can put right: the CLI prints the message as one line and exits with 2."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

MAX_NAME = 100  # letters of a name that is compared with others


class SnpatchError(Exception):
    """Bad input or an impossible request. The message says what, what was wanted, what came, and what to do.

    field: of what was given, the part that is wrong, as `window` or `clauses.0.donor`; None where it is no part of it.
    """

    def __init__(self, message: str = "", field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class NotEnoughNeuronsError(SnpatchError):
    """A random control needs more neurons than it may draw from."""


class ReceiptError(SnpatchError):
    """The device did not do what the plan implies: the results of the run must not be used."""


class BusyError(SnpatchError):
    """There is no room now: to be asked again."""


class EngineDiedError(SnpatchError):
    """The engine is no more: what was under way is lost, and it can be started anew."""


@contextmanager
def within(field: str) -> Iterator[None]:
    """Errors out of this block are of this field, or of a part of it."""
    try:
        yield
    except SnpatchError as error:
        error.field = field if error.field is None else f"{field}.{error.field}"
        raise


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """Return the names, at most three, that a misspelled one may stand for, the nearest first."""
    names = {name.lower(): name for name in known}
    return [names[name] for name in get_close_matches(word[:MAX_NAME].lower(), names)]


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line: its first one, or its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).strip()
