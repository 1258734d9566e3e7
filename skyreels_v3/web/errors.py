"""Error responses in the format of OpenAI's API. None contains a server path, a secret or a traceback."""

from __future__ import annotations

import re
from collections.abc import Mapping
from http import HTTPStatus

from starlette.responses import JSONResponse

from skyreels_v3.errors import FLAG, UserError, format_value, one_line, redact
from skyreels_v3.request import FLAGS

TYPES = {429: "rate_limit_error", 401: "authentication_error", 403: "permission_error"}
CODES = {
    **{400: "invalid_value", 401: "invalid_api_key", 403: "forbidden", 404: "not_found", 405: "method_not_allowed"},
    **{408: "request_timeout", 409: "conflict", 413: "too_large", 415: "unsupported_media_type"},
    **{416: "range_not_satisfiable", 429: "rate_limit_exceeded", 507: "insufficient_storage"},
}
# an absolute path that is not part of a URL; group 1 is its last component, which is kept
PATH = re.compile(r"(?<![\w:/.~-])~?/(?:[^\s/'\",;]+/)+([^\s/'\",;]*)")


class ApiError(Exception):
    """The error response to a refused request.

    Args:
        message: what is wrong; it names fields as --flags, which are converted for each kind of client.
        param: the field at fault.
        code: a machine-readable error code; by default that of the status.
        headers: extra headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code or CODES.get(status, "error")
        self.headers = headers


def response_of(error: ApiError) -> JSONResponse:
    """The JSON response for an error."""
    kind = TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    content = {
        "message": text_of(error),
        "type": kind,
        "param": None if error.param is None else format_value(error.param),
        "code": error.code,
    }
    return JSONResponse({"error": content}, error.status, dict(error.headers or {}))


def text_of(error: ApiError) -> str:
    """The message of an error as one redacted line, with --flags replaced by field names."""
    return one_line(redact(as_fields(error.message)))


def as_fields(text: str) -> str:
    """A text with --flags replaced by the names of the API's fields."""
    return FLAG.sub(r"\1", text)


def from_user_error(error: UserError, fields: Mapping[str, str], status: int = 400) -> ApiError:
    """The `ApiError` for a `UserError`.

    Args:
        fields: the field names that the client used, by flag.
    """
    flag = error.flag.removeprefix("--")
    name = fields.get(flag, flag)
    file = rf"{re.escape(flag)}[-.\w@]*"  # names of its files in the job's folder
    message = re.sub(f"^{file}(, {file})*: ", "", without_paths(error.message))
    message = FLAG.sub(lambda match: f"--{fields.get(match[1], match[1])}", message)
    return ApiError(status, f"{name}: {message}", name)


def from_status(status: int, detail: str, headers: Mapping[str, str] | None = None) -> ApiError:
    """The `ApiError` for an error that the web framework raised."""
    return ApiError(status, without_paths(detail) or HTTPStatus(status).phrase, headers=headers)


def for_clients(text: str) -> str:
    """A worker's error message without advice on flags that clients may not set; other flags keep their dashes."""
    what, *advice = text.split("; ")
    can_set = {flag.name for flag in FLAGS if flag.is_for_clients}
    return "; ".join([what, *(part for part in advice if can_set.issuperset(FLAG.findall(part)))])


def without_paths(text: str) -> str:
    """A text with each absolute path cut to its last component."""
    return PATH.sub(r"\1", text)
