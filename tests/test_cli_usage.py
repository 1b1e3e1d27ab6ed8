"""The command lines' manners: exit code 2 for a value that cannot be used, 1 for work that failed, 80 columns, one line of error."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from ground_station import cli, cli_benchmark
from node_agent import selftest


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    try:
        code = cli.main(list(arguments))
    except SystemExit as end:  # argparse's own
        code = end.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("demo", "--bundle", "/none"), "there is no bundle at /none"),
        (("demo", "--temperature", "-1"), "outside 0..100"),
        (("demo", "--prompt", ""), "the prompt is empty"),
        (("demo", "--precision", "int3"), "no int3 shards: it holds int8, int4"),
        (("demo", "--tokens", "100000"), "ask for at most"),
        (("demo", "--ledger", "/none/x"), "give --ledger a file in a folder that is there"),
        (("demo", "--keep", __file__), "is no folder: give another --keep DIR"),
        (("demo", "--broker", "pigeon"), "use auto, mosquitto, embedded or HOST:PORT"),
        (("demo", "--nodes", "3", "--scenario", "hot-eclipse"), "--nodes goes without --scenario"),
        (("demo", "--scenario", "/none"), "there are hot-eclipse"),
        (
            ("calibrate", "n1", "--simulated", "toaster"),
            "use jetson-agx-orin, jetson-nano, jetson-orin-nano, raspberry-pi-4",
        ),
        (
            ("calibrate", "n1", "--simulated", "toaster", "--dry-run"),
            "no simulated board 'toaster': use jetson-agx-orin",
        ),
        (("calibrate", "n1", "--step-s", "1"), "give a number from 10"),
        (("calibrate", "n1", "--output", "/none/x"), "give --output a file in a folder that is there"),
        (("calibrate", "Not Legal", "--broker", "127.0.0.1:9"), "not legal"),
        (("evaluate", "--text", "/none"), "/none"),
        (("benchmark", "sim", "--step-s", "60"), "0.1 to 10 s"),
        (("benchmark", "decode", "--tokens", "1"), "at least 2 tokens"),
    ],
)
def test_a_value_that_cannot_be_used_is_exit_code_2_and_one_line(capsys, arguments, says):
    code, out, error = run(capsys, *arguments)
    assert (code, out) == (2, "") and says in error and error.count("\n") == 1


def test_a_choice_that_is_none_is_exit_code_2_too(capsys):
    assert run(capsys, "demo", "--codec", "morse")[0] == run(capsys, "demo", "--tokens", "0")[0] == 2


def test_work_that_fails_is_exit_code_1(capsys):
    """Control: the values are good, and nobody answers there (port 9, discard)."""
    code, _, error = run(capsys, "calibrate", "n1", "--broker", "127.0.0.1:9")
    assert code == 1 and "no MQTT 5 broker answers" in error and error.count("\n") == 1


def test_the_help_says_what_exit_codes_mean(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and "1 the work failed; 2 wrong usage" in " ".join(out.split())


def parsers(root: argparse.ArgumentParser, words: tuple[str, ...] = ()):
    """Every sub-command's parser with the words that lead to it."""
    yield words, root
    for action in root._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                yield from parsers(sub, (*words, name))


def test_every_command_s_help_can_be_printed():
    """argparse expands "%" in help texts only when they are printed: "80 % capacity" is an exception then."""
    found = dict(parsers(cli.parser()))
    assert {("study", "battery"), ("experiment", "run"), ("demo",)} <= set(found)
    for words, sub in found.items():
        assert "usage: spacemoe" in sub.format_help(), words
    broken = argparse.ArgumentParser()
    broken.add_argument("--x", help="80 % capacity")
    with pytest.raises((TypeError, ValueError)):
        broken.format_help()


def test_a_bundle_is_shown_in_80_columns(capsys):
    code, out, _ = run(capsys, "bundle", "show")
    assert code == 0 and max(map(len, out.splitlines())) <= 80
    recipe = json.loads(run(capsys, "bundle", "show", "--json")[1])["recipe"]
    assert recipe and all(" ".join(text.split()) in " ".join(out.split()) for text in map(str, recipe.values()))


def test_a_self_test_is_shown_in_80_columns_and_paths_stay_whole():
    path = "/sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon0/in7_input:"  # of a Jetson Orin Nano
    text = (
        f"4 of 6 readable; total power: power_w.vdd_in; left out {path} an ina3221 has three channels; and more of it"
    )
    shown = selftest.as_table(
        selftest.Report((selftest.Check("sensors", True, text), selftest.Check("disk", False, "x" * 54)), ())
    )
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) == 4 and path in shown
    assert " ".join(shown.split()) == " ".join(f"ok sensors {text} FAIL disk {'x' * 54}".split())


def test_an_unsteady_machine_is_said_in_json_too(capsys, monkeypatch):
    code, out, _ = run(
        capsys, "benchmark", "sim", "--satellites", "4", "--rounds", "1", "--accelerator", "none", "--json"
    )
    assert code == 0 and json.loads(out)["unsteady"] is False  # one round does not differ from itself
    assert cli_benchmark._unsteady({"spread": {"min": 1.0, "max": 1.31}})
    assert not cli_benchmark._unsteady({"spread": {"min": 1.0, "max": 1.29}})


def test_the_profile_is_named_before_anything_is_started(tmp_path):
    from ground_station.local_fleet import Board, LocalFleet, ProfileError

    with pytest.raises(ProfileError, match="'pdp-11': use jetson-agx-orin, jetson-nano") as caught:
        LocalFleet(
            tmp_path / "run", Path("/none"), (), "tcp://127.0.0.1:1", ("h", 1), boards=(Board("n1", "pdp-11", 1),)
        )
    assert "log" not in str(caught.value) and not (tmp_path / "run").exists()
