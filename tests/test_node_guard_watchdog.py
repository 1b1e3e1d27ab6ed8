"""What systemd is told, over real datagram sockets of both kinds, and that a hung data plane ends the reports.

Expected texts are those of sd_notify(3) and sd_watchdog_enabled(3).
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import threading
import time

import pytest
from node_rig import WAIT_S, AgentProcess, Ground, agent_tables, make_bundle, toml
from test_node_guard_pacing import work

from node_agent import config, watchdog
from node_agent.agent import Agent
from node_agent.errors import ConfigError, GuardError
from node_agent.watchdog import Notifier, Watchdog


class Manager:
    """The other end of NOTIFY_SOCKET."""

    def __init__(self, address: str):
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address[0] == "@" else address)

    def __enter__(self) -> Manager:
        return self

    def __exit__(self, *exc: object) -> None:
        self.socket.close()

    def next(self, timeout_s: float = WAIT_S) -> dict[str, str] | None:
        """The next datagram's assignments; None when there is none in time."""
        self.socket.settimeout(timeout_s)
        try:
            return dict(line.split("=", 1) for line in self.socket.recv(4096).decode().split("\n"))
        except TimeoutError:
            return None

    def until(self, key: str, value: str, part: bool = False) -> dict[str, str]:
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            got = self.next(end - time.monotonic()) or {}
            if got.get(key) == value or (part and value in got.get(key, "")):
                return got
        raise AssertionError(f"no {key}={value} within {WAIT_S} s")


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path):
    address = str(tmp_path / "notify") if request.param == "path" else f"@spacemoe-{secrets.token_hex(8)}"
    with Manager(address) as running:
        yield running


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle"))


def test_the_life_of_a_service(manager):
    hung, said = [""], []
    notifier = Notifier({"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "100000"})
    assert notifier.watchdog_s == 0.1
    with Watchdog(notifier, lambda: hung[0], lambda: "duty 1.00\nSTOPPING=1", said.append):
        assert manager.next() == {"READY": "1", "STATUS": "duty 1.00 STOPPING=1"}  # a status adds no line
        for _ in range(3):
            assert manager.next() == {"WATCHDOG": "1", "STATUS": "duty 1.00 STOPPING=1"}
        hung[0] = "the data plane hangs"
        assert manager.until("STATUS", "the data plane hangs").keys() == {"STATUS"}
        for _ in range(4):
            assert manager.next() == {"STATUS": "the data plane hangs"}
        hung[0] = ""
        manager.until("WATCHDOG", "1")
    assert said == ["the data plane hangs"]
    assert manager.until("STOPPING", "1") == {"STOPPING": "1"}


def test_without_systemd_nothing_is_sent_and_nothing_fails(tmp_path):
    assert not Notifier({}).wanted and not Notifier({}).send("READY=1")
    assert not Notifier({"NOTIFY_SOCKET": str(tmp_path / "nobody")}).send("READY=1")
    assert not Notifier({"NOTIFY_SOCKET": "/" + "x" * 200}).send("READY=1")  # longer than sun_path
    assert Notifier({"WATCHDOG_USEC": "5000000"}).watchdog_s is None


@pytest.mark.parametrize(
    "environment, watchdog_s",
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),  # meant for another process
    ],
)
def test_who_is_watched(environment, watchdog_s):
    assert Notifier({"NOTIFY_SOCKET": "/x"} | environment).watchdog_s == watchdog_s


@pytest.mark.parametrize(
    "environment",
    [{"NOTIFY_SOCKET": "vsock:2:1"}, {"NOTIFY_SOCKET": "notify"}]
    + [{"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": bad} for bad in ("0", "-1", "1s", "9" * 17)],
)
def test_a_bad_environment_is_named(environment):
    with pytest.raises(ConfigError) as caught:
        Notifier(environment)
    assert "\n" not in str(caught.value)


def test_a_hung_data_plane_stops_the_pings(bundle, tmp_path, monkeypatch):
    """The agent itself, in this process so that its experts can be blocked: pings, none while it hangs, pings again."""
    with Manager(str(tmp_path / "notify")) as manager, Ground() as ground:
        monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
        monkeypatch.setenv("WATCHDOG_USEC", "200000")
        monkeypatch.delenv("WATCHDOG_PID", raising=False)
        tables = agent_tables(tmp_path, ground.endpoint, bundle) | {"guard": {"hang_s": 1}}
        agent = Agent(config.parse(toml(tables), tmp_path))
        go_on, run = threading.Event(), agent.experts.run
        monkeypatch.setattr(agent.experts, "run", lambda *a: (go_on.wait(WAIT_S), run(*a))[1])
        thread = threading.Thread(target=agent.run)
        thread.start()
        try:
            manager.until("READY", "1")
            ground.hello()
            for _ in range(15):  # 1.5 s and more: an idle node does not count as hung
                assert "hangs" not in manager.until("WATCHDOG", "1")["STATUS"]
            ground.send(work())
            manager.until("STATUS", "the data plane hangs", part=True)
            for _ in range(5):
                assert "WATCHDOG" not in manager.next()
            go_on.set()
            manager.until("WATCHDOG", "1")
        finally:
            go_on.set()
            agent.stop()
            thread.join(WAIT_S)
        manager.until("STOPPING", "1")


def test_a_guard_that_fails_ends_the_agent_and_no_work_is_taken(bundle, tmp_path, monkeypatch):
    with Ground() as ground:
        agent = Agent(config.parse(toml(agent_tables(tmp_path, ground.endpoint, bundle)), tmp_path))
        monkeypatch.setattr(agent._guard, "_hottest_c", lambda: 1 / 0 if agent._guard.alive else None)
        with pytest.raises(GuardError, match="ZeroDivisionError.*start the agent again"):
            agent.run()
        assert agent._link.pacer.refusal[0] == "guard" and agent._link.pacer.limited


def test_a_guard_that_hangs_leaves_the_duty_for_an_unknown_temperature(bundle, tmp_path, monkeypatch):
    with Ground() as ground:
        tables = agent_tables(tmp_path, ground.endpoint, bundle) | {"guard": {"hang_s": 1, "unknown_duty": 0.2}}
        monkeypatch.setattr(watchdog, "IDLE_PERIOD_S", 0.1)  # without systemd it looks less often
        agent = Agent(config.parse(toml(tables), tmp_path))
        go_on = threading.Event()
        monkeypatch.setattr(agent._guard, "_hottest_c", lambda: agent._guard.alive and go_on.wait(WAIT_S) and None)
        thread = threading.Thread(target=agent.run)
        thread.start()
        try:
            assert wait_until(lambda: agent._link.pacer.duty == 0.2)
            go_on.set()
            assert wait_until(lambda: agent._link.pacer.duty == 1.0)
        finally:
            go_on.set()
            agent.stop()
            thread.join(WAIT_S)


def wait_until(condition) -> bool:
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end and not condition():
        time.sleep(0.02)
    return condition()


def test_an_agent_process_reports_and_says_goodbye(bundle, tmp_path, monkeypatch):
    with Manager(str(tmp_path / "notify")) as manager, Ground() as ground:
        monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
        monkeypatch.setenv("WATCHDOG_USEC", "400000")
        monkeypatch.delenv("WATCHDOG_PID", raising=False)
        with AgentProcess(tmp_path, agent_tables(tmp_path, ground.endpoint, bundle)) as agent:
            assert manager.next()["READY"] == "1"
            for _ in range(3):
                assert manager.next()["WATCHDOG"] == "1"
            agent.process.send_signal(signal.SIGSTOP)
            while manager.next(0.5) is not None:
                pass
            assert manager.next(1.0) is None  # a stopped process does not report
            agent.process.send_signal(signal.SIGCONT)
            manager.until("WATCHDOG", "1")
            agent.process.send_signal(signal.SIGTERM)
            manager.until("STOPPING", "1")
            assert agent.process.wait(WAIT_S) == 0
