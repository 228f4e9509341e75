"""HTTP errors: a status by exception class; message and parameter in the format that OpenAI's clients read."""

from http import HTTPStatus

from starlette.responses import JSONResponse

from snpatch.errors import EngineCrashedError, ReceiptError, ServerBusyError, SnpatchError


class InternalError(SnpatchError):
    """Failure of the server itself, which no client can fix."""


class ForbiddenError(SnpatchError):
    """Request for a feature that the server was started without."""


class NotFoundError(SnpatchError):
    """Request for a route, model or upload that does not exist."""


class NameConflictError(SnpatchError):
    """Upload to a name that the server's own configuration uses."""


class PayloadTooLargeError(SnpatchError):
    """Body or number of uploads over a limit."""


class UnauthorizedError(SnpatchError):
    """Missing or wrong API key."""


class UnsupportedMediaTypeError(SnpatchError):
    """Body of a content type that the route does not read."""


class RequestTimeoutError(SnpatchError):
    """Body that did not arrive in time."""


STATUS_BY_ERROR = {
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
    """Return the status of an error's class or its nearest base class; 400 for all invalid input."""
    statuses = (STATUS_BY_ERROR[cls] for cls in type(error).__mro__ if cls in STATUS_BY_ERROR)
    return next(statuses, HTTPStatus.BAD_REQUEST)


def error_type(status: HTTPStatus) -> str:
    """Return vLLM's name of an error status: `BadRequestError`, `InternalServerError`."""
    return "".join(word.capitalize() for word in status.phrase.split()).removesuffix("Error") + "Error"


def error_param(error: SnpatchError) -> str | None:
    """Return the invalid request field, or None if the error is not about one field."""
    return None if error.field is None else _escape_surrogates(error.field)


def error_message(error: SnpatchError) -> str:
    """Return an error's message as valid Unicode."""
    return _escape_surrogates(str(error))


def _escape_surrogates(text: str) -> str:
    """Escape what UTF-8 cannot encode, because a message may repeat what a client sent."""
    return text.encode("utf-8", "backslashreplace").decode()


def error_response(error: SnpatchError) -> JSONResponse:
    """Return an error as a response in OpenAI's format."""
    status = http_status(error)
    fields = {"message": error_message(error), "type": error_type(status), "param": error_param(error), "code": status}
    return JSONResponse({"error": fields}, status)
