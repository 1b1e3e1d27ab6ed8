"""What the node's tests share: a small real bundle with its reference in numpy, a ROUTER, an MQTT observer, an agent process.

The reference expert is written here in float64 from the SwiGLU formula; only the dequantized weights come from quantize.nbits,
whose own tests check them against onnxruntime.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paho.mqtt.client as mqtt
import zmq

from node_agent import frame, shard

WAIT_S = 15.0
LAYERS, EXPERTS, HIDDEN, INTERMEDIATE = 2, 4, 64, 48
PRECISIONS = ("fp32", "int8", "int4")
BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class TestBundle:
    """`weights[layer, expert, precision]` = (gate_up [2I, D], down [D, I]) float64, as the shard holds them."""

    __test__ = False
    root: Path
    weights: dict[tuple[int, int, str], tuple[np.ndarray, np.ndarray]]
    stems: tuple[str, ...]

    def expert(self, layer: int, expert: int, precision: str, x: np.ndarray) -> np.ndarray:
        """down(silu(gate x) * up x) in float64."""
        gate_up, down = self.weights[layer, expert, precision]
        hidden = x.astype(np.float64) @ gate_up.T
        gate, up = hidden[:, :INTERMEDIATE], hidden[:, INTERMEDIATE:]
        return (gate / (1 + np.exp(-gate)) * up) @ down.T

    def partial(self, layer: int, x: np.ndarray, pairs: list[tuple[int, int, int, float]]) -> np.ndarray:
        """Sum over (row, expert, precision id, gate), one term after the other, in float64."""
        out = np.zeros(x.shape)
        for row, expert, precision, gate in pairs:
            out[row] += gate * self.expert(layer, expert, frame.PRECISIONS[precision], x[row : row + 1])[0]
        return out


def make_bundle(root: Path, seed: int = 1) -> TestBundle:
    """A bundle of LAYERS x EXPERTS experts in three precisions, with random weights; by another seed: a newer version of it."""
    from quantize.expert_graph import expert_model
    from quantize.nbits import dequantize, round_to_nearest

    rng = np.random.default_rng(seed)
    weights, entries, stems = {}, [], []
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            gate_up = rng.standard_normal((2 * INTERMEDIATE, HIDDEN)).astype(np.float32) / 8
            down = rng.standard_normal((HIDDEN, INTERMEDIATE)).astype(np.float32) / 7
            for precision in PRECISIONS:
                matrices = [gate_up, down]
                held = matrices
                if precision in BITS:
                    matrices = [round_to_nearest(matrix, BITS[precision], 16) for matrix in matrices]
                    held = [dequantize(matrix) for matrix in matrices]
                weights[layer, expert, precision] = tuple(matrix.astype(np.float64) for matrix in held)
                stem = shard.shard_stem(layer, expert, precision)
                graph, blob = expert_model(*matrices, stem.split("/")[1] + ".bin")
                files = (shard.write_file(root, f"{stem}.onnx", graph), shard.write_file(root, f"{stem}.bin", blob))
                entries.append(shard.ShardEntry(layer, expert, precision, files))
                stems.append(stem.removeprefix("experts/"))
    dims = shard.Dims(HIDDEN, INTERMEDIATE, LAYERS, EXPERTS, 2, 100, 4, 2, 16, 64)
    manifest = shard.Manifest(
        name="rig",
        family="qwen3_moe",
        base_model="random",
        revision="0",
        licence="Apache-2.0",
        dims=dims,
        routing=shard.Routing("softmax_topk", True),
        bos_id=None,
        eos_ids=(),
        moe_layers=tuple(range(LAYERS)),
        trunk_precision="fp32",
        segments=(),
        shards=tuple(entries),
        files=(),
        recipe={},
        created_at="2026-01-01T00:00:00Z",
    )
    shard.write_manifest(root, manifest)
    return TestBundle(root, weights, tuple(stems))


class Ground:
    """A ROUTER as the ground station has it; one node at a time."""

    def __init__(self, node: str = "n1", endpoint: str = "tcp://127.0.0.1:*", keys: tuple[bytes, bytes] | None = None):
        self.node = node.encode()
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self.socket.setsockopt(zmq.RCVTIMEO, int(WAIT_S * 1000))
        if keys:
            self.socket.curve_server = True
            self.socket.curve_publickey, self.socket.curve_secretkey = keys
        self.socket.bind(endpoint)
        self.endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def __enter__(self) -> Ground:
        return self

    def __exit__(self, *exc: object) -> None:
        self._context.destroy(linger=0)

    def send(self, data: bytes) -> None:
        self.socket.send_multipart((self.node, data))

    def receive(self, timeout_s: float = WAIT_S) -> frame.Frame:
        """The next frame that is no HELLO.  Raises: TimeoutError."""
        end = time.monotonic() + timeout_s
        while True:
            if not self.socket.poll(max(0.0, end - time.monotonic()) * 1000):
                raise TimeoutError(f"no answer within {timeout_s} s")
            identity, data = self.socket.recv_multipart()
            received = frame.unpack(data)
            # what was queued when the node dialled anew and took over its id comes under a made-up one (handover)
            assert identity == self.node or identity[:1] == b"\0"
            if received.kind != frame.HELLO:
                return received

    def hello(self) -> frame.Frame:
        """The next HELLO; whatever comes before it is an error of the test."""
        identity, data = self.socket.recv_multipart()
        received = frame.unpack(data)
        assert (identity, received.kind) == (self.node, frame.HELLO)
        return received

    def ask(self, request: frame.Frame | bytes, timeout_s: float = WAIT_S) -> frame.Frame:
        self.send(request if isinstance(request, bytes) else frame.pack(request))
        return self.receive(timeout_s)

    def ask_until_answered(self, request: frame.Frame | bytes) -> tuple[frame.Frame, int]:
        """(answer, tries that were lost): for a node whose connection breaks and comes back.  Raises: TimeoutError."""
        end = time.monotonic() + WAIT_S
        lost = 0
        while time.monotonic() < end:
            try:
                return self.ask(request, timeout_s=0.5), lost
            except (TimeoutError, zmq.ZMQError):  # lost with the connection, or not dialled again yet
                lost += 1
                time.sleep(0.05)
        raise TimeoutError(f"no answer to {lost} tries")


class Observer:
    """A paho client that keeps every message below spacemoe/ as (leaf below node/<id>, parsed JSON, retain flag)."""

    def __init__(self, host: str, port: int, fleet: str = "test", node: str = "n1"):
        self.prefix = f"spacemoe/v1/{fleet}/node/{node}/"
        self._arrived = threading.Condition()
        self._cursor: dict[str, int] = {}
        self.all: list[tuple[str, dict, bool]] = []
        self.properties: list = []
        self._ready = threading.Event()
        self.client = mqtt.Client(
            mqtt.CallbackAPIVersion.VERSION2, client_id=f"observer-{secrets.token_hex(4)}", protocol=mqtt.MQTTv5
        )
        self.client.reconnect_delay_set(0.1, 0.3)
        self.client.on_message = self._message
        self.client.on_connect = lambda client, *_: client.subscribe("spacemoe/#", 1)
        self.client.on_subscribe = lambda *_: self._ready.set()
        self.client.connect(host, port, 10)
        self.client.loop_start()
        assert self._ready.wait(WAIT_S)

    def __enter__(self) -> Observer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.client.disconnect()
        self.client.loop_stop()

    def _message(self, client: mqtt.Client, userdata: object, message: mqtt.MQTTMessage) -> None:
        if not message.topic.startswith(self.prefix):
            return
        leaf = message.topic.removeprefix(self.prefix)
        if leaf.startswith("command/"):
            return
        with self._arrived:
            self.all.append((leaf, json.loads(message.payload), message.retain))
            self.properties.append(message.properties)
            self._arrived.notify_all()

    def next(self, leaf: str, condition=lambda tree: True, timeout_s: float = WAIT_S) -> dict:
        """The next message of that leaf, after the last one that was returned, for which the condition holds."""
        end = time.monotonic() + timeout_s
        at = self._cursor.get(leaf, 0)
        with self._arrived:
            while True:
                while at < len(self.all):
                    got, tree, _ = self.all[at]
                    at += 1
                    if got == leaf and condition(tree):
                        self._cursor[leaf] = at
                        return tree
                if not self._arrived.wait(max(0.0, end - time.monotonic())) and time.monotonic() >= end:
                    raise AssertionError(
                        f"no such {leaf} within {timeout_s} s; there were {[m[0] for m in self.all][-50:]}"
                    )

    def command(self, name: str, payload: object, retain: bool = False, properties=None) -> None:
        text = payload if isinstance(payload, (str, bytes)) else json.dumps(payload)
        self.client.publish(f"{self.prefix}command/{name}", text, 1, retain, properties)


def toml(tables: dict[str, dict]) -> str:
    text = ""
    for table, values in tables.items():
        text += f"[{table}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()) + "\n"
    return text


def agent_tables(folder: Path, endpoint: str, bundle: TestBundle | None = None, broker=None) -> dict[str, dict]:
    """Configuration of an agent n1 of fleet test; tests change what they are about."""
    tables = {
        "node": {"id": "n1", "fleet": "test", "board": "test rig", "state_dir": str(folder / "state")},
        "data": {"endpoint": endpoint},
        "telemetry": {"period_s": 0.1, "sample_hz": 50},
    }
    if bundle is not None:
        tables["bundle"] = {"path": str(bundle.root), "shards": list(bundle.stems)}
    if broker is not None:
        tables["broker"] = {"host": broker.host, "port": broker.port}
    return tables


class AgentProcess:
    """`python -m node_agent.cli run` as a child; killed when the test ends."""

    def __init__(self, folder: Path, tables: dict[str, dict]):
        self.config = folder / "agent.toml"
        self.config.write_text(toml(tables))
        self.log = folder / "agent.log"
        self.process = self._start()

    def _start(self) -> subprocess.Popen:
        with open(self.log, "ab") as log:
            command = [sys.executable, "-m", "node_agent.cli", "run", "--config", str(self.config)]
            root = str(Path(__file__).resolve().parent.parent)
            return subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=root,
                env=os.environ | {"PYTHONPATH": root},
            )

    def restart(self) -> None:
        self.process = self._start()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(WAIT_S)

    def text(self) -> str:
        return self.log.read_text()

    def __enter__(self) -> AgentProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(WAIT_S)
