"""What comes in a request, checked: times, counts, JSON bodies; and errors as the API says them. Leaves out the routes (web_app.py)."""

from __future__ import annotations

import json
import math
from datetime import datetime, timezone
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ground_station.mission_feed import compact

MAX_LINES = 10_000
MAX_TEXT = 200
MAX_POINTS = 5000
MAX_DEPTH_TEXT = 64 * 1024
EARLIEST_UTC_S, LATEST_UTC_S = 0.0, 32_503_680_000.0  # to the year 3000


class ApiError(Exception):
    """An answer of `status` that says what is wrong and what to do."""

    def __init__(self, status: int, message: str, fix: str):
        super().__init__(message)
        self.status, self.message, self.fix = status, message, fix


def answer(content: Any, status: int = 200) -> Response:
    """JSON without NaN: one that got so far is an error of ours, and told as such."""
    return Response(compact(content), status, media_type="application/json")


def refused(error: ApiError) -> Response:
    return answer({"error": {"message": error.message, "fix": error.fix}}, error.status)


def time_of(request: Request, name: str, default: float) -> float:
    """UTC seconds, or ISO 8601 (without a zone: UTC), or seconds before now as -60.  Raises: ApiError."""
    text = request.query_params.get(name, "")
    if not text:
        return default
    fix = "give UTC seconds, or ISO 8601 such as 2026-06-21T00:00:00Z"
    try:
        value = float(text)
    except ValueError:
        try:
            moment = datetime.fromisoformat(text.replace("Z", "+00:00").replace(" ", "+"))
        except ValueError:
            raise ApiError(400, f"{name}={text[:40]!r} is no time", fix) from None
        value = (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
    if not EARLIEST_UTC_S <= value <= LATEST_UTC_S:  # also NaN
        raise ApiError(400, f"{name}={text[:40]!r} is no time between 1970 and 3000", fix)
    return value


def count_of(request: Request, name: str, default: int, most: int) -> int:
    """Raises: ApiError."""
    text = request.query_params.get(name, "")
    if not text:
        return default
    if not text.isdecimal() or len(text) > 9 or not 1 <= int(text) <= most:
        raise ApiError(400, f"{name}={text[:40]!r} is no whole number of 1 to {most}", f"give {name} of 1 to {most}")
    return int(text)


def text_of(request: Request, name: str) -> str:
    """Raises: ApiError."""
    text = request.query_params.get(name, "")
    if len(text) > MAX_TEXT:
        raise ApiError(400, f"{name} has {len(text)} characters", f"give at most {MAX_TEXT}")
    return text


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no number")


async def body_of(request: Request, fields: dict[str, type | tuple[type, ...]]) -> dict[str, Any]:
    """A JSON object with some of `fields`, each of its type, and no others.  Raises: ApiError."""
    raw = await request.body()
    try:
        tree = json.loads(raw or b"{}", parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON ({str(error)[:80]})", "send one JSON object") from None
    if not isinstance(tree, dict):
        raise ApiError(400, "the body is no JSON object", "send one JSON object")
    for name, value in tree.items():
        if name not in fields:
            raise ApiError(400, f"{name[:40]!r} is unknown", f"give {', '.join(fields)}")
        wanted = fields[name]
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise ApiError(400, f"{name} is of the wrong type", f"give {name} as {_said(wanted)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ApiError(400, f"{name} is not finite", f"give {name} as a number")
    return tree


def _said(wanted: type | tuple[type, ...]) -> str:
    kinds = wanted if isinstance(wanted, tuple) else (wanted,)
    words = {str: "text", bool: "true or false", dict: "an object of texts", int: "a number", float: "a number"}
    return " or ".join(dict.fromkeys(words[kind] for kind in kinds))
