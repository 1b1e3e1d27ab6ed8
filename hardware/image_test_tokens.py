"""The part of `make image-test` that is about the main job: booted boards get their shards and write text, also after a power cut.

The reference model is cut twice: once calibrated, once rounded to nearest, so that the second bundle has other 8-bit shards of the same
names, an update. Leaves out: images and boots (image_test.py).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from hardware.qemu_machine import Machine, QemuError

PROMPT, TOKENS = "In the beginning", 8
NAME = "image-test"
CALIBRATION_TOKENS = 2048
PATIENCE_S = 600.0
ANSWER_S = 60.0  # an emulated board under load takes its time for a layer
EXIT_CHECK = 3
CUT_AT = 0.35
"""Share of an update's expected time after which the power is cut."""


class Report(Protocol):
    """What is needed of image_test.Report."""

    folder: Path
    facts: dict[str, object]

    def say(self, text: str) -> None: ...

    def check(self, name: str, held: bool, fact: object) -> None: ...


Spacemoe = Callable[..., dict]


def bundles(report: Report, spacemoe: Spacemoe, fleet: Path, checkpoint: Path) -> tuple[Path, Path]:
    """The bundle and its update, both signed by the fleet."""
    made = report.folder / "bundle", report.folder / "bundle-newer"
    for path, options in zip(made, (("--max-tokens", CALIBRATION_TOKENS), ("--rtn",))):
        words = ("quantize", checkpoint, "-o", path, "--precision", "int8,fp32", "--name", NAME, "--force", *options)
        spacemoe(*words)
        spacemoe("bundle", "sign", path, "--dir", fleet)
    return made


def _words(fleet: Path, bundle: Path, precision: str, codec: str) -> list[str]:
    given = ("--dir", fleet, "--bundle", bundle, "--precision", precision, "--codec", codec, "--tokens", TOKENS)
    return [
        "generate",
        PROMPT,
        *map(str, given),
        *("--replica", "none", "--parity"),
        *("--patience", str(PATIENCE_S), "--timeout", str(ANSWER_S)),
    ]


def _generated(words: list[str]) -> dict:
    """The result of a generation, also where its tokens differ from one process's.  Raises: RuntimeError."""
    line = [sys.executable, "-m", "ground_station.cli", *words, "--json"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=2 * PATIENCE_S)
    if done.returncode not in (0, EXIT_CHECK):
        raise RuntimeError(f"spacemoe generate failed ({done.returncode}): {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout)


def _fact(result: dict) -> dict:
    parity = result["parity"]
    return {
        "text": result["text"],
        "tokens_equal": f"{parity['tokens_equal']} of {parity['tokens']}",
        "max_logit_diff": parity["max_logit_diff"],
        "tokens_per_s": result["tokens_per_s"],
        "ladder": result["ladder"],
        "delivered": result["delivered"],
        "served": {node["id"]: node["served"] for node in result["nodes"]},
    }


def check_tokens(report: Report, fleet: Path, bundle: Path, nodes: set[str]) -> float:
    """Text with fp32 shards, equal to one process's, and with 8-bit ones; how long those took to send, in seconds."""
    exact = _generated(_words(fleet, bundle, "fp32", "fp32"))
    took_part = {node["id"] for node in exact["nodes"] if node["served"]} == nodes
    name = f"fp32 shards: {TOKENS} tokens of both boards equal one process's"
    report.check(name, exact["parity"]["equal"] is True and took_part, _fact(exact))
    eight = _generated(_words(fleet, bundle, "int8", "q8"))
    name = "8-bit shards: largest difference of a logit, Arm and x86"
    report.check(name, not eight["ladder"] and eight["tokens"] == TOKENS, _fact(eight))
    return float(eight["delivered"]["s"])


def check_power_cut(
    report: Report,
    fleet: Path,
    newer: Path,
    update_s: float,
    node: str,
    machines: dict[str, Machine],
    boot: Callable[[], Machine],
    boot_s: float,
) -> None:
    """Cuts the power of `node` in the middle of an update of its shards, boots it again, and sees that whole shards serve.

    `boot()` starts the same card again; `update_s`: how long the update is expected to take.
    """
    line = [sys.executable, "-u", "-m", "ground_station.cli", *_words(fleet, newer, "int8", "q8")]
    log = report.folder / "update.log"
    with open(log, "wb") as output:
        update = subprocess.Popen(line, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    try:
        _until(lambda: b"are to be sent" in log.read_bytes(), PATIENCE_S, f"no update began: see {log}")
        time.sleep(CUT_AT * update_s)
        under_way = update.poll() is None and b"tokens/s" not in log.read_bytes()
        machines[node].cut_power()
        report.check(
            f"{node}: power cut in the middle of an update of its shards", under_way, f"after {CUT_AT * update_s:.1f} s"
        )
        seen = _seen(report)
        machines[node] = boot()
        machines[node].wait_for(r"spacemoe-report .*agent_state=running", boot_s)
        _until(
            lambda: re.search(rf"{node} online: [^\"]*", _seen(report)[len(seen) :]), PATIENCE_S, f"{node} is not back"
        )
        back = re.search(rf"{node} online: [^\"]*", _seen(report)[len(seen) :]).group()
        report.check(f"{node}: back after the cut, with whole shards", not re.search(r"\b0 shards", back), back)
        code = update.wait(2 * PATIENCE_S)
        report.check(
            "the update went on to its end by itself", code in (0, EXIT_CHECK), log.read_text(errors="replace")[-300:]
        )
    finally:
        update.kill()
        update.wait()
    after = _generated(_words(fleet, newer, "int8", "q8"))
    report.check(
        "the updated shards serve, and nothing was left to send", after["delivered"]["shards"] == 0, _fact(after)
    )


def _seen(report: Report) -> str:
    return (report.folder / "ground.log").read_text(errors="replace")


def _until(held: Callable[[], object], timeout_s: float, text: str) -> None:
    """Raises: QemuError with `text` when the time is over."""
    end_s = time.monotonic() + timeout_s
    while not held():
        if time.monotonic() > end_s:
            raise QemuError(text)
        time.sleep(0.2)
