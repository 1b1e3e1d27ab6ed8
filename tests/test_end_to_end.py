"""The main path with real processes and sockets: agents, data plane, decode loop, fallback ladder, return of a node.

The reference is the same bundle in one process (same partition, codec, grouping): logits must be equal to the last bit.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from cluster import NODES, PROMPT, Cluster, greedy

from ground_station import selection
from ground_station.control import Control
from ground_station.decode import Decoder
from ground_station.dispatch import Table
from ground_station.link import Failure, Link, LinkError, is_loopback
from ground_station.local import LocalExperts
from ground_station.placement import round_robin
from ground_station.sampling import Sampling
from ground_station.trunk import ContextFull, Trunk
from node_agent import frame, shard
from quantize.synthetic import synthetic


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("bundle") / "tiny"
    synthetic(root, 64, 32, 3, 8, 2, heads=2, kv_heads=1, head_dim=32, vocab=256, precision=("int8", "int4"))
    return root


@pytest.mark.broker
@pytest.mark.parametrize("codec", ["fp32", "fp16", "q8", "q4"])
def test_four_agents_give_the_single_process_tokens_and_logits_bit_for_bit(bundle, tmp_path, codec):
    with Cluster(bundle, tmp_path, codec) as cluster:
        tokens, logits, costs = greedy(cluster.decoder, 24)
        sampled = greedy(cluster.decoder, 8, sampling=Sampling(0.8, 0.9, seed=4))[0]
        single = cluster.single()
        expected_tokens, expected_logits, _ = greedy(single, 24)
        assert tokens == expected_tokens
        assert np.array_equal(logits, expected_logits)
        assert sampled == greedy(single, 8, sampling=Sampling(0.8, 0.9, seed=4))[0]
        assert set(cluster.remote.served) == set(NODES)  # a parity of runs in which no node took part proves nothing
        assert not any(cost.rungs for cost in costs)
        assert all(cost.sent_bytes > 0 and cost.received_bytes > 0 for cost in costs)
        # negative control: another codec must not give the same logits
        other = LocalExperts(bundle, cluster.manifest, cluster.table, "q4" if codec != "q4" else "q8")
        cluster_other = Decoder(single.trunk, cluster.policy, other)
        assert not np.array_equal(greedy(cluster_other, 24)[1], expected_logits)


@pytest.mark.broker
def test_a_killed_agent_costs_a_rung_not_the_text_and_serves_again_when_it_is_back(bundle, tmp_path):
    with Cluster(bundle, tmp_path, "q8") as cluster:
        victim = "node-2"
        costs = []
        returned_at = None
        for index, cost in enumerate(cluster.decoder.generate(PROMPT, 200, ignore_eos=True)):
            costs.append(cost)
            if index == 20:
                cluster.fleet.kill(victim)
            if index == 60:
                cluster.fleet.start(victim)
                started = time.monotonic()
                while not cluster.link.is_up(victim):
                    cluster.link.drain()
                    assert time.monotonic() - started < 5.0, "the restarted agent did not serve within 5 s"
                    time.sleep(0.01)
                returned_at = len(costs)
                before = cluster.remote.served[victim]
        assert len(costs) == 200
        rungs = [rung for cost in costs[21:61] for rung in cost.rungs]
        assert rungs and {rung.rung for rung in rungs} <= {"retry", "lower_precision"}
        assert any(rung.rung == "lower_precision" for rung in rungs)
        assert not any(cost.rungs for cost in costs[:20])
        assert not any(cost.rungs for cost in costs[returned_at + 1 :])
        assert cluster.remote.served[victim] > before


@pytest.mark.broker
def test_without_any_copy_the_expert_is_skipped_and_the_gates_renormalised(bundle, tmp_path):
    with Cluster(bundle, tmp_path, "fp32", replicas=()) as cluster:
        cluster.fleet.kill("node-3")
        time.sleep(0.2)
        hidden = np.random.default_rng(0).standard_normal((1, 64)).astype(np.float32)
        home = {expert: cluster.table.nodes[cluster.table.copies[0, expert][0][0]] for expert in range(8)}
        dark = next(expert for expert, node in home.items() if node == "node-3")
        lit = next(expert for expert, node in home.items() if node != "node-3")
        gates = np.array([[0.75, 0.25]], np.float32)
        out = cluster.remote.run(0, hidden, np.array([[dark, lit]]), gates)
        rungs = cluster.remote.traffic.rungs
        assert [rung.rung for rung in rungs][-1] == "skip" and rungs[-1].loss == pytest.approx(0.75)
        local = LocalExperts(bundle, cluster.manifest, cluster.table, "fp32")
        # the whole gate mass (1.0) goes to the expert that is left
        expected = local.run(0, hidden, np.array([[lit]]), np.array([[1.0]], np.float32))
        assert out == pytest.approx(expected, rel=1e-5)
        # with every copy gone the layer adds nothing, and nothing is raised
        for node in ("node-1", "node-2", "node-4"):
            cluster.fleet.kill(node)
        time.sleep(0.2)
        assert not cluster.remote.run(0, hidden, np.array([[dark, lit]]), gates).any()


@pytest.mark.broker
def test_the_text_goes_on_while_the_broker_restarts_and_telemetry_returns(bundle, tmp_path):
    with Cluster(bundle, tmp_path, "q8") as cluster:
        with Control("demo", cluster.broker.host, cluster.broker.port) as control:
            assert not control.wait_for(NODES, 15)
            costs = []
            for index, cost in enumerate(cluster.decoder.generate(PROMPT, 120, ignore_eos=True)):
                costs.append(cost)
                if index == 30:
                    cluster.broker.stop()
                if index == 60:
                    cluster.broker.restart()
            assert len(costs) == 120 and not any(cost.rungs for cost in costs)
            restarted = time.time()
            end = time.monotonic() + 20
            while True:
                states = control.snapshot()
                fresh = [n for n in NODES if states[n].telemetry_at and states[n].telemetry_at.utc_s > restarted]
                if len(fresh) == len(NODES):
                    break
                assert time.monotonic() < end, f"telemetry came back from {fresh} only"
                time.sleep(0.1)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_row_does_not_depend_on_the_rest_of_its_batch(bundle, precision):
    """Bit for bit, through the shards as they are written (the kernels at larger sizes: test_quantize_nbits)."""
    manifest = shard.read_manifest(bundle)
    holdings = round_robin(manifest, {"local": 1 << 40}, precision)
    experts = LocalExperts(bundle, manifest, Table(holdings))
    rng = np.random.default_rng(1)
    hidden = rng.standard_normal((64, 64)).astype(np.float32) * np.geomspace(0.1, 10, 64, dtype=np.float32)[:, None]
    chosen = np.tile([[3, 5]], (64, 1))
    gates = np.full((64, 2), 0.5, np.float32)
    together = experts.run(1, hidden, chosen, gates)
    alone = np.concatenate([experts.run(1, hidden[i : i + 1], chosen[:1], gates[:1]) for i in range(64)])
    assert np.array_equal(together, alone)
    assert not np.array_equal(together, experts.run(0, hidden, chosen, gates))


def test_a_full_context_is_said_before_anything_is_computed(bundle):
    manifest = shard.read_manifest(bundle)
    sequence = Trunk(bundle, manifest).sequence(4)
    with pytest.raises(ContextFull, match="5 tokens do not fit a context of 4"):
        sequence.prefill([1, 2, 3, 4, 5], lambda layer, hidden, logits: np.zeros_like(hidden))


def test_prefill_in_one_go_equals_token_by_token(bundle):
    manifest = shard.read_manifest(bundle)
    holdings = round_robin(manifest, {"local": 1 << 40}, "int8")
    policy = selection.make("topk", manifest.routing, manifest.dims.top_k, manifest.dims.experts)
    decoder = Decoder(Trunk(bundle, manifest), policy, LocalExperts(bundle, manifest, Table(holdings)))
    whole = decoder.trunk.sequence(16)
    together = whole.prefill(PROMPT, decoder.moe, every_position=True)
    steps = decoder.trunk.sequence(16)
    apart = np.stack([steps.step(token, decoder.moe).copy() for token in PROMPT])
    assert together == pytest.approx(apart, abs=2e-4)
    whole.rewind(3)
    again = np.stack([whole.step(token, decoder.moe).copy() for token in PROMPT[3:]])
    assert again == pytest.approx(apart[3:], abs=2e-4)


def test_the_link_refuses_an_open_port_without_keys_and_counts_rubbish():
    assert is_loopback("tcp://127.0.0.1:5") and not is_loopback("tcp://0.0.0.0:5") and not is_loopback("tcp://*:5")
    with pytest.raises(LinkError, match="CURVE"):
        Link("tcp://0.0.0.0:*")
    import zmq

    with Link() as link, zmq.Context() as context, context.socket(zmq.DEALER) as rogue:
        rogue.setsockopt(zmq.LINGER, 0)
        rogue.setsockopt(zmq.ROUTING_ID, b"rogue")
        rogue.connect(link.endpoint)
        rogue.send(b"rubbish")
        rogue.send(frame.pack(frame.Frame(frame.PONG, text="unasked")))  # not known before its HELLO
        rogue.send(frame.pack(frame.Frame(frame.HELLO, text="rogue")))
        assert not link.wait_for({"rogue"}, 5)
        assert link.bad_frames == 2
        welcome = frame.unpack(rogue.recv())
        assert (welcome.kind, welcome.destination) == (frame.WELCOME, 1)
        # an answer nobody waits for is dropped; no answer in time is a failure, not an exception
        rogue.send(frame.pack(frame.Frame(frame.ERROR, 99, text="late")))
        answers = link.exchange({"rogue": (1, b"x"), "ghost": (2, b"x")}, 0.1)
        assert isinstance(answers["rogue"], Failure) and answers["rogue"].kind == "late"
        assert answers["ghost"].kind == "unreachable"


def test_a_node_that_protects_itself_is_passed_over_for_this_layer_and_asked_again_for_the_next():
    """Two nodes with hand-made answers: `a` refuses, as its guard does; the control answers with another error."""
    import threading

    import zmq

    from ground_station.placement import Holding
    from ground_station.remote import RemoteExperts

    stop = threading.Event()
    asked: list[str] = []

    def node(name: str, endpoint: str, reply) -> None:
        with zmq.Context() as context, context.socket(zmq.DEALER) as link:
            link.setsockopt(zmq.LINGER, 0)
            link.setsockopt(zmq.ROUTING_ID, name.encode())
            link.connect(endpoint)
            link.send(frame.pack(frame.Frame(frame.HELLO, text=name)))
            while not stop.is_set():
                if link.poll(20):
                    request = frame.unpack(link.recv())
                    if request.kind == frame.EXPERTS:
                        asked.append(name)
                        link.send(frame.pack(reply(request)))

    def partial_of(request: frame.Frame) -> frame.Frame:
        return frame.Frame(frame.PARTIAL, request.request_id, x=np.full_like(request.x, 2.0))

    table = Table((Holding("a", 0, 0, "int8", 0), Holding("b", 0, 0, "int4", 1)))
    one, gate = np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32)
    for text, asks, stays_up in (
        ("a: throttled: the duty cap is 0.05", ["a", "b"], True),
        ("a: compute: no such thing", ["a", "a", "b"], False),
    ):
        stop.clear()
        asked.clear()
        with Link() as link:
            replies = {"a": lambda r, text=text: frame.Frame(frame.ERROR, r.request_id, text=text), "b": partial_of}
            threads = [threading.Thread(target=node, args=(n, link.endpoint, reply)) for n, reply in replies.items()]
            for thread in threads:
                thread.start()
            try:
                assert not link.wait_for({"a", "b"}, 5)
                remote = RemoteExperts(link, table, "fp32")
                out = remote.run(0, np.ones((1, 4), np.float32), one, gate)
                assert out.tolist() == [[2.0] * 4] and asked == asks
                assert link.is_up("a") is stays_up
                rungs = [rung.rung for rung in remote.traffic.rungs]
                assert rungs == (["lower_precision"] if stays_up else ["retry", "lower_precision"])
            finally:
                stop.set()
                for thread in threads:
                    thread.join(5)
