"""Shards move between real agents while tokens are made: nobody asks for what has gone, and the text is the one of one process."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from cluster import PROMPT

from ground_station import selection
from ground_station.broker import Broker, free_port
from ground_station.carry_out import Journal, Step, carry_out
from ground_station.decode import Decoder
from ground_station.delivery import Deliverer
from ground_station.dispatch import Table
from ground_station.link import Link
from ground_station.local import LocalExperts
from ground_station.local_fleet import LocalFleet
from ground_station.migration import MigrationError, Serving, after
from ground_station.placement import Holding, round_robin
from ground_station.remote import RemoteExperts
from ground_station.trunk import Trunk
from node_agent import frame, shard
from node_agent.delivery_frame import Shard
from quantize.synthetic import synthetic

INT8, INT4 = frame.PRECISION_ID["int8"], frame.PRECISION_ID["int4"]
LAYERS, EXPERTS = 3, 8


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    root = tmp_path_factory.mktemp("bundle") / "tiny"
    synthetic(root, 64, 32, LAYERS, EXPERTS, 2, heads=2, kv_heads=1, head_dim=32, vocab=256, precision=("int8",))
    return root


def test_a_table_after_a_step_by_hand():
    table = Table((Holding("a", 0, 0, "int4", 0), Holding("b", 0, 1, "int8", 0)), empty=("c",))
    assert table.nodes == ["a", "b", "c"]
    better = after(table, Step("copy", "c", Shard(0, 0, "int8")))
    assert better.copies == {(0, 0): ((2, INT8), (0, INT4)), (0, 1): ((1, INT8),)}
    assert table.copies[0, 0] == ((0, INT4),)  # what is in use does not change under anybody's hands
    assert after(better, Step("drop", "a", Shard(0, 0, "int4"))).copies[0, 0] == ((2, INT8),)
    assert after(better, Step("copy", "c", Shard(0, 0, "int8"))).copies == better.copies  # twice is once
    with pytest.raises(MigrationError, match="L00E000.int4 on a is the last copy"):
        after(table, Step("drop", "a", Shard(0, 0, "int4")))
    with pytest.raises(MigrationError, match="d is no node of this run"):
        after(table, Step("copy", "d", Shard(0, 0, "int8")))


class Asked:
    """Stands where RemoteExperts does: all that Serving needs of it is its table."""

    def __init__(self, table: Table):
        self.table = table


def test_a_drop_waits_for_the_token_under_way_and_for_no_other():
    table = Table((Holding("a", 0, 0, "int8", 0), Holding("b", 0, 0, "int8", 1)))
    drop = Step("drop", "a", Shard(0, 0, "int8"))
    asked = Asked(table)
    seen = []
    serving = Serving(asked, seen.append, patience_s=20)
    serving.on_step(drop)  # nobody generates: at once
    assert asked.table.copies[0, 0] == ((1, INT8),) and seen == [asked.table] and serving.changes == 1

    asked.table = table
    in_token, go_on, dropped = threading.Event(), threading.Event(), threading.Event()

    def generation():
        for number in range(3):
            in_token.set()
            assert go_on.wait(10)
            yield number, asked.table.copies[0, 0]

    items = []
    decode = threading.Thread(target=lambda: items.extend(serving.tokens(generation())))
    decode.start()
    assert in_token.wait(10)
    mover = threading.Thread(target=lambda: (serving.on_step(drop), dropped.set()))
    mover.start()
    assert not dropped.wait(0.3)  # the token under way may still ask node a
    go_on.set()
    assert dropped.wait(10)
    decode.join(10)
    mover.join(10)
    assert items[0] == (0, ((0, INT8), (1, INT8))) and items[-1] == (2, ((1, INT8),))

    hasty = Serving(Asked(table), patience_s=0.05)
    stuck = hasty.tokens(iter([1, 2]))
    next(stuck)
    with pytest.raises(MigrationError, match="no token came to its end within 0.05 s"):
        hasty.on_step(drop)
    assert next(stuck) == 2 and hasty.experts.table is table  # what was not agreed does not happen later
    stuck.close()


def _steps(moved: range) -> tuple[Step, ...]:
    """Experts `moved` of every layer go from where round robin put them to the empty node."""
    steps = []
    for layer in range(LAYERS):
        for expert in moved:
            which = Shard(layer, expert, "int8")
            steps += [
                Step("copy", "node-3", which),
                Step("drop", ("node-1", "node-2")[(expert + layer) % 2], which),
            ]
    return tuple(steps)


@pytest.mark.broker
@pytest.mark.parametrize("told", [True, False])
def test_experts_move_to_an_empty_node_under_way(bundle, tmp_path, told):
    """`told` False is the control: the same moves behind the requests' back need the ladder."""
    manifest = shard.read_manifest(bundle)
    holdings = round_robin(manifest, dict.fromkeys(("node-1", "node-2"), 1 << 30), "int8")
    table = Table(holdings, empty=("node-3",))
    policy = selection.make("topk", manifest.routing, manifest.dims.top_k, manifest.dims.experts)
    journal = Journal(manifest.name, _steps(range(0, EXPERTS, 2)))
    listen = f"tcp://127.0.0.1:{free_port()}"
    tables, failures = [], []
    with Broker(tmp_path) as broker, Link() as link, Deliverer(listen) as deliverer:
        where = (link.endpoint, (broker.host, broker.port))
        with LocalFleet(tmp_path, bundle, holdings, *where, delivery_endpoint=listen, empty=("node-3",)) as fleet:
            fleet.wait_joined(link)
            remote = RemoteExperts(link, table, "fp32")
            serving = Serving(remote)

            def move() -> None:
                try:
                    on_step = serving.on_step if told else lambda step: None
                    carry_out(journal, deliverer, bundle, manifest, on_step=on_step)
                except BaseException as error:
                    failures.append(error)

            mover = threading.Thread(target=move)
            decoder = Decoder(Trunk(bundle, manifest), policy, remote)
            tokens, logits, rungs = [], [], []
            for count, cost in enumerate(
                serving.tokens(decoder.generate(PROMPT, 400, keep_logits=logits, ignore_eos=True))
            ):
                if count == 5:
                    mover.start()
                tables.append(remote.table)
                tokens.append(cost.token_id)
                rungs += cost.rungs
                if count > 50 and mover.is_alive():
                    time.sleep(0.1)  # a text need not end before slow moves do
                if count > 25 and not mover.is_alive() and tables[-1] is tables[-20]:
                    break
            mover.join(30)
    assert not failures
    if not told:
        assert rungs
        return
    assert not rungs and len(tokens) < 400 and serving.changes >= len(journal.steps) // 2
    assert remote.served["node-3"] > 0
    kept = {expert: copies for (_, expert), copies in remote.table.copies.items()}
    assert all(copies == ((2, INT8),) for expert, copies in kept.items() if expert % 2 == 0)
    assert all(len(copies) == 1 and copies[0][0] < 2 for expert, copies in kept.items() if expert % 2)

    local = LocalExperts(bundle, manifest, table, "fp32")
    reference: list[np.ndarray] = []
    again = Decoder(Trunk(bundle, manifest), policy, local).generate(
        PROMPT, len(tokens), keep_logits=reference, ignore_eos=True
    )
    for number in range(len(tokens)):
        local.table = tables[number]
        assert next(again).token_id == tokens[number]
    assert np.array_equal(np.stack(reference), np.stack(logits))
