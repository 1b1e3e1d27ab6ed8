"""What a telemetry message says: a pure builder of samples, and the probe that reads this process and machine for it.

Names are fixed here: the ground station looks for `temp_c` (the hottest zone), `power_w`, `energy_j`, `tokens_served`.
Leaves out: when it is sent and how (agent.py, control.py).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import psutil

from node_agent import energy
from node_agent.counters import Counters
from node_agent.wire import Provenance, Sample

AGENT, MACHINE = "agent", "machine"


@dataclass(frozen=True)
class ProcessReading:
    """This process and its machine, from the kernel's counters. Percentages are since the last reading, of one core
    (agent) and of all cores (machine); None at the first reading."""

    agent_cpu_percent: float | None
    machine_cpu_percent: float | None
    agent_cpu_s: float
    rss_bytes: int
    memory_available_bytes: int


class ProcessProbe:
    """Reads ProcessReadings; holds the last one's times."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._last: tuple[float, float, float, float] | None = None

    def read(self) -> ProcessReading:
        now_s = time.monotonic()
        own = self._process.cpu_times()
        own_s = own.user + own.system
        whole = psutil.cpu_times()
        idle_s = whole.idle + getattr(whole, "iowait", 0.0)
        # guest time is part of user time already, and of nice
        total_s = sum(whole) - getattr(whole, "guest", 0.0) - getattr(whole, "guest_nice", 0.0)
        agent = machine = None
        if self._last is not None:
            then_s, then_own_s, then_idle_s, then_total_s = self._last
            if now_s > then_s:
                agent = max(0.0, 100.0 * (own_s - then_own_s) / (now_s - then_s))
            if total_s > then_total_s:
                machine = min(100.0, max(0.0, 100.0 * (1.0 - (idle_s - then_idle_s) / (total_s - then_total_s))))
        self._last = (now_s, own_s, idle_s, total_s)
        return ProcessReading(agent, machine, own_s, self._process.memory_info().rss, psutil.virtual_memory().available)


def _measured(name: str, value: float | None, unit: str, scope: str, at: float) -> Sample:
    return Sample(name, value, unit, "missing" if value is None else "ok", "measured", scope, at)


def hottest(readings: tuple[Sample, ...], simulated: bool, at: float) -> Sample:
    """`temp_c`: the hottest valid temperature, 'missing' where there is none."""
    valid = [sample for sample in readings if sample.unit == "degC" and sample.validity == "ok"]
    provenance: Provenance = "simulated" if simulated else "measured"
    if not valid:
        return Sample("temp_c", None, "degC", "missing", provenance, "module", at)
    top = max(valid, key=lambda sample: sample.value)
    return Sample("temp_c", top.value, "degC", "ok", top.provenance, top.scope, top.generated_at)


def snapshot(
    readings: tuple[Sample, ...],
    meter: energy.Snapshot,
    process: ProcessReading,
    counters: Counters,
    uptime_s: float,
    simulated: bool,
    generated_at: float,
) -> tuple[Sample, ...]:
    """All samples of one telemetry message. `simulated`: the sensors' sysroot is not this machine's."""
    at = generated_at
    samples = [
        hottest(readings, simulated, at),
        *readings,
        *energy.samples(meter, at),
        _measured("uptime_s", uptime_s, "s", AGENT, at),
        _measured("agent_cpu_percent", process.agent_cpu_percent, "%", AGENT, at),
        _measured("machine_cpu_percent", process.machine_cpu_percent, "%", MACHINE, at),
        _measured("agent_cpu_s", process.agent_cpu_s, "s", AGENT, at),
        _measured("rss_bytes", process.rss_bytes, "bytes", AGENT, at),
        _measured("memory_available_bytes", process.memory_available_bytes, "bytes", MACHINE, at),
        _measured("tokens_served", counters.tokens, "rows", AGENT, at),
        _measured("requests_served", counters.requests, "requests", AGENT, at),
        _measured("expert_rows_served", counters.pairs, "rows", AGENT, at),
        _measured("expert_compute_s", counters.compute_s, "s", AGENT, at),
        _measured("codec_s", counters.codec_s, "s", AGENT, at),
        _measured("bytes_received", counters.bytes_in, "bytes", AGENT, at),
        _measured("bytes_sent", counters.bytes_out, "bytes", AGENT, at),
        _measured("shard_bytes_received", counters.shard_bytes_in, "bytes", AGENT, at),
    ]
    planes = (
        ("link", counters.link_errors),
        ("control", counters.control_errors),
        ("delivery", counters.delivery_errors),
    )
    for plane, errors in planes:
        samples += [
            _measured(f"errors.{plane}.{kind}", n, "errors", AGENT, at) for kind, n in sorted(dict(errors).items())
        ]
    return tuple(samples)
