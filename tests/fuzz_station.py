"""A ground station as a process of its own: its Link and, with a broker, its Control, told what to do in lines of JSON.

Run as `python fuzz_station.py DEFECT [HOST PORT]`; DEFECT is code to run first, for the negative controls, or nothing. The first
line that it prints says where its Link listens; it ends when its standard input does. Leaves out trunk and decoding.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import select
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

# ---------------------------------------------------------------- the child


def serve(link, order: dict) -> dict:
    """Asks `node` again and again until `frames` bad frames have come and `least` answers, or the time is over."""
    end_s = time.monotonic() + order["timeout_s"]
    outcomes: Counter[str] = Counter()
    answers = set()
    request = bytes.fromhex(order["request"])
    request_id = int.from_bytes(request[16:24], "little")
    while time.monotonic() < end_s:
        answer = link.exchange({order["node"]: (request_id, request)}, 10.0)[order["node"]]
        if hasattr(answer, "x"):
            outcomes["partial"] += 1
            answers.add(hashlib.sha256(answer.x.tobytes()).hexdigest())
        else:
            outcomes[f"{answer.kind}: {answer.text}"] += 1
        if link.bad_frames + link.unasked_frames >= order["frames"] and outcomes.total() >= order["least"]:
            break
    return {"outcomes": outcomes, "answers": sorted(answers), "refused": link.bad_frames + link.unasked_frames}


def counts(link, control) -> dict:
    tree = {
        "bad_frames": link.bad_frames,
        "unasked_frames": link.unasked_frames,
        "dropped_connections": link.dropped_connections,
        "peers": sorted(link.peers),
    }
    if control is not None:
        nodes = control.snapshot()
        tree["malformed"] = control.malformed
        tree["nodes"] = {name: dataclasses.asdict(state.counts) for name, state in nodes.items()}
        tree["ready"] = [name for name, state in nodes.items() if state.ready(control.now())]
    return tree


def carry_out(order: dict, link, control) -> dict:
    if order["do"] == "serve":
        return serve(link, order)
    if order["do"] == "command":
        return dataclasses.asdict(control.command(order["node"], order["name"], order["timeout_s"]))
    return counts(link, control)


def child(arguments: list[str]) -> None:
    from ground_station.control import Control
    from ground_station.link import Link

    defect, *broker = arguments
    exec(defect, {})
    with ExitStack() as stack:
        link = stack.enter_context(Link())
        control = stack.enter_context(Control("test", broker[0], int(broker[1]))) if broker else None
        print(json.dumps({"endpoint": link.endpoint}), flush=True)
        while True:
            if select.select([sys.stdin], [], [], 0.002)[0]:
                line = sys.stdin.readline()
                if not line:
                    return
                print(json.dumps(carry_out(json.loads(line), link, control)), flush=True)
            link.drain()


# ---------------------------------------------------------------- the test's end


class Station:
    """The process; killed when the test ends. `endpoint` is its Link's."""

    def __init__(self, folder: Path, *broker: str | int, defect: str = ""):
        self.log = folder / "station.log"
        root = str(Path(__file__).resolve().parents[1])
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, defect, *map(str, broker)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"PYTHONPATH": root},
            )
        self.endpoint = self._hear()["endpoint"]

    def _say(self, line: str) -> None:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def _hear(self) -> dict:
        line = self.process.stdout.readline()
        assert line, f"the ground station ended: {self.log.read_text()[-2000:]}"
        return json.loads(line)

    def ask(self, do: str, **more: object) -> dict:
        self._say(json.dumps({"do": do, **more}))
        return self._hear()

    def begin(self, do: str, **more: object) -> None:
        """As `ask`, but the answer is fetched by `end`."""
        self._say(json.dumps({"do": do, **more}))

    def end(self) -> dict:
        return self._hear()

    def __enter__(self) -> Station:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            pipe.close()


if __name__ == "__main__":
    child(sys.argv[1:])
