"""GET /metrics of one agent, off unless its configuration asks for it: the latest telemetry as Prometheus reads it.

Nothing is read for a request: it shows what the agent has published last, and nothing once that is old. Text format 0.0.4 by hand,
since a board has no prometheus_client. Leaves out access control: on anything but loopback everybody who can connect can read.
"""

from __future__ import annotations

import http.server
import logging
import socket
import threading
import time
from collections.abc import Iterable

from node_agent.errors import ConfigError
from node_agent.wire import Sample

log = logging.getLogger("node_agent.metrics")

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_CONNECTIONS = 8
REQUEST_TIMEOUT_S = 5.0
OLD_PERIODS = 5.0
# By unit: name, help, factor. Counters end in _total.
FAMILIES = {
    "degC": ("spacemoe_agent_temperature_celsius", "Temperatures", 1.0),
    "W": ("spacemoe_agent_power_watts", "Powers", 1.0),
    "V": ("spacemoe_agent_voltage_volts", "Voltages", 1.0),
    "J": ("spacemoe_agent_energy_joules_total", "Energy since the start of the agent", 1.0),
    "1": ("spacemoe_agent_share_ratio", "Shares, 0 to 1", 1.0),
    "%": ("spacemoe_agent_share_ratio", "Shares, 0 to 1", 0.01),
    "s": ("spacemoe_agent_time_seconds", "Times, most of them since the start of the agent", 1.0),
    "bytes": ("spacemoe_agent_size_bytes", "Memory, and bytes that were moved", 1.0),
}
OTHER = ("spacemoe_agent_sample", "Every other sample, in its own unit", 1.0)


def exposition(samples: Iterable[Sample]) -> bytes:
    """The valid ones of `samples`."""
    families: dict[str, tuple[str, dict[str, float]]] = {}
    for sample in samples:
        if sample.validity != "ok" or sample.value is None:
            continue
        name, about, factor = FAMILIES.get(sample.unit, OTHER)
        if name.endswith("_total") and sample.value < 0:
            name, about, factor = OTHER
        labels = {"sensor": sample.name, "scope": sample.scope, "provenance": sample.provenance}
        if name == OTHER[0]:
            labels["unit"] = sample.unit
        row = ",".join(f'{key}="{_escaped(value)}"' for key, value in labels.items())
        families.setdefault(name, (about, {}))[1].setdefault(row, sample.value * factor)
    lines = []
    for name, (about, rows) in sorted(families.items()):
        kind = "counter" if name.endswith("_total") else "gauge"
        lines += [
            f"# HELP {name} {about}",
            f"# TYPE {name} {kind}",
            *(f"{name}{{{row}}} {value!r}" for row, value in rows.items()),
        ]
    return "".join(f"{line}\n" for line in lines).encode("utf-8", "replace")


def _escaped(value: str) -> str:
    return value[:200].replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class _Handler(http.server.BaseHTTPRequestHandler):
    timeout = REQUEST_TIMEOUT_S
    server_version, sys_version = "node-agent", ""

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404, "only /metrics is here")
            return
        body = self.server.body()
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class MetricsServer(http.server.ThreadingHTTPServer):
    """Serves on `host`:`port` from a thread of its own while used as a context manager.  Raises: ConfigError where it cannot listen."""

    daemon_threads = True
    request_queue_size = MAX_CONNECTIONS

    def __init__(self, host: str, port: int, period_s: float):
        if ":" in host:
            self.address_family = socket.AF_INET6
        self._latest: tuple[float, tuple[Sample, ...]] = (0.0, ())
        self._old_s = OLD_PERIODS * period_s + 1.0
        self._room = threading.BoundedSemaphore(MAX_CONNECTIONS)
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise ConfigError(
                f"[metrics] cannot listen on {host}:{port} ({error.strerror}): give another port"
            ) from None

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)  # HTTPServer's asks a name server for this machine's name
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.server_address[:2]

    def __enter__(self) -> MetricsServer:
        threading.Thread(target=self.serve_forever, name="metrics", daemon=True).start()
        log.info("metrics on http://%s:%d/metrics", self.server_name, self.server_port)
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def show(self, samples: Iterable[Sample]) -> None:
        """From now on these."""
        self._latest = (time.monotonic(), tuple(samples))

    def body(self) -> bytes:
        at_s, samples = self._latest
        return exposition(samples) if time.monotonic() - at_s <= self._old_s else b""

    def process_request(self, request, client_address) -> None:
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request, client_address) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, _request, client_address) -> None:
        log.debug("metrics: a request of %s broke", client_address[0])
