"""The exceptions for what a user can put right: the CLI prints the message as one line and exits with 2."""


class SnpatchError(Exception):
    """Bad input or an impossible request. The message says what, what was wanted, what came, and what to do."""


class NotEnoughNeuronsError(SnpatchError):
    """A random control needs more neurons than it may draw from."""


class ReceiptError(SnpatchError):
    """The device did not do what the plan implies: the results of the run must not be used."""


class EngineDiedError(SnpatchError):
    """The engine is no more: what was under way is lost, and it can be started anew."""


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line: its first one, or its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).strip()
