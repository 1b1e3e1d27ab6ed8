"""The part of `make image-test` that measures how long the agent takes from its start to READY=1, on one core of this machine.

What systemd would hear is heard here: a datagram socket as NOTIFY_SOCKET. Where this user may, the kernel's caches are dropped before each
start, so that every file is read from the disk. Leaves out: boards, whose own start the boots report.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Protocol

ROUNDS = 3
PATIENCE_S = 60.0
MAX_START_S = 3.0
SHARDS = ("L00E000.int8", "L00E001.int8", "L00E002.int8", "L00E003.int8")


class Report(Protocol):
    """What is needed of image_test.Report."""

    def check(self, name: str, held: bool, fact: object) -> None: ...


def _drop_caches() -> bool:
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return False
    return True


def start_s(folder: Path, bundle: Path) -> float:
    """Seconds from the start of the process to READY=1.  Raises: RuntimeError."""
    shards = ", ".join(f'"{stem}"' for stem in SHARDS)
    config = folder / "spacemoe.toml"
    config.write_text(
        f'[node]\nid = "cold"\nfleet = "cold"\nstate_dir = "{folder}/state"\n'
        f'[bundle]\npath = "{bundle}"\nshards = [{shards}]\n[data]\nendpoint = "tcp://127.0.0.1:9"\n'.replace(
            "\\\n", "\n"
        )
    )
    (folder / "state").mkdir(exist_ok=True)
    address = folder / "notify"
    address.unlink(missing_ok=True)
    core = min(os.sched_getaffinity(0))
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as heard:
        heard.bind(str(address))
        heard.settimeout(PATIENCE_S)
        began_s = time.monotonic()
        agent = subprocess.Popen(
            [sys.executable, "-m", "node_agent.cli", "run", "--config", str(config)],
            env=os.environ | {"NOTIFY_SOCKET": str(address)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )
        try:
            while b"READY=1" not in heard.recv(4096):
                pass
            return time.monotonic() - began_s
        except TimeoutError:
            agent.kill()
            raise RuntimeError(
                f"the agent did not get ready: {agent.stderr.read()[-300:].decode(errors='replace')}"
            ) from None
        finally:
            agent.kill()
            agent.communicate()


def check_start(report: Report, bundle: Path) -> None:
    """Cold starts of the agent, with four shards."""
    with tempfile.TemporaryDirectory(prefix="spacemoe-start-") as folder:
        cold = [(_drop_caches(), start_s(Path(folder), bundle)) for _ in range(ROUNDS)]
    times = [round(each, 2) for _, each in cold]
    fact = {
        "s": times,
        "median_s": statistics.median(times),
        "n": ROUNDS,
        "caches_dropped": all(dropped for dropped, _ in cold),
    }
    report.check(f"the agent starts within {MAX_START_S:g} s on one core here", max(times) < MAX_START_S, fact)
