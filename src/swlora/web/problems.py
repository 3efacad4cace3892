"""What a client is told when a request cannot be served: one shape, that of the OpenAI API.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

Messages are for the client and never hold a path of this machine or a traceback.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import Response

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


_PLAIN_WORDS = {  # for pydantic's own, by the kind of the problem
    "extra_forbidden": "there is no such field",
    **dict.fromkeys(("model_attributes_type", "model_type", "dict_type"), "an object is needed"),
}


class ApiError(Exception):
    """A request that is refused, with its HTTP status and what to do instead."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the body of the response."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _TYPES.get(self.status, kind)
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> Response:
        """Return the whole response."""
        return json_response(self.body(), self.status, self.headers)


def json_text(value: Any) -> str:
    """Write strict JSON in ASCII: also a lone surrogate in a client's text can be sent back."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def json_response(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return `value` as a JSON response that no cache keeps."""
    headers = {"cache-control": "no-store", **(headers or {})}
    return Response(json_text(value), status, headers, media_type="application/json")


def validation_problem(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Turn what pydantic found into one short 400; nothing of the client's input is repeated."""
    first = errors[0]
    where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
    where = where.encode("ascii", "replace").decode()[:80]
    broken = first["type"] == "json_invalid"
    is_ours = first["type"] == "value_error"
    message = str(first["ctx"]["error"] if is_ours else first["msg"])
    message = _PLAIN_WORDS.get(first["type"], message).encode("ascii", "replace").decode()[:200]
    if broken:
        return ApiError(400, "the body is not valid JSON", code="invalid_json")
    more = f" (and {len(errors) - 1} more problems)" if len(errors) > 1 else ""
    text = f"{where}: {message}{more}" if where else f"{message}{more}"
    return ApiError(400, text, param=where or None, code="invalid_value")
