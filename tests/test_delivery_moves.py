"""Moves of shards between two real agents: carried out in order, cut short and gone on with, undone; journals that are damaged."""

from __future__ import annotations

import json

import numpy as np
import pytest
from node_rig import AgentProcess, agent_tables, make_bundle

from firmware_sim.contact import OneWay
from ground_station import benchmark_routing, contacts
from ground_station import carry_out as co
from ground_station.carry_out import Journal, JournalError, Step, carry_out, read_journal, undone
from ground_station.delivery import Deliverer
from ground_station.placement_moves import moves
from ground_station.placement_problem import Copy
from node_agent import shard
from node_agent.delivery_frame import Shard

NODES = ("n1", "n2")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle"))


def held(folder, node) -> set[str]:
    return {path.stem for path in (folder / node / "state/shards").glob("*.offer")}


def test_moves_are_carried_out_gone_on_with_and_undone(bundle, tmp_path):
    """Two experts change places; the list is planned by placement_moves, and stops once in the middle of a copy."""
    manifest = shard.read_manifest(bundle.root)
    old = {Copy(0, 0, 0, 0), Copy(0, 1, 1, 0)}
    new = {Copy(0, 0, 1, 0), Copy(0, 1, 0, 0)}
    planned = moves(old, new, np.array([10]), np.array([25, 25]))
    steps = co.steps_of(planned, NODES, ("int8",), (0, 1))
    assert {step.kind for step in steps[:2]} == {"copy"} and {step.kind for step in steps[2:]} == {"drop"}
    begin = Journal(
        "rig", tuple(Step("copy", f"n{copy.node + 1}", Shard(0, copy.expert, "int8")) for copy in sorted(old))
    )
    with Deliverer() as deliverer:
        agents = []
        try:
            for node in NODES:
                folder = tmp_path / node
                folder.mkdir()
                tables = agent_tables(folder, "tcp://127.0.0.1:9")
                tables["node"]["id"] = node
                tables["data"]["delivery_endpoint"] = deliverer.endpoint
                agents.append(AgentProcess(folder, tables))
            carry_out(begin, deliverer, bundle.root, manifest)
            assert held(tmp_path, "n1") == {"L00E000.int8"} and held(tmp_path, "n2") == {"L00E001.int8"}

            path, seen = tmp_path / "journal.json", []

            def stop_in_the_second(now):
                seen.append((now.step, now.bytes))
                if now.step == 1 and 0 < now.bytes < now.total_bytes:
                    raise InterruptedError

            with pytest.raises(InterruptedError):
                carry_out(Journal("rig", steps), deliverer, bundle.root, manifest, path, stop_in_the_second)
            assert read_journal(path) == Journal("rig", steps, 1) and len(seen) > 2
            way, order = [], []
            end, sent = carry_out(
                read_journal(path),
                deliverer,
                bundle.root,
                manifest,
                path,
                way.append,
                lambda step: order.append((step.kind, frozenset(held(tmp_path, step.node)))),
            )
            assert end == read_journal(path) == Journal("rig", steps, 4) and [now.step for now in way][0] == 1
            assert len(sent) == 1 and sent[0].had_bytes > 0  # what came before it was cut short
            assert all(len(there) == 2 for _, there in order)  # told after each copy and before each drop
            assert held(tmp_path, "n1") == {"L00E001.int8"} and held(tmp_path, "n2") == {"L00E000.int8"}

            back, _ = carry_out(undone(end), deliverer, bundle.root, manifest)
            assert [step.kind for step in back.steps] == ["copy", "copy", "drop", "drop"]
            assert held(tmp_path, "n1") == {"L00E000.int8"} and held(tmp_path, "n2") == {"L00E001.int8"}
        finally:
            for agent in agents:
                agent.__exit__()


def test_the_way_back_is_of_what_is_done():
    steps = tuple(Step("copy", "n1", Shard(0, expert, "int8")) for expert in range(3))
    assert undone(Journal("rig", steps, 2)).steps == (steps[1].inverse, steps[0].inverse)
    assert steps[0].inverse.kind == "drop" and steps[0].inverse.inverse == steps[0]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[", "damaged"),
        ("{}", "lacks 'bundle'"),
        (json.dumps({"bundle": "rig", "steps": [], "done": 1}), "1 of 0 steps"),
        (
            json.dumps({"bundle": "rig", "steps": [{"kind": "burn", "node": "n1", "shard": {}}]}),
            "not one of copy, drop",
        ),
        (
            json.dumps(
                {"bundle": "rig", "steps": [{"kind": "copy", "node": "../n", "shard": vars(Shard(0, 0, "int8"))}]}
            ),
            "not legal",
        ),
    ],
)
def test_damaged_journals_are_one_line(tmp_path, text, word):
    (tmp_path / "j.json").write_text(text)
    with pytest.raises(JournalError, match=word) as caught:
        read_journal(tmp_path / "j.json")
    assert "\n" not in str(caught.value) and "j.json" in str(caught.value)


def test_journals_of_something_else_are_refused(bundle):
    manifest = shard.read_manifest(bundle.root)
    with Deliverer() as deliverer:
        with pytest.raises(JournalError, match="give that bundle"):
            carry_out(Journal("else", ()), deliverer, bundle.root, manifest)
        with pytest.raises(JournalError, match="L00E099.int8"):
            steps = (Step("copy", "n1", Shard(0, 99, "int8")),)
            carry_out(Journal("rig", steps), deliverer, bundle.root, manifest)


def test_a_scenario_s_contacts_become_a_plan():
    rows = (OneWay("ground", "sat-1", 0.0, 600.0, 0.01, 1e6), OneWay("sat-1", "ground", 0.0, 600.0, 0.01, 1e6))
    assert contacts.plan(rows).contacts[1].source == "sat-1"


# ------------------------------------------------------------ the benchmark's own arithmetic, and the benchmark itself


def test_the_plan_of_the_benchmark_by_hand():
    """8000 bit/s: 1000 bytes a second. A file of 5000 bytes is chunks of 4096 and 904, each with 28 bytes of header."""
    case = benchmark_routing.Case(8000.0, 0.5, "int8")
    assert benchmark_routing.planned_arrival_s(case, (5000,), 2.0) == pytest.approx(2.0 + 5.056 + 0.5)
    # Contact 0-4 s: offer of 100 bytes 0.1 s, its way there and back 1 s; 2.9 s are left: 2872 bytes and a header. In the next,
    # from 10 s: 1.1 s again, then 2128 bytes and a header, and 0.5 s of flight.
    got = benchmark_routing.interrupted_arrival_s(case, 100, (5000,), 4.0, 10.0)
    assert got == pytest.approx(10.0 + 1.1 + 2.156 + 0.5)


def test_the_benchmark_measures_and_loses_nothing(bundle, monkeypatch):
    """Small shards on fast links: what it reports is checked for sense, not for time."""
    cases = tuple(benchmark_routing.Case(rate, 0.01, precision) for rate, precision in ((1e6, "int4"), (2e6, "fp32")))
    monkeypatch.setattr(benchmark_routing, "CASES", (*cases, cases[1]))
    monkeypatch.setattr(benchmark_routing, "INTERRUPTED", cases[1])
    got = benchmark_routing.routing(bundle.root, 2)
    assert got["emulated"] is True and [row["measured_s"]["n"] for row in got["links"]] == [2, 4]
    for row in got["links"]:
        assert row["measured_s"]["min"] >= row["planned_s"] - 1e-6  # a paced link is never faster than its plan
        assert row["within"] == (abs(row["error_percent"]["median"]) <= 2.0)
    cut = got["interrupted"]
    assert (cut["sent_bytes"], cut["sent_twice_bytes"]) == (cut["payload_bytes"], 0) and cut["offers"] >= 2
    assert "contact cut in the middle" in benchmark_routing.report(got)
