"""`spacemoe sim run`: whole constellations without boards, against hand figures, PHYSICS.md, the published order and the exact study."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from datetime import datetime, timezone

import numpy as np
import pytest

from firmware_sim import constellation, paths
from firmware_sim.scenario import Constellation
from ground_station import cli, plan_fleet
from ground_station import constellation_file as files
from ground_station import constellation_network as network
from ground_station import constellation_report as report
from ground_station import constellation_routing as routes
from ground_station import constellation_run as run
from ground_station import constellation_setting as settings
from ground_station import placement_problem as pp
from ground_station import study_space_xnet as exact
from ground_station.cli_shared import reference_bundle
from ground_station.placement import PlacementError
from ground_station.selection_choice import Choice
from ground_station.selection_world import PRECISIONS
from node_agent import routing
from node_agent.shard import Routing, read_manifest

BUNDLE = reference_bundle()
XNET = files.find("space-xnet")
SMALL = {
    "name": "small",
    "start": files.find("starlink-like").start,
    "play": {"slots": 4, "slot_s": 20.0, "tokens_per_s": 100.0, "batch_tokens": 32, "looks": 4},
    "constellation": {"kind": "delta", "planes": 12, "per_plane": 10, "phasing": 1},
    "model": {
        "layers": 3,
        "experts": 8,
        "top_k": 2,
        "routing": "zipf",
        "exponent": 0.7,
        "logit_spread": 1.0,
        "source": "a test's",
    },
    "costs": {
        "source": "a test's",
        "attention_ms": 0.2,
        "int8": {"megabytes": 1.0, "ms": 1.0, "joules": 0.004, "error": 0.01},
        "int4": {"megabytes": 0.6, "ms": 0.8, "joules": 0.003, "error": 0.08},
    },
    "memory": {"satellite_mb": 4.0, "copies": 1.25},
    "bus": {"kind": "6U", "start_c": 30.0},
    "power": {"array_w": 20.0, "platform_w": 6.0, "battery_wh": 11.0, "start_soc": 1.0},
    "payload": {"idle_w": 2.7, "busy_w": 6.9, "limit_c": 95.0},
    "placement": [{"policy": "packed"}],
    "policy": [{"policy": "topk"}, {"policy": "budgeted"}],
}


def small(**changes) -> files.Study:
    return files.parse(SMALL | changes)


def test_one_hop_in_a_plane_takes_the_time_of_its_chord():
    """PHYSICS.md: 22 satellites in a plane at 550 km are 1971.95 km apart, 6.578 ms; a way of two hops takes twice that."""
    shape = Constellation(planes=1, per_plane=22)
    graph, too_fast = next(network.networks(shape, network.Links(), 1, 10.0, 0))
    there = network.there_ms(graph, np.array([0]))
    assert there[0, 1] == pytest.approx(6.578, abs=5e-4) and there[0, 2] == pytest.approx(2 * 6.578, abs=1e-3)
    assert there[0, 1] * 299.792458 == pytest.approx(1971.95, abs=0.01) and too_fast == 0
    # neighbours that do not see each other over the Earth have no link: 7 in a plane are 6012 km apart, the longest link is 5017 km
    blind, _ = next(network.networks(Constellation(planes=1, per_plane=7), network.Links(), 1, 10.0, 0))
    assert blind.nnz == 0


def test_latency_on_a_line_of_satellites_by_hand():
    """Satellites 0 - 1 - 2 - 3, links of 1, 2 and 4 ms. Gateways: layer 0 on 0, layer 1 on 3. Experts of layer 0: A, B on 1, C on 2;
    a run takes 1 ms. A token that chooses A and B: 1 + (2 + 4) + two runs = 9 ms; A and C: 7 + 1 = 8 ms either way; with 1 cut off,
    nothing runs and the token goes straight on, 7 ms.
    """
    graph = paths.graph(4, np.array([[0, 1], [1, 2], [2, 3]]), np.array([1.0, 2.0, 4.0]))
    gateways = np.array([0, 3])
    there = network.there_ms(graph, gateways)
    path = network.path_ms(there, gateways)
    assert path[0].tolist() == [7, 7, 7, 7]
    joules, ms = np.zeros(PRECISIONS), np.ones(PRECISIONS)
    copies = [pp.Copy(0, expert, node, 0) for expert, node in ((0, 1), (1, 1), (2, 2))]  # expert 3 is nowhere
    hosts = settings.hosts_of(small(), copies, 0)
    world = replace(hosts.world, hosted=hosts.world.hosted[:, :4], joules=joules, ms=ms)
    delay = path[0, hosts.satellites].astype(float)
    hosts = settings.Hosts.of(hosts.satellites, world.changed(delay_ms=delay))
    assert hosts.satellites.tolist() == [1, 2] and hosts.world.delay_ms.tolist() == [7, 7]
    experts = np.array([[0, 1], [0, 2], [2, 3]])
    gates = np.array([[0.6, 0.4], [0.6, 0.4], [0.9, 0.1]], np.float32)
    tokens = run.Tokens(np.zeros((3, 4), np.float32), experts, gates)
    found = run.outcome(hosts, tokens, Choice(experts, gates), 7.0)
    assert found.ms.tolist() == [9, 8, 8]
    assert found.kept == pytest.approx([1.0, 1.0, 0.9])
    # a gate of 0 is not run; another node's answer may be the later one
    far = settings.Hosts.of(hosts.satellites, hosts.world.changed(delay_ms=np.array([7.0, 10.5])))
    gates[0, 1] = 0.0
    assert run.outcome(far, tokens, Choice(experts, gates), 7.0).ms.tolist() == [8, 11.5, 11.5]
    dark = settings.Hosts.of(hosts.satellites, hosts.world.changed(up=np.array([False, False])))
    lost = run.outcome(dark, tokens, Choice(experts, gates), 7.0)
    assert lost.ms.tolist() == [7, 7, 7] and not lost.kept.any() and not lost.ran.any()


def test_energy_of_a_satellite_by_hand():
    """PHYSICS.md: 12 W at 550 km, beta 0, 0.95 each way: an array of 19.887 W; a shadow takes 7.122 Wh of load, 7.497 Wh out of
    the battery, 9.37 % of 80 Wh. At the equinox the sun stands in every plane whose node is at 0 degrees.
    """
    study = small(
        start=datetime(2026, 3, 20, 14, 46, tzinfo=timezone.utc),
        play={"slots": 192, "slot_s": 30.0, "tokens_per_s": 1e-6, "batch_tokens": 4, "looks": 1},
        constellation={"planes": 1, "per_plane": 10, "raan_deg": 0.0},
        model=SMALL["model"] | {"layers": 1},
        power={"array_w": 19.887, "platform_w": 9.3, "battery_wh": 80.0, "start_soc": 1.0},
        policy=[{"policy": "topk"}],
    )
    setting = settings.prepare(study, BUNDLE)
    # what the payload may draw beside the platform's 9.3 W; the penumbra makes it a little less than the cylinder's 2.7 W
    np.testing.assert_allclose(setting.orbit.harvest_w, 12.0 - 9.3, atol=0.03)
    (trace,) = run.play(setting)
    lit = constellation.start(setting.satellites.constellation).lit_share == 1.0  # those see one whole shadow
    assert lit.sum() >= 5
    np.testing.assert_allclose(1.0 - trace.least_soc[lit], 0.0937, atol=4e-4)
    dark = small(
        **{"constellation": {"planes": 1, "per_plane": 10, "raan_deg": 90.0}, "model": SMALL["model"] | {"layers": 1}}
    )
    # control: in another plane the sun's share is another
    assert abs(settings.prepare(dark, BUNDLE).orbit.harvest_w - 2.7).min() > 0.1


def test_the_published_order_token_by_token_and_the_exact_study():
    """arXiv 2605.00515: random > intra > central gateway > rank match, a factor of at least 3; the means over drawn tokens are those that
    `study space-xnet` works out over all routing sets, on the same links, gateways and popularity."""
    study = XNET.narrowed(4, None, None, None)
    setting = settings.prepare(study, BUNDLE)
    traces = run.play(setting)
    mean_s = [float(trace.latency_ms.mean()) / 1e3 for trace in traces]
    assert all(a > b for a, b in zip(mean_s, mean_s[1:])) and mean_s[0] / mean_s[-1] >= 3.0
    table = exact.one_each(exact.Options(slots=4, seeds=1), 0)
    assert mean_s == pytest.approx([table[name]["s"] for name in ("random", "intra", "central", "rank")], rel=5e-3)
    assert all(trace.gate_mass.min() == 1.0 for trace in traces if not trace.out_of_reach.any())
    # control: the rank match's satellites, dealt out anew without regard to layer and rank, lose the order
    rank = setting.copies[-1]
    dealt = np.random.default_rng(0).permutation([copy.node for copy in rank])
    shuffled = tuple(copy._replace(node=int(node)) for copy, node in zip(rank, dealt))
    hosts = tuple(settings.hosts_of(study, shuffled, layer) for layer in range(32))
    worse = replace(setting, copies=(*setting.copies[:-1], shuffled), hosts=(*setting.hosts[:-1], hosts))
    *_, last = run.play(worse)
    assert float(last.latency_ms.mean()) / 1e3 > mean_s[2]
    # control: the least used expert next to the gateway and the most used far away is slower than the rank match
    flipped = {}
    for layer in range(32):
        mine = [copy for copy in rank if copy.layer == layer]
        for copy, other in zip(mine, reversed(mine)):
            flipped[copy.layer, copy.expert] = copy._replace(node=other.node)
    hosts = tuple(settings.hosts_of(study, tuple(flipped.values()), layer) for layer in range(32))
    *_, last = run.play(replace(setting, hosts=(*setting.hosts[:-1], hosts)))
    assert float(last.latency_ms.mean()) / 1e3 > 1.02 * mean_s[-1]


def test_drawn_tokens_have_the_calibrations_use_and_pairs():
    """Counts and pair counts of the reference model's held-out calibration; control: without the pairs they are others."""
    manifest = read_manifest(BUNDLE)
    stats = plan_fleet.calibration(BUNDLE, manifest)
    tokens = float(stats["tokens"])
    use, pairs = stats["counts"] / tokens, stats["coactivation"] / tokens
    apart = []
    for given in (pairs, None):
        router = routes.router(use, 4, 1.5, given)
        logits = router.logits(3, 20_000, np.random.default_rng(5))
        experts = routing.largest(logits, 4)
        chosen = np.zeros(logits.shape)
        np.put_along_axis(chosen, experts, 1.0, 1)
        np.testing.assert_allclose(chosen.mean(0), use[3], atol=3e-3)
        off = chosen.T @ chosen / len(chosen) - pairs[3]
        apart.append(np.abs(off - np.diag(np.diag(off))).max())
    assert apart[0] < 5e-3 < 0.02 < apart[1]
    gates = routing.gates_of(logits, experts, Routing("softmax_topk", True))
    assert 0.41 < gates[:, 0].mean() < 0.61, "the largest gate lies where the reference model's layers have it"
    # batches of 64 tokens have the shares of use more nearly than independent tokens would: p (1 - p) / 64
    square = np.zeros(16)
    for seed in range(40):
        drawn = routing.largest(router.logits(0, 64, np.random.default_rng(seed)), 4)
        square += (np.bincount(drawn.ravel(), minlength=16) / 64 - use[0]) ** 2 / 40
    assert square.mean() < 0.6 * (use[0] * (1 - use[0])).mean() / 64


def test_shares_of_use_by_hand():
    assert routes.shares(np.array([100.0, 1.0, 1.0, 1.0]), 2) == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3])
    assert routes.shares(np.array([4.0, 2.0, 1.0, 1.0]), 1) == pytest.approx([0.5, 0.25, 0.125, 0.125])
    drawn = routes.zipf(8, 2, 1.0, np.random.default_rng(0))
    assert drawn.sum() == pytest.approx(2.0) and sorted(drawn)[-1] / sorted(drawn)[0] == pytest.approx(8.0)


def test_percentiles_count_slots_by_what_they_served():
    """Ten tokens of 1..10 ms; a slot that serves nothing, or that no token could pass, does not count."""
    latency = np.array([np.arange(1.0, 11.0), np.full(10, 99.0), np.full(10, np.nan)])
    assert report.percentiles(latency, np.array([5.0, 0.0, 7.0]), (0.5, 0.9, 0.99)) == [5.0, 9.0, 10.0]
    assert report.percentiles(latency[:2], np.array([9.0, 1.0]), (0.9, 0.99)) == [10.0, 99.0]
    assert np.isnan(report.percentiles(latency[2:], np.ones(1), (0.5,))).all()


def test_heat_binds_and_policies_that_look_at_it_serve_more():
    """One physics, one batch of tokens for all. Demand is over what the satellites may do."""
    hot = small(
        play=SMALL["play"] | {"slots": 40, "tokens_per_s": 500.0},
        model=SMALL["model"] | {"layers": 5},
        placement=[{"policy": "budgeted"}],
        policy=[
            {"policy": "topk", "label": "throttled", "admission": "throttle"},
            {"policy": "topk"},
            {"policy": "coolest"},
            {"policy": "budgeted"},
        ],
    )
    setting = settings.prepare(hot, BUNDLE)
    traces = run.play(setting)
    tokens = {trace.policy.label: trace.tokens.sum() for trace in traces}
    over = {trace.policy.label: trace.over_s.max() for trace in traces}
    assert over["throttled"] > 0 and over["topk"] == over["coolest"] == over["budgeted"] == 0
    assert tokens["budgeted"] > 1.1 * tokens["topk"] and tokens["topk"] < 0.95 * 40 * 20 * 500
    assert all(trace.gate_mass.min() == 1.0 for trace in traces[:3]) and traces[3].gate_mass.min() > 0.5
    # the same again, and no slot knows of those to come
    for first, second in zip(traces, run.play(replace(setting, study=hot.narrowed(6, None, None, None)))):
        np.testing.assert_array_equal(first.tokens[:6], second.tokens)
        np.testing.assert_array_equal(first.latency_ms[:6], second.latency_ms)
    # joules are those of the runs: each token takes K = 2 runs per layer of 4 or 3 mJ, and nothing else here
    per_token = traces[1].joules.sum() / traces[1].tokens.sum()
    assert 5 * 2 * 0.003 <= per_token <= 5 * 2 * 0.004 + 1e-9
    served, load_j = traces[1].tokens[0], traces[1].joules[0]
    assert load_j == pytest.approx(served * per_token, rel=0.05)


def test_a_policy_sees_a_layers_hosts_however_many_satellites_there_are():
    copies, sizes = [], []
    for planes in (12, 48):
        study = small(constellation={"planes": planes, "per_plane": 10}, placement=[{"policy": "budgeted"}])
        setting = settings.prepare(study.narrowed(1, None, None, None), BUNDLE)
        sizes.append([len(hosts.world.up) for hosts in setting.hosts[0]])
        copies = setting.copies[0]
        memory = np.bincount([c.node for c in copies], [study.variants[c.variant].megabytes for c in copies])
        assert memory.max() <= 4.0 and not {c.node for c in copies} & set(setting.gateways["central"].tolist())
        assert {c[:2] for c in copies} == set(itertools.product(range(3), range(8)))
    assert max(sizes[0] + sizes[1]) <= 10


def test_a_gateway_that_is_cut_off_stops_every_token():
    study = small(links={"survival": 0.01}, play=SMALL["play"] | {"slots": 3})
    result = report.summary(setting := settings.prepare(study, BUNDLE), run.play(setting))
    assert all(row["tokens"] == 0 and row["slots_cut_off"] == 3 for row in result["rows"])
    assert all(row["latency_ms"]["p50"] is None and row["experts_out_of_reach"] > 0.5 for row in result["rows"])
    json.loads(json.dumps(result, allow_nan=False))


def test_command_writes_what_it_prints(tmp_path, capsys):
    from pyarrow import parquet

    arguments = [
        "sim",
        "run",
        "starlink-like",
        "--slots",
        "2",
        "--placements",
        "packed",
        "--policies",
        "topk",
        "budgeted",
    ]
    assert cli.main([*arguments, "--json", "-o", str(tmp_path / "out")]) == cli.EXIT_OK
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "out" / "result.json").read_text())
    rows = parquet.read_table(tmp_path / "out" / "slots.parquet").to_pylist()
    assert len(rows) == 4 and {row["policy"] for row in rows} == {"topk", "budgeted"}
    for row in result["rows"]:
        mine = [each for each in rows if each["policy"] == row["policy"]]
        assert sum(each["tokens"] for each in mine) == pytest.approx(row["tokens"], abs=0.1)
    assert result["satellites"] == 1584 and result["provenance"] == "simulated" and "no perplexity" in result["quality"]
    assert cli.main(["sim", "run", "space-xnet", "--slots", "1", "--placements", "random", "rank match"]) == cli.EXIT_OK
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= report.COLUMNS_WIDE and "p99 ms" in lines[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"colour": 1}, "colour is unknown"),
        ({"play": {"slots": 0, "tokens_per_s": 1.0}}, "slots is 0; give a whole number from 1"),
        ({"play": {"slots": 4, "tokens_per_s": float("nan")}}, "tokens_per_s is nan"),
        ({"play": {"slots": 4, "tokens_per_s": 1.0, "speed": 1}}, "speed is unknown"),
        ({"play": {"slots": 20000, "tokens_per_s": 1.0, "batch_tokens": 4096}}, "at most 4000000"),
        ({"play": {"slots": 4, "tokens_per_s": 1.0, "batch_tokens": 6, "looks": 4}}, "no multiple of looks"),
        ({"constellation": {"planes": 900, "per_plane": 900}}, "810000 satellites; at most 20000"),
        ({"constellation": {"planes": 2, "per_plane": 2}}, "3 layers need a gateway each"),
        ({"model": SMALL["model"] | {"top_k": 9}}, "top_k 9 of 8 experts"),
        ({"model": SMALL["model"] | {"sigma": 1.0}}, "sigma goes with routing"),
        ({"model": SMALL["model"] | {"routing": "guess"}}, "routing is guess; use lognormal, zipf, calibration"),
        ({"costs": {"source": "x", "int9": {"ms": 1.0}}}, "no precision; use"),
        ({"costs": {"source": "x"}}, "megabytes, ms, joules and error"),
        ({"placement": [{"policy": "affinity"}]}, "affinity is unknown"),
        ({"placement": [{"policy": "ring"}, {"policy": "ring"}]}, "the same label"),
        ({"policy": [{"policy": "best"}]}, "best is unknown; use topk"),
        ({"policy": [{"policy": "topp", "p": "much"}]}, "p = much is no number"),
        ({"policy": []}, "[[policy]]"),
        ({"start": "now"}, "give a time with its zone"),
        ({"payload": {"busy_w": 1.0, "idle_w": 2.0}}, "busy_w above idle_w"),
    ],
)
def test_files_that_cannot_be(change, words):
    with pytest.raises(files.ConstellationFileError) as error:
        small(**change)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_commands_that_cannot_be(tmp_path, capsys):
    half = {key: value for key, value in SMALL.items() if key != "power"}
    with pytest.raises(files.ConstellationFileError, match="give all or none"):
        files.parse(half)
    bad = tmp_path / "bad.toml"
    bad.write_text("name = ")
    for arguments, words in (
        (["no-such"], "there are space-xnet, starlink-like"),
        ([str(tmp_path / "none.toml")], "cannot be read"),
        ([str(bad)], "is not TOML"),
        (["space-xnet", "--policies", "best"], "there are 'topk'"),
        (["space-xnet", "--slots", "100000"], "slots is 100000"),
        (["space-xnet", "--seed", "-1"], "--seed is -1"),
        (["starlink-like", "--bundle", str(tmp_path / "none")], "there is no bundle at"),
        (["space-xnet", "-o", str(bad)], "is no folder"),
    ):
        assert cli.main(["sim", "run", *arguments]) == cli.EXIT_USAGE
        told = capsys.readouterr().err
        assert words in told and told.count("\n") == 1
    with pytest.raises(run.KnobError, match="policy topp: p 7.* is not in"):
        run.play(settings.prepare(small(policy=[{"policy": "topp", "p": 7.0}]), BUNDLE))
    crowded = small(memory={"satellite_mb": 0.5, "copies": 1.0})
    with pytest.raises(PlacementError, match="memory binds"):
        settings.prepare(crowded, BUNDLE)
