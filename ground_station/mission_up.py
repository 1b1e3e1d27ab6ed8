"""Mission control around a control plane that runs, for `up` and `demo --serve`: archive, limits, page and API, and tokens made for it.

Leaves out what each of them does (archive.py, limits_file.py, mission.py, web_server.py, api_openai.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ground_station import limits_file, metrics, web_server
from ground_station.api_late import LateApi
from ground_station.archive import Archive
from ground_station.archive_read import ArchiveReader
from ground_station.archive_records import RequestRecord, Retention, TokenRecord
from ground_station.control import Control
from ground_station.decode import TokenCost
from ground_station.mission import Mission
from ground_station.text import Text

NO_MODEL = "no model is served here: a ground station serves one with --bundle"


@dataclass(frozen=True)
class Options:
    """`archive`: folder of the archive; `limits` None: the kit's own; `limit_set` None: the file's active one."""

    archive: Path
    web: web_server.Options = web_server.Options()
    limits: Path | None = None
    limit_set: str | None = None
    retention: Retention = field(default_factory=Retention)


@dataclass(frozen=True)
class Running:
    mission: Mission
    archive: Archive
    served: web_server.Served
    api: LateApi


@contextmanager
def running(
    control: Control,
    options: Options,
    say: Callable[[str], None],
    planned: Callable[[], Iterable[tuple[str, str, float, float]]] | None = None,
) -> Iterator[Running]:
    """The page at `served.url`, fed by `control`; OpenAI's API comes with a model (`api`). `say` gets what an operator must know.

    Raises: ArchiveError, LimitsError, WebError, TokenError, OSError.
    """
    with ExitStack() as stack:
        api = LateApi(NO_MODEL)
        watch = limits_file.LimitsWatch(options.limits or limits_file.SHIPPED)
        if options.limit_set is not None:
            watch.switch(options.limit_set)
        archive = stack.enter_context(Archive(options.archive, options.retention, say))
        reader = stack.enter_context(ArchiveReader(options.archive))
        mission = stack.enter_context(Mission(control, archive, reader, watch, planned))
        served = stack.enter_context(web_server.serving(mission, options.web, [metrics_route(mission), api.route()]))
        yield Running(mission, archive, served, api)


def metrics_route(mission: Mission) -> Route:
    """GET /metrics, for Prometheus."""

    def scrape(_request: Request) -> Response:
        return Response(metrics.of_mission(mission), media_type=metrics.CONTENT_TYPE)

    return Route("/metrics", scrape)


class TextTold:
    """A text of `demo`, told to mission control token by token."""

    def __init__(self, mission: Mission, kind: str, text: Text, prompt_tokens: int) -> None:
        at_utc_s = time.time()
        self._mission, self._pieces = mission, text.stream()
        self._record = RequestRecord(
            f"{kind}-{at_utc_s:.3f}", kind, at_utc_s, prompt_tokens, 0, "running", None, "", ""
        )
        mission.request(self._record)

    def token(self, cost: TokenCost) -> None:
        record, piece = self._record, self._pieces.push(cost.token_id)
        self._record = replace(record, tokens=record.tokens + 1, text=record.text + piece)
        self._mission.token(
            TokenRecord(
                record.request,
                record.tokens,
                cost.token_id,
                piece,
                time.time(),
                cost.total_ms,
                cost.trunk_ms,
                cost.select_ms,
                cost.codec_ms,
                cost.wire_ms,
                cost.expert_ms,
                cost.sent_bytes,
                cost.received_bytes,
                len(cost.rungs),
            )
        )

    def end(self, state: str, energy_j: float | None = None, energy_scope: str = "") -> None:
        self._record = replace(self._record, state=state, energy_j=energy_j, energy_scope=energy_scope)
        self._mission.request(self._record)
