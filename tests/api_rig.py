"""A token engine behind a real uvicorn server on loopback, for tests of the OpenAI-compatible API."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from starlette.applications import Starlette

from ground_station import api_chat, api_openai
from ground_station.decode import Decoder
from ground_station.engine import Engine, Options
from ground_station.text import Text
from node_agent import shard


@contextlib.contextmanager
def serving(routes: list) -> Iterator[str]:
    """The base URL (with /v1) of a server that runs until the end of the block."""
    link = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_level="warning", lifespan="off"))
    thread = threading.Thread(target=lambda: server.run(sockets=[link]), daemon=True)
    thread.start()
    end_s = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < end_s and thread.is_alive(), "uvicorn did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{link.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join(10)
        link.close()


@contextlib.contextmanager
def api(bundle: Path, decoder: Decoder, options: Options = Options(), **more) -> Iterator[tuple[str, Engine]]:
    """(base URL, engine) over a decoder of this bundle."""
    manifest = shard.read_manifest(bundle)
    with Engine(decoder, manifest, Text(bundle, manifest), options, **more) as engine:
        with serving(api_openai.create_routes(engine, api_chat.template_of(bundle, manifest))) as url:
            yield url, engine
