"""`spacemoe benchmark mission`: what a ground station bears: telemetry of many nodes, a page that watches, and, with `kill`, kill -9.

Real parts on loopback: broker, a ground station in a process of its own (archive, limits, page), publishers in others. A message
carries when it was made, to the millisecond; the watcher reads /api/v1/stream as a page does and stamps each line as it comes. What
is lost is found by comparing what publishers wrote down with the rows of the archive. All share this machine's cores.
Leaves out: boards (a publisher keeps no history and answers no command; one connection carries up to NODES_EACH nodes) and drawing.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil

from ground_station import archive_schema
from ground_station.broker import Broker
from ground_station.run_folder import run_folder
from node_agent import wire

FLEET = "bench"
SIGNALS = 30
NODES_EACH = 100  # of one publisher process
PERIOD_S = 1.0
LOOK_S = 0.5
START_S = 30.0
SETTLE_S = 1.5
STOP_S = 15.0
LIMIT_P95_S, LIMIT_MB, LIMIT_MISSING_S = 1.0, 300.0, 1.0
LATE_S = 0.5  # a publisher that is so much behind its own plan does not offer 1 Hz
MADE, SEQ = "made_utc_ms", "seq"
KNOWN = (("temp_c", "degC", 48.0), ("power_w", "W", 5.5), ("duty", "1", 0.5), ("energy_j", "J", 1000.0))


class MissionBenchmarkError(RuntimeError):
    """A part did not start, or ended by itself; the text says which."""


# ---------------------------------------------------------------- children


def station_process(host: str, port: int, folder: Path) -> None:
    """A ground station; each line on standard input is answered with its counts, the end of it ends the station."""
    from ground_station import mission_up, web_server
    from ground_station.control import Control

    options = mission_up.Options(folder, web_server.Options(port=0))
    with Control(FLEET, host, port) as control:
        with mission_up.running(control, options, lambda text: print(text, file=sys.stderr)) as up:
            _tell({"url": up.served.url})
            for _line in sys.stdin:
                total: Counter[str] = Counter()
                for state in control.snapshot().values():
                    total.update(vars(state.counts))
                health = up.mission.health()
                _tell(
                    {
                        "received": total["telemetry"],
                        "gaps": total["telemetry_lost"],
                        "replayed": total["telemetry_replayed"],
                        "unborn": total["telemetry_unborn"],
                        "malformed": sum(health["malformed"].values()),
                        "archive_dropped": sum(up.archive.counts.dropped.values()),
                        "archive_failures": up.archive.counts.failures,
                        "frames_lost": health["frames_lost"],
                    }
                )


def publisher_process(
    host: str, port: int, first: int, nodes: int, ticks: int, start_utc_s: float, leave_out: int, log: Path
) -> None:
    """`nodes` nodes from number `first` on, for `ticks` seconds from `start_utc_s`; each `leave_out`-th seq is not sent (0: all are).

    Writes to `log` (ticks, nodes) float64: UTC seconds at which each was made, NaN where it was not sent.
    """
    import paho.mqtt.client as mqtt

    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id=f"load-{first}", protocol=mqtt.MQTTv5)
    ready = threading.Event()
    client.on_connect = lambda *_: ready.set()
    client.connect(host, port)
    client.loop_start()
    if not ready.wait(START_S):
        raise MissionBenchmarkError("the broker did not answer a publisher")
    topics, names = wire.Topics(FLEET), [f"load-{first + i:03d}" for i in range(nodes)]
    for name in names:
        birth = wire.Birth(name, 1, "0", "load", round(time.time(), 3), (), (), "", 1, "")
        client.publish(topics.birth(name), wire.encode(birth), 1, True)
        client.publish(topics.status(name), wire.encode(wire.Status(name, "online", 1)), 1, True).wait_for_publish(
            START_S
        )
    made, late_s, refused = np.full((ticks, nodes), np.nan), np.zeros((ticks, nodes)), 0
    for tick in range(ticks):
        for i, name in enumerate(names):
            due_s = start_utc_s + PERIOD_S * (tick + i / nodes)
            if (wait_s := due_s - time.time()) > 0:
                time.sleep(wait_s)
            now_s = round(time.time(), 3)
            late_s[tick, i] = max(0.0, now_s - due_s)
            seq = tick + 1
            if leave_out and seq % leave_out == 0:
                continue
            telemetry = wire.Telemetry(name, 1, seq, now_s, _samples(now_s, seq, i), 1, seq)
            refused += client.publish(topics.telemetry(name), wire.encode(telemetry), 0).rc != 0
            made[tick, i] = now_s
    time.sleep(0.5)  # what paho still holds
    client.disconnect()
    client.loop_stop()
    np.save(log, made)
    _tell({"late_p99_s": float(np.percentile(late_s, 99)), "late_max_s": float(late_s.max()), "refused": refused})


def _samples(now_s: float, seq: int, node: int) -> tuple[wire.Sample, ...]:
    """SIGNALS of them; when the message was made is a whole number, which the page's nine digits leave as it is."""
    rows = [(MADE, "ms", float(round(now_s * 1000))), (SEQ, "1", float(seq))]
    rows += [(name, unit, value + 0.1 * value * math.sin(now_s / 20 + node)) for name, unit, value in KNOWN]
    rows += [(f"signal_{i}", "1", 10 * math.sin(now_s / 7 + node + i)) for i in range(SIGNALS - len(rows))]
    return tuple(wire.Sample(name, value, unit, "ok", "simulated", "board", now_s) for name, unit, value in rows)


def _tell(tree: dict[str, Any]) -> None:
    print(json.dumps(tree), flush=True)


@contextlib.contextmanager
def _child(kind: str, *arguments: object) -> Iterator[subprocess.Popen]:
    """Ends with its standard input at the latest; by force where that does not help."""
    root = str(Path(__file__).resolve().parents[1])
    child = subprocess.Popen(
        [sys.executable, "-m", "ground_station.benchmark_mission", kind, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))},
    )
    try:
        yield child
    finally:
        with contextlib.suppress(OSError):
            child.stdin.close()
        try:
            child.wait(10.0 if kind == "station" else 0.1)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        child.stdout.close()


def _answer(child: subprocess.Popen, what: str) -> dict[str, Any]:
    """The next line of a child.  Raises: MissionBenchmarkError."""
    line = child.stdout.readline()
    if not line:
        raise MissionBenchmarkError(f"the {what} ended by itself (exit status {child.wait()})")
    return json.loads(line)


# ---------------------------------------------------------------- who watches the page's stream


@dataclass
class Watcher:
    """Reads the stream in a thread of its own. `delays_s`: from made to shown, once per message."""

    delays_s: list[float] = field(default_factory=list)
    lost_frames: int = 0
    received_bytes: int = 0

    def __post_init__(self) -> None:
        self._places: dict[str, tuple[int, int]] = {}
        self._seen: dict[str, int] = {}

    def follow(self, url: str) -> None:
        threading.Thread(target=self._follow, args=(urlsplit(url).netloc,), daemon=True).start()

    def _follow(self, address: str) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):  # a station that was killed; the next has its own
            link = http.client.HTTPConnection(address, timeout=30)
            link.request("GET", "/api/v1/stream")
            answer, kind = link.getresponse(), b""
            while line := answer.readline():
                now_s = time.time()
                self.received_bytes += len(line)
                if line.startswith(b"event: "):
                    kind = line[7:].strip()
                elif line.startswith(b"data: "):
                    if kind == b"lost":
                        self.lost_frames += json.loads(line[6:])["frames"]
                    elif kind in (b"snapshot", b"fleet"):
                        tree = json.loads(line[6:])
                        self._rows(tree["fleet"] if kind == b"snapshot" else tree, now_s, kind == b"fleet")

    def _rows(self, fleet: dict[str, Any], now_s: float, fresh: bool) -> None:
        for set_id, signals in fleet["sets"].items():
            names = [signal[0] for signal in signals]
            if MADE in names:
                self._places[set_id] = names.index(MADE), names.index(SEQ)
        for node, set_id, _received, _state, values, *_ in fleet["rows"]:
            if set_id not in self._places:
                continue
            made, seq = (values[place] for place in self._places[set_id])
            if seq > self._seen.get(node, 0):
                self._seen[node] = seq
                if fresh:  # a snapshot is as old as its rows
                    self.delays_s.append(now_s - made / 1000)


# ---------------------------------------------------------------- the measurement


def measure(
    nodes: int = 200,
    seconds: int = 300,
    kill: bool = False,
    leave_out: int = 0,
    broker: str = "auto",
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The figures as JSON-ready values; with `kill` the station is killed halfway and started again on its archive.

    `leave_out`: publishers leave out each so-manieth seq, which must be found as lost.
    Raises: MissionBenchmarkError, BrokerError, ArchiveError, OSError.
    """
    killed: dict[str, Any] = {}
    with ExitStack() as stack:
        folder = stack.enter_context(run_folder("benchmark"))
        bus = stack.enter_context(Broker(folder, broker))
        archive, watcher = folder / "archive", Watcher()
        station, process = _station(stack, bus, archive, watcher)
        start_utc_s = time.time() + 2.0 + nodes / 50
        logs, publishers = [], []
        for first in range(0, nodes, NODES_EACH):
            logs.append(folder / f"sent-{first}.npy")
            count = min(NODES_EACH, nodes - first)
            publishers.append(
                stack.enter_context(
                    _child("publisher", bus.host, bus.port, first, count, seconds, start_utc_s, leave_out, logs[-1])
                )
            )
        time.sleep(max(0.0, start_utc_s - time.time()))
        began_s, cpu_before_s, cpu_s, rss = time.monotonic(), _cpu_s(process), 0.0, 0
        before: dict[str, int] = {}
        while any(child.poll() is None for child in publishers):
            if station.poll() is not None:
                raise MissionBenchmarkError(f"the ground station ended by itself (exit status {station.poll()})")
            rss = max(rss, process.memory_info().rss)
            elapsed_s = time.monotonic() - began_s
            if kill and not killed and elapsed_s >= seconds / 2:
                before, cpu_s = _counts(station), _cpu_s(process) - cpu_before_s
                killed = _kill(station, archive)
                station, process = _station(stack, bus, archive, watcher)
                cpu_before_s = 0.0  # its start counts
            say(f"{min(elapsed_s, seconds):4.0f} of {seconds} s, {rss / 1e6:.0f} MB, {len(watcher.delays_s)} shown")
            time.sleep(LOOK_S)
        load_s = time.monotonic() - began_s
        cpu_s += _cpu_s(process) - cpu_before_s
        told = [_answer(child, "publisher") for child in publishers]
        time.sleep(SETTLE_S)
        after = _counts(station)
        counts = {name: value + before.get(name, 0) for name, value in after.items()}
        rss = max(rss, process.memory_info().rss)
        station.stdin.close()
        try:
            station.wait(STOP_S)
        except subprocess.TimeoutExpired:
            raise MissionBenchmarkError(f"the ground station did not end within {STOP_S:g} s") from None
        made = np.concatenate([np.load(log) for log in logs], axis=1)
        rows = _rows(archive)
        damage = archive_schema.damage(archive_schema.file_of(archive))
        kind = bus.kind
    losses = _losses(made, rows, killed.get("at_utc_s"))
    sent = int(np.isfinite(made).sum())
    if not watcher.delays_s:
        raise MissionBenchmarkError("the page's stream showed no telemetry")
    delays_s = np.array(watcher.delays_s)
    offered = max(one["late_p99_s"] for one in told) < LATE_S and not any(one["refused"] for one in told)
    result = {
        "nodes": nodes,
        "seconds": seconds,
        "signals": SIGNALS,
        "broker": kind,
        "cores": os.cpu_count(),
        "left_out": int(np.isnan(made).sum()),
        "sent": sent,
        "received": counts.pop("received"),
        "lost": max(counts["gaps"], losses["unexplained"]),  # one lost on its way shows in both
        **counts,
        "archived": len(rows),
        **losses,
        "damage": damage,
        "shown": len(watcher.delays_s),
        "stream_lost_frames": watcher.lost_frames,
        "stream_kb_per_s": round(watcher.received_bytes / 1000 / load_s, 1),
        "delay_s": {
            "p50": round(float(np.percentile(delays_s, 50)), 3),
            "p95": round(float(np.percentile(delays_s, 95)), 3),
            "max": round(float(delays_s.max()), 3),
        },
        "rss_mb": round(rss / 1e6, 1),
        "cpu_s_per_s": round(cpu_s / load_s, 3),
        "offered": offered,
        "publishers_late_s": {
            "p99": round(max(one["late_p99_s"] for one in told), 3),
            "max": round(max(one["late_max_s"] for one in told), 3),
        },
        "kill": killed or None,
        "received_after_kill": after["received"] if killed else None,
        "provenance": "measured",
    }
    result["holds"] = not misses(result)
    return result


def _station(stack: ExitStack, bus: Broker, archive: Path, watcher: Watcher) -> tuple[subprocess.Popen, psutil.Process]:
    station = stack.enter_context(_child("station", bus.host, bus.port, archive))
    watcher.follow(_answer(station, "ground station")["url"])
    return station, psutil.Process(station.pid)


def _counts(station: subprocess.Popen) -> dict[str, int]:
    station.stdin.write("\n")
    station.stdin.flush()
    return _answer(station, "ground station")


def _kill(station: subprocess.Popen, archive: Path) -> dict[str, Any]:
    """kill -9, and the archive as it was left, before anybody writes it again."""
    station.kill()
    at_utc_s = time.time()
    station.wait()
    newest_utc_s = max((received for *_, received in _rows(archive)), default=None)
    return {
        "at_utc_s": at_utc_s,
        "newest_row_age_s": None if newest_utc_s is None else round(at_utc_s - newest_utc_s, 3),
        "damage": archive_schema.damage(archive_schema.file_of(archive)),
    }


def _rows(archive: Path) -> list[tuple[str, int, float]]:
    """(node, seq, received_utc_s) of all telemetry."""
    with contextlib.closing(archive_schema.open_to_read(archive_schema.file_of(archive))) as db:
        wanted = "SELECT nodes.node, seq, received_utc_s FROM telemetry JOIN nodes ON nodes.id = telemetry.node"
        return db.execute(wanted).fetchall()


def _losses(made: np.ndarray, rows: list[tuple[str, int, float]], killed_utc_s: float | None) -> dict[str, Any]:
    """What was sent and is not in the archive: `by_kill` (before it), `while_down` (no station was there), `unexplained` (the rest).

    `made`: (ticks, nodes) UTC seconds, NaN: not sent.
    """
    missing = np.isfinite(made)
    for node, seq, _received in rows:
        missing[seq - 1, int(node.rpartition("-")[2])] = False
    lost = made[missing]
    if killed_utc_s is None:
        return {"by_kill": 0, "missing_s": 0.0, "while_down": 0, "down_s": 0.0, "unexplained": int(lost.size)}
    back_utc_s = min((received for *_, received in rows if received > killed_utc_s), default=math.inf)
    # a loss long before the kill is none of it: it shows as an age over the limit
    by_kill = lost[lost < killed_utc_s]
    return {
        "by_kill": int(by_kill.size),
        "missing_s": round(float(killed_utc_s - by_kill.min()), 3) if by_kill.size else 0.0,
        "while_down": int(((lost >= killed_utc_s) & (lost < back_utc_s)).sum()),
        "down_s": round(back_utc_s - killed_utc_s, 3) if math.isfinite(back_utc_s) else None,
        "unexplained": int((lost >= back_utc_s).sum()),
    }


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def misses(result: dict[str, Any]) -> list[str]:
    """What does not hold, in words; empty when all does."""
    kill = result["kill"]
    checks = [
        (result["offered"], "the publishers did not keep 1 Hz: the figures do not hold"),
        (result["lost"] == 0, f"{result['lost']} messages were lost"),
        (result["archive_dropped"] == result["archive_failures"] == 0, "the archive dropped rows, or its disk refused"),
        (result["malformed"] == result["unborn"] == result["replayed"] == 0, "the station refused messages"),
        (result["frames_lost"] == result["stream_lost_frames"] == 0, "the page's stream lost frames"),
        (result["delay_s"]["p95"] <= LIMIT_P95_S, f"the page's delay is over {LIMIT_P95_S:g} s at p95"),
        (result["rss_mb"] <= LIMIT_MB, f"the station has over {LIMIT_MB:g} MB"),
        (not result["damage"] and not (kill and kill["damage"]), "the archive is damaged"),
        (result["missing_s"] <= LIMIT_MISSING_S, f"kill -9 cost {result['missing_s']:.2f} s of the archive"),
        (not kill or bool(result["received_after_kill"]), "nothing was received after the restart"),
    ]
    return [text for good, text in checks if not good]


def report(result: dict[str, Any]) -> str:
    """At most 80 columns."""
    delay, late, kill = result["delay_s"], result["publishers_late_s"], result["kill"]
    lines = [
        f"{result['nodes']} nodes at 1 Hz, {result['signals']} signals each, {result['seconds']} s, {result['broker']}, loopback",
        f"messages  sent {result['sent']}, received {result['received']}, archived {result['archived']}, lost {result['lost']}",
        f"page      {result['shown']} shown, made to shown p50 {delay['p50']:.3f}, p95 {delay['p95']:.3f}, max {delay['max']:.3f} s",
        f"stream    {result['stream_kb_per_s']:.0f} kB/s, {result['stream_lost_frames']} frames lost",
        f"station   {result['rss_mb']:.0f} MB at most, {result['cpu_s_per_s']:.2f} CPU seconds per second",
        f"archive   {len(result['damage'])} faults found by integrity_check, {result['archive_dropped']} rows dropped",
    ]
    if kill:
        lines += [
            f"kill -9   {len(kill['damage'])} faults in the archive as it was left; {result['by_kill']} messages gone,",
            f"          the oldest of them {result['missing_s']:.2f} s, the newest row {_s(kill['newest_row_age_s'])} old then",
            f"restart   away {_s(result['down_s'])}, {result['while_down']} were sent meanwhile (boards keep theirs);",
            f"          {result['received_after_kill']} received after it",
        ]
    lines += [
        f"load      publishers behind their plan p99 {late['p99']:.3f}, max {late['max']:.3f} s; all parts,",
        f"          publishers too, share the {result['cores']} cores of this machine",
        *(f"not held  {text}" for text in misses(result)),
    ]
    return "\n".join(lines)


def _s(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:.2f} s"


if __name__ == "__main__":
    if sys.argv[1] == "station":
        station_process(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
    else:
        host, port, first, nodes, ticks, start, leave, log = sys.argv[2:]
        publisher_process(host, int(port), int(first), int(nodes), int(ticks), float(start), int(leave), Path(log))
