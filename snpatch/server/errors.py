"""Errors as HTTP tells them: a status by their kind, the reason and the field as OpenAI's clients read them."""

from http import HTTPStatus

from starlette.responses import JSONResponse

from snpatch.errors import EngineDiedError, ReceiptError, SnpatchError

RETRY_S = 1  # when a client may come again after a 503


class BusyError(SnpatchError):
    """There is no room now: to be asked again."""


class ForbiddenError(SnpatchError):
    """The server was started without it."""


class MissingError(SnpatchError):
    """There is no such thing."""


class TakenError(SnpatchError):
    """A name that is the server's own."""


class TooMuchError(SnpatchError):
    """More than is kept for clients."""


STATUS = {
    BusyError: HTTPStatus.SERVICE_UNAVAILABLE,
    ForbiddenError: HTTPStatus.FORBIDDEN,
    MissingError: HTTPStatus.NOT_FOUND,
    TakenError: HTTPStatus.CONFLICT,
    TooMuchError: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    EngineDiedError: HTTPStatus.INTERNAL_SERVER_ERROR,
    ReceiptError: HTTPStatus.INTERNAL_SERVER_ERROR,
}


def status_of(error: SnpatchError) -> HTTPStatus:
    """400 for all bad input."""
    return STATUS.get(type(error), HTTPStatus.BAD_REQUEST)


def kind_of(status: HTTPStatus) -> str:
    """As vLLM names errors: `BadRequestError`, `InternalServerError`."""
    return "".join(word.capitalize() for word in status.phrase.split()).removesuffix("Error") + "Error"


def error(reason: SnpatchError) -> JSONResponse:
    """An error as OpenAI's clients read it."""
    status = status_of(reason)
    told = {"message": str(reason), "type": kind_of(status), "param": reason.field, "code": status}
    headers = {"retry-after": str(RETRY_S)} if status == HTTPStatus.SERVICE_UNAVAILABLE else None
    return JSONResponse({"error": told}, status, headers)
