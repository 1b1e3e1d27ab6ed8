"""Errors as OpenAI's API says them, and a request's body as JSON within bounds. Leaves out what a body may hold (api_request.py)."""

from __future__ import annotations

import json
import math
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

MAX_BODY_BYTES = 1_000_000
MAX_DEPTH = 8
MAX_SHOWN = 60


class ApiRefusal(Exception):
    """An answer of `status`: {"error": {"message", "type", "param", "code"}}."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        retry_s: int | None = None,
    ):
        super().__init__(message)
        self.message, self.param, self.code, self.status, self.retry_s = message, param, code, status, retry_s

    def tree(self) -> dict[str, Any]:
        kinds = {429: "rate_limit_exceeded", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def shown(value: object) -> str:
    """A stranger's value in a message: short, and in ASCII."""
    text = ascii(value)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


def answer(tree: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(dump(tree), status, headers, "application/json")


def dump(tree: Any) -> bytes:
    """In ASCII, so that no text of a stranger can make it fail. Raises: ValueError for NaN, which would be a fault of ours."""
    return json.dumps(tree, allow_nan=False, separators=(",", ":")).encode()


def refusal(error: ApiRefusal) -> Response:
    return answer(error.tree(), error.status, None if error.retry_s is None else {"retry-after": str(error.retry_s)})


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _check(value: object, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ApiRefusal(f"the body is nested more than {MAX_DEPTH} deep", code="invalid_json")
    if isinstance(value, dict):
        for each in value.values():
            _check(each, depth + 1)
    elif isinstance(value, list):
        for each in value:
            if isinstance(each, (dict, list, float)):
                _check(each, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ApiRefusal("a number of the body is too large", code="invalid_json")


def parse(raw: bytes) -> dict[str, Any]:
    """Raises: ApiRefusal."""
    try:
        tree = json.loads(raw, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ApiRefusal(f"the body is not JSON ({shown(str(error))})", code="invalid_json") from None
    if not isinstance(tree, dict):
        raise ApiRefusal("the body is no JSON object", code="invalid_json")
    _check(tree, 0)
    return tree


async def body_of(request: Request) -> dict[str, Any]:
    """The body, read no further than MAX_BODY_BYTES.  Raises: ApiRefusal."""
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > MAX_BODY_BYTES:
            raise ApiRefusal(f"the body is over {MAX_BODY_BYTES} bytes", code="too_large", status=413)
    return parse(bytes(raw))
