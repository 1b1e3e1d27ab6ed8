"""Shards over real sockets to real agents: resumed after kill -9, a cut connection and the end of a contact; refused; served."""

from __future__ import annotations

import resource
import time

import numpy as np
import pytest
import zmq
from node_rig import HIDDEN, AgentProcess, Ground, agent_tables, make_bundle

from ground_station.contacts import Contact, plan
from ground_station.control import Control
from ground_station.delivery import Deliverer, DeliveryError, DeliveryRefused, NoContact
from ground_station.delivery_pace import Window
from ground_station.delivery_route import windows_over
from ground_station.link import LinkError, open_router
from node_agent import config, delivery_frame, experts, frame, shard
from node_agent.dataplane import open_dealer
from node_agent.delivery_frame import HEADER_BYTES, Message, Shard
from node_agent.errors import ConfigError


class Stop(Exception):
    """Raised by a test in the middle of a transfer."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle"))


class Rig:
    """A ground station's two sockets and a real agent n1, which has no bundle of its own unless a test gives one."""

    def __init__(self, folder, bundle, keys=None, broker=None, own=None, node=None, extra=None):
        self.bundle, self.manifest = bundle, shard.read_manifest(bundle.root)
        self.ground, self.deliverer = Ground(keys=keys), Deliverer(curve_keys=keys)
        tables = agent_tables(folder, self.ground.endpoint, own, broker)
        tables["data"]["delivery_endpoint"] = self.deliverer.endpoint
        tables["node"] |= node or {}
        for table, fields in (extra or {}).items():
            tables[table] = tables.get(table, {}) | fields
        if keys:
            tables["data"] |= {"server_public_key": keys[0].decode(), "secret_key_file": str(folder / "key")}
        self.folder = folder
        self.agent = AgentProcess(folder, tables)

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *exc) -> None:
        self.agent.__exit__(*exc)
        self.deliverer.close()
        self.ground.__exit__(*exc)

    def deliver(self, stem, **options):
        layer, expert, precision = int(stem[1:3]), int(stem[4:7]), stem[8:]
        entry = self.manifest.shard(layer, expert, precision)
        return self.deliverer.deliver("n1", self.bundle.root, self.manifest, entry, **options)

    def partial_bytes(self) -> int:
        """Of what was received, whole or not."""
        files = [path for path in (self.folder / "state/shards").rglob("*") if path.is_file()]
        return sum(path.stat().st_size for path in files if path.suffix != ".offer")

    def served(self, layer, pairs, rows=1) -> frame.Frame:
        self.ground.send(frame.pack(request(layer, pairs, rows)))
        return self.ground.receive()


def request(layer, pairs, rows=1) -> frame.Frame:
    x = np.random.default_rng(rows).standard_normal((rows, HIDDEN)).astype(np.float32)
    return frame.Frame(frame.EXPERTS, request_id=3, layer=layer, x=x, pairs=np.array(pairs, frame.PAIR))


def slow(rate_bps=400_000.0, delay_s=0.0, seconds=30.0):
    return lambda left, now_s: (Window(now_s, now_s + seconds, rate_bps, delay_s),)


def stop_beyond(share: float):
    def progress(done, total):
        if share * total < done < total:
            raise Stop

    return progress


def local(bundle, layer, pairs, rows=1) -> np.ndarray:
    """The same request in this process, from the bundle's own files."""
    stems = {f"L{layer:02d}E{expert:03d}.{frame.PRECISIONS[precision]}" for _, expert, precision, _ in pairs}
    asked = request(layer, pairs, rows)
    return experts.load(bundle.root, tuple(sorted(stems)), 10**12).run(layer, asked.x, asked.pairs)


@pytest.fixture(scope="module")
def rig(bundle, tmp_path_factory):
    with Rig(tmp_path_factory.mktemp("rig"), bundle) as made:
        made.ground.hello()
        yield made


# ------------------------------------------------------------ delivered and served


def test_a_delivered_expert_answers_like_the_local_one_and_the_fleet_sees_it(bundle, broker, tmp_path):
    with Rig(tmp_path, bundle, broker=broker) as rig, Control("test", broker.host, broker.port) as control:
        assert control.wait_for(["n1"], 10) == set() and control.snapshot()["n1"].birth.shards == ()
        got = rig.deliver("L01E002.int8")
        assert (got.had_bytes, got.sent_bytes, got.offers, got.emulated) == (0, got.total_bytes, 1, False)
        pairs = [(0, 2, 1, 0.7)]
        assert np.array_equal(rig.served(1, pairs).x, local(bundle, 1, pairs))

        def hosted():
            birth = control.snapshot()["n1"].birth
            return [(item.layer, item.expert, item.precision) for item in birth.shards], birth.bundle

        wait(lambda: hosted() == ([(1, 2, "int8")], "rig"))
        rig.deliverer.drop("n1", Shard(1, 2, "int8"))
        rig.deliverer.drop("n1", Shard(1, 2, "int8"))  # done already: no error
        wait(lambda: hosted()[0] == [])
        assert "not on this node" in rig.served(1, pairs).text
        assert not control.malformed


def wait(condition, seconds=10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_requests_are_served_while_shards_come_and_go(bundle, rig):
    """Each answer equals the first bit by bit, over a hundred requests in the middle of ten changes."""
    rig.deliver("L00E000.int8")
    pairs = [(0, 0, 1, 0.5), (1, 0, 1, 1.5)]
    want = local(bundle, 0, pairs, 2)
    answers = []

    def ask(*_):
        for _ in range(5):
            answers.append(rig.served(0, pairs, 2))

    for expert in (1, 2, 3):
        rig.deliver(f"L00E00{expert}.fp32", progress=ask)
        ask()
        rig.deliver(f"L00E00{expert}.int4", progress=ask)
        rig.deliverer.drop("n1", Shard(0, expert, "int4"))
        ask()
    assert len(answers) > 100 and all(answer.kind == frame.PARTIAL for answer in answers)
    assert all(np.array_equal(answer.x, want) for answer in answers)


def test_over_curve_and_from_no_other_ground_station(bundle, tmp_path):
    keys = zmq.curve_keypair()
    with Rig(tmp_path, bundle, keys=keys) as rig:
        assert rig.deliver("L01E001.int4").sent_bytes > 0
        port = rig.deliverer.endpoint
        rig.deliverer.close()
        with (
            Deliverer(port, zmq.curve_keypair()) as rig.deliverer,
            pytest.raises(DeliveryError, match="see that its agent"),
        ):
            rig.deliver("L01E001.int8", patience_s=0.7)
    with pytest.raises(LinkError, match="give CURVE keys"):
        Deliverer("tcp://0.0.0.0:*")


# ------------------------------------------------------------ resumed


@pytest.mark.parametrize("over", [0, 1000], ids=["the largest chunk", "more, the control"])
def test_the_largest_chunk_goes_through_curve(over):
    """Encrypted it is longer than the limit that both ends set, and libzmq drops a connection for that."""
    server, client = zmq.curve_keypair(), zmq.curve_keypair()
    context, router, _ = open_router("tcp://127.0.0.1:*", server, {zmq.MAXMSGSIZE: delivery_frame.MAX_ANSWER_BYTES})
    endpoint, own = router.getsockopt_string(zmq.LAST_ENDPOINT), zmq.Context()
    dealer = open_dealer(own, "n1", endpoint, delivery_frame.MAX_FRAME_BYTES, server[0].decode(), client)
    try:
        dealer.setsockopt(zmq.RCVTIMEO, 1000 if over else 10_000)
        end_s = time.monotonic() + 10
        while not _sent(dealer, b"hello") and time.monotonic() < end_s:
            pass
        name, _ = router.recv_multipart()
        chunk = bytes(delivery_frame.MAX_CHUNK_BYTES + delivery_frame.HEADER_BYTES + over)
        router.send_multipart((name, chunk))
        try:
            came = len(dealer.recv())
        except zmq.Again:
            came = 0
        assert came == (0 if over else delivery_frame.MAX_FRAME_BYTES)
    finally:
        router.close()
        dealer.close()
        context.term()
        own.term()


def _sent(socket: zmq.Socket, data: bytes) -> bool:
    try:
        socket.send(data)
        return True
    except zmq.Again:
        return False


def test_after_kill_9_only_what_was_missing_is_sent(bundle, tmp_path):
    with Rig(tmp_path, bundle) as rig:
        with pytest.raises(Stop):
            rig.deliver("L01E000.fp32", windows=slow(), progress=stop_beyond(0.4))
        rig.agent.kill()
        there = rig.partial_bytes()
        rig.agent.restart()
        got = rig.deliver("L01E000.fp32")
        assert 0.4 * got.total_bytes < there < got.total_bytes
        assert (got.had_bytes, got.sent_bytes) == (there, got.total_bytes - there)
        assert np.array_equal(rig.served(1, [(0, 0, 0, 1.0)]).x, local(bundle, 1, [(0, 0, 0, 1.0)]))
        # killed again: what was delivered is loaded from the disk
        rig.agent.kill()
        rig.agent.restart()
        again = rig.deliver("L01E000.fp32")
        assert (again.had_bytes, again.sent_bytes) == (again.total_bytes, 0)


def test_a_transfer_under_way_survives_kill_9_by_itself(bundle, rig):
    killed = []

    def kill(done, total):
        if not killed and done > 0.4 * total:
            killed.append(done)
            rig.agent.kill()
            rig.agent.restart()

    got = rig.deliver("L01E003.fp32", windows=slow(), progress=kill)
    assert killed and got.offers >= 2 and got.sent_bytes < got.total_bytes + killed[0]


def test_a_cut_connection_and_a_new_ground_station_go_on(bundle, rig):
    with pytest.raises(Stop):
        rig.deliver("L01E002.fp32", windows=slow(), progress=stop_beyond(0.4))
    endpoint = rig.deliverer.endpoint
    rig.deliverer.close()
    rig.deliverer = Deliverer(endpoint)
    got = rig.deliver("L01E002.fp32")
    assert got.had_bytes > 0.4 * got.total_bytes and got.had_bytes + got.sent_bytes == got.total_bytes


def test_what_was_altered_on_the_node_s_disk_is_sent_again(bundle, rig):
    with pytest.raises(Stop):
        rig.deliver("L01E001.fp32", windows=slow(), progress=stop_beyond(0.4))
    (partial,) = (rig.folder / "state/shards/partial").glob("L01E001.fp32.bin*")
    data = bytearray(partial.read_bytes())
    data[100] ^= 1
    partial.write_bytes(data)
    got = rig.deliver("L01E001.fp32")
    graph = rig.manifest.shard(1, 1, "fp32").files[0].bytes
    assert (got.had_bytes, got.sent_bytes) == (graph, got.total_bytes - graph)
    assert np.array_equal(rig.served(1, [(0, 1, 0, 1.0)]).x, local(bundle, 1, [(0, 1, 0, 1.0)]))


def test_a_contact_that_ends_in_the_middle_loses_nothing(bundle, rig):
    """0.6 s of contact at 400 kbit/s are 30,000 bytes of the 37,410; the rest goes with the next contact, 0.3 s later."""
    rows = [Contact("ground", "n1", from_s, to_s, 0.02, 400_000.0) for from_s, to_s in ((0, 0.6), (0.9, 9))]
    epoch_s = time.monotonic()
    got = rig.deliver("L00E000.fp32", windows=windows_over(plan(rows), "ground", "n1", epoch_s))
    assert (got.had_bytes, got.sent_bytes, got.offers, got.emulated) == (0, got.total_bytes, 2, True)
    # The last byte: after what the first contact carried at most, at the rate of the second.
    first = 0.6 * 400_000 / 8
    assert got.arrived_s - epoch_s > 0.9 + (got.total_bytes - first) * 8 / 400_000
    assert np.array_equal(rig.served(0, [(0, 0, 0, 1.0)]).x, local(bundle, 0, [(0, 0, 0, 1.0)]))


def test_over_a_relay_nothing_comes_before_the_relay_has_all_of_it(bundle, rig):
    """13,226 bytes take the relay 0.26 s at 400 kbit/s, then 0.03 s more at ten times that."""
    hops = [Contact("ground", "relay", 0, 20, 0.0, 400_000.0), Contact("relay", "n1", 0, 20, 0.0, 4_000_000.0)]
    epoch_s = time.monotonic()
    got = rig.deliver("L01E003.int8", windows=windows_over(plan(hops), "ground", "n1", epoch_s))
    assert got.first_s - epoch_s > got.total_bytes * 8 / 400_000
    assert got.arrived_s - epoch_s > got.total_bytes * 8 * (1 / 400_000 + 1 / 4_000_000)


def test_the_second_socket_has_the_first_one_s_rules(tmp_path):
    keyless = (
        '[node]\nid = "n1"\nfleet = "f"\nstate_dir = "s"\n[data]\nendpoint = "tcp://127.0.0.1:1"\ndelivery_endpoint = '
    )
    assert config.parse(keyless + '"tcp://127.0.0.1:2"', tmp_path).link.delivery_endpoint == "tcp://127.0.0.1:2"
    with pytest.raises(ConfigError, match="tcp://10.0.0.1:2 is not this machine"):
        config.parse(keyless + '"tcp://10.0.0.1:2"', tmp_path)
    with pytest.raises(ConfigError, match="delivery_endpoint is 'udp://127.0.0.1:2'"):
        config.parse(keyless + '"udp://127.0.0.1:2"', tmp_path)


def test_without_another_contact_it_says_what_is_left(bundle, rig):
    one = plan([Contact("ground", "n1", 0, 0.2, 0.0, 400_000.0)])
    with pytest.raises(NoContact, match="no more contact with n1, .* nothing is lost"):
        rig.deliver("L00E001.int8", windows=windows_over(one, "ground", "n1", time.monotonic()))
    got = rig.deliver("L00E001.int8")
    assert 0 < got.had_bytes <= 0.2 * 400_000 / 8 and got.had_bytes + got.sent_bytes == got.total_bytes


# ------------------------------------------------------------ refused


class Flipping(Deliverer):
    """Alters one bit of each weight chunk on its way."""

    def _send(self, node, data):
        if delivery_frame.unpack(data).kind == delivery_frame.CHUNK and data[6] == 1:  # index of the file
            data = data[: HEADER_BYTES + 5] + bytes([data[HEADER_BYTES + 5] ^ 4]) + data[HEADER_BYTES + 6 :]
        return super()._send(node, data)


def test_a_flipped_bit_is_refused_by_name(bundle, rig):
    endpoint = rig.deliverer.endpoint
    rig.deliverer.close()
    with (
        Flipping(endpoint) as rig.deliverer,
        pytest.raises(DeliveryRefused, match=r"n1 refuses \(hash\): .*L00E003.int8.bin"),
    ):
        rig.deliver("L00E003.int8")
    rig.deliverer = Deliverer(endpoint)
    assert rig.deliver("L00E003.int8").sent_bytes == rig.manifest.shard(0, 3, "int8").files[1].bytes


def test_names_that_point_elsewhere_are_refused_by_the_agent(rig):
    """The frame is altered by hand, since nothing here packs it; the agent answers and goes on."""
    entry = rig.manifest.shard(0, 2, "int4")
    offer = delivery_frame.Offer(Shard(0, 2, "int4"), HIDDEN, "rig", entry.files)
    data = delivery_frame.pack(Message(delivery_frame.OFFER, 77, offer=offer))
    evil = data.replace(b"L00E002.int4.onnx", b"../../../evil.onn")
    assert evil != data and len(evil) == len(data)
    socket = rig.deliverer._socket
    for bad in (evil, data.replace(b"L00E002.int4.onnx", b"L00E009.int4.onnx"), data[:-1], b"x" * 50):
        socket.send_multipart((b"n1", bad))
        assert socket.poll(5000)
        answer = delivery_frame.unpack(socket.recv_multipart()[1])
        assert (answer.kind, answer.refusal) == (delivery_frame.REFUSED, "malformed")
    assert not [path for path in rig.folder.rglob("*evil*")]
    assert rig.deliver("L00E002.int4").sent_bytes > 0


def test_a_disk_that_takes_no_more_is_reported_and_cleared(bundle, tmp_path):
    """The kernel's own limit on the size of a file stands for a disk that is full: write() fails in the middle."""
    with Rig(tmp_path, bundle) as rig:
        rig.deliver("L00E000.int4")
        resource.prlimit(rig.agent.process.pid, resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        with pytest.raises(DeliveryRefused, match="free space on the disk") as caught:
            rig.deliver("L00E001.fp32")
        assert caught.value.kind == "disk"
        assert not [path for path in rig.folder.rglob("L00E001.fp32.bin*")]
        resource.prlimit(rig.agent.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert rig.deliver("L00E001.fp32").had_bytes == rig.manifest.shard(0, 1, "fp32").files[0].bytes


def test_a_shard_over_the_memory_limit_is_refused(bundle, tmp_path):
    with Rig(tmp_path, bundle, node={"memory_limit_mb": 20}) as rig:
        with pytest.raises(DeliveryRefused, match="drop a shard first or use a lower precision") as caught:
            rig.deliver("L00E000.int8")
        assert caught.value.kind == "memory" and rig.partial_bytes() == 0


def test_a_shard_of_its_own_bundle_stays_dropped_after_a_restart(bundle, tmp_path):
    from dataclasses import replace

    own = replace(bundle, stems=("L00E000.int8", "L01E000.int8"))
    with Rig(tmp_path, bundle, own=own) as rig:
        rig.deliverer.drop("n1", Shard(0, 0, "int8"))
        rig.agent.kill()
        rig.agent.restart()
        answer, _ = rig.ground.ask_until_answered(request(1, [(0, 0, 1, 1.0)]))
        assert answer.kind == frame.PARTIAL
        assert "not on this node" in rig.served(0, [(0, 0, 1, 1.0)]).text
        back = rig.deliver("L00E000.int8")
        assert (back.had_bytes, back.sent_bytes) == (back.total_bytes, 0)  # its files are still in the bundle
        assert rig.served(0, [(0, 0, 1, 1.0)]).kind == frame.PARTIAL


def test_an_altered_bundle_here_is_not_sent(bundle, rig, tmp_path):
    copy = make_bundle(tmp_path)
    path = copy.root / "experts" / "L00E002.int8.bin"
    path.write_bytes(b"\0" + path.read_bytes()[1:])
    with pytest.raises(shard.BundleError, match="altered"):
        rig.deliverer.deliver("n1", copy.root, rig.manifest, rig.manifest.shard(0, 2, "int8"))


def test_what_the_relay_gets_later_goes_with_the_next_plan(bundle, rig):
    """The relay can be reached twice for 0.2 s, with 10,000 bytes each time; its own contact with n1 stays open all the while."""
    hops = [Contact("ground", "relay", from_s, from_s + 0.2, 0.0, 400_000.0) for from_s in (0.1, 0.9)]
    hops.append(Contact("relay", "n1", 0, 20, 0.0, 4_000_000.0))
    epoch_s = time.monotonic()
    got = rig.deliver("L01E002.int8", windows=windows_over(plan(hops), "ground", "n1", epoch_s))
    assert got.sent_bytes == got.total_bytes and got.offers == 2
    assert 0.9 < got.arrived_s - epoch_s < 10
