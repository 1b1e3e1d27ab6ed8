"""A running ground station's HTTP API for the command line: bounded answers, deadlines, errors that name the next step, the stream.

What is answered is untrusted: whoever shows it shows it as text. Leaves out the commands (cli_mission.py) and the screen (top_screen.py).
"""

from __future__ import annotations

import ipaddress
import json
import os
import ssl
import stat
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

URL = "http://127.0.0.1:8642"
API = "/api/v1/"
MAX_ANSWER_BYTES = 64 * 1024 * 1024
MAX_TOKEN_BYTES = 4096
PART_BYTES = 64 * 1024
TIMEOUT_S = 30.0  # of one answer; a command waits for its node meanwhile
SILENT_S = 20.0  # a stream has a beat every 5 s
RETRY_S = (0.5, 1.0, 2.0, 5.0)
SEEN_EVENTS = 4000
START = "start it by `spacemoe up` or `spacemoe demo`, or name it by --url or $SPACEMOE_URL"


class MissionError(RuntimeError):
    """The ground station cannot be asked, or refuses. `status`: of HTTP, 0 where there was no answer; `fix`: the next step."""

    def __init__(self, message: str, fix: str, status: int = 0):
        super().__init__(f"{message}: {fix}" if fix else message)
        self.message, self.fix, self.status = message, fix, status


class MissionRefused(MissionError, ValueError):
    """What was asked for cannot be: the arguments are wrong."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A token goes to nobody else."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass(frozen=True)
class Station:
    """Where it is and who asks. `token`: never shown; `authority`: PEM file of who signed its certificate, or None."""

    url: str = URL
    token: str = ""
    authority: Path | None = None

    def __repr__(self) -> str:
        return f"Station({self.url!r})"


def station_of(url: str | None, token_file: Path | None, authority: Path | None = None) -> Station:
    """What the arguments, or else SPACEMOE_URL and SPACEMOE_TOKEN, say.  Raises: ValueError, OSError."""
    url = (url or os.environ.get("SPACEMOE_URL") or URL).strip().rstrip("/")
    parts = urllib.parse.urlsplit(url)
    try:
        port_fits = parts.port is None or parts.port > 0
    except ValueError:
        port_fits = False
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_fits or parts.username or parts.query:
        raise ValueError(f"{url[:80]!r} is no address of a ground station: write for example {URL}")
    token = os.environ.get("SPACEMOE_TOKEN", "")
    if token_file is not None:
        with open(os.open(token_file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode) or stat.S_IMODE(mode) & 0o077:
                raise ValueError(f"{token_file} can be read by others: chmod 600 {token_file}")
            token = file.read(MAX_TOKEN_BYTES).decode("ascii", "replace")
    token = token.strip()
    if not all("!" <= each <= "~" for each in token):
        raise ValueError("the token is no line of printable ASCII: copy it again")
    return Station(url, token, authority)


class MissionClient:
    """Asks one ground station. Every method raises MissionError."""

    def __init__(self, station: Station, timeout_s: float = TIMEOUT_S):
        self.station, self._timeout_s = station, timeout_s
        handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
        if _is_local(station.url):
            handlers.append(urllib.request.ProxyHandler({}))  # a proxy could not reach this machine's own
        if station.url.startswith("https:"):
            context = ssl.create_default_context(cafile=station.authority)
            handlers.append(urllib.request.HTTPSHandler(context=context))
        self._opener = urllib.request.build_opener(*handlers)

    def get(self, path: str, **query: Any) -> dict[str, Any]:
        """The JSON object at /api/v1/`path`; a query's None and '' are left out."""
        given = {name: value for name, value in query.items() if value not in (None, "")}
        return self._object(path + (f"?{urllib.parse.urlencode(given)}" if given else ""), None)

    def post(self, path: str, content: dict[str, Any]) -> dict[str, Any]:
        return self._object(path, json.dumps(content).encode())

    def _object(self, path: str, body: bytes | None) -> dict[str, Any]:
        end_s = time.monotonic() + self._timeout_s
        with self._open(path, body, self._timeout_s) as answer:
            raw = self._read(answer, end_s)
        return _tree(raw, self.station.url)

    def _open(self, path: str, body: bytes | None, timeout_s: float):
        headers = {"Accept": "application/json, text/event-stream", "User-Agent": "spacemoe"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        request = urllib.request.Request(self.station.url + API + path, data=body, headers=headers)
        if self.station.token:
            request.add_unredirected_header("Authorization", f"Bearer {self.station.token}")
        try:
            return self._opener.open(request, timeout=timeout_s)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error) from None
        except (OSError, ValueError) as error:  # URLError and http.client's are of these
            raise self._unreachable(error) from None
        except Exception as error:  # http.client.HTTPException: what answers speaks no HTTP
            raise self._unreachable(error) from None

    def _unreachable(self, error: BaseException) -> MissionError:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            text = f"the certificate of {self.station.url} is not trusted ({reason.verify_message})"
            return MissionError(text, "name its authority's PEM file by --ca FILE")
        why = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        return MissionError(f"no ground station answers at {self.station.url} ({why[:200]})", START)

    def _refused(self, error: urllib.error.HTTPError) -> MissionError:
        message, fix = f"{self.station.url} answers {error.code}", ""
        try:
            told = json.loads(error.read(PART_BYTES))["error"]
            message, fix = str(told["message"])[:1000], str(told["fix"])[:1000]
        except (ValueError, KeyError, TypeError, OSError, RecursionError):
            fix = f"is that a ground station? {START}"
        if error.code == 401:
            fix = "give a token by --token-file FILE or $SPACEMOE_TOKEN"
        kind = MissionRefused if error.code in (400, 404, 409, 413, 415, 422) else MissionError
        return kind(message, fix, error.code)

    def _read(self, answer: Any, end_s: float) -> bytes:
        """All of an answer, within bounds of size and time."""
        parts, size = [], 0
        while True:
            try:
                part = answer.read1(PART_BYTES)
            except Exception as error:  # cut off, or no HTTP
                raise self._unreachable(error) from None
            if not part:
                return b"".join(parts)
            size += len(part)
            parts.append(part)
            if size > MAX_ANSWER_BYTES:
                raise MissionError(
                    f"{self.station.url} answers with over {MAX_ANSWER_BYTES} bytes",
                    "ask for less by --lines or --since",
                )
            if time.monotonic() > end_s:
                raise MissionError(
                    f"{self.station.url} takes over {self._timeout_s:g} s to answer", "try again, or ask for less"
                )

    # ------------------------------------------------------------ the stream

    def stream(self) -> Iterator[tuple[str, Any]]:
        """(kind, content) of each server-sent event of one connection, until it ends.  Raises: MissionError."""
        with self._open("stream", None, SILENT_S) as answer:
            kind, data, size = "message", [], 0
            while True:
                try:
                    line = answer.readline(MAX_ANSWER_BYTES + 1)
                except Exception as error:  # silence, or cut off
                    raise self._unreachable(error) from None
                if not line:
                    return
                size += len(line)
                if size > MAX_ANSWER_BYTES:
                    raise MissionError(f"{self.station.url} sends an event of over {MAX_ANSWER_BYTES} bytes", START)
                line = line.rstrip(b"\r\n")
                if not line:
                    if data:
                        yield kind, _tree(b"\n".join(data), self.station.url)
                    kind, data, size = "message", [], 0
                elif line.startswith(b"event:"):
                    kind = line[6:].strip().decode("ascii", "replace")[:40]
                elif line.startswith(b"data:"):
                    data.append(line[5:].removeprefix(b" "))

    def follow(
        self, lost: Callable[[str], None], sleep: Callable[[float], None] = time.sleep
    ) -> Iterator[tuple[str, Any]]:
        """As `stream`, for ever: connects anew where it breaks, which begins with a `snapshot` again. `lost` gets the reason each time.

        Raises: MissionError where the first connection fails, or access ends.
        """
        tries, begun = 0, False
        while True:
            try:
                for each in self.stream():
                    tries, begun = 0, True
                    if each[0] == "lost":  # what is shown must be fetched anew
                        break
                    yield each
                else:
                    lost("the ground station has ended the stream")
            except MissionError as error:
                if not begun or error.status in (400, 401, 403, 404):
                    raise
                lost(error.message)
            sleep(RETRY_S[min(tries, len(RETRY_S) - 1)])
            tries += 1

    def follow_events(
        self,
        query: dict[str, Any],
        wanted: Callable[[dict[str, Any]], bool],
        lost: Callable[[str], None],
        sleep: Callable[[float], None] = time.sleep,
    ) -> Iterator[dict[str, Any]]:
        """Events as they come, first those of `query`; after a break those that were missed. None comes twice."""
        seen: OrderedDict[str, None] = OrderedDict()
        latest_utc_s: float | None = None

        def new(rows: Any) -> Iterator[dict[str, Any]]:
            nonlocal latest_utc_s
            for row in rows if isinstance(rows, list) else []:
                if not isinstance(row, dict):
                    continue
                key = json.dumps([row.get(name) for name in ("at_utc_s", "node", "kind", "text")])
                if key in seen:
                    continue
                seen[key] = None
                while len(seen) > SEEN_EVENTS:
                    seen.popitem(last=False)
                if isinstance(at := row.get("at_utc_s"), (int, float)):
                    latest_utc_s = max(at, latest_utc_s or at)
                yield row

        for kind, content in self.follow(lost, sleep):
            if kind == "snapshot":
                asked = query
                if latest_utc_s is not None:  # the archive writes a little later: from somewhat before
                    asked = {**{name: query.get(name) for name in ("node", "severity", "filter")}, "lines": 10_000}
                    asked["since"] = latest_utc_s - 5.0
                first = self.get("events", **asked).get("events")
                yield from new(first)
                latest_utc_s = time.time() if latest_utc_s is None else latest_utc_s
            elif kind == "event":
                yield from (row for row in new([content]) if wanted(row))


def _tree(raw: bytes, url: str) -> dict[str, Any]:
    def refuse(text: str) -> None:
        raise ValueError(f"{text} is no JSON")

    try:
        tree = json.loads(raw, parse_constant=refuse)
        if not isinstance(tree, dict):
            raise ValueError("no object")
        return tree
    except (ValueError, RecursionError):
        raise MissionError(f"what answers at {url} is no ground station", START) from None


def _is_local(url: str) -> bool:
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
