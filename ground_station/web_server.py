"""Serves mission control: uvicorn in a thread of its own, on loopback, or beyond it with tokens and TLS.

Leaves out what is served (web_app.py) and who may come in (web_access.py).
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from starlette.routing import BaseRoute

from ground_station import web_app
from ground_station.mission import Mission
from ground_station.web_access import Access, Rules
from ground_station.web_tokens import TokenError, Tokens

PORT = 8642
LOOPBACK = "127.0.0.1"
START_S = 10.0
STOP_S = 2.0
MAX_CONNECTIONS = 512
MAX_HEADER_BYTES = 32 * 1024


class WebError(OSError):
    """The page cannot be served so; the text says what to do."""


@dataclass(frozen=True)
class Options:
    """`port` 0: a free one; `fallback`: a free one too where `port` is taken. Beyond loopback `tokens` (a file of web_tokens) is
    needed, and `certificate` and `key` (PEM files), unless `plain` says that what lies between is trusted.
    `hosts`: names by which browsers call this server."""

    bind: str = LOOPBACK
    port: int = PORT
    fallback: bool = True
    tokens: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    plain: bool = False
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Served:
    """What runs. `url`: for a browser on this machine."""

    url: str
    host: str
    port: int


def rules_of(options: Options) -> Rules:
    """Who may come in.  Raises: WebError, TokenError."""
    address = _address(options.bind)
    secure = options.certificate is not None
    if secure != (options.key is not None):
        raise WebError("a certificate needs its key: give both files")
    if address.is_loopback and options.tokens is None:
        return Rules(secure=secure)
    if options.tokens is None:
        raise WebError(f"beyond loopback ({options.bind}) a file of tokens is needed: make one, or bind {LOOPBACK}")
    if not address.is_loopback and not secure and not options.plain:
        raise WebError(
            f"beyond loopback ({options.bind}) a certificate and its key are needed, or say that the network is trusted"
        )
    tokens = Tokens(options.tokens)
    if not tokens:
        raise TokenError(f"{options.tokens} holds no token: make one first")
    names = {name.lower().rstrip(".") for name in (*options.hosts, socket.gethostname(), socket.getfqdn())}
    return Rules(tokens, frozenset(names), secure)


def _address(bind: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        return ipaddress.ip_address(LOOPBACK if bind == "localhost" else bind)
    except ValueError:
        raise WebError(f"{bind[:80]!r} is no address to listen on: give one of this machine, or 0.0.0.0") from None


def listen(options: Options) -> socket.socket:
    """A bound socket, so that the port is known before anything runs.  Raises: WebError."""
    address = _address(options.bind)
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    for port in (options.port, 0) if options.fallback and options.port else (options.port,):
        link = socket.socket(family, socket.SOCK_STREAM)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            link.bind((str(address), port))
            link.listen(128)
            return link
        except OSError as error:
            link.close()
            why = error.strerror
    raise WebError(
        f"port {options.port} on {options.bind} cannot be had ({why}): end what listens there, or give another"
    )


@contextmanager
def serving(mission: Mission, options: Options = Options(), more: Iterable[BaseRoute] = ()) -> Iterator[Served]:
    """The page and the API of `mission`; `more` are routes of others, behind the same door.

    Raises: WebError, TokenError, OSError for files of TLS that cannot be used.
    """
    rules = rules_of(options)
    if options.certificate is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(options.certificate, options.key)
        except (OSError, ValueError) as error:
            raise WebError(f"{options.certificate} or {options.key} cannot be used ({error}): give PEM files") from None
    link = listen(options)
    closing = asyncio.Event()
    app = Access(web_app.make(mission, more, closing), rules)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=1,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        http="h11",
        loop="asyncio",
        ssl_certfile=options.certificate,
        ssl_keyfile=options.key,
    )
    server = uvicorn.Server(config)
    failed: list[BaseException] = []
    loops: list[asyncio.AbstractEventLoop] = []

    async def run() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve(sockets=[link])

    def thread() -> None:
        try:
            asyncio.run(run())
        except BaseException as error:  # told by whoever waits for the start
            failed.append(error)

    worker = threading.Thread(target=thread, name="web", daemon=True)
    worker.start()
    try:
        ended = threading.Event()
        for _ in range(int(START_S / 0.02)):
            if server.started or failed or not worker.is_alive():
                break
            ended.wait(0.02)
        if not server.started:
            raise WebError(f"the web server did not start ({failed[0] if failed else 'no reason given'})")
        host, port = link.getsockname()[:2]
        shown = host if not _address(host).is_unspecified else (LOOPBACK if _address(host).version == 4 else "::1")
        shown = f"[{shown}]" if ":" in shown else shown
        yield Served(f"{'https' if rules.secure else 'http'}://{shown}:{port}/", host, port)
    finally:
        server.should_exit = True
        if loops and worker.is_alive():
            try:
                loops[0].call_soon_threadsafe(closing.set)
                mission.feed.publish("end", {})  # open streams wake, see that it is closing, and end
            except RuntimeError:
                pass  # it has just ended
        worker.join(STOP_S + 3.0)
        link.close()
