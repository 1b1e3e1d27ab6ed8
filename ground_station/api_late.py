"""The place of OpenAI's API in the web app before there is a model: it says why with 503 until somebody puts the API there.

Boards have to come and get their shards first; the page is up long before. Leaves out the API itself (api_openai.py).
"""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ground_station.api_errors import ApiRefusal, refusal

RETRY_S = 10


class LateApi:
    """An ASGI app. `why`: what is said while nothing is served."""

    def __init__(self, why: str) -> None:
        self.why = why
        self._app: ASGIApp | None = None

    def serve(self, routes: list[Route]) -> None:
        self._app = Starlette(routes=routes)

    def withdraw(self, why: str) -> None:
        self.why, self._app = why, None

    def route(self) -> Route:
        return Route("/v1/{rest:path}", self)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if app is None:
            app = refusal(ApiRefusal(self.why, None, "not_ready", 503, RETRY_S))
        await app(scope, receive, send)
