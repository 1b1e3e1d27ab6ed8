"""What keeps the enrolment server standing among strangers: bounded connections, seconds, bytes of a head, and failed attempts.

Leaves out: what is served (enrol_server.py).
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import socket
import socketserver
import ssl
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable

log = logging.getLogger("spacemoe.enrol")
MAX_CONNECTIONS, MAX_PER_PEER = 64, 16
CONNECTION_S = 20.0
"""A connection is cut after that long, whatever it is doing."""
SPEAK_S = 5.0
"""Who has not finished the TLS handshake and sent the request's first line by then is cut: saying nothing is the cheapest way to
hold a place."""
MAX_HEAD_BYTES = 16 * 1024
MAX_PEERS, FAILURES, FAILURES_S = 1024, 30, 60.0


class Attempts:
    """How often each address failed of late. Bounded: where the table is full, the address that failed longest ago is forgotten."""

    def __init__(self, limit: int = FAILURES, window_s: float = FAILURES_S, peers: int = MAX_PEERS):
        self._limit, self._window_s, self._peers = limit, window_s, peers
        self._failed: OrderedDict[str, deque[float]] = OrderedDict()
        self._lock = threading.Lock()

    def wait_s(self, peer: str, now_s: float) -> float:
        """Seconds until `peer` may try again; 0: now."""
        with self._lock:
            times = self._failed.get(peer)
            if times is None or len(times) < self._limit:
                return 0.0
            return max(0.0, times[0] + self._window_s - now_s)

    def failed(self, peer: str, now_s: float) -> None:
        with self._lock:
            self._failed.setdefault(peer, deque(maxlen=self._limit)).append(now_s)
            self._failed.move_to_end(peer)
            while len(self._failed) > self._peers:
                self._failed.popitem(last=False)


class BoundedServer(socketserver.TCPServer):
    """TLS with one thread per connection, up to a bound; the accepting thread also cuts connections that take too long."""

    allow_reuse_address = True
    request_queue_size = 64

    def __init__(
        self,
        address: tuple[str, int],
        handler: type[socketserver.BaseRequestHandler],
        context: Callable[[], ssl.SSLContext],
        connection_s: float = CONNECTION_S,
    ):
        """`context`: asked for each connection. Raises: OSError when the address is not to be had."""
        self._context, self._connection_s = context, connection_s
        self._open: dict[threading.Thread, list] = {}  # [deadline, peer, socket]
        self._speak_s = min(SPEAK_S, connection_s)
        self._lock = threading.Lock()
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, handler)

    def process_request(self, request: socket.socket, client_address) -> None:
        peer = client_address[0]
        thread = threading.Thread(target=self._serve, args=(request, client_address), name="enrolling", daemon=True)
        with self._lock:
            same = sum(each[1] == peer for each in self._open.values())
            full = len(self._open) >= MAX_CONNECTIONS or same >= MAX_PER_PEER
            if not full:
                self._open[thread] = [time.monotonic() + self._speak_s, peer, request]
        if full:
            log.warning(
                "a connection from %s was closed: %d are open, %d of them from there", peer, len(self._open), same
            )
            self.shutdown_request(request)
            return
        try:
            thread.start()
        except RuntimeError:  # no thread to be had
            with self._lock:
                self._open.pop(thread)
            self.shutdown_request(request)

    def _serve(self, request: socket.socket, client_address) -> None:
        me = threading.current_thread()
        try:
            request.settimeout(self._connection_s)
            request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._context().wrap_socket(request, server_side=True, do_handshake_on_connect=False) as secure:
                with self._lock:
                    self._open[me][2] = secure
                secure.do_handshake()
                self.RequestHandlerClass(secure, client_address, self)
                with contextlib.suppress(OSError, ValueError):
                    socket.socket.shutdown(secure, socket.SHUT_WR)
        except ssl.SSLError as error:
            log.warning("TLS with %s failed: %s", client_address[0], error.reason or "the connection ended")
        except OSError as error:
            log.info("the connection of %s ended: %s", client_address[0], error.strerror or type(error).__name__)
        except Exception:  # a thread's traceback would go nowhere that anybody looks
            log.exception("a request from %s failed", client_address[0])
        finally:
            self.shutdown_request(request)
            with self._lock:
                self._open.pop(me, None)

    def spoke(self) -> None:
        """The connection of this thread has sent its request's first line, and may take the rest of its time."""
        with self._lock:
            self._open[threading.current_thread()][0] += self._connection_s - self._speak_s

    def service_actions(self) -> None:
        self.cut(time.monotonic())

    def cut(self, now_s: float) -> None:
        """Ends the connections whose time is over; their threads find the socket closed."""
        with self._lock:
            for deadline, _, connection in self._open.values():
                if now_s > deadline:
                    with contextlib.suppress(OSError):
                        # the plain socket's: SSLSocket.shutdown would take the TLS state from under the thread that reads
                        socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def joined(self, patience_s: float) -> None:
        deadline = time.monotonic() + patience_s
        with self._lock:
            threads = list(self._open)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def handle_error(self, request, client_address) -> None:
        log.exception("a connection from %s failed", client_address[0])


class BoundedHead:
    """The reading half of a connection, which gives no more than a request may have."""

    def __init__(self, file):
        self._file, self.left = file, MAX_HEAD_BYTES

    def readline(self, size: int = -1) -> bytes:
        if self.left == 0:
            raise http.client.LineTooLong("head")  # the parser answers it by 431
        line = self._file.readline(min(self.left, size) if size >= 0 else self.left)
        self.left -= len(line)
        return line

    def read(self, size: int) -> bytes:
        return self._file.read(size)

    def close(self) -> None:
        self._file.close()

    @property
    def closed(self) -> bool:
        return self._file.closed
