"""Fixtures that several test files share: real brokers on loopback, and what to do when something is not installed.

A test that lacks a program or package is skipped with the command that brings it, except where SPACEMOE_NO_SKIP is set
(continuous integration): there it fails, so that a missing installation cannot pass for success.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

from ground_station.broker import Broker, find_mosquitto

TURNS = "SPACEMOE_TEST_TURNS"


def lacking(what: str, remedy: str) -> None:
    """Skips the running test, or fails it under SPACEMOE_NO_SKIP, because `what` is not installed."""
    text = f"{what} is not installed: {remedy}"
    if os.environ.get("SPACEMOE_NO_SKIP"):
        pytest.fail(text)
    pytest.skip(text)


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        os.environ[TURNS] = tempfile.mkdtemp(prefix="spacemoe-tests-")  # its workers inherit it
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


@contextlib.contextmanager
def _turn(folder: Path, alone: bool):
    """A turn of one test among those of all workers: many at a time, or this one by itself.

    Who wants to be by itself holds the door meanwhile, so that others, who only pass through it, cannot keep it waiting for ever.
    """
    with open(folder / "door", "ab") as door, open(folder / "room", "ab") as room:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        if not alone:
            fcntl.flock(door, fcntl.LOCK_UN)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    """Tests marked `alone` measure what a board does in real time: under pytest-xdist no other test computes beside them."""
    folder = os.environ.get(TURNS)
    if folder is None:
        return (yield)
    with _turn(Path(folder), item.get_closest_marker("alone") is not None):
        return (yield)


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop(TURNS, ""), ignore_errors=True)


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
