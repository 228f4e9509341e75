"""Exceptions, and the text of their messages. The command line prints the message as one line and exits with 2."""

import codecs
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

MAX_NAME_CHARS = 100  # of a name that is compared with known names
MAX_MESSAGE_CHARS = 4000
MAX_VALUE_CHARS = 200  # of a value in a message
ESCAPE = "snpatch_json"  # name of an error handler of `codecs`
# Control characters except tab and newline, line separators, marks that reorder text, halves of surrogate pairs.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return a text with control characters escaped as in JSON, so that a terminal does not execute them."""
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def encodable(text: str, encoding: str) -> str:
    """Return a text in which characters that an encoding lacks are escaped as in JSON."""
    return text.encode(encoding, ESCAPE).decode(encoding)


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """Return JSON escapes of what cannot be encoded, and the end of it; a handler of `codecs`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4)), error.end


codecs.register_error(ESCAPE, _escaped)


def one_line(text: str) -> str:
    """Return a text as one printable line."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def is_unicode(text: str) -> bool:
    """Return whether a text can be written as UTF-8; half a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: object) -> str:
    """Return the repr of a value, shortened for a message."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integers above sys.get_int_max_str_digits()
        text = f"{type(value).__name__} with too many digits to show"
    return text if len(text) <= MAX_VALUE_CHARS else f"{text[:MAX_VALUE_CHARS]}..."


class SnpatchError(Exception):
    """Invalid input or an impossible request; the message is one line: object, expected, got, what to do.

    field: path of the invalid part of the input, such as `window` or `interventions.0.donor`, or None.
    """

    def __init__(self, message: str = "", field: str | None = None) -> None:
        line = one_line(message)
        super().__init__(line if len(line) <= MAX_MESSAGE_CHARS else f"{line[:MAX_MESSAGE_CHARS]}...")
        self.field = field


class NotEnoughNeuronsError(SnpatchError):
    """Too few neurons to draw a random control from."""


class ReceiptError(SnpatchError):
    """The device's counts differ from what the plan implies. The results of the run must not be used."""


class OverflowedError(ReceiptError):
    """Values of a completion are not finite. Other completions are not affected.

    unpatched: content hash of recipient and prompt if no patch was applied, else None.
    """

    def __init__(self, message: str = "", *, unpatched: str | None = None) -> None:
        super().__init__(message)
        self.unpatched = unpatched


class ServerBusyError(SnpatchError):
    """The server is at capacity. Retry later."""


class EngineCrashedError(SnpatchError):
    """The vLLM engine process died; running requests are lost. Call restart()."""


class SpoiledEngineError(OverflowedError, EngineCrashedError):
    """Values of an unpatched completion are not finite. The engine is restarted, because its state may be spoiled."""


@contextmanager
def error_field(field: str) -> Iterator[None]:
    """Prefix the `field` of SnpatchErrors that the block raises."""
    try:
        yield
    except SnpatchError as error:
        error.field = field if error.field is None else f"{field}.{error.field}"
        raise


@contextmanager
def error_source(source: object) -> Iterator[None]:
    """Prefix SnpatchErrors that the block raises with the file that they are about."""
    try:
        yield
    except SnpatchError as error:
        raise SnpatchError(f"{source}: {error}", error.field) from error


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """Return up to three known names that a misspelled word may stand for, the nearest first."""
    names = {name.lower(): name for name in known}
    return [names[name] for name in get_close_matches(word[:MAX_NAME_CHARS].lower(), names)]


def unknown_name(kind: str, name: object, known: Iterable[str], field: str | None = None) -> SnpatchError:
    """Return the error of a name that is not among the known ones. kind: names it, such as "model"."""
    names = list(known)
    hint = "".join(f" Did you mean {other}?" for other in nearest(name, names)[:1]) if isinstance(name, str) else ""
    expected = f"one of {', '.join(names)}" if names else "no name, as none is defined"
    return SnpatchError(f"{kind}: expected {expected}, got {shown(name)}.{hint}", field=field)


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, and the second if the first ends with a colon.

    An error without a message is described by its type, and a KeyError by its key, which is all that it holds.
    """
    if isinstance(error, KeyError) and error.args:
        return f"unknown or missing key {shown(error.args[0])}"
    first, *others = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{first} {others[0]}" if first.endswith(":") and others else first
