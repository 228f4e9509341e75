"""Errors as HTTP tells them: a status by their kind, the reason and the field as OpenAI's clients read them."""

from http import HTTPStatus

from starlette.responses import JSONResponse

from snpatch.errors import EngineCrashedError, ReceiptError, ServerBusyError, SnpatchError


class InternalError(SnpatchError):
    """The server's own: nothing that a client can mend."""


class ForbiddenError(SnpatchError):
    """The server was started without it."""


class NotFoundError(SnpatchError):
    """There is no such thing."""


class NameConflictError(SnpatchError):
    """A name that is the server's own."""


class PayloadTooLargeError(SnpatchError):
    """More than is kept for clients."""


class UnauthorizedError(SnpatchError):
    """No API key, or a wrong one."""


class UnsupportedMediaTypeError(SnpatchError):
    """A body of another type than the route reads."""


class RequestTimeoutError(SnpatchError):
    """A body that did not arrive in time."""


STATUS = {
    ServerBusyError: HTTPStatus.SERVICE_UNAVAILABLE,
    ForbiddenError: HTTPStatus.FORBIDDEN,
    NotFoundError: HTTPStatus.NOT_FOUND,
    NameConflictError: HTTPStatus.CONFLICT,
    PayloadTooLargeError: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    UnauthorizedError: HTTPStatus.UNAUTHORIZED,
    UnsupportedMediaTypeError: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    RequestTimeoutError: HTTPStatus.REQUEST_TIMEOUT,
    InternalError: HTTPStatus.INTERNAL_SERVER_ERROR,
    EngineCrashedError: HTTPStatus.INTERNAL_SERVER_ERROR,
    ReceiptError: HTTPStatus.INTERNAL_SERVER_ERROR,
}


def http_status(error: SnpatchError) -> HTTPStatus:
    """Return the status of an error's class or the nearest base class; 400 for all bad input."""
    found = (STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
    return next(found, HTTPStatus.BAD_REQUEST)


def error_type(status: HTTPStatus) -> str:
    """As vLLM names errors: `BadRequestError`, `InternalServerError`."""
    return "".join(word.capitalize() for word in status.phrase.split()).removesuffix("Error") + "Error"


def error_param(reason: SnpatchError) -> str | None:
    """The field that is wrong, if it is one."""
    return None if reason.field is None else _utf8(reason.field)


def error_message(reason: SnpatchError) -> str:
    """What is wrong."""
    return _utf8(str(reason))


def _utf8(text: str) -> str:
    """As UTF-8 can have it: what a client sent, and a reason repeats, may be none."""
    return text.encode("utf-8", "backslashreplace").decode()


def error(reason: SnpatchError) -> JSONResponse:
    """An error as OpenAI's clients read it."""
    status = http_status(reason)
    told = {"message": error_message(reason), "type": error_type(status), "param": error_param(reason), "code": status}
    return JSONResponse({"error": told}, status)
