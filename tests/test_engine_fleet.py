"""The engine over real agents on loopback: tokens of a batch as of one process, one exchange a layer, a killed agent, joules of boards."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from api_rig import api
from cluster import NODES, Cluster

from ground_station.cli_shared import reference_bundle
from ground_station.control import Control
from ground_station.decode import Decoder
from ground_station.engine import Engine, Options
from ground_station.engine_meter import FleetMeter
from ground_station.engine_request import Ended, Failed, Piece, Request, Usage
from ground_station.local_fleet import Board, LocalFleet
from ground_station.sampling import Sampling
from ground_station.text import Text

BUNDLE = reference_bundle()
PROMPTS = ["In the beginning", "def main(", "x = 3\n", "The sun", "Once upon", "1 2 3", "a b c d " * 40, "import numpy"]


def requests_of(cluster: Cluster, text: Text, tokens: int) -> list[Request]:
    return [
        Request(
            f"r{i}", "completion", (cluster.manifest.bos_id, *text.encode(prompt)), tokens,
            Sampling(0.8 if i % 2 else 0.0, 0.95, seed=i), ignore_eos=True,
        )
        for i, prompt in enumerate(PROMPTS)
    ]  # fmt: skip


def ids_of(handle) -> list[int]:
    events = list(handle)
    assert isinstance(events[-1], Usage), events[-1]
    return [token.token_id for event in events if isinstance(event, Piece) for token in event.tokens]


@pytest.mark.broker
def test_eight_requests_over_agents_get_the_tokens_of_one_process_each(tmp_path):
    with Cluster(BUNDLE, tmp_path, "fp32", replicas=()) as cluster:
        text = Text(BUNDLE, cluster.manifest)
        records, costs = [], []
        with Engine(
            cluster.decoder, cluster.manifest, text, on_token=records.append, after_step=costs.append
        ) as engine:
            requests = requests_of(cluster, text, 24)
            got = [ids_of(handle) for handle in engine.submit(*requests)]
        served = dict(cluster.remote.served)
        single = cluster.single()
        expected = [
            [c.token_id for c in single.generate(list(r.prompt_ids), 24, r.sampling, ignore_eos=True)] for r in requests
        ]
        assert got == expected
        assert set(served) == set(NODES)
        assert sum(cost.n == 8 for cost in costs) >= 20  # all eight in one step
        one = [r for r in records if r.request == "r0"]
        assert [r.index for r in one] == list(range(24)) and [r.token_id for r in one] == expected[0]
        assert all(r.sent_bytes > 0 and r.received_bytes > 0 and r.expert_ms > 0 and r.rungs == 0 for r in one)
        sent = sum(cost.sent_bytes for cost in costs)
        assert abs(sum(r.sent_bytes for r in records) - sent) < len(records)  # rows share what was sent, all of it


@pytest.mark.broker
def test_a_killed_agent_costs_rungs_and_no_request(tmp_path):
    with Cluster(BUNDLE, tmp_path, "q8") as cluster:
        text, records = Text(BUNDLE, cluster.manifest), []
        with api(BUNDLE, cluster.decoder, on_token=records.append) as (_, engine):
            handles = engine.submit(*requests_of(cluster, text, 60))
            while len(records) < 80:
                time.sleep(0.005)
            cluster.fleet.kill("node-2")
            ended = [list(handle) for handle in handles]
        assert not any(isinstance(event, Failed) for events in ended for event in events)
        assert all(len([e for e in events if isinstance(e, Ended)]) == 1 for events in ended)
        assert not any(r.rungs for r in records[:80]) and any(r.rungs for r in records[80:])
        assert len(records) == 8 * 60


@pytest.mark.broker
@pytest.mark.slow
def test_usage_has_the_joules_of_simulated_boards_and_their_sum_is_what_the_boards_took(tmp_path):
    with Cluster(BUNDLE, tmp_path, "q8") as cluster:
        cluster.fleet.stop()
        boards = tuple(Board(node, "raspberry-pi-5-ina226", 1 << 30) for node in NODES)
        at = (cluster.broker.host, cluster.broker.port)
        folder = tmp_path / "metered"
        with (
            Control("demo", *at) as control,
            LocalFleet(folder, BUNDLE, cluster.holdings, cluster.link.endpoint, at, "demo", boards) as fleet,
        ):
            fleet.wait_joined(cluster.link)
            assert not control.wait_for(NODES, 15)
            time.sleep(1.5)  # a first telemetry of each
            text, taken = Text(BUNDLE, cluster.manifest), []
            read = FleetMeter(control, NODES)

            def meter():
                taken.append(read())
                return taken[-1]

            decoder = Decoder(cluster.decoder.trunk, cluster.policy, cluster.remote)
            with Engine(decoder, cluster.manifest, text, Options(meter_s=0.3), meter=meter) as engine:
                time.sleep(1.0)
                with ThreadPoolExecutor(8) as pool:
                    usages = list(
                        pool.map(
                            lambda h: [e for e in h if isinstance(e, Usage)][0],
                            engine.submit(*requests_of(cluster, text, 40)),
                        )
                    )
            assert {usage.energy.provenance for usage in usages} == {"simulated"}, [u.energy for u in usages]
            joules = [usage.energy.joules for usage in usages]
            assert min(joules) > 0
            whole = sum(each.joules for each in taken if each.joules is not None)
            assert sum(joules) <= whole * (1 + 1e-9)
            # who has more rows has more joules: r6's prompt is the longest
            assert max(range(8), key=lambda i: joules[i]) == 6
