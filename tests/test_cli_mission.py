"""`spacemoe nodes`, `top`, `events`, `alarms`, `command`, `trend` as processes, against a ground station that serves, boards that answer.

`top` runs on a pseudo-terminal whose screen a small emulator (pyte, where it is installed) or the raw bytes show.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time

import pytest
from mission_cli import COMMAND, environment, here, spacemoe
from web_rig import station, until

from ground_station import archive_records, cli_mission, limits, top_screen, trend_text

LIMITS = """
active = "bench"
[sets.bench]
[[sets.bench.signals]]
name = "temp_c"
yellow_high = 70
red_high = 80
"""
HOSTILE = "<b>\x1b[31mred\x07\u202e\U0001f6f0\x00"


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("station")
    (folder / "limits.toml").write_text(LIMITS)
    with station(folder, limits=folder / "limits.toml") as made:
        hot, cool = made.board("sat-hot", board=f"Raspberry {HOSTILE}"), made.board("sat-cool")
        hot.values["temp_c"] = (85.5, "degC", "simulated")
        hot.values[HOSTILE] = (1e308, HOSTILE, "virtual")
        for board in (hot, cool):
            board.run_at(0.2)
        until(lambda: len(made.mission.alarm_list()) == 1 and len(made.mission.nodes()) == 2)
        yield made


def ask(running, *arguments, process: bool = False, **more: str) -> subprocess.CompletedProcess:
    """`process`: as users start it; otherwise the same without a start of Python."""
    more = {"SPACEMOE_URL": running.url, "COLUMNS": "80"} | more
    if process:
        return spacemoe(*arguments, env=environment(**more), stdin=subprocess.DEVNULL)
    return here(*arguments, **more)


def plain(text: str, columns: int | None = 80) -> None:
    """Nothing a terminal obeys, and lines that fit."""
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text), ascii(text)
    assert columns is None or max(map(len, text.splitlines())) <= columns, text


def test_nodes(running):
    done = ask(running, "nodes", process=True)
    assert done.returncode == 0, done.stderr
    plain(done.stdout)
    rows = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert re.search(r"online +\d+s +85\.5 +5\.5 +0\.50 critical", rows["sat-hot"]), done.stdout
    assert re.search(r"online +\d+s +45\.0 +5\.5 +0\.50 ok", rows["sat-cool"])
    tree = json.loads(ask(running, "nodes", "--json", "--filter", "cool").stdout)
    assert [node["node"] for node in tree["nodes"]] == ["sat-cool"]


def test_one_node(running):
    done = ask(running, "nodes", "sat-hot")
    assert done.returncode == 0, done.stderr
    plain("\n".join(line for line in done.stdout.splitlines() if "temp_c" in line or "signal " in line))
    plain(done.stdout, None)
    assert re.search(r"temp_c +85\.500 degC +ok +simulated +critical", done.stdout) and "1e+308" in done.stdout
    assert json.loads(ask(running, "nodes", "sat-hot", "--json").stdout)["signals"]["temp_c"]["value"] == 85.5
    none = ask(running, "nodes", "sat/../x")
    assert none.returncode == 2 and none.stderr.count("\n") == 1


def test_no_station_names_the_next_step(running):
    for words in (
        ["nodes"],
        ["top", "--once"],
        ["events"],
        ["alarms", "list"],
        ["command", "a", "ping"],
        ["trend", "a", "b"],
    ):
        done = ask(running, *words, SPACEMOE_URL="http://127.0.0.1:9")
        assert done.returncode == 1 and "`spacemoe up`" in done.stderr and done.stderr.count("\n") == 1
        assert not done.stdout


def test_events(running):
    began = time.time()
    board = running.boards[0]
    board.event("info", "boot", f"hello {HOSTILE}")
    board.event("warning", "hot", "too warm")
    until(lambda: len(running.mission.reader.events(began - 1, None, 100, "sat-hot", None, None)) >= 2)
    done = ask(running, "events", "--since", "5m", "--node", "sat-hot", "--filter", "hello")
    assert done.returncode == 0 and re.search(r"Z info +sat-hot: boot: hello <b>", done.stdout), (
        done.stdout + done.stderr
    )
    plain(done.stdout, None)
    rows = json.loads(ask(running, "events", "--severity", "warning", "--lines", "100", "--json").stdout)["events"]
    assert "too warm" in [row["text"] for row in rows] and all(row["severity"] != "info" for row in rows)
    assert "hello" not in ask(running, "events", "--until", "2020-01-01").stdout
    for words in (["--since", "yesterday"], ["--since", "1m", "--until", "2m"], ["-f", "--until", "1m"]):
        wrong = ask(running, "events", *words)
        assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1, wrong.stderr


def test_events_follow_until_interrupted(running):
    board = running.boards[1]
    board.event("info", "before", "old")
    until(lambda: running.mission.reader.events(None, None, 100, "sat-cool", None, "old"))
    child = subprocess.Popen(
        [*COMMAND, "events", "-f", "--json", "--node", "sat-cool"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(SPACEMOE_URL=running.url),
    )
    try:
        assert json.loads(child.stdout.readline())["text"] == "old"
        running.boards[0].event("severe", "other", "not of this node")
        board.event("watch", "now", "new")
        assert json.loads(child.stdout.readline())["text"] == "new"
        child.send_signal(signal.SIGINT)
        assert child.wait(15) == 130
    finally:
        child.kill()
        child.communicate()


def test_alarms(running):
    done = ask(running, "alarms", "list")
    assert done.returncode == 0 and "sat-hot temp_c 85.5" in " ".join(done.stdout.split()), done.stdout + done.stderr
    plain(done.stdout)

    def state() -> str | None:
        return next((each["state"] for each in running.mission.alarm_list() if each["id"] == row["id"]), None)

    (row,) = json.loads(ask(running, "alarms", "list", "--filter", "temp_c", "--json").stdout)["alarms"]
    assert row["state"] == "unacknowledged"
    acked = ask(running, "alarms", "ack", row["id"], "--comment", f"seen {HOSTILE}")
    assert acked.returncode == 0 and "acknowledged" in acked.stdout, acked.stderr
    plain(acked.stdout)
    assert state() == "acknowledged"
    shelved = ask(running, "alarms", "shelve", row["id"], "--for", "10m", "--json")
    until_s = json.loads(shelved.stdout)["shelved_until_utc_s"]
    assert until_s == pytest.approx(time.time() + 600, abs=60)
    assert ask(running, "alarms", "unshelve", row["id"]).returncode == 0
    kept = ask(running, "alarms", "clear", row["id"])
    assert kept.returncode == 2 and state() is not None  # its cause holds
    assert ask(running, "alarms", "clear", row["id"], "--yes").returncode == 0
    assert state() is None and "no alarm stands" in ask(running, "alarms", "list", "--filter", "temp_c").stdout
    assert ask(running, "alarms", "ack", "nothing").returncode == 2
    assert ask(running, "alarms", "shelve", "x", "--for", "soon").returncode == 2


def test_commands(running):
    board = running.boards[1]
    done = ask(running, "command", "sat-cool", "ping")
    assert done.returncode == 0 and re.search(r"ping to sat-cool: ok after \d\.\d\d s: did ping", done.stdout), (
        done.stderr
    )
    sent = len(board.commands)
    dry = ask(running, "command", "sat-cool", "duty", "cap=0.5", "valid_s=10", "--dry-run")
    assert (
        dry.returncode == 0
        and "cap=0.5" in dry.stdout
        and "hazardous" in dry.stdout
        and "nothing was sent" in dry.stdout
    )
    refused = ask(running, "command", "sat-cool", "stop", process=True)
    assert refused.returncode == 2 and "--yes" in refused.stderr and "hazardous" in refused.stderr
    for words in (["explode"], ["duty", "cap=2", "valid_s=10"], ["ping", "x"], ["ping", "x=1"]):
        assert ask(running, "command", "sat-cool", *words, "--yes").returncode == 2
    assert ask(running, "command", "nobody", "ping").returncode == 2
    assert len(board.commands) == sent  # none of these went out
    yes = ask(running, "command", "sat-cool", "duty", "cap=0.5", "valid_s=10", "--yes", "--json")
    record = json.loads(yes.stdout)
    assert yes.returncode == 0 and record["state"] == "ok" and record["who"] == "local"
    assert board.commands[-1]["arguments"] == {"cap": "0.5", "valid_s": "10"}


def test_trend(running):
    until(lambda: running.mission.reader.trend("sat-cool", "power_w", time.time() - 60, time.time(), 100))
    done = ask(running, "trend", "sat-cool", "power_w", "--since", "1m")
    assert done.returncode == 0 and "*" in done.stdout and "min 5.5  max 5.5" in done.stdout, done.stdout + done.stderr
    plain(done.stdout)
    table = ask(running, "trend", "sat-cool", "power_w", "--since", "1m", "--table")
    assert re.search(r"\d\d:\d\d:\d\d +5\.5 +5\.5 +5\.5", table.stdout)
    assert set(json.loads(ask(running, "trend", "sat-cool", "power_w", "--json").stdout)["mean"]) <= {5.5, None}
    assert ask(running, "trend", "sat-cool", "nothing_w").returncode == 2
    assert ask(running, "trend", "sat-hot", HOSTILE.strip("\0"), "--since", "1m").returncode == 2
    hostile = trend_text.picture(
        {"at_utc_s": [1, 2], "min": [1e308, -1e308], "max": [1e308, -1e308], "mean": [float("nan"), 1]}, 80
    )
    assert hostile[-1] == "no valid value in this time"  # the lists do not fit each other
    wide = trend_text.picture(
        {
            "at_utc_s": [1, 2],
            "min": [1e308, -1e308],
            "max": [1e308, -1e308],
            "mean": [1e308, -1e308],
            "count": [1, 1],
            "node": HOSTILE,
        },
        80,
    )
    plain("\n".join(wide))


# ---------------------------------------------------------------- top


class Screen:
    """`spacemoe top` on a pseudo-terminal; the text on it as a terminal would show it."""

    def __init__(self, running, columns: int = 80, rows: int = 24, **more: str):
        self.size = (columns, rows)
        self.pid, self.link = pty.fork()
        if self.pid == 0:
            os.environ.update(
                {"SPACEMOE_URL": running.url, "TERM": "xterm", "PYTHONPATH": environment()["PYTHONPATH"]} | more
            )
            for name in ("COLUMNS", "LINES"):
                os.environ.pop(name, None)
            os.execv(COMMAND[0], [*COMMAND, "top"])
        self.raw = b""
        self.resize(columns, rows)

    def resize(self, columns: int, rows: int) -> None:
        self.size = (columns, rows)
        fcntl.ioctl(self.link, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def read(self) -> bool:
        ready, _, _ = select.select([self.link], [], [], 0.1)
        try:
            part = os.read(self.link, 65_536) if ready else b""
        except OSError:  # it has ended
            return False
        self.raw += part
        return True

    def lines(self) -> list[str]:
        """What stands on the screen: cursor jumps and clearing obeyed, colours left out."""
        rows = [""] * 200
        at = 0
        for part in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|[^\x1b]+|\x1b", self.raw.decode("utf-8", "replace")):
            if found := re.fullmatch(r"\x1b\[(\d+);1H", part):
                at = int(found[1]) - 1
            elif part == "\x1b[2J":
                rows = [""] * 200
            elif part == "\x1b[2K":
                rows[at] = ""
            elif part == "\x1b[0J":
                rows[at:] = [""] * (200 - at)
            elif not part.startswith("\x1b"):
                rows[at] += part
        return rows[: self.size[1]]

    def until(self, condition):
        def look():
            self.read()
            return condition("\n".join(self.lines()))

        return until(look, f"not on the screen:\n{ascii(self.raw[-2000:])}")

    def end(self, key: bytes) -> int:
        os.write(self.link, key)
        while self.read():
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_top_live(running):
    screen = Screen(running)
    shown = screen.until(lambda text: text if "sat-hot" in text and "85.5 r" in text else None)
    assert max(map(len, shown.splitlines())) <= 80 and "q quit" in shown and "2 nodes: 2 on" in shown
    assert b"\x1b[31m" in screen.raw  # red, beside the letter
    running.boards[1].values["temp_c"] = (61.25, "degC", "simulated")
    screen.until(lambda text: "61.2" in text)
    os.write(screen.link, b"t")
    screen.until(lambda text: re.search("^sat-hot.*^sat-cool", text, re.S | re.M))
    os.write(screen.link, b"n")
    screen.until(lambda text: re.search("^sat-cool.*^sat-hot", text, re.S | re.M))
    screen.resize(40, 8)
    fits = screen.until(lambda text: "q quit" in text and max(map(len, text.splitlines())) <= 40 and "sat-hot" in text)
    assert fits
    assert not re.search(r"\x1b(?!\[)|\x07|\u202e", screen.raw.decode("utf-8", "replace"))
    assert screen.end(b"q") == 0
    assert screen.raw.endswith(b"\x1b[?1049l")  # the terminal as it was


def test_top_without_colour(running):
    screen = Screen(running, NO_COLOR="1")
    screen.until(lambda text: "85.5 r" in text and "critical" in text)
    assert not re.search(rb"\x1b\[3[0-9]", screen.raw)
    assert screen.end(b"\x03") == 130  # Ctrl-C
    assert screen.raw.count(b"\x1b[?1049l") == 1


def test_top_once(running):
    done = ask(running, "top", "--once", process=True)
    assert done.returncode == 0 and "85.5 r" in done.stdout, done.stderr
    plain(done.stdout)
    assert json.loads(ask(running, "top", "--json").stdout)["fleet"]["rows"]
    refused = ask(running, "top")
    assert refused.returncode == 2 and "--once" in refused.stderr


def test_the_view_takes_what_comes():
    """200 nodes on a small screen, and frames that are none."""
    view = top_screen.View()
    signals = [["temp_c", "degC", "board", "measured"], ["power_w", "W", "board", "measured"]]
    rows = [[f"sat-{i:03}", "s", 1000.0, "online", [float(i), None], "g.", "om"] for i in range(200)]
    view.apply("snapshot", {"fleet": {"at": 1000.0, "sets": {"s": signals}, "rows": rows, "births": []}}, 1000.0)
    for kind, content in (
        ("fleet", {"rows": [[1]]}),
        ("fleet", None),
        ("alarm", {}),
        ("event", {"text": 5}),
        ("snapshot", []),
    ):
        view.apply(kind, content, 1000.0)
    assert len(view.nodes) == 200
    for width, height in ((80, 24), (200, 60), (20, 4), (1, 1)):
        shown = top_screen.lines(view, top_screen.Look(width, height, False, "t"), 1001.0)
        assert len(shown) <= max(height, 4) and max(map(len, shown)) <= max(width, 20)
    shown = top_screen.lines(view, top_screen.Look(80, 24, False, "t"), 1001.0)
    assert [line.split()[0] for line in shown[2:4]] == ["sat-199", "sat-198"] and "1-21 of 200" in shown[-1]
    shown = top_screen.lines(view, top_screen.Look(80, 24, False, "n", 500), 1001.0)
    assert shown[-2].startswith("sat-199") and "of 200" in shown[-1]
    for value in (1e308, -1e308, 123456789.0, True, "x", None):
        assert len(top_screen.number(value)) <= 9


def test_words_are_those_of_the_contract():
    assert cli_mission.SEVERITIES == archive_records.SEVERITIES
    assert set(top_screen.ORDER) == set(limits.LETTERS) | {limits.UNKNOWN, "."}
    assert [top_screen.LEVEL_WORDS[each] for each in limits.LETTERS[1:]] == list(limits.SEVERITIES[1:])
    assert cli_mission.span_s("10m") == 600 and cli_mission.span_s("90") == 90
