"""APIError: what the server answers when it cannot serve a request, in the shape of the API that was asked."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import islice
from typing import Any

# Statuses are DeepSeek's (its page of error codes); types are OpenAI's and Anthropic's words for the same.
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "insufficient_balance_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_UNION_MEMBER = re.compile(r"str|bool|int|float|dict|[A-Z]\w*|[\w-]+\[.*\]")  # as pydantic names them
_MOST_MEMBERS = 8
_LONGEST = 300  # characters of what is quoted
CLIENT_GONE = 499  # never sent: nobody is there to read it


class APIError(Exception):
    """An error as the client sees it; `retry_after` is in seconds. `param` names the offending field by its path."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.type = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.code = code or self.type
        self.retry_after = retry_after

    @classmethod
    def unaccounted(cls, cause: object) -> APIError:
        """Keys, limits or ledger are out of reach."""
        return cls(503, f"{cause}; try again later", code="ledger_unavailable", retry_after=5)

    @classmethod
    def closing(cls) -> APIError:
        """The server ends."""
        message = "the server is shutting down; send the request again"
        return cls(503, message, code="shutting_down", retry_after=5)

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's and DeepSeek's shape."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    @property
    def anthropic_body(self) -> dict[str, Any]:
        """Anthropic's shape, whose word for a failure of the server is api_error."""
        kind = "api_error" if self.type == "server_error" else self.type
        return {"type": "error", "error": {"type": kind, "message": self.message}}


def validation_error(errors: Sequence[Any]) -> APIError:
    """One sentence about the first of pydantic's errors, naming the field by its path in the body."""
    first = errors[0]
    path = _path(first)
    kind = first["type"]
    if kind == "json_invalid":
        return APIError(400, f"the body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    if kind == "extra_forbidden":
        return APIError(422, f"unknown field `{path}`; remove it", param=path, code="unknown_parameter")
    if kind == "missing" and path:
        return APIError(422, f"field `{path}` is missing", param=path, code="missing_required_parameter")
    same = [error for error in errors[:_MOST_MEMBERS] if _path(error) == path]  # one fault for each member of a union
    messages = [_short(str(error["msg"]).removeprefix("Value error, ")) for error in same]
    message = ", or ".join(dict.fromkeys(message[:1].lower() + message[1:] for message in messages))
    shown = f" (given {_given(first)})" if kind != "value_error" and len(_given(first)) <= 60 else ""
    return APIError(422, f"`{path}`: {message}{shown}" if path else f"{message}{shown}", param=path or None)


def _path(error: Any) -> str:
    """Where in the body; which member of a union a value is no example of, nobody needs to know."""
    loc, path = error["loc"], ""
    name = len(loc) - 1 if error["type"] in ("extra_forbidden", "missing") else None  # that part the client wrote
    for i, part in enumerate(loc):
        if isinstance(part, int):
            path += f"[{part}]"
        elif (i > 0 or part not in ("body", "query")) and (i == name or not _UNION_MEMBER.fullmatch(part)):
            path += f".{part}" if path else part
    return _short(path)


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _given(error: Any) -> str:
    """The start of the wrong value as JSON."""
    try:
        return "".join(islice(json.JSONEncoder(default=str).iterencode(error.get("input")), 61))
    except RecursionError:
        return "what is nested too deeply"
