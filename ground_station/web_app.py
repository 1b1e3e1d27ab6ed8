"""The pages and the HTTP API of mission control, as a Starlette app over one Mission. Leaves out who may come in (web_access.py).

JSON under /api/v1; `since` and `until` are UTC seconds or ISO 8601. Errors: {"error": {"message", "fix"}}. The stream begins with a
`snapshot`, after which each frame says what has changed; a `lost` frame asks to begin anew. Past times come from the archive alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from ground_station import mission_commands, web_history
from ground_station.archive_records import ArchiveError
from ground_station.mission import Mission, NoSuchNode
from ground_station.mission_alarms import AlarmRefused
from ground_station.mission_feed import TooManyWatchers, encode
from ground_station.web_access import Refusal
from ground_station.web_query import ApiError, answer, body_of, refused, text_of

log = logging.getLogger("spacemoe.web")

PAGES = Path(__file__).with_name("web")
BEAT_S = 5.0
MAX_ARGUMENTS = 16
ALARM_FIELDS = {"comment": str, "for_s": (int, float), "yes": bool}
COMMAND_FIELDS = {"node": str, "name": str, "arguments": dict, "dry_run": bool, "yes": bool}


def make(mission: Mission, more: Iterable[BaseRoute] = (), closing: asyncio.Event | None = None) -> Starlette:
    """The app. `more`: routes of others (/v1/..., /metrics), which come first; `closing`: ends open streams when set."""
    api = [
        Route("/me", me),
        Route("/health", health),
        Route("/stream", stream),
        Route("/fleet", lambda request: answer(_mission(request).fleet())),
        Route("/nodes", nodes),
        Route("/nodes/{node}", node),
        Route("/experts", lambda request: answer(_mission(request).experts())),
        Route("/catalogue", lambda request: answer({"commands": mission_commands.catalogue()})),
        Route("/limits", lambda request: answer(_mission(request).limits())),
        Route("/limits", limits, methods=["POST"]),
        Route("/commands", command, methods=["POST"]),
        Route("/alarms/{alarm}/{action}", alarm, methods=["POST"]),
        *web_history.ROUTES,
        Route("/{rest:path}", nothing, methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
    ]
    app = Starlette(
        routes=[
            *more,
            Route("/", page),
            Mount("/static", StaticFiles(directory=PAGES)),
            Mount("/api/v1", routes=api),
        ],
        exception_handlers={
            ApiError: lambda _request, error: refused(error),
            Refusal: lambda _request, error: refused(error),
            ArchiveError: lambda _request, error: refused(
                ApiError(503, str(error)[:300], "see what the ground station says of its archive")
            ),
            NoSuchNode: lambda _request, error: refused(
                ApiError(404, f"nothing was ever heard of {str(error.args[0])[:40]!r}", "GET /api/v1/nodes names all")
            ),
            HTTPException: lambda _request, error: refused(
                ApiError(error.status_code, str(error.detail), "see the README for the API")
            ),
            Exception: failed,
        },
    )
    app.state.mission, app.state.closing = mission, closing
    return app


def _mission(request: Request) -> Mission:
    return request.app.state.mission


def page(_request: Request) -> Response:
    return FileResponse(PAGES / "index.html")


async def nothing(request: Request) -> Response:
    raise ApiError(404, f"there is no {request.method} {request.url.path[:80]!r}", "see the README for the API")


async def failed(request: Request, error: Exception) -> Response:
    log.error("%s %s failed: %r", request.method, request.url.path[:80], error)
    return refused(ApiError(500, "this failed; the ground station's log says where", "tell whoever runs it"))


def me(request: Request) -> Response:
    person = request.scope["person"]
    return answer({"name": person.name, "role": person.role, "session": "cookie" in request.headers})


def health(request: Request) -> Response:
    return answer(_mission(request).health())


def nodes(request: Request) -> Response:
    wanted = text_of(request, "filter").lower()
    found = _mission(request).nodes()
    return answer(
        {"nodes": [each for each in found if wanted in f"{each['node']} {each['state']} {each['board']}".lower()]}
    )


def node(request: Request) -> Response:
    return answer(_mission(request).node(request.path_params["node"]))


# ---------------------------------------------------------------- live


async def stream(request: Request) -> Response:
    mission, closing = _mission(request), request.app.state.closing
    loop, ready = asyncio.get_running_loop(), asyncio.Event()

    def wake() -> None:
        try:
            loop.call_soon_threadsafe(ready.set)
        except RuntimeError:
            pass  # the server has ended, and with it whoever watched

    try:
        watcher = mission.feed.watch(wake)
    except TooManyWatchers as error:
        raise ApiError(503, str(error), "try again then") from None

    async def frames() -> AsyncIterator[bytes]:
        try:
            yield encode("snapshot", await run_in_threadpool(mission.snapshot))
            while closing is None or not closing.is_set():
                try:
                    await asyncio.wait_for(ready.wait(), BEAT_S)
                except asyncio.TimeoutError:
                    if not request.scope["still"]():  # the token was removed while the page was open
                        return
                    yield encode("beat", {"at": mission.control.now().utc_s})
                ready.clear()
                if waiting := watcher.take():
                    yield b"".join(waiting)
        finally:
            mission.feed.leave(watcher)

    return StreamingResponse(frames(), media_type="text/event-stream", headers={"x-accel-buffering": "no"})


# ---------------------------------------------------------------- what operators do


async def command(request: Request) -> Response:
    body = await body_of(request, COMMAND_FIELDS)
    arguments = body.get("arguments", {})
    if len(arguments) > MAX_ARGUMENTS or not all(isinstance(value, str) for value in arguments.values()):
        raise ApiError(400, "arguments are not all texts", f"give at most {MAX_ARGUMENTS} name: text")
    mission, who = _mission(request), request.scope["person"].name
    options = {"dry_run": body.get("dry_run", False), "yes": body.get("yes", False)}
    try:
        done = await run_in_threadpool(
            mission.command, who, body.get("node", ""), body.get("name", ""), arguments, **options
        )
    except mission_commands.CommandRefused as error:
        raise ApiError(409 if error.hazardous else 400, str(error), error.fix) from None
    return answer(done)


async def alarm(request: Request) -> Response:
    body: dict[str, Any] = await body_of(request, ALARM_FIELDS)
    mission, who = _mission(request), request.scope["person"].name
    try:
        done = await run_in_threadpool(
            mission.act,
            request.path_params["alarm"],
            request.path_params["action"],
            who,
            body.get("comment", ""),
            body.get("for_s"),
            body.get("yes", False),
        )
    except AlarmRefused as error:
        raise ApiError(error.status, str(error), error.fix) from None
    return answer(done)


async def limits(request: Request) -> Response:
    body = await body_of(request, {"set": str})
    mission, who = _mission(request), request.scope["person"].name
    try:
        return answer(await run_in_threadpool(mission.switch_limits, body.get("set", ""), who))
    except AlarmRefused as error:
        raise ApiError(error.status, str(error), error.fix) from None
