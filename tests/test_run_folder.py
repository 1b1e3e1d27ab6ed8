"""Temporary folders of killed runs are removed by the next run, and nothing else is: real processes, real kill -9, real links."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ground_station import run_folder
from ground_station.run_folder import OWNER, sweep

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
HOLDS_ONE = (
    "from ground_station.run_folder import run_folder\nwith run_folder('demo') as f: print(f, flush=True); input()"
)


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def holder(temporary: Path) -> tuple[subprocess.Popen, Path]:
    """A process that has a run folder, and the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS_ONE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=ENVIRONMENT | {"TMPDIR": str(temporary)},
        text=True,
    )
    return process, Path(process.stdout.readline().strip())


def killed(temporary: Path) -> Path:
    """What kill -9 leaves of a run."""
    process, folder = holder(temporary)
    process.kill()
    process.communicate()
    assert folder.is_dir() and folder.parent == temporary
    return folder


def test_a_killed_runs_folder_goes_and_a_living_ones_stays(temporary, capsys):
    process, alive = holder(temporary)
    (alive / "log").write_text("x")
    dead = killed(temporary)
    (dead / "node" / "sysroot").mkdir(parents=True)
    (dead / "node" / "agent.log").write_text("x")
    with run_folder.run_folder("demo") as mine:
        assert not dead.exists() and (alive / "log").exists() and (mine / OWNER).exists()
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and str(dead) in told and str(alive) not in told
    assert not mine.exists()
    process.communicate("\n")
    assert process.returncode == 0 and not alive.exists()
    assert list(temporary.iterdir()) == [] == sweep()


def test_links_are_not_followed(temporary, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "precious").write_text("x")
    dead = killed(temporary)
    (dead / "link").symlink_to(elsewhere)
    os.mkfifo(dead / "fifo")
    (temporary / "spacemoe-demo-linklink").symlink_to(dead)
    (elsewhere / OWNER).write_text((dead / OWNER).read_text())
    (temporary / "spacemoe-demo-elsewher").symlink_to(elsewhere)  # eight characters, as mkdtemp's
    linked = temporary / "spacemoe-demo-ownerlnk"
    linked.mkdir()
    (linked / OWNER).symlink_to(elsewhere / OWNER)
    assert sweep() == [dead]
    assert (elsewhere / "precious").exists() and (elsewhere / OWNER).exists() and linked.is_dir()


@pytest.mark.parametrize(
    "change",
    [
        {"machine": "another-host"},  # its processes cannot be seen from here
        {"pid_namespace": 1},
        {"pid": "1"},
        {"start_ticks": None},
        {"boot": None},
    ],
    ids=str,
)
def test_what_cannot_be_judged_stays(temporary, change):
    dead = killed(temporary)
    owner = json.loads((dead / OWNER).read_text())
    (dead / OWNER).write_text(json.dumps(owner | change))
    assert sweep() == [] and dead.is_dir()
    (dead / OWNER).write_text(json.dumps(owner))  # control
    assert sweep() == [dead]


def test_names_and_owners_that_are_not_ours_stay(temporary):
    dead = killed(temporary)
    owner = (dead / OWNER).read_text()
    for name in ("spacemoe-demo-mine", "spacemoe-other-abcdefgh", "demo-abcdefgh", "spacemoe-demo-abcdefgh-2"):
        (temporary / name).mkdir()
        (temporary / name / OWNER).write_text(owner)
    (temporary / "spacemoe-demo-noowner_").mkdir()
    for name, text in (("spacemoe-demo-nojson__", "{"), ("spacemoe-demo-nodict__", "[]")):
        (temporary / name).mkdir()
        (temporary / name / OWNER).write_text(text)
    assert sweep() == [dead] and len(list(temporary.iterdir())) == 7


def test_a_number_that_came_again_is_another_process(temporary):
    """This process's number with another start, and an earlier boot: its owner is gone. Control: the right start."""
    dead = killed(temporary)
    mine = run_folder._owner(os.getpid())
    # proc_pid_stat(5): field 22, counted behind the command's closing bracket
    assert mine["start_ticks"] == int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    (dead / OWNER).write_text(json.dumps(mine))
    assert sweep() == []
    (dead / OWNER).write_text(json.dumps(mine | {"start_ticks": mine["start_ticks"] + 1}))
    assert sweep() == [dead]
    dead = killed(temporary)
    (dead / OWNER).write_text(json.dumps(mine | {"boot": "0d1c0d5e-an-earlier-one"}))
    assert sweep() == [dead]
