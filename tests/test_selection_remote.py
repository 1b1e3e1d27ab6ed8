"""Named nodes and precisions over real sockets: agents run what a policy named, and a named node that dies costs a rung."""

from __future__ import annotations

import numpy as np
import pytest
from cluster import Cluster, greedy

from ground_station import selection
from ground_station.decode import Decoder
from ground_station.local import LocalExperts
from ground_station.selection_world import PRECISIONS, World
from quantize.synthetic import synthetic


@pytest.mark.broker
def test_named_copies_run_on_the_named_nodes_and_the_ladder_catches_a_dead_one(tmp_path):
    bundle = tmp_path / "tiny"
    synthetic(bundle, 64, 32, 3, 8, 2, heads=2, kv_heads=1, head_dim=32, vocab=256, precision=("int8", "int4"))
    with Cluster(bundle, tmp_path / "run", "fp32") as cluster:
        ones = np.ones((4, PRECISIONS))
        world = World.of(cluster.table, 8, ones, ones, joule_price=np.array([9.0, 0.01, 0.02, 0.03]))
        dims = cluster.manifest.dims
        recorder = selection.Recorder(
            selection.make("budgeted", cluster.manifest.routing, dims.top_k, dims.experts, coverage=1.0)
        )
        decoder = Decoder(cluster.decoder.trunk, recorder, cluster.remote)
        decoder.world = world
        tokens, logits, costs = greedy(decoder, 12)
        assert not any(cost.rungs for cost in costs)
        # node-1 is dear, and each of its experts has a copy elsewhere: one precision lower
        assert set(cluster.remote.served) == {"node-2", "node-3", "node-4"}
        assert any((choice.precisions[choice.gates > 0] == 2).any() for choice in recorder.choices)
        local = LocalExperts(bundle, cluster.manifest, cluster.table, "fp32")
        again = Decoder(decoder.trunk, selection.Replay(recorder.choices), local)
        expected_tokens, expected, _ = greedy(again, 12)
        assert tokens == expected_tokens and np.array_equal(logits, expected)
        # negative control: without the names dispatch takes the primaries
        plain = greedy(Decoder(decoder.trunk, cluster.policy, local), 12)[1]
        assert not np.array_equal(plain, expected)
        # the world has not heard that node-2 is gone: what is named there falls back to dispatch
        cluster.fleet.kill("node-2")
        served = cluster.remote.served["node-2"]
        _, _, costs = greedy(decoder, 12)
        rungs = [rung for cost in costs for rung in cost.rungs]
        assert rungs and {rung.rung for rung in rungs} <= {"retry", "replica", "lower_precision"}
        assert cluster.remote.served["node-2"] == served
