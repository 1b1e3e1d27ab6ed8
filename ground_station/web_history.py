"""The routes of the API that look back: trends, events, commands, alarms, requests, contacts, and frames for a replay.

They read the archive, and where a ground station keeps none, what is in memory; `source` says which. Leaves out what is live (web_app.py).
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ground_station.archive_records import SEVERITIES
from ground_station.mission import Mission
from ground_station.mission_fleet import event_row
from ground_station.mission_frames import MAX_MESSAGES, steps
from ground_station.web_query import MAX_LINES, MAX_POINTS, ApiError, answer, count_of, text_of, time_of

LINES = 200
TREND_S = 900.0
POINTS = 600
MAX_FRAMES_S = 600.0
DAY_S = 86_400.0


def _mission(request: Request) -> Mission:
    return request.app.state.mission


def _span(request: Request, default_s: float) -> tuple[float, float]:
    """(since, until) in UTC seconds.  Raises: ApiError."""
    until_s = time_of(request, "until", _mission(request).control.now().utc_s)
    since_s = time_of(request, "since", until_s - default_s)
    if not since_s < until_s:
        raise ApiError(400, "since is not before until", "give since before until")
    return since_s, until_s


def _bounds(request: Request) -> tuple[float | None, float | None]:
    """Both may be absent."""
    given = request.query_params
    return tuple(time_of(request, name, math.nan) if given.get(name) else None for name in ("since", "until"))


def _within(rows: list[dict[str, Any]], request: Request, lines: int) -> list[dict[str, Any]]:
    since_s, until_s = _bounds(request)
    kept = [
        row
        for row in rows
        if (since_s is None or row["at_utc_s"] >= since_s) and (until_s is None or row["at_utc_s"] <= until_s)
    ]
    return kept[-lines:]


def _reader(request: Request):
    reader = _mission(request).reader
    if reader is None:
        raise ApiError(503, "this ground station keeps no archive", "start it with an archive folder")
    return reader


def trend(request: Request) -> Response:
    node, signal = text_of(request, "node"), request.query_params.get("signal", "")
    if not node or not signal or len(signal) > 1000:
        raise ApiError(400, "a trend is of one node and signal", "give node=... and signal=...")
    since_s, until_s = _span(request, TREND_S)
    points = count_of(request, "points", POINTS, MAX_POINTS)
    found = _reader(request).trend(node, signal, since_s, until_s, points)
    if found is None:
        raise ApiError(404, f"{node[:40]} never sent {signal[:40]!r}", "GET /api/v1/nodes/NODE names its signals")
    return answer(asdict(found))


def events(request: Request) -> Response:
    mission, lines = _mission(request), count_of(request, "lines", LINES, MAX_LINES)
    node, severity, text = (text_of(request, name) for name in ("node", "severity", "filter"))
    if severity and severity not in SEVERITIES:
        raise ApiError(400, f"{severity[:40]!r} is no severity", f"give one of {', '.join(SEVERITIES)}")
    if mission.reader is None:
        least = SEVERITIES.index(severity) if severity else 0
        rows = [
            row
            for row in mission.events()
            if (not node or row["node"] == node)
            and SEVERITIES.index(row["severity"]) >= least
            and text.lower() in f"{row['kind']} {row['text']}".lower()
        ]
        return answer({"events": _within(rows, request, lines), "source": "memory"})
    found = mission.reader.events(*_bounds(request), lines, node or None, severity or None, text or None)
    rows = [event_row(record.event, record.at_utc_s, record.source) for record in found]
    return answer({"events": rows, "source": "archive"})


def commands(request: Request) -> Response:
    mission, lines, node = _mission(request), count_of(request, "lines", LINES, MAX_LINES), text_of(request, "node")
    wanted = text_of(request, "filter").lower()
    if mission.reader is None:
        rows = _within([row for row in mission.commands() if not node or row["node"] == node], request, lines)
    else:
        rows = [asdict(record) for record in mission.reader.commands(*_bounds(request), lines, node or None)]
    rows = [
        row
        for row in rows
        if wanted in f"{row['node']} {row['name']} {row['who']} {row['state']} {row['text']}".lower()
    ]
    return answer({"commands": rows, "source": "memory" if mission.reader is None else "archive"})


def alarms(request: Request) -> Response:
    """The alarms that stand; with `since` or `until` also their changes of that time."""
    mission, lines = _mission(request), count_of(request, "lines", LINES, MAX_LINES)
    wanted = text_of(request, "filter").lower()
    standing = [row for row in mission.alarm_list() if wanted in " ".join(map(str, row.values())).lower()]
    told: dict[str, Any] = {"alarms": standing}
    bounds = _bounds(request)
    if bounds != (None, None):
        told["changes"] = [asdict(record) for record in _reader(request).alarms(*bounds, lines)]
    return answer(told)


def requests(request: Request) -> Response:
    mission, lines = _mission(request), count_of(request, "lines", 50, MAX_LINES)
    if mission.reader is None:
        return answer({"requests": _within(mission.tokens.requests()[::-1], request, lines), "source": "memory"})
    rows = [asdict(record) for record in mission.reader.requests(*_bounds(request), lines)]
    return answer({"requests": rows, "source": "archive"})


def one_request(request: Request) -> Response:
    """Live while it is among the latest, then as the archive has it."""
    mission, name = _mission(request), request.path_params["request"]
    if (live := mission.tokens.one(name)) is not None:
        return answer({**live[0], "ledger": live[1], "source": "memory"})
    lines = count_of(request, "lines", MAX_LINES, MAX_LINES)
    if mission.reader is not None and (found := mission.reader.tokens(name, lines)):
        record = next((row for row in mission.reader.requests(None, None, MAX_LINES) if row.request == name), None)
        head = {"request": name} if record is None else asdict(record)
        return answer({**head, "ledger": [asdict(token) for token in found], "source": "archive"})
    raise ApiError(404, f"there is no request {name[:40]!r}", "GET /api/v1/requests names them")


def contacts(request: Request) -> Response:
    return answer(_mission(request).contacts(*_span(request, TREND_S)))


def archive(request: Request) -> Response:
    """What there is to replay: each node and its times."""
    found = [asdict(node) for node in _reader(request).nodes()]
    since = min((node["first_utc_s"] for node in found if node["first_utc_s"] is not None), default=None)
    until = max((node["last_utc_s"] for node in found if node["last_utc_s"] is not None), default=None)
    return answer({"nodes": found, "since": since, "until": until})


def frames(request: Request) -> Response:
    """What came from `since` to `until` (at most ten minutes), as the frames of the stream, in steps of a quarter of a second."""
    since_s, until_s = _span(request, 60.0)
    until_s = min(until_s, since_s + MAX_FRAMES_S)
    mission, most = _mission(request), count_of(request, "lines", MAX_MESSAGES, MAX_MESSAGES)
    levels = None if mission.alarms is None else mission.alarms.levels
    return answer(steps(_reader(request).messages(since_s, until_s), until_s, most, levels))


ROUTES = [
    Route("/trend", trend),
    Route("/events", events),
    Route("/commands", commands),
    Route("/alarms", alarms),
    Route("/requests", requests),
    Route("/requests/{request}", one_request),
    Route("/contacts", contacts),
    Route("/archive", archive),
    Route("/frames", frames),
]
