"""A/B updates of the agent: real processes that are updated, crash, never become healthy, and are killed anywhere; hostile packages."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from node_rig import WAIT_S, Observer, agent_tables, toml
from test_delivery_frames import Node
from test_signatures import trusting

from ground_station import agent_update, bundle_sign, cli
from ground_station.broker import Broker
from ground_station.delivery import Deliverer, DeliveryRefused
from ground_station.fleet_records import FleetFolder, NodeRecord, Ports
from ground_station.link import Link
from node_agent import agent_slots, launcher
from node_agent.agent_slots import PackageError, Slots
from node_agent.agent_update import AgentUpdates
from node_agent.delivery import Receiver
from node_agent.delivery_frame import CHUNK, OFFER_AGENT, REFUSED, STAGED, STATE, Message
from node_agent.launcher import SHIPPED, State, decide

ROOT = Path(__file__).resolve().parent.parent
KEY = Ed25519PrivateKey.generate()
SIGNER = bundle_sign.signer_of(KEY)


def tree(folder: Path, changes: dict[str, tuple[str, str]] | None = None) -> Path:
    """A folder with this checkout's node_agent, with a text replaced in some of its files."""
    shutil.copytree(ROOT / "node_agent", folder / "node_agent")  # compiled files too, as an image has them
    for name, (old, new) in (changes or {}).items():
        path = folder / "node_agent" / name
        text = path.read_text()
        assert text.count(old) == 1, (name, old)
        path.write_text(text.replace(old, new))
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A package of few files: what is in it is of no interest to who unpacks it."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "site/node_agent").mkdir(parents=True)
    (folder / "site/node_agent/cli.py").write_text("print('new')\n")
    (folder / "site/node_agent/agent.py").write_text("x = 1\n")
    return agent_update.make(folder / "small.zip", KEY, folder / "site", "1")


# ------------------------------------------------------------ which slot is started


def test_a_trial_is_started_twice_and_then_the_one_before_it():
    state, started = State(current="a", package="A", trial="b", trial_package="B", tries_left=launcher.TRIES), []
    for _ in range(4):
        slot, state = decide(state, lambda slot, package: True)
        started.append(slot)
    assert started == ["b", "b", "a", "a"] and state.failed == ("B",) and state.trial == ""


def test_whatever_is_damaged_something_is_started():
    state = State(current="a", package="A", trial="b", trial_package="B", tries_left=2)
    assert decide(state, lambda slot, package: slot == "a")[0] == "a"
    assert decide(state, lambda slot, package: slot == "b")[0] == "b"
    assert decide(state, lambda slot, package: False)[0] == SHIPPED
    one = State(current="a", package="A")
    started = []
    for _ in range(launcher.MAX_STARTS + 2):  # one that was good and does not live any more
        slot, one = decide(one, lambda slot, package: True)
        started.append(slot)
    assert started == ["a"] * launcher.MAX_STARTS + [SHIPPED] * 2
    assert decide(dataclasses.replace(one, starts=0), lambda slot, package: True)[0] == "a"  # the shipped one lived


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"[]",
        b'{"current": "c"}',
        b'{"failed": 3}',
        b"[" * 60_000,
        b'{"trial": "a", "tries_left": 1e9, "failed": []}',
    ],
)
def test_a_damaged_state_means_the_shipped_agent(tmp_path, data):
    (tmp_path / launcher.STATE).write_bytes(data)
    assert launcher.read_state(tmp_path) == State() and launcher.chosen(tmp_path, print) == SHIPPED
    launcher.write_state(tmp_path, State(current="b", package="x", failed=("y",)))
    assert launcher.read_state(tmp_path) == State(current="b", package="x", failed=("y",))  # negative control


def test_the_launcher_needs_nothing_but_the_standard_library():
    code = f"import sys, runpy; runpy.run_path({str(ROOT / 'node_agent/launcher.py')!r}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-IBS", "-c", code], capture_output=True, text=True, timeout=30)
    tops = {name.split(".")[0] for name in done.stdout.split()}
    assert done.returncode == 0 and tops - set(sys.stdlib_module_names) <= {"__main__"}


# ------------------------------------------------------------ what is unpacked


def installed(tmp_path, package) -> Slots:
    slots = Slots(tmp_path / "slots", SHIPPED)
    slots.install(package.path, package.offer.sha256)
    return slots


def test_a_package_is_unpacked_and_an_altered_file_of_it_is_not_started(tmp_path, small):
    slots = installed(tmp_path, small)
    assert slots.state() == State(trial="a", trial_package=small.offer.sha256, tries_left=2)
    assert launcher.damage(slots.folder, "a", small.offer.sha256) == ""
    assert "another package" in launcher.damage(slots.folder, "a", "ab" * 32)
    path = slots.folder / "a/node_agent/agent.py"
    path.write_text("x = 2\n")
    said = []
    assert launcher.chosen(slots.folder, said.append) == SHIPPED
    assert "agent.py is altered" in said[0] and launcher.read_state(slots.folder).failed == (small.offer.sha256,)


def test_the_same_tree_gives_the_same_bytes(tmp_path, small):
    again = agent_update.make(tmp_path / "again.zip", KEY, small.path.parent / "site", "1")
    assert again.offer == small.offer and again.path.read_bytes() == small.path.read_bytes()
    assert agent_update.read(small.path) == small
    (tmp_path / "again.zip.sig").write_bytes(b"x")
    with pytest.raises(agent_update.PackageFileError):
        agent_update.read(tmp_path / "again.zip")


NOTE = {"format": "spacemoe-agent-1", "name": "x", "python": "3.10", "abi": "any", "machine": "any"}


def zipped(path, members, note=NOTE):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data, mode in (("node_agent/cli.py", b"", 0o100644), *members):
            member = zipfile.ZipInfo(name)
            member.external_attr, member.compress_type = mode << 16, zipfile.ZIP_DEFLATED
            archive.writestr(member, data)
        if note is not None:
            archive.writestr("package.json", json.dumps(note))
    return path


@pytest.mark.parametrize(
    ("members", "note", "said"),
    [
        ([("../evil", b"x", 0o100644)], NOTE, "names must be plain"),
        ([("/evil", b"x", 0o100644)], NOTE, "names must be plain"),
        ([("a/./b", b"x", 0o100644)], NOTE, "names must be plain"),
        ([("a\\..\\b", b"x", 0o100644)], NOTE, "names must be plain"),
        ([("link", b"/etc", stat.S_IFLNK | 0o777)], NOTE, "no plain file"),
        ([("pipe", b"", stat.S_IFIFO | 0o644)], NOTE, "no plain file"),
        ([("A", b"x", 0o100644), ("a", b"x", 0o100644)], NOTE, "a file twice"),
        ([("slot.json", b"{}", 0o100644)], NOTE, "one of the launcher's"),
        ([], None, "no readable package.json"),
        ([], NOTE | {"format": "x"}, "format"),
        ([], NOTE | {"machine": "pdp11"}, "for pdp11"),
        ([], NOTE | {"abi": "cpython27"}, "for cpython27"),
        ([], NOTE | {"python": "9.1"}, "needs Python 9.1"),
        ([], NOTE | {"python": "x"}, "no readable package.json"),
    ],
)
def test_hostile_packages_are_refused_and_nothing_is_tried(tmp_path, members, note, said):
    slots = Slots(tmp_path / "slots", SHIPPED)
    with pytest.raises(PackageError, match=said):
        slots.install(zipped(tmp_path / "p.zip", members, note), "ab" * 32)
    assert slots.state() == State() and launcher.chosen(slots.folder, print) == SHIPPED
    assert not [path for path in tmp_path.rglob("*evil*")]


def test_bombs_and_damaged_zips_are_refused(tmp_path, monkeypatch):
    slots = Slots(tmp_path / "slots", SHIPPED)
    path = zipped(tmp_path / "p.zip", [("big", bytes(3_000_000), 0o100644)])
    assert path.stat().st_size < 10_000
    monkeypatch.setattr(agent_slots, "MAX_TREE_BYTES", 2_000_000)
    with pytest.raises(PackageError, match="too much"):
        slots.install(path, "ab" * 32)
    monkeypatch.undo()
    data = path.read_bytes()
    lying = data.replace((3_000_000).to_bytes(4, "little"), (1_000).to_bytes(4, "little"))
    assert lying != data
    for bad in (lying, data[:-30], b"PK", data[:100] + b"\xff" * 40 + data[140:]):
        path.write_bytes(bad)
        with pytest.raises(PackageError):
            slots.install(path, "ab" * 32)
    assert slots.state() == State()
    slots.install(zipped(path, []), "ab" * 32)  # negative control
    assert slots.state().trial == "a"


@pytest.mark.parametrize("what", ["deflate", "lzma", "bzip2", "damaged lzma", "encrypted"])
def test_a_package_packed_otherwise_or_damaged_is_one_error_at_both_ends(tmp_path, what):
    method = {"bzip2": zipfile.ZIP_BZIP2, "lzma": zipfile.ZIP_LZMA, "damaged lzma": zipfile.ZIP_LZMA}
    path, beside = tmp_path / "p.zip", tmp_path / "p.zip.sig"
    beside.write_bytes(bytes(64))
    with zipfile.ZipFile(path, "w", method.get(what, zipfile.ZIP_DEFLATED)) as archive:
        for name, data in (("package.json", json.dumps(NOTE)), ("node_agent/cli.py", "")):
            archive.writestr(name, data)
    slots = Slots(tmp_path / "slots", SHIPPED)
    good, at = path.read_bytes(), 30 + len("package.json")
    if what == "deflate":
        assert agent_update.read(path).offer.name == "x" and slots.install(path, "ab" * 32) == "a"  # control
    bad = {
        "deflate": good[:at] + b"\xff" * 20 + good[at + 20 :],
        "damaged lzma": good[:at] + b"\xff" * 20 + good[at + 20 :],
    }
    if what == "encrypted":
        central = good.index(b"PK\x01\x02")
        bad[what] = good[:6] + b"\x01" + good[7 : central + 8] + b"\x01" + good[central + 9 :]
    path.write_bytes(bad.get(what, good))
    state = slots.state()
    with pytest.raises(agent_update.PackageFileError, match="p.zip is no package") as one:
        agent_update.read(path)
    with pytest.raises(PackageError, match="the package") as two:
        slots.install(path, "cd" * 32)
    assert "\n" not in str(one.value) + str(two.value) and slots.state() == state


# ------------------------------------------------------------ what a node takes


def updatable(root, signers=(SIGNER,), running=SHIPPED) -> tuple[Node, Slots, list[str]]:
    node, slots, staged = trusting(root / "n"), Slots(root / "slots", running), []
    updates = AgentUpdates(slots, root / "update", tuple(signers), staged.append)
    node.receiver = Receiver(
        node.store,
        node.experts,
        node.counters,
        10**12,
        node.changes.append,
        lambda *e: node.reported.append(e),
        updates=updates,
    )
    return node, slots, staged


def sent(node, package, size=500) -> list[Message]:
    said = node.say(Message(OFFER_AGENT, 4, update=package.offer))
    data = package.path.read_bytes()
    if said[0].kind == STATE:
        for at in range(said[0].have[0].bytes, len(data), size):
            said += node.say(Message(CHUNK, 4, 0, at, data[at : at + size]))
    return said


def test_an_update_with_a_wrong_signature_is_refused_by_name(tmp_path, small):
    flipped = bytes([small.offer.signature[0] ^ 1]) + small.offer.signature[1:]
    other = dataclasses.replace(small.offer, name=small.offer.name + "x")
    for offer in (dataclasses.replace(small.offer, signature=flipped), other):
        node, slots, staged = updatable(tmp_path)
        (said,) = sent(node, dataclasses.replace(small, offer=offer))
        assert (said.kind, said.refusal) == (REFUSED, "signature") and offer.name in said.text
    for signers in ((), ("ab" * 32,)):
        node, slots, staged = updatable(tmp_path, signers)
        assert sent(node, small)[0].refusal == "signature"
    assert sent(Node(tmp_path / "bare"), small)[0].refusal == "other"  # nobody launched it
    assert not staged and slots.state() == State() and not [p for p in tmp_path.rglob("*") if p.is_file()]
    node, slots, staged = updatable(tmp_path)
    assert sent(node, small)[-1].kind == STAGED and small.offer.name in staged[0]  # negative control
    assert sent(node, small)[0].refusal == "busy"
    launcher.write_state(slots.folder, launcher.fallen_back(slots.state()))
    assert sent(node, small)[0].refusal == "failed"


def test_killed_at_any_call_of_the_disk_the_board_starts_what_is_whole(tmp_path, small, monkeypatch):
    """A process installs a package over an older one and calls itself good; it is ended by SIGKILL at each of its calls in turn."""
    monkeypatch.setattr(agent_slots, "compile_tree", lambda root: None)  # a process of its own, thirty times
    older = agent_update.make(tmp_path / "older.zip", KEY, small.path.parent / "site", "0")
    base = Slots(tmp_path / "base", SHIPPED)
    base.install(older.path, older.offer.sha256)
    Slots(base.folder, "a").mark_good()
    seen, count, killed = [], 0, True
    while killed:
        folder = tmp_path / str(count)
        shutil.copytree(base.folder, folder)
        pid = os.fork()
        if pid == 0:
            left = [count]

            def counted(real, left=left):
                def call(*arguments, **options):
                    left[0] -= 1
                    if left[0] < 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*arguments, **options)

                return call

            try:
                for name in ("replace", "unlink", "fsync", "mkdir", "open", "sync", "rmdir"):
                    setattr(os, name, counted(getattr(os, name)))
                Slots(folder, "a").install(small.path, small.offer.sha256)
                Slots(folder, "b").mark_good()
            finally:
                os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        said = []
        slot = launcher.chosen(folder, said.append)
        state = launcher.read_state(folder)
        package = state.trial_package if slot == state.trial else state.package
        assert launcher.damage(folder, slot, package) == "" and not said
        seen.append((slot, state.current))
        shutil.rmtree(folder)
        count += 1
    assert [kind for index, kind in enumerate(seen) if index == 0 or seen[index - 1] != kind] == [
        ("a", "a"),
        ("b", "a"),
        ("b", "b"),
    ]
    assert count > 15


def test_a_package_that_was_cut_off_is_resumed(tmp_path, small):
    node, slots, _ = updatable(tmp_path)
    data = small.path.read_bytes()
    node.say(Message(OFFER_AGENT, 4, update=small.offer))
    node.say(Message(CHUNK, 4, 0, 0, data[:300]))
    node, slots, _ = updatable(tmp_path)
    said = sent(node, small)
    assert said[0].have[0].bytes == 300 and said[-1].kind == STAGED and not (tmp_path / "update").exists()


@pytest.mark.parametrize("good", [True, False])
def test_a_trial_is_good_after_a_while_without_a_break_and_ends_without(tmp_path, small, good):
    """Real seconds, short ones: healthy from 0.2 s on, and healthy whenever it was not the time before."""
    Slots(tmp_path, SHIPPED).install(small.path, small.offer.sha256)
    slots, ended, news, began_s, asked = Slots(tmp_path, "a"), threading.Event(), [], time.monotonic(), []

    def healthy() -> bool:
        asked.append(None)
        return time.monotonic() - began_s > 0.2 if good else len(asked) % 2 == 0

    with agent_slots.Trial(slots, 0.2, 1.0, healthy, lambda *said: news.append(said), lambda text: ended.set()):
        end_s = time.monotonic() + 10.0
        while slots.state().trial and not ended.is_set() and time.monotonic() < end_s:
            time.sleep(0.02)
    assert (slots.state().current, ended.is_set()) == (("a", False) if good else (SHIPPED, True))
    assert news[-1][0] == ("info" if good else "critical")


# ------------------------------------------------------------ the command


def test_the_command_names_the_next_step_and_waits_for_no_node_that_cannot_answer(tmp_path, capsys):
    lab, file = tmp_path / "lab", tmp_path / "agent.zip"
    folder = FleetFolder.create(lab, "lab", ["ground.local"])
    assert cli.main(["update", "--make", str(file), "--dir", str(lab)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"next: spacemoe update NODE --package {file} --dir {lab}" in out
    for state, says in (
        ("new", "sat-1 has not enrolled yet"),
        ("revoked", "fleet add sat-1 --board pi4 --again"),
        ("quarantined", "fleet release sat-1"),
    ):
        with folder.locked():
            folder.write(NodeRecord("sat-1", "pi4", state))
        assert cli.main(["update", "sat-1", "--package", str(file), "--dir", str(lab)]) == 2
        assert says in capsys.readouterr().err


def test_a_refusal_names_the_node_once(tmp_path, capsys, monkeypatch):
    lab, file = tmp_path / "lab", tmp_path / "agent.zip"
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        ports = Ports(data=one.getsockname()[1], delivery=two.getsockname()[1])
    folder = FleetFolder.create(lab, "lab", ["ground.local"], ports)
    assert cli.main(["update", "--make", str(file), "--dir", str(lab)]) == 0
    with folder.locked():
        folder.write(NodeRecord("sat-1", "pi4", "enrolled"))

    def refuse(self, node, *_):
        raise DeliveryRefused(node, "other", "why")

    monkeypatch.setattr(Deliverer, "update", refuse)
    capsys.readouterr()
    assert cli.main(["update", "sat-1", "--package", str(file), "--dir", str(lab)]) == 3
    assert capsys.readouterr().out == "sat-1 refuses (other): why\n"


# ------------------------------------------------------------ real processes


class Board:
    """The launcher and what it starts, started again whenever it ends, as systemd does."""

    def __init__(self, folder: Path, tables: dict):
        self.folder, self.codes = folder, []
        self.config, self.log, self.slots = folder / "agent.toml", folder / "log", folder / "state/agent"
        self.config.write_text(toml(tables))
        self.shipped = tree(folder / "opt")
        self.slots.mkdir(parents=True)
        self._stopped = threading.Event()
        self.process = self._start()
        self._thread = threading.Thread(target=self._supervise, daemon=True)
        self._thread.start()

    def _start(self) -> subprocess.Popen:
        with open(self.log, "ab") as log:
            line = [
                sys.executable,
                "-IB",
                str(self.shipped / "node_agent/launcher.py"),
                "run",
                "--config",
                str(self.config),
            ]
            environment = os.environ | {launcher.FOLDER_VARIABLE: str(self.slots)}
            return subprocess.Popen(line, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, cwd="/")

    def _supervise(self) -> None:
        while not self._stopped.is_set():
            try:
                self.codes.append(self.process.wait(0.1))
            except subprocess.TimeoutExpired:
                continue
            if not self._stopped.is_set():
                self.process = self._start()

    @property
    def state(self) -> State:
        return launcher.read_state(self.slots)

    def paths(self) -> str:
        """Which trees the running agent was started from, as the kernel says it."""
        return Path(f"/proc/{self.process.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()

    def wait(self, condition, seconds=WAIT_S, tick=lambda: None) -> None:
        end_s = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end_s, (self.state, self.codes, self.log.read_text()[-2000:])
            tick()
            time.sleep(0.02)

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *exc) -> None:
        self._stopped.set()
        self._thread.join(5.0)
        self.process.kill()
        self.process.wait(WAIT_S)


def test_a_board_is_updated_and_goes_back_by_itself_from_agents_that_are_no_good(tmp_path):
    """One board, three updates: one that crashes at import, one that the ground station never sees, a good one; killed on the way."""
    crash = {"agent.py": ("DISTRIBUTION = ", "raise SystemExit(9)\nDISTRIBUTION = ")}
    lonely = {"dataplane.py": ("= request.destination, True", "= request.destination, False")}
    good = {"agent.py": ("        return metadata.version(DISTRIBUTION)", '        return "9.9.9"')}
    made = [
        agent_update.make(tmp_path / f"{name}.zip", KEY, tree(tmp_path / name, changes), name)
        for name, changes in (("crash", crash), ("lonely", lonely), ("good", good))
    ]
    said = []
    with (
        Broker(tmp_path, "embedded") as broker,
        Observer(broker.host, broker.port) as seen,
        Link("tcp://127.0.0.1:*") as link,
        Deliverer() as deliverer,
    ):
        tables = agent_tables(tmp_path, link.endpoint, broker=broker)
        tables["data"]["delivery_endpoint"] = deliverer.endpoint
        tables["update"] = {"signers": [SIGNER], "hold_s": 0.4, "deadline_s": 1.6}
        with Board(tmp_path, tables) as board:
            first = seen.next("birth")
            board.wait(lambda: link.is_up("n1"), tick=link.drain)

            def update(package, trial_s=30.0):
                return agent_update.carry_out(
                    deliverer, ("n1",), package, lambda *line: said.append(line), 10.0, trial_s, link.drain
                )["n1"]

            assert "refuses (failed)" in update(made[0])
            assert board.codes == [75, 9, 9] and board.state.failed == (made[0].offer.sha256,)
            assert str(board.slots) not in board.paths()  # the shipped one runs
            assert deliverer.update("n1", made[1].path, made[1].offer) is False
            board.wait(lambda: board.state.tries_left == 1)
            launcher.write_state(
                board.slots, dataclasses.replace(board.state, tries_left=0)
            )  # as if it were the second try
            assert "refuses (failed)" in update(made[1])
            assert board.codes[3:] == [75, 75] and board.state.current == SHIPPED
            event = seen.next("event", lambda tree: tree["kind"] == "update" and tree["severity"] == "critical")
            assert "not healthy within 1.6 s" in event["text"]

            killed = []

            def kill_once(done, total):
                if not killed and done > 0.4 * total:
                    killed.append(board.process.pid)
                    board.process.kill()

            assert deliverer.update("n1", made[2].path, made[2].offer, kill_once) is False and killed
            assert update(made[2]) == "good"
            assert board.state == State(
                current=board.state.current,
                package=made[2].offer.sha256,
                failed=(made[0].offer.sha256, made[1].offer.sha256),
            )
            slot = board.slots / board.state.current
            assert str(slot) in board.paths() and first["agent_version"] != "9.9.9"
            assert seen.next("birth", lambda tree: tree["agent_version"] == "9.9.9")
            with pytest.raises(DeliveryRefused, match="wrong signature"):
                deliverer.update(
                    "n1", made[0].path, dataclasses.replace(made[0].offer, signature=made[1].offer.signature)
                )
            assert deliverer.update("n1", made[2].path, made[2].offer) is True
