"""`spacemoe demo` as a user runs it, on the reference bundle: what it prints, and that it leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from ground_station import cli_shared
from ground_station.cli import reference_bundle
from ground_station.demo import report
from ground_station.selection import POLICIES
from ground_station.text_stream import Wrapped
from node_agent.compress import CODECS

pytestmark = pytest.mark.broker
DEMO = [sys.executable, "-m", "ground_station.cli", "demo", "--prompt", "In the beginning", "--seed", "0"]


def run(*arguments: str) -> dict:
    done = subprocess.run([*DEMO, "--json", *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip().splitlines()) == 1
    return json.loads(done.stdout)


def check_joules(result: dict) -> None:
    """Four parts that add up, per node and over all; boards take 3 W and more, so idling is nearly all of it."""
    assert result["joules_unknown"] == {} and "cumulative counters" in result["joules_method"]
    kinds = ("compute", "radio", "idle", "telemetry")
    for tree in (result["joules"], *(node["joules"] for node in result["nodes"])):
        assert list(tree) == [*kinds, "total"]
        assert sum(tree[kind] for kind in kinds) == pytest.approx(tree["total"], abs=1e-3)
        assert tree["compute"] > 0 and tree["radio"] > 0 and tree["idle"] > 0.7 * tree["total"]
    for kind in (*kinds, "total"):
        each = [node["joules"][kind] for node in result["nodes"]]
        assert sum(each) == pytest.approx(result["joules"][kind], abs=1e-3)
    assert result["joules"]["total"] / result["tokens"] == pytest.approx(result["joules_per_token"], abs=1e-3)
    for node in result["nodes"]:
        assert node["joules"]["total"] == pytest.approx(node["energy_j"], abs=1e-3)
        assert (node["joules_provenance"], node["joules_unknown"]) == ("simulated", None)
        assert node["joules_scope"] == ("board" if "rpi5" in node["id"] else "module")
    lines = report(result).splitlines()
    assert f"{result['joules']['total']:.2f} J: compute {result['joules']['compute']:.2f}, radio" in lines[3]
    # control: a node that is unknown makes the sum unknown, and the text says so
    lame = result | {"joules": None, "joules_per_token": None, "joules_unknown": {"sat-1-rpi5": "no answer"}}
    assert "joules unknown: sat-1-rpi5: no answer" in report(lame) and "J/token" not in report(lame)


@pytest.mark.parametrize("broker", ["mosquitto", "embedded"])
def test_the_ledger_says_what_the_issue_asks_for(broker, request):
    if broker == "mosquitto":
        request.getfixturevalue("mosquitto")
    result = run("--tokens", "64", "--broker", broker)
    assert result["tokens"] == 64 and len(result["text"]) > 64
    assert result["tokens_per_s"] > 0 and result["ttft_s"] > 0
    assert result["bytes_per_token"]["sent"] > 0 and result["bytes_per_token"]["received"] > 0
    assert result["joules_per_token"] > 0 and result["joules_provenance"] == "simulated"
    assert len(result["nodes"]) == 4
    for node in result["nodes"]:
        assert node["served"] > 0 and 20 < node["temp_c"] < 100 and 1 < node["power_w"] < 30
        assert node["provenance"] == "simulated"
    assert result["ladder"] == {}
    check_joules(result)
    assert result["parity"]["equal"] is True
    assert (result["parity"]["tokens_equal"], result["parity"]["max_logit_diff"]) == (64, 0)
    assert result["broker"] == broker


def test_the_same_seed_gives_the_same_text_and_another_policy_another():
    sampled = [
        run("--tokens", "24", "--temperature", "0.9", "--top-p", "0.95", "--no-parity")["text"] for _ in range(2)
    ]
    assert sampled[0] == sampled[1]
    random = run("--tokens", "24", "--policy", "random")
    assert random["text"] != run("--tokens", "24", "--no-parity")["text"]
    assert random["parity"]["equal"] is True


def test_budgeted_runs_fewer_experts_when_the_boards_are_near_their_limit():
    free, hot = (run("--tokens", "24", "--policy", "budgeted", "--temp-limit", limit) for limit in ("200", "40"))
    served = [sum(node["served"] for node in result["nodes"]) for result in (free, hot)]
    assert served[1] < 0.8 * served[0]
    assert hot["parity"]["equal"] is True


def test_the_ledger_file_has_a_line_per_token(tmp_path):
    run("--tokens", "8", "--no-parity", "--ledger", str(tmp_path / "tokens.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "tokens.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    assert all(line["total_ms"] >= line["trunk_ms"] > 0 for line in lines)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_behind_however_it_ends(how, tmp_path):
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    demo = subprocess.Popen(
        [*DEMO, "--tokens", "1900"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    children: list[psutil.Process] = []
    end = time.monotonic() + 60
    while len(children) < 6:  # broker, simulator, four agents
        assert time.monotonic() < end and demo.poll() is None
        children = psutil.Process(demo.pid).children(recursive=True)
        time.sleep(0.05)
    demo.send_signal(how)
    _, errors = demo.communicate(timeout=20)
    if how == signal.SIGINT:
        assert demo.returncode == 130
        assert errors.decode().strip().splitlines()[-1].startswith("interrupted")
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    if how != signal.SIGKILL:
        assert not list(tmp_path.glob("spacemoe-demo-*"))


def test_text_is_wrapped_at_spaces_and_nothing_is_lost():
    shown: list[str] = []
    wrapped = Wrapped(shown.append, width=10)
    for piece in ("one two", " three fo", "ur\n  five sixteenletters", " end"):
        wrapped(piece)
    wrapped.end()
    lines = "".join(shown).split("\n")
    assert [line.rstrip() for line in lines] == ["one two", "three four", "  five", "sixteenletters", "end"]


def test_the_choices_of_the_command_line_are_those_of_the_libraries():
    assert cli_shared.CODECS == tuple(CODECS) and cli_shared.POLICIES == POLICIES


def test_a_clone_has_its_reference_bundle():
    assert reference_bundle().is_dir()


def test_a_signal_that_another_thread_takes_waits_until_the_child_is_known():
    """Control: without the hold, the handler's exception comes in the middle of the block."""
    import threading

    from ground_station.local_fleet import _signals_held

    class Told(Exception):
        pass

    def handler(_number, _frame):
        raise Told

    before = signal.signal(signal.SIGTERM, handler)
    try:
        for hold, expected in ((True, ["began", "known"]), (False, ["began"])):
            steps = []
            stop = threading.Event()
            other = threading.Thread(target=stop.wait)
            other.start()
            try:
                with _signals_held() if hold else contextlib.nullcontext():
                    steps.append("began")
                    signal.pthread_kill(other.ident, signal.SIGTERM)
                    time.sleep(0.05)
                    steps.append("known")
            except Told:
                steps.append("told")
            finally:
                stop.set()
                other.join()
            assert steps == [*expected, "told"]
    finally:
        signal.signal(signal.SIGTERM, before)
