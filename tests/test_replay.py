"""A recorded run and its replay: the same decisions, other ones where the recording was altered, and one line for what cannot be used."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from ground_station import recording, recording_tape, replay, replay_heat, selection_choice
from ground_station.cli import main, reference_bundle
from ground_station.decode import Decoder
from ground_station.dispatch import Table
from ground_station.fleet import Instant, NodeState, Taken
from ground_station.live_prices import Costs
from ground_station.live_setting import policy_of, setting_of
from ground_station.local import LocalExperts
from ground_station.placement import round_robin
from ground_station.price_loop import Chosen, PriceLoop, as_chosen, play
from ground_station.recording import RecordingError
from ground_station.sampling import Sampling
from ground_station.selection_world import PRECISIONS, World
from ground_station.text import Text
from ground_station.trunk import Trunk
from node_agent import frame, npz_file, shard, wire

NODES = ("n1", "n2", "n3")
AMBIENT_C, R, TAU_S = 45.0, 3.0, 5.0
SENSOR_K = -2.0  # the sensors say so much less than the die is
TOKENS, TOKEN_S = 36, 0.25


def die_c(time_s: float) -> float:
    """3 K/W and 5 s over 45 °C, at 4 W for long and at 12.5 W from time 0 on: 57 °C to 82.5 °C."""
    return AMBIENT_C + R * (12.5 - 8.5 * np.exp(-time_s / TAU_S))


class Boards:
    """A fleet whose telemetry comes once a second of a clock that each token moves."""

    def __init__(self, tape: recording_tape.Tape):
        self.time_s, self._tape, self._states, self._told = 0.0, tape, {}, -1

    def now(self) -> Instant:
        return Instant(1e9 + self.time_s, self.time_s)

    def fleet(self) -> dict[str, NodeState]:
        second = int(self.time_s)
        if second > self._told:
            self._told = second
            for index, node in enumerate(NODES):
                self._tell(node, float(second), index)
        self.time_s += TOKEN_S
        return dict(self._states)

    def _tell(self, node: str, uptime_s: float, index: int) -> None:
        # the second node is 12 K cooler in all: work goes there
        temp_c = die_c(uptime_s) - 12.0 * (index == 1) + (SENSOR_K if uptime_s else 0.0)
        values = {"temp_c": temp_c, "power_w": 12.5, "energy_j": 12.5 * uptime_s, "uptime_s": uptime_s}
        values |= {"energy_compute_j": 0.4 * uptime_s, "expert_compute_s": 0.2 * uptime_s, "expert_rows_served": 0.0}
        samples = {
            name: wire.Sample(name, value, "1", "ok", "simulated", "board", uptime_s) for name, value in values.items()
        }
        telemetry = wire.Telemetry(node, 1, 1, uptime_s, tuple(samples.values()))
        self._states[node] = NodeState(node, samples=samples, telemetry_at=self.now())
        self._tape.hear(node, Taken(telemetry, self.now(), late=False))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run in this process, by the very loop of the demo, on boards that warm up to their limit."""
    bundle, folder = reference_bundle(), tmp_path_factory.mktemp("recorded")
    manifest = shard.read_manifest(bundle)
    table = Table(round_robin(manifest, dict.fromkeys(NODES, 1 << 29), "int8", ("int4",)))
    joules, ms = np.zeros((3, PRECISIONS)), np.zeros((3, PRECISIONS))
    for name, share in (("int8", 1.0), ("int4", 0.8)):
        joules[:, frame.PRECISION_ID[name]], ms[:, frame.PRECISION_ID[name]] = 2e-5 * share, 0.01 * share
    costs = Costs(joules, ms, np.full(3, 200.0), ("test",) * 3)
    tape = recording_tape.Tape(NODES)
    boards = Boards(tape)
    chosen = Chosen(policy_of("budgeted", 3, bundle, manifest), len(NODES))
    decoder = Decoder(Trunk(bundle, manifest), chosen, LocalExperts(bundle, manifest, table, "q8"))
    world = World.of(table, manifest.dims.experts, joules, ms)
    setting = setting_of(table, manifest, costs, 85.0, None)
    prices = PriceLoop(decoder, chosen, setting, world, boards.fleet, boards.now, lambda node: True, tape=tape)
    prompt = "In the beginning"
    ids = ([manifest.bos_id] if manifest.bos_id is not None else []) + Text(bundle, manifest).encode(prompt)
    sampling = Sampling(0.8, 0.9, 3)
    for _ in range(2):
        list(play(decoder, chosen, ids, TOKENS // 2, sampling, prices, tape, lambda: (True,) * 3))
    simulated = json.dumps({"ambient_c": AMBIENT_C, "foster": [[R, TAU_S]]})
    cool = json.dumps({"ambient_c": AMBIENT_C - 12.0, "foster": [[R, TAU_S]]})
    head = {
        "made_utc_s": 1e9,
        "bundle": manifest.name,
        "manifest_sha256": shard.sha256_of(bundle / shard.MANIFEST),
        "prompt": prompt,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "policy": "budgeted",
        "temp_limit_c": 85.0,
        "precision": "int8",
        "replica": "int4",
        "codec": "q8",
        "bits_per_value": None,
        "boards": tuple(
            recording.Board(node, 1 << 29, "raspberry-pi-5", cool if node == "n2" else simulated) for node in NODES
        ),
        "scenario": "",
    }
    recording.write(folder, tape, chosen.choices, costs, head)
    return folder


def altered(recorded, folder, change, resign: bool = True):
    """A copy of the recording whose arrays `change` alters in place; `resign`: with the digest that fits."""
    shutil.copytree(recorded, folder)
    with np.load(folder / recording.RUN) as found:
        arrays = {name: found[name].copy() for name in found}
    arrays = change(arrays) or arrays
    np.savez_compressed(folder / recording.RUN, **arrays)
    if resign:
        head = json.loads((folder / recording.HEAD).read_text())
        head["run_sha256"] = shard.sha256_of(folder / recording.RUN)
        (folder / recording.HEAD).write_text(json.dumps(head))
    return folder


def test_a_replay_makes_the_same_decisions_one_by_one(recorded):
    result = replay.run(recorded, reference_bundle())
    decisions = result["decisions"]
    assert result["equal"] is True and decisions["first_difference"] is None
    assert decisions["recorded"] == decisions["replayed"] == decisions["equal"] == TOKENS * 4
    assert decisions["recorded_sha256"] == decisions["replayed_sha256"]
    assert result["tokens"]["equal"] == TOKENS and result["prices"] == {"updates": 10, "equal": True, "nodes": [*NODES]}
    found = recording.read(recorded)
    # prices were no constant, and they moved decisions: some experts were left out
    assert not found.prices[0, 0].any() and found.prices[-1, 0, 0] > found.prices[-1, 0, 1]
    assert sum(int((choice.gates == 0).sum()) for choice in found.choices) > 0
    again = replay.run(recorded, reference_bundle())["decisions"]["replayed_sha256"]
    assert again == decisions["recorded_sha256"]


def test_the_model_against_the_sensor_and_what_hangs_on_it(recorded):
    """The die follows the model exactly and the sensors say 2 K less: the model says 2 K more, and near the limit that decides."""
    result = replay.run(recorded, reference_bundle())
    for row in result["temperature"].values():
        assert row["foster"]["n"] == 9 and row["measured"]["temp_c"] == "simulated"
        assert row["foster"]["mean_k"] == row["foster"]["rms_k"] == row["foster"]["largest_k"] == -SENSOR_K
        assert row["one_node"]["n"] == 0 and row["one_node"]["source"].startswith("not identified")
    shadow = result["with_simulated_temperatures"]
    assert 0 < shadow["different_decisions"] < shadow["of"] == TOKENS * 4
    found = recording.read(recorded)
    _, stands = replay_heat.compare(found)
    looks = replay_heat.replaced(found.looks, replay.COLUMNS, stands)
    assert looks[1:, 0] - found.looks[1:, 0] == pytest.approx(np.full((len(looks) - 1, 3), -SENSOR_K))
    assert np.array_equal(looks[:, 1:], found.looks[:, 1:], equal_nan=True)


def test_without_a_difference_no_decision_hangs_on_it(recorded, tmp_path):
    """Control: sensors that say what the model says. Recorded prices are of the old temperatures, so that replay says "different"."""

    def honest(arrays):
        temp, uptime = replay.COLUMNS.index("temp_c"), replay.COLUMNS.index("uptime_s")
        later = arrays["looks"][:, uptime] > 0
        arrays["looks"][:, temp][later] -= SENSOR_K
        arrays["messages"][arrays["messages"][:, 1] > 0, recording_tape.MESSAGE.index("temp_c")] -= SENSOR_K

    result = replay.run(altered(recorded, tmp_path / "honest", honest), reference_bundle())
    assert result["with_simulated_temperatures"]["different_decisions"] == 0
    assert result["equal"] is False and not result["prices"]["equal"]
    assert all(abs(row["foster"]["largest_k"]) < 1e-9 for row in result["temperature"].values())


def test_one_altered_temperature_is_found(recorded, tmp_path, capsys):
    def hotter(arrays):
        arrays["looks"][6, replay.COLUMNS.index("temp_c"), 1] += 8.0

    with pytest.raises(RecordingError, match="altered"):
        recording.read(altered(recorded, tmp_path / "crude", hotter, resign=False))
    folder = altered(recorded, tmp_path / "careful", hotter)
    result = replay.run(folder, reference_bundle())
    assert result["equal"] is False and not result["prices"]["equal"]
    first, found = result["decisions"]["first_difference"], recording.read(folder)
    assert first["call"] >= found.look_call[6] and first["token"] == first["call"] // 4
    blind = replay.report(result | {"with_simulated_temperatures": {"different_decisions": None, "why_not": "x " * 60}})
    assert max(map(len, blind.splitlines())) <= 80
    assert main(["replay", str(folder)]) == 3
    out = capsys.readouterr().out
    assert "DIFFERENT decisions" in out and max(map(len, out.splitlines())) <= 80


def test_after_a_rung_of_the_ladder_the_rest_of_the_text_is_not_compared(recorded, tmp_path):
    def broken(arrays):
        arrays["token_whole"][10] = 0
        # what those tokens chose may have been anything
        pairs = arrays["call_shape"].prod(1).cumsum()
        arrays["experts"][pairs[41] : pairs[60]] = 0

    folder = altered(recorded, tmp_path / "broken", broken)
    head = json.loads((folder / recording.HEAD).read_text())
    with np.load(folder / recording.RUN) as found:
        head["choices_sha256"] = recording.digest(recording._choices({name: found[name] for name in found}))
    (folder / recording.HEAD).write_text(json.dumps(head))
    result = replay.run(folder, reference_bundle())
    # tokens 10 to 17 of the first text are left out; the second text can be had again
    assert result["equal"] is True
    assert result["decisions"]["comparable"] == result["decisions"]["equal"] == 4 * (10 + TOKENS // 2)
    assert "8 tokens, the first 10" in result["decisions"]["not_comparable_because"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda a: a["looks"].__setitem__((2, 0, 0), np.nan), "looks holds what is no number"),
        (lambda a: {**a, "looks": a["looks"][:, :, :2]}, "looks is not of shape"),
        (lambda a: {name: each for name, each in a.items() if name != "tokens"}, "holds no tokens"),
        (lambda a: a["call_shape"].__setitem__((0, 0), 60_000), "arrays do not fit"),
        (lambda a: a["token_call"].__setitem__(0, 10**9), "arrays do not fit"),
        (lambda a: a["look_call"].__setitem__(3, 0), "arrays do not fit"),
        (lambda a: a["gates"].__setitem__(0, 0.125), "choices are not of the head's"),
        (lambda a: {**a, "messages": np.array([b"x"])}, "messages"),
    ],
)
def test_a_hostile_run_is_one_line(recorded, tmp_path, change, text):
    with pytest.raises(RecordingError) as told:
        replay.run(altered(recorded, tmp_path / "hostile", change), reference_bundle())
    assert text in str(told.value) and "\n" not in str(told.value) and "record again" in str(told.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"[" * 100_000, "not JSON"),
        (b'{"format": "spacemoe-recording", "version": 99}', "version 99"),
        (b"{}", "not of format"),
        (b"x" * (5 << 20), "over the limit"),
        (dict(manifest_sha256="0" * 64), "another bundle"),
        (dict(run_sha256="no"), "damaged"),
        (dict(temp_limit_c=float("nan")), "not JSON"),
        (dict(temp_limit_c=-4.0), "limit"),
        (dict(policy="telepathy"), "unknown to this build"),
        (dict(boards=[]), "damaged"),
        (dict(boards=[dict(node="a\x1b[2J", memory_bytes=1, profile="", simulated="")], costs_source=["x"]), "damaged"),
        (dict(temp_provenance={"a": "\x1b[2J"}), "damaged"),
        (dict(scenario="name = 5"), "scenario"),
        (dict(precision="fp64"), "fp64"),
    ],
)
def test_a_hostile_head_is_one_line_and_exit_code_2(recorded, tmp_path, content, text, capsys):
    folder = tmp_path / "hostile"
    shutil.copytree(recorded, folder)
    head = folder / recording.HEAD
    head.write_bytes(
        content if isinstance(content, bytes) else json.dumps(json.loads(head.read_text()) | content).encode()
    )
    assert main(["replay", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert text in err and len(err.strip().splitlines()) == 1 and out == ""


@pytest.mark.parametrize("name", [recording.HEAD, recording.RUN])
def test_a_pipe_in_place_of_a_file_is_told_and_not_waited_for(recorded, tmp_path, name):
    folder = tmp_path / "pipe"
    shutil.copytree(recorded, folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(RecordingError, match="no plain file"):
        recording.read(folder)
    with pytest.raises(npz_file.NpzError, match="no plain file"):
        npz_file.read(folder / name, {"x": (1,)})


def test_a_folder_without_a_recording_is_one_line(tmp_path, capsys):
    assert main(["replay", str(tmp_path / "nowhere")]) == 2
    assert "spacemoe demo --record" in capsys.readouterr().err


def test_what_ends_in_the_middle_of_a_text_is_left_out(recorded, tmp_path):
    found = recording.read(recorded)
    tape = recording_tape.Tape(NODES)
    tape.tokens = [(int(t), int(c), True) for t, c in zip(found.tokens, found.token_call)]
    tape.text_tokens = [TOKENS // 2]
    fields = {name: getattr(found.head, name) for name in found.head.__dataclass_fields__}
    made = ("format", "version", "costs_source", "temp_provenance", "power_provenance", "truncated")
    head = {name: each for name, each in fields.items() if name not in (*made, "choices_sha256", "run_sha256")}
    written = recording.write(tmp_path, tape, found.choices, found.costs, head)
    again = recording.read(tmp_path)
    assert written.truncated and len(again.tokens) == TOKENS // 2 and len(again.choices) == TOKENS // 2 * 4
    assert recording.digest(again.choices) == recording.digest(found.choices[: TOKENS // 2 * 4])


def test_a_load_without_end_fills_neither_memory_nor_tape():
    """What is not on tape is counted and forgotten; a full tape takes no more texts, and says so."""
    choice = selection_choice.Choice(
        np.array([[0, 1]]), np.array([[0.5, 0.0]], np.float32), np.array([[2, -1]]), np.array([[1, -1]])
    )
    chosen = Chosen(lambda layer, logits: choice, 3)
    for _ in range(5):
        chosen(0, np.zeros((1, 2)))
    chosen.forget(2)
    chosen(0, np.zeros((1, 2)))
    chosen.tally()
    assert (chosen.calls, len(chosen.choices), chosen.ran, chosen.rows) == (6, 3, 6, 6)
    assert chosen.runs[2, 1] == chosen.runs.sum() == 6
    tape = recording_tape.Tape(NODES)
    assert tape.begin_text() and not tape.truncated
    tape.end_text(recording_tape.MAX_CALLS)
    assert not tape.begin_text() and tape.truncated


def test_a_token_with_nodes_down_is_comparable_where_the_policy_knew_and_named_every_copy():
    experts, gates = np.array([[0, 1]]), np.array([[0.5, 0.5]], np.float32)
    named = selection_choice.Choice(experts, gates, np.array([[0, 2]]), np.array([[1, 1]]))
    half = selection_choice.Choice(experts, gates, np.array([[0, -1]]), np.array([[1, -1]]))
    plain = selection_choice.Choice(experts, gates)
    down = (True, False, True)
    assert as_chosen([named, plain], (True,) * 3, None) and as_chosen([named, named], down, down)
    for choices, known in (([named, half], down), ([plain], down), ([named], (True,) * 3), ([named], None)):
        assert not as_chosen(choices, down, known)


def test_a_course_ends_where_an_agent_started_again():
    rows = [[0, t, 0, 0, 50.0 + t, 4.0, 4.0 * t, 1, 1] for t in (1.0, 2.0, 3.0, 0.5, 1.5)]
    run = replay_heat.course(np.array(rows), 0)
    assert run.uptime_s.tolist() == [1.0, 2.0, 3.0] and run.power_w[1:].tolist() == [4.0, 4.0]
    assert not len(replay_heat.course(np.array(rows), 1).temp_c)


def test_a_network_predicts_as_the_formula_says():
    """From 57 °C, its equilibrium at 4 W, by 12.5 W: T(t) = 45 + 3 (12.5 - 8.5 e^(-t/5))."""
    board = recording.Board("x", 1, "raspberry-pi-5", json.dumps({"ambient_c": 45.0, "foster": [[3.0, 5.0]]}))
    time_s = np.arange(8.0)
    run = replay_heat.Course(time_s, np.full(8, 57.0), np.append(np.nan, np.full(7, 12.5)))
    assert replay_heat.predict(replay_heat.of_profile(board), run).tolist() == pytest.approx(die_c(time_s).tolist())
    for wrong in ("[]", '{"foster": [[1e9, 1]]}', '{"foster": 5}', '{"ambient_c": "hot"}', "{"):
        assert replay_heat.of_profile(replace(board, simulated=wrong)) is None
    assert replay_heat.of_profile(replace(board, profile="a real board")) is None


@pytest.mark.broker
def test_a_recorded_demo_replays_with_real_agents_gone(tmp_path):
    """Limit 50 °C: boards that idle at 35 to 47 °C are near it, so prices are no zeros and choices are not topk's."""
    spacemoe = [sys.executable, "-m", "ground_station.cli"]
    demo = [
        *spacemoe,
        "demo",
        "--policy",
        "budgeted",
        "--tokens",
        "24",
        "--temp-limit",
        "50",
        "--no-parity",
        "--json",
        "--nodes",
        "2",
    ]
    done = subprocess.run([*demo, "--record", str(tmp_path / "run")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["recording"] == str(tmp_path / "run") and told["expert_runs_per_token"]["topk"] == 16
    for row in told["prices"]["nodes"].values():
        assert row["price"]["max"] >= row["price"]["first"] >= 0.0
        assert row["joules_per_run"]["int8"] > 0 and "its own meter (simulated)" in row["costs_source"]
    assert any(row["price"]["max"] > 0 for row in told["prices"]["nodes"].values())
    replayed = subprocess.run(
        [*spacemoe, "replay", str(tmp_path / "run"), "--json"], capture_output=True, text=True, timeout=60
    )
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    result = json.loads(replayed.stdout)
    assert result["equal"] is True and result["decisions"]["equal"] == 24 * 4
    assert all(row["measured"]["temp_c"] == "simulated" for row in result["temperature"].values())
    assert all(abs(row["foster"]["mean_k"]) < 2.0 for row in result["temperature"].values() if row["foster"]["n"])
