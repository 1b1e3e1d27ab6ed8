"""The data plane of a node: hidden states in, gate-weighted partial sums out, over one ZeroMQ DEALER that dials the ground.

`Service` is the pure part, bytes in and bytes out, and never raises for what a frame holds: a bad frame is counted by kind
and answered by an ERROR frame. `DataPlane` is the loop around it, one thread. Nothing is logged on the hot path.
Leaves out: what an expert is (experts.py) and the layout of frames (frame.py).
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from typing import Callable

import zmq
from zmq.utils.monitor import recv_monitor_message

from node_agent import compress, frame, pacing
from node_agent.config import LinkConfig
from node_agent.counters import Counters
from node_agent.curve_key import own_key
from node_agent.errors import UnknownExpertError
from node_agent.experts import Experts
from node_agent.pacing import Pacer, Request
from node_agent.zmtp import CURVE_BYTES, HandshakeError, OversizedError, ZmtpDealer

HELLO_PERIOD_S = 1.0
HELLO_RETRY_S = 0.1  # while there is no connection
MAX_RETRY_S = 1.0
WAIT_MS = 100  # longest sleep in recv: how soon a stop is seen
QUEUE_FRAMES = 16  # high-water mark of each direction
MAX_DRAINED = 64  # frames held back while one is computed
MAX_DRAINED_BYTES = frame.MAX_PAYLOAD_BYTES
CONNECT_TIMEOUT_MS = 2000
DEAD_S = 4.0  # without connection and without a try for longer: ZeroMQ has given up, and the socket is made anew
FIRST_ERROR_CHARS = 200

OnError = Callable[[str, str], None]


class Service:
    """Answers frames. `on_first_error(kind, text)` is called for the first error of each kind."""

    def __init__(self, node: str, experts: Experts, counters: Counters, on_first_error: OnError):
        self.number = 0  # ours, from WELCOME
        self.welcomed = False
        self._node, self._experts, self._counters, self._on_first_error = node, experts, counters, on_first_error
        self.hello = frame.pack(frame.Frame(frame.HELLO, text=node))

    def answer(self, data: bytes, received_ns: int) -> bytes | None:
        """The reply to `data`, which arrived at `received_ns` of time.perf_counter_ns(), or None where none is due."""
        self._counters.bytes_in += len(data)
        started_ns = time.perf_counter_ns()
        try:
            request = frame.unpack(data)
        except frame.FrameError as error:
            stale = data[:4] == frame.MAGIC and len(data) > 4 and data[4] != frame.VERSION
            return self._refuse("version" if stale else "malformed", str(error), error.request_id)
        if request.kind == frame.EXPERTS:
            return self._experts_reply(request, received_ns, time.perf_counter_ns() - started_ns)
        if request.kind == frame.PING:
            return frame.pack(
                frame.Frame(
                    frame.PONG, request.request_id, source=self.number, destination=request.source, text=request.text
                )
            )
        if request.kind == frame.WELCOME:
            self.number, self.welcomed = request.destination, True
            return None
        if request.kind == frame.ERROR:  # never answered: two sides must not send errors to and fro
            self.count("peer", request.text)
            return None
        return self._refuse("kind", f"frame kind {request.kind} is not for a node", request.request_id, request.source)

    def _experts_reply(self, request: frame.Frame, received_ns: int, decode_ns: int) -> bytes:
        start_ns = time.perf_counter_ns()
        if request.budget_us and start_ns - received_ns > request.budget_us * 1000:
            late_ms = (start_ns - received_ns) / 1e6
            text = f"deadline passed: {late_ms:.1f} ms in the queue, the budget was {request.budget_us / 1e3:.1f} ms"
            return self._refuse("deadline", text, request.request_id, request.source, request.layer)
        where = (request.request_id, request.source, request.layer)
        if request.layer not in self._experts.layers:
            return self._refuse("layer", f"layer {request.layer} is not on this node: ask for its birth again", *where)
        self._counters.serving.enter("compute")
        try:
            partial = self._experts.run(request.layer, request.x, request.pairs)
        except UnknownExpertError as error:
            return self._refuse("expert", str(error), *where)
        except ValueError as error:
            return self._refuse("shape", str(error), *where)
        except Exception as error:  # onnxruntime's exceptions have no common base; a node serves on
            return self._refuse("compute", f"{type(error).__name__}: {str(error)[:FIRST_ERROR_CHARS]}", *where)
        finally:
            self._counters.serving.enter("radio")
        computed_ns = time.perf_counter_ns()
        try:
            payload = compress.encode(request.reply_codec, partial, request.reply_step)
        except compress.CodecError as error:
            return self._refuse("compute", f"experts gave a result that cannot be sent: {error}", *where)
        compute_ns, codec_ns = computed_ns - start_ns, decode_ns + time.perf_counter_ns() - computed_ns
        reply = frame.pack(
            frame.Frame(
                frame.PARTIAL,
                request.request_id,
                request.layer,
                source=self.number,
                destination=request.source,
                codec=request.reply_codec,
                x=partial,
                compute_us=compute_ns // 1000,
                codec_us=codec_ns // 1000,
            ),
            payload,
        )
        counters = self._counters
        counters.requests += 1
        counters.tokens += partial.shape[0]
        counters.pairs += len(request.pairs)
        counters.compute_s += compute_ns / 1e9
        counters.codec_s += codec_ns / 1e9
        return reply

    def refuse_work(self, request: Request, kind: str, text: str) -> bytes:
        """The answer to a request that is not computed to protect the board: 'throttled', 'memory' or 'guard'."""
        return self._refuse(kind, f"{kind}: {text}", request.request_id, request.source, request.layer)

    def count(self, kind: str, text: str) -> None:
        if Counters.count(self._counters.link_errors, kind):
            self._on_first_error(kind, text[:FIRST_ERROR_CHARS])

    def _refuse(self, kind: str, text: str, request_id: int, destination: int = frame.GROUND, layer: int = 0) -> bytes:
        self.count(kind, text)
        return frame.pack(
            frame.Frame(
                frame.ERROR,
                request_id,
                layer,
                source=self.number,
                destination=destination,
                text=f"{self._node}: {text}",
            )
        )


def open_dealer(
    context: zmq.Context, node: str, endpoint: str, max_bytes: int, server_key: str, keys: tuple[bytes, bytes] | None
) -> zmq.Socket:
    """libzmq's DEALER, dialling `endpoint`; with `keys` (public, secret) by CURVE, to the server of `server_key` alone."""
    socket = context.socket(zmq.DEALER)
    for option, value in (
        (zmq.ROUTING_ID, node.encode()),
        (zmq.LINGER, 0),
        (zmq.IMMEDIATE, 1),  # nothing is queued for a ground station that is not there
        (zmq.SNDHWM, QUEUE_FRAMES),
        (zmq.RCVHWM, QUEUE_FRAMES),
        (zmq.MAXMSGSIZE, max_bytes + CURVE_BYTES),
        (zmq.RECONNECT_IVL, 100),
        (zmq.RECONNECT_IVL_MAX, 1000),
        (zmq.CONNECT_TIMEOUT, CONNECT_TIMEOUT_MS),
        (zmq.TCP_KEEPALIVE, 1),
        (zmq.TCP_KEEPALIVE_IDLE, 10),
        (zmq.TCP_KEEPALIVE_INTVL, 5),
        (zmq.TCP_KEEPALIVE_CNT, 3),
        (zmq.HEARTBEAT_IVL, 2000),  # ZMTP's own, answered by the I/O thread: finds a ground station that vanished
        (zmq.HEARTBEAT_TIMEOUT, 6000),
        (zmq.IPV6, 1),
        (zmq.RCVTIMEO, WAIT_MS),
        (zmq.SNDTIMEO, WAIT_MS),
    ):
        socket.setsockopt(option, value)
    if keys:
        socket.curve_publickey, socket.curve_secretkey = keys
        socket.curve_serverkey = server_key.encode()
    socket.connect(endpoint)
    return socket


class LibzmqDealer:
    """A link by libzmq: encrypted ones, and delivery's. Also watches the connection: libzmq never dials again after a protocol
    error such as a frame over MAXMSGSIZE (session_base.cpp, engine_error: only timeouts and lost connections are retried), so a
    node would stay away for good."""

    def __init__(self, socket: zmq.Socket):
        self._socket = socket
        self._monitor = socket.get_monitor_socket()
        self._connected, self._last_event_s = False, time.monotonic()

    def __enter__(self) -> LibzmqDealer:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.disable_monitor()
        self._socket.close()

    def alive(self, now_s: float) -> bool:
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)["event"]
            self._last_event_s = now_s
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._connected = True
            elif event in (zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED):
                self._connected = False
        return self._connected or now_s - self._last_event_s <= DEAD_S

    def receive(self, wait_s: float) -> bytes | None:
        try:
            if 0 < wait_s < WAIT_MS / 1000 and not self._socket.poll(math.ceil(wait_s * 1000)):
                return None
            return self._socket.recv() if wait_s else self._socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None

    def more(self) -> bool:
        return bool(self._socket.getsockopt(zmq.EVENTS) & zmq.POLLIN)

    def send(self, data: bytes) -> bool:
        try:
            self._socket.send(data)
            return True
        except zmq.Again:  # the ground station went away meanwhile
            return False


class DataPlane:
    """The loop: one thread that owns the socket. Use as a context manager; `failed` holds what ended it early."""

    def __init__(
        self,
        node: str,
        link: LinkConfig,
        experts: Experts,
        counters: Counters,
        on_first_error: OnError,
        pacer: Pacer | None = None,
    ):
        """`pacer`: holds the duty cap; without one there is none."""
        self.service = Service(node, experts, counters, on_first_error)
        self.pacer = pacer or Pacer()
        self.failed: Exception | None = None
        self.beat_s = time.monotonic()  # when the loop came round last
        self.public_key = ""
        self._node, self._link, self._counters = node, link, counters
        self._keys = own_key(link.secret_key_file) if link.server_public_key else None
        if self._keys:
            self.public_key = self._keys[0].decode()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dataplane", daemon=True)

    def __enter__(self) -> DataPlane:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(5.0)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _open(self, context: zmq.Context) -> zmq.Socket:
        link = self._link
        return open_dealer(
            context, self._node, link.endpoint, frame.MAX_FRAME_BYTES, link.server_public_key, self._keys
        )

    def _run(self) -> None:
        """Makes the link anew whenever it fails; plain links without libzmq's I/O thread (see zmtp)."""
        plain = self._keys is None and self._link.endpoint.startswith("tcp://")
        context = None if plain else zmq.Context(io_threads=1)
        pause_s = HELLO_RETRY_S
        try:
            while not self._stop.is_set():
                self.beat_s = time.monotonic()
                waiting: deque[tuple[int, bytes]] = deque()
                try:
                    with self._dial_plain() if plain else LibzmqDealer(self._open(context)) as link:
                        pause_s = HELLO_RETRY_S
                        self._serve(link, waiting)
                except OSError as error:
                    self._counters.serving.leave()
                    for _ in waiting:
                        self.service.count("unanswered", f"the link failed before a frame's turn came: {error}")
                    if isinstance(error, HandshakeError):
                        self.service.count("handshake", f"{self._link.endpoint}: {error}")
                    elif isinstance(error, OversizedError):
                        self.service.count("oversized", str(error))
                    self._stop.wait(pause_s)
                    pause_s = min(2 * pause_s, MAX_RETRY_S)
        except Exception as error:  # the agent reports it and exits: a node without a data plane is no node
            self.failed = error
        finally:
            if context is not None:
                context.destroy(linger=0)

    def _dial_plain(self) -> ZmtpDealer:
        host, _, port = self._link.endpoint.removeprefix("tcp://").rpartition(":")
        return ZmtpDealer(
            host.strip("[]"), int(port), self._node.encode(), frame.MAX_FRAME_BYTES, CONNECT_TIMEOUT_MS / 1000
        )

    def _serve(self, link: ZmtpDealer | LibzmqDealer, waiting: deque[tuple[int, bytes]]) -> None:
        """Serves until a stop, or until the link has to be made anew; `waiting` keeps what had no answer by then.

        Raises: OSError when a plain link fails.
        """
        next_hello_s = 0.0
        while not self._stop.is_set():
            self.beat_s = now_s = time.monotonic()
            if now_s >= next_hello_s:
                if not link.alive(now_s):
                    return
                next_hello_s = now_s + (HELLO_PERIOD_S if link.send(self.service.hello) else HELLO_RETRY_S)
            if not waiting:
                data = link.receive(WAIT_MS / 1000)
                if data is None:
                    continue
                waiting.append((time.perf_counter_ns(), data))
            self._counters.serving.enter("radio")  # and compute inside, while experts run
            self._drain(link, waiting)
            if self.pacer.limited:
                self._serve_limited(link, waiting)
            else:
                received_ns, data = waiting.popleft()
                self._send(link, self.service.answer(data, received_ns))
            self._counters.serving.leave()

    def _serve_limited(self, link: ZmtpDealer | LibzmqDealer, waiting: deque[tuple[int, bytes]]) -> None:
        """One frame at most, as the duty cap allows; or a short wait, which ends when another frame comes."""
        plan = self.pacer.plan(waiting, time.perf_counter_ns())
        waiting.clear()
        waiting.extend(plan.order)
        for request, kind, text in plan.refused:
            self._counters.bytes_in += request.size
            self._send(link, self.service.refuse_work(request, kind, text))
        if plan.wait_s:
            self._counters.serving.leave()
            data = link.receive(min(plan.wait_s, WAIT_MS / 1000))
            if data is not None:
                waiting.append((time.perf_counter_ns(), data))
        elif waiting:
            received_ns, data = waiting.popleft()
            started_ns = time.perf_counter_ns()
            reply = self.service.answer(data, received_ns)
            if pacing.peek(data) is not None:
                self.pacer.computed(started_ns, time.perf_counter_ns())
            self._send(link, reply)

    def _send(self, link: ZmtpDealer | LibzmqDealer, reply: bytes | None) -> None:
        if reply is not None:
            if link.send(reply):
                self._counters.bytes_out += len(reply)
            else:
                Counters.count(self._counters.link_errors, "unsent")

    @staticmethod
    def _drain(link: ZmtpDealer | LibzmqDealer, waiting: deque[tuple[int, bytes]]) -> None:
        """Takes in what has arrived already, so that its budget counts from now and not from when its turn comes."""
        held = sum(len(data) for _, data in waiting)
        while len(waiting) < MAX_DRAINED and held < MAX_DRAINED_BYTES and link.more():
            data = link.receive(0)
            if data is None:
                return
            held += len(data)
            waiting.append((time.perf_counter_ns(), data))
