"""`spacemoe place` on two real agents: cut short, gone on with, undone; and what it refuses before it sends anything."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import zmq
from node_rig import EXPERTS, LAYERS, AgentProcess, Observer, agent_tables, make_bundle

from ground_station import carry_out, cli, cli_place, placement_live
from ground_station.broker import Broker, free_port
from ground_station.carry_out import Journal, Step, read_journal
from ground_station.placement import PlacementError
from node_agent import shard
from node_agent.delivery_frame import Shard
from node_agent.wire import Birth, HostedShard

ALL_INT8 = {f"L{layer:02}E{expert:03}.int8" for layer in range(LAYERS) for expert in range(EXPERTS)}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """The rig's bundle with a calibration: expert 0 is chosen most, always with another one."""
    made = make_bundle(tmp_path_factory.mktemp("bundle"))
    tokens, pair = 60.0, np.array([[0, 30, 20, 10], [30, 0, 0, 0], [20, 0, 0, 0], [10, 0, 0, 0]], float)
    np.savez(
        made.root / "calibration.npz",
        counts=np.tile([60.0, 30.0, 20.0, 10.0], (LAYERS, 1)),
        gate_mean=np.full((LAYERS, EXPERTS), 0.5),
        coactivation=np.tile(pair, (LAYERS, 1, 1)),
        successive=np.full((LAYERS - 1, EXPERTS, EXPERTS), 9.0),
        tokens=tokens,
    )
    return made


def held(observer: Observer) -> set[str]:
    """What the node's latest birth says."""
    rows = [tree["shards"] for leaf, tree, _ in observer.all if leaf == "birth"][-1]
    return {Shard(row["layer"], row["expert"], row["precision"]).stem for row in rows}


def after(start: dict[str, set[str]], steps: list[dict]) -> dict[str, set[str]]:
    """What the listed steps make of it, each done once by hand."""
    now = {node: set(stems) for node, stems in start.items()}
    for step in steps:
        (now[step["node"]].add if step["kind"] == "copy" else now[step["node"]].remove)(step["shard"])
    return now


def test_a_placement_is_cut_short_gone_on_with_and_undone(bundle, tmp_path, capsys, monkeypatch):
    listen = f"tcp://127.0.0.1:{free_port()}"
    manifest = shard.read_manifest(bundle.root)
    resident_mb = max(entry.bytes for entry in manifest.shards if entry.precision == "int8") * 1.5e-6
    nodes, journal = tmp_path / "nodes.toml", tmp_path / "journal.json"
    rows = "".join(f'[[nodes]]\nid = "{node}"\nmemory_mb = {8.5 * resident_mb}\n' for node in ("n1", "n2"))
    nodes.write_text(f"fleet_mb = {9.5 * resident_mb}\n{rows}")
    broker, agents, seen = Broker(tmp_path / "broker"), [], {}
    broker.start()
    try:
        for node in ("n1", "n2"):
            folder = tmp_path / node
            folder.mkdir()
            tables = agent_tables(folder, "tcp://127.0.0.1:9", broker=broker)
            tables["node"]["id"] = node
            tables["data"]["delivery_endpoint"] = listen
            if node == "n1":
                tables["bundle"] = {"path": str(bundle.root), "shards": sorted(ALL_INT8)}
            seen[node] = Observer(broker.host, broker.port, node=node)
            agents.append(AgentProcess(folder, tables))
        start = {"n1": ALL_INT8, "n2": set()}
        for node in seen:
            seen[node].next("birth")
        assert {node: held(observer) for node, observer in seen.items()} == start

        def place(*more: object) -> tuple[int, str, str]:
            common = ["--broker", f"{broker.host}:{broker.port}", "--fleet", "test", "--listen", listen]
            code = cli.main(["place", str(bundle.root), *common, "--patience", "10", *map(str, more)])
            return code, *capsys.readouterr()

        plan = ("--nodes", nodes, "--journal", journal)
        code, out, err = place(*plan, "--dry-run", "--json")
        assert code == 0, err
        shown = json.loads(out)
        kinds = [step["kind"] for step in shown["steps"]]
        assert "copy" in kinds and "drop" in kinds and len(kinds) >= 4 and shown["worth"]
        files = {entry.files[0].path.split("/")[-1].removesuffix(".onnx"): entry.bytes for entry in manifest.shards}
        assert shown["bytes"] == sum(files[step["shard"]] for step in shown["steps"] if step["kind"] == "copy")
        assert not journal.exists() and {node: held(observer) for node, observer in seen.items()} == start
        goal = after(start, shown["steps"])
        assert goal != start and {stem.split(".")[0] for stems in goal.values() for stem in stems} == {
            stem.split(".")[0] for stem in ALL_INT8
        }

        small = tmp_path / "small.toml"
        small.write_text(rows.replace(str(8.5 * resident_mb), str(7.5 * resident_mb)))
        code, _, err = place("--nodes", small, "--dry-run")
        assert code == cli.EXIT_USAGE and "n1 holds" in err and err.count("\n") == 1

        alone = tmp_path / "alone.json"
        carry_out.write_journal(alone, Journal(manifest.name, (Step("drop", "n1", Shard(0, 0, "int8")),)))
        for more in ((), ("--dry-run",)):
            code, _, err = place("--nodes", nodes, "--journal", alone, *more)
            assert code == cli.EXIT_USAGE and "the only copy of an expert (L00E000.int8 on n1)" in err
        carry_out.write_journal(alone, Journal("another", ()))
        code, out, err = place("--nodes", nodes, "--journal", alone)
        assert code == cli.EXIT_USAGE and "is of bundle 'another'" in err and out == ""
        assert {node: held(observer) for node, observer in seen.items()} == start

        write = carry_out.write_journal

        def stop_in_the_third(path, now):
            if now.done == 3:  # the node has carried it out, and nobody has noted it
                raise KeyboardInterrupt
            write(path, now)

        with monkeypatch.context() as patch:
            patch.setattr(carry_out, "write_journal", stop_in_the_third)
            code, _, err = place(*plan)
        count = len(shown["steps"])
        assert code == cli.EXIT_INTERRUPTED and err.count("\n") == 1 and read_journal(journal).done == 2
        assert (
            f"interrupted: 2 of {count} steps are done: the same command goes on" in err and f"--undo {journal}" in err
        )

        def told_to_end(path, now):
            if now.done == 3:
                raise cli._Terminated
            write(path, now)

        with monkeypatch.context() as patch:
            patch.setattr(carry_out, "write_journal", told_to_end)
            code, _, err = place(*plan)
        assert (
            code == cli.EXIT_TERMINATED and f"terminated: 2 of {count} steps are done" in err and err.count("\n") == 1
        )

        def full_disk(path, now):
            if now.done == 4:
                raise OSError(28, "No space left on device")
            write(path, now)

        with monkeypatch.context() as patch:
            patch.setattr(carry_out, "write_journal", full_disk)
            code, _, err = place(*plan)
        assert code == cli.EXIT_FAILED and f"No space left on device; 3 of {count} steps are done" in err
        assert err.count("\n") == 1 and f"--undo {journal}" in err
        code, out, err = place(*plan, "--json")
        assert code == 0, err
        rest = json.loads(out)
        assert rest["went_on"] and rest["steps"] == shown["steps"][3:] and rest["done"] == count
        assert rest["sent_bytes"] + rest["had_bytes"] == rest["bytes"]
        for node in seen:
            seen[node].next("birth", lambda _, node=node: held(seen[node]) == goal[node])
        assert {node: held(observer) for node, observer in seen.items()} == goal
        code, out, err = place(*plan)
        assert code == 0 and "already carried out" in out, err
        code, out, err = place(*plan, "--json")
        assert code == 0 and (json.loads(out)["done"], json.loads(out)["steps"]) == (count, []), err
        code, out, err = place("--nodes", nodes, "--journal", tmp_path / "next.json")
        assert code == 0 and "nothing is to be moved" in out and "what is held stays: expected latency" in out, err
        assert "latency then" not in out and not (tmp_path / "next.json").exists()

        # an endpoint that no node dials: nothing is moved, not even noted
        elsewhere = ("--listen", f"tcp://127.0.0.1:{free_port()}", "--patience", "1.5")
        code, _, err = place("--undo", journal, *elsewhere)
        assert code == cli.EXIT_FAILED and "not dialled in" in err and "n2" in err and "nothing was moved" in err, err
        assert err.count("\n") == 1 and not (tmp_path / "journal.json.undo").exists()
        with placement_live.PatientDeliverer(listen, None, 10.0) as deliverer:
            deliverer.reach(["n1", "n2"])  # control: those that dial in are found,
            deliverer.patience_s = 0.5
            with pytest.raises(placement_live.FleetNotReady, match="within 0.5 s: n3; "):  # and only the other is named
                deliverer.reach(["n1", "n2", "n3"])
        assert {node: held(observer) for node, observer in seen.items()} == goal

        code, out, err = place("--undo", journal)
        assert code == 0 and "births say the same" in " ".join(out.split()) and "MB was on the nodes" in out, err
        assert read_journal(tmp_path / "journal.json.undo").done == len(shown["steps"])
        for node in seen:
            seen[node].next("birth", lambda _, node=node: held(seen[node]) == start[node])
        assert {node: held(observer) for node, observer in seen.items()} == start

        code, out, err = place("--undo", journal)
        assert code == 0 and "already gone back" in out, err
        code, _, err = place(*plan, "--patience", "1")  # what is undone is not said to be carried out
        assert code == cli.EXIT_FAILED and "not what the journal left" in err

        # the old list begun again in its middle would drop experts that are nowhere else
        write(journal, replace(read_journal(journal), done=2))
        monkeypatch.setattr(placement_live, "LOOK_S", 0.3)
        code, _, err = place(*plan)
        assert code == cli.EXIT_FAILED and "lacks" in err and "not what the journal left" in err, err
        assert {node: held(observer) for node, observer in seen.items()} == start
    finally:
        for agent in agents:
            agent.__exit__()
        for observer in seen.values():
            observer.__exit__()
        broker.stop()


# ------------------------------------------------------------ what births say


def birth(node: str, *shards: HostedShard, bundle: str = "rig") -> Birth:
    return Birth(node, 1, "0", "rig", 0.0, (), shards, bundle, 10**9, "tcp://127.0.0.1:1")


def test_another_bundle_or_version_is_refused_by_name(bundle):
    manifest = shard.read_manifest(bundle.root)
    entry = next(e for e in manifest.shards if (e.layer, e.expert, e.precision) == (1, 2, "int4"))
    mine = HostedShard(1, 2, "int4", entry.sha256)
    number = manifest.precisions.index("int4")
    assert placement_live.held(manifest, {"a": birth("a"), "b": birth("b", mine)}) == {(1, 2, 1, number)}
    for wrong in (birth("b", mine, bundle="else"), birth("b", replace(mine, sha256="0" * 64))):
        with pytest.raises(PlacementError, match="^b .*rig"):
            placement_live.held(manifest, {"b": wrong})


def test_the_last_step_of_a_shard_counts():
    which = Shard(0, 1, "int8")
    there = HostedShard(0, 1, "int8", "0" * 64)
    parked = (Step("copy", "a", which), Step("drop", "a", which))
    assert placement_live.unlike(parked, {"a": birth("a")}) == []
    assert placement_live.unlike(parked, {"a": birth("a", there)}) == ["a still holds L00E001.int8"]
    assert placement_live.unlike(parked[:1], {"a": birth("a")}) == ["a lacks L00E001.int8"]
    assert placement_live.unlike(parked[:1], {}) == ["a lacks L00E001.int8"]


def test_the_way_back_takes_in_a_step_that_was_not_noted():
    """A is copied to b and dropped from a, the drop is not in the journal: A must come back to a before it leaves b."""
    which = Shard(0, 1, "int8")
    steps = (Step("copy", "b", which), Step("drop", "a", which))
    back = (Step("copy", "a", which), Step("drop", "b", which))
    assert placement_live.way_back(Journal("rig", steps, 1)).steps == back
    assert placement_live.way_back(Journal("rig", steps, 2)).steps == back
    assert carry_out.undone(Journal("rig", steps, 1)).steps == back[1:]  # control: this alone would lose it
    assert placement_live.settled(Journal("rig", steps, 1)) == steps[:1]
    parked = (Step("copy", "b", which), Step("drop", "b", which))
    assert placement_live.settled(Journal("rig", parked, 1)) == ()  # it may be dropped by now
    assert placement_live.settled(Journal("rig", parked, 2)) == parked


# ------------------------------------------------------------ wrong usage


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (("--memory", "1"), "--journal FILE"),
        (("--dry-run",), "--memory MB"),
        (("--nodes", "x", "--memory", "1"), "goes without"),
        (("--patience", "nan", "--dry-run"), "--patience nan"),
        (("--undo", "/none/j.json"), "cannot be"),
        (("--memory", "1", "--dry-run", "--key", "/none"), "cannot be read"),
        (("--memory", "1", "--dry-run", "--broker", "nowhere"), "nowhere"),
    ],
)
def test_wrong_usage_is_one_line(bundle, capsys, more, word):
    assert cli.main(["place", str(bundle.root), *more]) == cli.EXIT_USAGE
    err = capsys.readouterr().err
    assert word in err and err.count("\n") == 1


def test_the_key_s_public_half_is_libzmq_s(tmp_path):
    public, secret = zmq.curve_keypair()
    path = tmp_path / "key"
    path.write_bytes(secret + b"\n")
    path.chmod(0o600)
    assert cli_place._keys(path) == (public, secret)
    for text, mode, word in ((secret, 0o644, "chmod 600"), (secret[:-1], 0o600, "no secret key"), (b"", 0o600, "no s")):
        path.write_bytes(text)
        path.chmod(mode)
        with pytest.raises(cli_place.UsageError, match=word):
            cli_place._keys(path)
