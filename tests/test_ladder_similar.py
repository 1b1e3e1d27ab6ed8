"""The ladder's rung "similar expert": the router's next expert in reach takes the place of one that nobody can run."""

from __future__ import annotations

import threading
import time
from functools import partial

import numpy as np
import pytest
import zmq
from cluster import Cluster, greedy

from ground_station import dispatch
from ground_station.dispatch import StandIn, Table
from ground_station.link import Link
from ground_station.local import LocalExperts
from ground_station.placement import Holding
from ground_station.remote import RemoteExperts
from node_agent import frame, routing, shard
from quantize.synthetic import synthetic

OWN_RULE = shard.Routing("softmax_topk", True)


def test_the_routers_next_expert_in_reach_stands_in_with_the_models_own_gate():
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((6, 8)).astype(np.float32)
    experts = routing.largest(logits, 3)
    gates = routing.gates_of(logits, experts, OWN_RULE)
    reachable = np.ones(8, bool)
    reachable[[0, 3]] = False
    chosen, given, lost, found = dispatch.stand_ins(experts, gates, logits, reachable)
    assert found and not np.isin(chosen, [0, 3]).any()
    # reference: the model's own top-3 and gates where experts 0 and 3 do not exist
    without = np.where(reachable, logits, -np.inf)
    for row in range(6):
        expected = routing.largest(without[row : row + 1], 3)
        assert set(chosen[row].tolist()) == set(expected[0].tolist())
        own = routing.gates_of(without[row : row + 1], chosen[row : row + 1], OWN_RULE)
        whole = gates[row].sum()
        assert given[row] * whole / (whole - lost[row]) == pytest.approx(own[0] * whole, rel=1e-5)
    assert lost[~np.isin(experts, [0, 3]).any(1)].tolist() == [0.0] * int((~np.isin(experts, [0, 3]).any(1)).sum())
    # control: "lost" hands over the whole gate, which the model would not
    _, kept, none, _ = dispatch.stand_ins(experts, gates, logits, reachable, rule="lost")
    assert kept == pytest.approx(gates) and not none.any() and not np.allclose(kept, given)


def test_by_hand_largest_gate_first_each_stand_in_once_and_what_nobody_takes_is_lost():
    logits = np.log(np.array([[8.0, 4.0, 2.0, 1.0]], np.float32))
    experts, gates = np.array([[0, 1, 2]]), np.array([[0.5, 0.25, 0.125]], np.float32)
    reachable = np.array([False, False, True, True])
    chosen, given, lost, found = dispatch.stand_ins(experts, gates, logits, reachable)
    # 2 runs already, so only 3 is free: it goes to the pair of gate 0.5, at 1/8 of it
    assert found == [StandIn(0, 0, 0.5, 3, pytest.approx(0.0625))]
    assert chosen.tolist() == [[3, 1, 2]] and given[0] == pytest.approx([0.0625, 0.25, 0.125])
    assert lost == pytest.approx([0.4375 + 0.25])
    # what the row ran before, in another exchange, is not run again
    busy = np.array([[True, True, True, True]])
    assert dispatch.stand_ins(experts, gates, logits, reachable, busy)[3] == []
    assert experts.tolist() == [[0, 1, 2]]  # the caller's arrays stay


class Nodes:
    """Hand-made nodes on real sockets: expert e gives the constant 10^e; a node in `refusing` protects itself."""

    def __init__(self, link: Link, names: tuple[str, ...], refusing: tuple[str, ...] = ()):
        self._link, self._names, self._refusing = link, names, refusing
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._serve, args=(name,)) for name in names]

    def __enter__(self) -> Nodes:
        for thread in self._threads:
            thread.start()
        assert not self._link.wait_for(set(self._names), 5)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(5)

    def _serve(self, name: str) -> None:
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.ROUTING_ID, name.encode())
            socket.connect(self._link.endpoint)
            socket.send(frame.pack(frame.Frame(frame.HELLO, text=name)))
            while not self._stop.is_set():
                if not socket.poll(20):
                    continue
                request = frame.unpack(socket.recv())
                if request.kind == frame.EXPERTS:
                    socket.send(frame.pack(self._answer(name, request)))

    def _answer(self, name: str, request: frame.Frame) -> frame.Frame:
        if name in self._refusing:
            return frame.Frame(frame.ERROR, request.request_id, text=f"{name}: throttled: the duty cap is 0")
        y = np.zeros_like(request.x)
        for row, expert, _, gate in request.pairs.tolist():
            y[row] += gate * 10.0**expert
        return frame.Frame(frame.PARTIAL, request.request_id, x=y)


TABLE = Table(
    (
        Holding("a", 0, 0, "int8", 0),
        Holding("b", 0, 1, "int8", 0),
        Holding("b", 0, 2, "int8", 0),
        Holding("c", 0, 3, "int8", 0),
    )
)


@pytest.mark.parametrize("how", ["gone", "refuses"])
def test_out_of_reach_before_or_in_the_middle_of_a_layer_gives_the_same_sum(how):
    logits = np.log(np.array([[8.0, 4.0, 1.0, 2.0], [1.0, 8.0, 2.0, 4.0]], np.float32))
    experts = np.array([[0, 1], [1, 3]])
    gates = np.array([[2 / 3, 1 / 3], [2 / 3, 1 / 3]], np.float32)
    names = ("b", "c") if how == "gone" else ("a", "b", "c")
    with Link() as link, Nodes(link, names, ("a",)):
        remote = RemoteExperts(link, TABLE, "fp32")
        out = remote.run(0, np.ones((2, 4), np.float32), experts, gates, None, logits)
        # row 0: expert 3 (logit log 2) beside 1 (log 4), so a third and two thirds; row 1 is as chosen
        assert out[0] == pytest.approx(np.full(4, 1000 / 3 + 20 / 3), rel=1e-5)
        assert out[1] == pytest.approx(np.full(4, 20 / 3 + 1000 / 3), rel=1e-5)
        rungs = [(rung.rung, rung.expert, rung.node) for rung in remote.traffic.rungs]
        assert rungs == [("similar_expert", 0, "c")]
        assert remote.traffic.rungs[0].loss == pytest.approx(2 / 3, abs=1e-5)
        assert remote.traffic.rungs[0].reason == ("node is down" if how == "gone" else "a refused")
        # control: without the router's logits the expert is skipped
        remote.traffic.rungs.clear()
        out = remote.run(0, np.ones((2, 4), np.float32), experts, gates)
        assert out[0] == pytest.approx(np.full(4, 10.0), rel=1e-5)
        assert [rung.rung for rung in remote.traffic.rungs] == ["skip"]


def test_a_stand_in_that_refuses_too_is_followed_by_the_next_and_then_by_nothing():
    logits = np.log(np.array([[8.0, 4.0, 1.0, 2.0]], np.float32))
    with Link() as link, Nodes(link, ("b", "c"), ("c",)):
        remote = RemoteExperts(link, TABLE, "fp32")
        one = np.ones((1, 4), np.float32)
        out = remote.run(0, one, np.array([[0, 1]]), np.array([[2 / 3, 1 / 3]], np.float32), None, logits)
        # 3 refuses, so 2 (a fifth) beside 1 (four fifths)
        assert out[0] == pytest.approx(np.full(4, 100 / 5 + 40 / 5), rel=1e-5)
        assert [(rung.rung, rung.expert) for rung in remote.traffic.rungs] == [
            ("similar_expert", 0),
            ("similar_expert", 3),
        ]
        remote.traffic.rungs.clear()
        # every expert in reach is taken: the rest is skipped, and the gates renormalised
        out = remote.run(0, one, np.array([[0, 1, 2]]), np.array([[0.5, 0.3, 0.2]], np.float32), None, logits)
        assert out[0] == pytest.approx(np.full(4, (0.3 * 10 + 0.2 * 100) / 0.5), rel=1e-5)
        assert [rung.rung for rung in remote.traffic.rungs][-1] == "skip"


@pytest.mark.broker
def test_with_real_agents_a_dead_node_without_replicas_is_stood_in_for(tmp_path):
    bundle = tmp_path / "tiny"
    synthetic(bundle, 64, 32, 2, 8, 2, heads=2, kv_heads=1, head_dim=32, vocab=256, precision=("int8",))
    with Cluster(bundle, tmp_path / "run", "fp32", replicas=()) as cluster:
        whole = greedy(cluster.decoder, 4)[1]
        cluster.fleet.kill("node-3")
        time.sleep(0.2)
        _, logits, costs = greedy(cluster.decoder, 4)
        rungs = [rung for cost in costs for rung in cost.rungs]
        assert any(rung.rung == "similar_expert" for rung in rungs)
        assert {rung.rung for rung in rungs} <= {"retry", "similar_expert"}
        table, local = cluster.table, LocalExperts(bundle, cluster.manifest, cluster.table)
        usable = [node != "node-3" for node in table.nodes]

        def moe(layer: int, hidden: np.ndarray, router: np.ndarray) -> np.ndarray:
            choice = cluster.policy(layer, router)
            here = np.array([any(usable[node] for node, _ in table.copies[layer, e]) for e in range(8)])
            experts, gates, lost, _ = dispatch.stand_ins(choice.experts, choice.gates, router, here)
            work = dispatch.split(layer, experts, gates, partial(dispatch.assign, table, usable=usable))
            sums = choice.gates.sum(1)
            return local.run_work(layer, hidden, work) * (sums / (sums - lost))[:, None].astype(np.float32)

        expected = cluster.decoder.trunk.sequence(16).prefill([5, 9, 200, 31, 7, 77, 8], moe)
        assert logits[0] == pytest.approx(expected, abs=1e-4)
        assert not np.allclose(whole[0], expected, atol=1e-3)  # control: the dead node's experts mattered
