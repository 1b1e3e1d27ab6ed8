"""Fixtures that several test files share: real brokers on loopback, and what to do when something is not installed.

A test that lacks a program or package is skipped with the command that brings it, except where SPACEMOE_NO_SKIP is set
(continuous integration): there it fails, so that a missing installation cannot pass for success.
"""

from __future__ import annotations

import importlib.util
import os
import signal

import pytest

from ground_station.broker import Broker, find_mosquitto


def lacking(what: str, remedy: str) -> None:
    """Skips the running test, or fails it under SPACEMOE_NO_SKIP, because `what` is not installed."""
    text = f"{what} is not installed: {remedy}"
    if os.environ.get("SPACEMOE_NO_SKIP"):
        pytest.fail(text)
    pytest.skip(text)


def pytest_configure(config: pytest.Config) -> None:
    # "nohup make test &" hands down ignored signals, and what a test starts would not end by the Ctrl-C that it is sent
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if os.environ.get("SPACEMOE_NO_SKIP") and importlib.util.find_spec("torch") is None:
        pytest.exit("SPACEMOE_NO_SKIP is set and torch is missing: pip install -c constraints.txt -e .[reference]", 1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("torch") and importlib.util.find_spec("torch") is None:
        lacking("torch", "pip install -c constraints.txt -e .[reference]")


@pytest.fixture
def mosquitto() -> str:
    """Path of the mosquitto program."""
    program = find_mosquitto()
    if program is None:
        lacking("mosquitto", "apt-get install mosquitto")
    return program


@pytest.fixture(params=["mosquitto", "embedded"])
def broker(request, tmp_path):
    """A running broker of either kind on a free loopback port."""
    if request.param == "mosquitto":
        request.getfixturevalue("mosquitto")
    with Broker(tmp_path, request.param) as running:
        yield running
