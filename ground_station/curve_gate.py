"""Who may speak on an encrypted ROUTER, and as whom: keys of the fleet's records and no others (ZAP, RFC 27), each under its own name.

libzmq lets a peer choose its routing id, so a node could name itself as another and take over its messages (ROUTER_HANDOVER). Here
the answer to the key check sets the routing id of the connection to the node whose key it is, whatever the peer says; libzmq takes
that over only where it has read the peer's own wish before, hence the fence. Every message is checked again by its user id.
A node that may not speak any more is cut off by shutting down the socket of its connection, since libzmq itself cannot do that.
Leaves out: which keys those are (allow_list.py). Source: libzmq 4.3.5, curve_server.cpp, mechanism.cpp, router.cpp.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import zmq
from zmq.utils import z85

from ground_station.allow_list import AllowList

log = logging.getLogger("spacemoe.fleet")

ZAP_ENDPOINT = "inproc://zeromq.zap.01"
DOMAIN = b"spacemoe"
LOOK_S = 0.25
HANDSHAKE_MS = 5000
FENCE_S = 2.0
FENCE_START_S = 5.0
JOIN_S = 5.0
_KEY, _CONNECTION = "X-Curve-Key", "X-Connection"  # properties that the gate adds to every message of a connection
_FILE = "__fd"  # libzmq's own, behind the old ZMQ_SRCFD


class _Seen(NamedTuple):
    """A connection that messages came over: its descriptor, and whose it is."""

    number: int
    inode: int
    node: str
    name: bytes
    key: bytes


class _Fence:
    """Shows that a context's only I/O thread has left what it was doing: a message went through it since.

    libzmq asks for the key check first and reads the peer's own routing id after that, in one go; what is answered too early,
    by a thread that was quicker, is overwritten.
    """

    def __init__(self, context: zmq.Context):
        """Raises: zmq.ZMQError, OSError."""
        self._near, self._far = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        folder = tempfile.mkdtemp(prefix="spacemoe-fence-")  # nobody else can reach it
        try:
            for each in (self._near, self._far):
                each.setsockopt(zmq.LINGER, 0)
            endpoint = f"ipc://{folder}/f"
            self._far.bind(endpoint)
            self._near.connect(endpoint)
            self._near.send(b"")
            if not self._far.poll(FENCE_START_S * 1e3):
                raise OSError("the machine is too busy to open the data plane; try again")
            self._far.recv()
        except BaseException:
            self.close()
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def wait(self) -> bool:
        """False where the I/O thread did not come round in time."""
        while self._far.poll(0):  # of an earlier one that came late
            self._far.recv()
        self._near.send(b"")
        if not self._far.poll(FENCE_S * 1e3):
            return False
        self._far.recv()
        return True

    def close(self) -> None:
        self._near.close()
        self._far.close()


def _property(name: bytes, value: bytes) -> bytes:
    """Metadata as ZMTP writes it (RFC 23)."""
    return bytes([len(name)]) + name + len(value).to_bytes(4, "big") + value


class Gate:
    """The gate of one context, which has one I/O thread, and of the ROUTERs in it that `guard` was called for.

    Its own thread answers libzmq and looks at the records four times a second; `admits` belongs to the sockets' thread.
    """

    def __init__(self, context: zmq.Context, allowed: AllowList):
        """Raises: zmq.ZMQError, OSError."""
        self._allowed = allowed
        self._context = context
        self._readable = True
        self._ports: set[object] = set()
        self._seen: dict[str, _Seen] = {}  # by a token that the gate gives to each connection; one for each descriptor
        self._tokens: dict[int, str] = {}  # by descriptor, the latest
        self._handshakes = 0
        self.dropped: Counter[str] = Counter()  # 'impostor', 'revoked': messages, each at the cost of its connection
        self.refused = 0  # keys that let nobody in
        self._stop = threading.Event()
        self._enforced = allowed.refresh()
        self._answers = context.socket(zmq.REP)
        self._answers.setsockopt(zmq.LINGER, 0)
        try:
            self._answers.bind(ZAP_ENDPOINT)
            self._fence = _Fence(context)
        except BaseException:
            self._answers.close()
            raise
        self._thread = threading.Thread(target=self._run, name="curve gate", daemon=True)
        self._thread.start()

    @staticmethod
    def guard(router: zmq.Socket) -> None:
        """Makes a CURVE server ask the gate. Before its bind. Without a gate that answers nobody gets in."""
        router.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
        router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        router.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)

    def watch(self, router: zmq.Socket) -> None:
        """Remembers where a bound ROUTER listens, to find its connections by."""
        endpoint = router.getsockopt_string(zmq.LAST_ENDPOINT)
        kind, _, where = endpoint.partition("://")
        self._ports.add(int(where.rpartition(":")[2]) if kind == "tcp" else where)

    def close(self) -> None:
        """Before the context's end."""
        self._stop.set()
        self._thread.join(JOIN_S)
        self._answers.close()
        self._fence.close()

    # ------------------------------------------------------------ the sockets' thread

    def admits(self, identity: bytes, part: zmq.Frame) -> bool:
        """Whether this part of a message is from the node that its routing id names, and that node may speak.

        Where not, it is counted and its connection cut.
        """
        try:
            token = part.get(_CONNECTION)
            seen = self._seen.get(token) or self._first(token, part)
        except (zmq.ZMQError, ValueError):
            self.dropped["impostor"] += 1
            return False
        if identity != seen.name:
            kind = "impostor"
        elif not self._allowed.holds(seen.node, seen.key):
            kind = "revoked"
        else:
            return True
        self.dropped[kind] += 1
        if self.dropped[kind] == 1:
            log.warning(
                "dropped a message under the name %s of a connection of %s (%s)", identity[:40], seen.node, kind
            )
        _shut(seen.number, seen.inode)
        return False

    def _first(self, token: str, part: zmq.Frame) -> _Seen:
        """Notes a connection by its first message.  Raises: zmq.ZMQError, ValueError."""
        number, node = int(part.get(_FILE)), part.get("User-Id")
        try:
            inode = os.fstat(number).st_ino
        except OSError:  # closed since: the message is good all the same
            inode = 0
        seen = self._seen[token] = _Seen(number, inode, node, node.encode(), part.get(_KEY).encode())
        self._seen.pop(self._tokens.get(number, ""), None)  # of an earlier connection that had this descriptor
        self._tokens[number] = token
        return seen

    def allows(self, identity: bytes) -> bool:
        """Whether anything may be sent to that node."""
        return self._allowed.allows(identity.decode("ascii", "replace"))

    # ------------------------------------------------------------ the gate's own thread

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                asked = self._answers.poll(LOOK_S * 1e3)
                self._look()
                if asked:
                    self._answers.send_multipart(self._answer(self._answers.recv_multipart()))
            except zmq.ZMQError as error:
                if not self._stop.is_set():
                    log.error("the data plane lets nobody in any more: %s; start again", error)
                return

    def _look(self) -> None:
        """Takes in the records; cuts who was on the list and is not any more."""
        try:
            now = self._allowed.refresh()
        except (ValueError, OSError) as error:
            if self._readable:
                log.error("the data plane lets no new connection in until the records can be read: %s", error)
            self._readable = False
            return
        self._readable = True
        if now is not self._enforced:
            before, self._enforced = self._enforced, now
            if any(now.get(node) != key for node, key in before.items()):
                self._cut(now)

    def _answer(self, parts: list[bytes]) -> list[bytes]:
        """The answer to a request of RFC 27: version, id, domain, address, identity, mechanism, key.

        After a 300 libzmq lets the handshake run out and dials again by itself, after a 400 never again on that socket: an agent
        makes a new one every few seconds.
        """
        request = parts[1] if len(parts) > 1 else b""
        node = None
        if len(parts) == 7 and (parts[0], parts[5]) == (b"1.0", b"CURVE") and len(parts[6]) == 32:
            key = z85.encode(parts[6])
            node = self._allowed.node_of(key)
        if node is None:
            self.refused += 1
            return [b"1.0", request, b"400", b"no key of this fleet", b"", b""]
        if not self._readable or not self._fence.wait():
            self.refused += 1
            log.warning("the data plane cannot let %s in now", node)
            return [b"1.0", request, b"300", b"try again later", b"", b""]
        name = node.encode()
        self._handshakes += 1
        own = ((b"Identity", name), (_KEY.encode(), key), (_CONNECTION.encode(), b"%d" % self._handshakes))
        metadata = b"".join(_property(*each) for each in own)
        return [b"1.0", request, b"200", b"OK", name, metadata]

    def _cut(self, allowed: Mapping[str, bytes]) -> None:
        """Cuts every connection that is not known to be of a node on the list; who is, and has not spoken yet, comes again."""
        seen = {each.number: each for each in self._seen.copy().values()}
        for number in map(int, os.listdir("/dev/fd")):
            with contextlib.suppress(OSError):
                inode = os.fstat(number).st_ino
                known = seen.get(number)
                if known is None or known.inode != inode or allowed.get(known.node) != known.key:
                    if self._listens_at(number):
                        _shut(number, inode)

    def _listens_at(self, number: int) -> bool:
        """Whether this descriptor is a connection that one of our ROUTERs has accepted."""
        with contextlib.suppress(OSError), _copy(number) as copy:
            name = copy.getsockname()
            copy.getpeername()
            return (name[1] if isinstance(name, tuple) else name) in self._ports
        return False


@contextlib.contextmanager
def _copy(number: int) -> Iterator[socket.socket]:
    """A second descriptor of a socket.  Raises: OSError for what is none."""
    twin = os.dup(number)
    try:
        copy = socket.socket(fileno=twin)
    except OSError:
        os.close(twin)
        raise
    with copy:
        yield copy


def _shut(number: int, inode: int) -> None:
    """Ends the connection behind a descriptor of libzmq's, unless another has taken its number since; libzmq then closes it."""
    with contextlib.suppress(OSError), _copy(number) as copy:
        if os.fstat(copy.fileno()).st_ino == inode:
            copy.shutdown(socket.SHUT_RDWR)
