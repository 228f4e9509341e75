"""The exceptions for what a user can put right: the CLI prints the message as one line and exits with 2."""

import codecs
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

MAX_NAME = 100  # letters of a name that is compared with others

MAX_MESSAGE = 4000  # characters of an error
MAX_VALUE = 200  # characters of a value that an error shows
ESCAPE = "snpatch_json"  # name of an error handler of `codecs`
# Control characters but tab and newline, line separators, marks that reorder text, and halves of surrogate pairs.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return a text with control characters escaped, as JSON escapes them: no terminal obeys it."""
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def encodable(text: str, encoding: str) -> str:
    """Return a text in which characters that an encoding lacks are escaped, as JSON escapes them."""
    return text.encode(encoding, ESCAPE).decode(encoding)


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """Return JSON's escapes of what cannot be encoded, and where to go on: a handler of `codecs`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4)), error.end


codecs.register_error(ESCAPE, _escaped)


def one_line(text: str) -> str:
    """Return a text as one printable line."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: half a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: object) -> str:
    """Return a value's repr, cut to what an error can show."""
    text = repr(value)
    return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]}..."


class SnpatchError(Exception):
    """Invalid input or an impossible request; the message is one line: object, expected, got, what to do.

    field: path of the invalid part of the input, such as `window` or `interventions.0.donor`, or None.
    """

    def __init__(self, message: str = "", field: str | None = None) -> None:
        line = one_line(message)
        super().__init__(line if len(line) <= MAX_MESSAGE else f"{line[:MAX_MESSAGE]}...")
        self.field = field


class NotEnoughNeuronsError(SnpatchError):
    """A random control needs more neurons than it may draw from."""


class ReceiptError(SnpatchError):
    """The device did not do what the plan implies: the results of the run must not be used."""


class OverflowedError(ReceiptError):
    """Values of one text are not finite: that text must not be used. Other texts are not affected.

    unpatched: digest of the recipient and the prompt if no patch was applied, else None.
    """

    def __init__(self, message: str = "", *, unpatched: str | None = None) -> None:
        super().__init__(message)
        self.unpatched = unpatched


class ServerBusyError(SnpatchError):
    """There is no room now: to be asked again."""


class EngineCrashedError(SnpatchError):
    """The engine process died: running requests are lost. Call restart()."""


class SpoiledEngineError(OverflowedError, EngineCrashedError):
    """Values of an unpatched text are not finite: the engine's state may be spoiled, so it is restarted."""


@contextmanager
def error_field(field: str) -> Iterator[None]:
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
    """What another library's error says, in one line: its first one, with the next where it ends with a colon.

    An error that says nothing is told by its type.
    """
    first, *others = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{first} {others[0]}" if first.endswith(":") and others else first
