"""Tokens per second through the API: one stream, and several at once, with stock agents as processes over the data plane.

The askers are a process of their own with a thread per stream, over HTTP on loopback. Streams of one and of several take turns, so that
a machine that is busy with something else is so for both. Leaves out boards: all agents share this machine's cores, and the ratio is its.
Run: python -m ground_station.benchmark_api [--bundle DIR] [--streams 8] [--runs 5] [--tokens 64] [--json]
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

PROMPT = "In the beginning"
CLIENT_TIMEOUT_S = 300.0
JOIN_TIMEOUT_S = 60.0
STEP_TIMES = ("total_ms", "trunk_ms", "select_ms", "codec_ms", "wire_ms", "expert_ms")


@dataclass(frozen=True)
class Options:
    """What is measured; `runs` of each number of streams."""

    bundle: Path
    nodes: int = 4
    streams: int = 8
    runs: int = 5
    tokens: int = 64
    precision: str = "int8"
    replica: str | None = "int4"
    codec: str = "q8"


def measure(options: Options, show) -> dict:
    """Starts broker, agents, engine and server, and stops them.  Raises: what `spacemoe demo` does."""
    import uvicorn
    from starlette.applications import Starlette

    from ground_station import api_chat, api_openai, ledger, serving
    from ground_station.broker import Broker
    from ground_station.control import Control
    from ground_station.dispatch import Table
    from ground_station.engine import Engine
    from ground_station.engine import Options as EngineOptions
    from ground_station.engine_meter import FleetMeter
    from ground_station.link import Link
    from ground_station.local_fleet import LocalFleet, demo_boards
    from ground_station.placement import round_robin
    from ground_station.run_folder import run_folder

    asked = serving.Options(
        bundle=options.bundle, precision=options.precision, replica=options.replica, codec=options.codec
    )
    model, boards = serving.model_of(asked), demo_boards(options.nodes)
    memory = {board.node: board.memory_bytes for board in boards}
    holdings = round_robin(model.manifest, memory, options.precision, (options.replica,) if options.replica else ())
    table = Table(holdings)
    steps = []
    with ExitStack() as stack:
        folder = stack.enter_context(run_folder("benchmark-api"))
        broker = stack.enter_context(Broker(folder, "auto"))
        link = stack.enter_context(Link())
        control = stack.enter_context(Control("demo", broker.host, broker.port))
        at = (broker.host, broker.port)
        fleet = stack.enter_context(LocalFleet(folder, options.bundle, holdings, link.endpoint, at, "demo", boards))
        fleet.wait_joined(link, JOIN_TIMEOUT_S)
        control.wait_for(set(table.nodes), JOIN_TIMEOUT_S)
        ledger.wait_for_baselines(control, table.nodes)
        made = serving.Serving(model, table, link, control, show)
        engine = stack.enter_context(
            Engine(
                made.decoder,
                model.manifest,
                model.text,
                EngineOptions(batch=options.streams),
                meter=FleetMeter(control, table.nodes),
                after_step=steps.append,
            )
        )
        routes = api_openai.create_routes(engine, api_chat.template_of(options.bundle, model.manifest))
        port = stack.enter_context(_served(uvicorn, Starlette(routes=routes)))
        _ask(port, options.streams, 8)  # sessions are made, paths are warm
        found: dict[int, list[dict]] = {1: [], options.streams: []}
        parts: dict[int, list] = {1: [], options.streams: []}
        for run in range(options.runs):
            for streams in (1, options.streams) if run % 2 == 0 else (options.streams, 1):
                steps.clear()
                found[streams].append(_ask(port, streams, options.tokens))
                parts[streams] += [step for step in steps if step.n == streams]
                show(f"run {run + 1}, {streams} at once: {found[streams][-1]['tokens_per_s']:.1f} tokens/s\n")
    return {
        "options": asdict(options) | {"bundle": str(options.bundle)},
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 2),
        "streams": {
            streams: _spread([each["tokens_per_s"] for each in runs])
            | {"first_token_ms": _spread([each["first_token_ms"] for each in runs])}
            | {"energy_j_per_token": [each["energy_j_per_token"] for each in runs]}
            | {"step_ms": _step(parts[streams])}
            for streams, runs in found.items()
        },
        "ratio": round(
            statistics.median(each["tokens_per_s"] for each in found[options.streams])
            / statistics.median(each["tokens_per_s"] for each in found[1]),
            3,
        ),
    }


def _spread(values: list[float]) -> dict:
    return {
        "n": len(values),
        "median": round(statistics.median(values), 3),
        "least": round(min(values), 3),
        "most": round(max(values), 3),
    }


def _step(steps: list) -> dict:
    """Medians of the steps in which every stream wrote one token."""
    if not steps:
        return {}
    return {"n": len(steps)} | {
        name: round(statistics.median(getattr(step, name) for step in steps), 3) for name in STEP_TIMES
    }


@contextmanager
def _served(uvicorn, app):
    link = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=lambda: server.run(sockets=[link]), daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    try:
        yield link.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(10)
        link.close()


def _ask(port: int, streams: int, tokens: int) -> dict:
    """In a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "ground_station.benchmark_api", "--ask", str(port), str(streams), str(tokens)],
        capture_output=True,
        text=True,
        timeout=CLIENT_TIMEOUT_S,
    )
    if done.returncode:
        raise RuntimeError(f"the askers failed: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout)


def asker(port: int, streams: int, tokens: int) -> dict:
    """Asks for `streams` texts at once; tokens/s from the first request to the last token, joules from the usage."""
    results: list[tuple[float, float, int, float | None]] = []
    ready = threading.Barrier(streams + 1)

    def one(index: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=CLIENT_TIMEOUT_S)
        connection.connect()
        body = {
            "prompt": PROMPT,
            "max_tokens": tokens,
            "seed": index,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        ready.wait()
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        first_s = last_s = 0.0
        usage = None
        for line in connection.getresponse():
            if line.startswith(b"data: {"):
                part = json.loads(line[6:])
                if "error" in part:
                    raise RuntimeError(part["error"]["message"])
                if part["choices"]:
                    last_s = time.monotonic()
                    first_s = first_s or last_s
                usage = part["usage"] or usage
        results.append((first_s, last_s, usage["completion_tokens"], usage["energy_j"]))

    threads = [threading.Thread(target=one, args=(index,)) for index in range(streams)]
    for thread in threads:
        thread.start()
    ready.wait()
    began_s = time.monotonic()
    for thread in threads:
        thread.join()
    if len(results) < streams:
        raise RuntimeError(f"{streams - len(results)} of {streams} streams failed")
    count = sum(each[2] for each in results)
    joules = [each[3] for each in results]
    return {
        "tokens": count,
        "tokens_per_s": count / (max(each[1] for each in results) - began_s),
        "first_token_ms": statistics.median((each[0] - began_s) * 1e3 for each in results),
        "energy_j_per_token": None if None in joules else round(sum(joules) / count, 5),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ground_station.benchmark_api", description=__doc__.split("\n")[0])
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--codec", default="q8")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--ask", nargs=3, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.ask:
        print(json.dumps(asker(*args.ask)))
        return 0
    from ground_station.cli_shared import bundle_of

    options = Options(
        bundle_of(args), args.nodes, max(2, args.streams), max(1, args.runs), max(1, args.tokens), codec=args.codec
    )
    found = measure(options, lambda text: print(text, end="", file=sys.stderr, flush=True))
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    for streams, each in found["streams"].items():
        text = f"{streams} at once: {each['median']} tokens/s ({each['least']} to {each['most']}, n {each['n']})"
        print(f"{text}, first token after {each['first_token_ms']['median']} ms")
    print(f"ratio of the medians: {found['ratio']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
