"""Starts the agent of the right slot: the launcher of a board, run by plain Python from the folder that came with the image.

    /opt/spacemoe/agent               the shipped agent: read-only, the fallback of last resort; this file is run from here
    /var/lib/spacemoe/agent/{a,b}/    two slots for updates: a Python tree and `slot.json`, which lists its files with size and sha256
    /var/lib/spacemoe/agent/state.json

An update is a trial: it is started TRIES times at most, each counted on the disk before it starts, until it says itself that it is good
(agent_slots.py). Else the agent before it is started again, and what failed is remembered. An agent that was good once and does not live
for long any more gives way to the shipped one for a while. Whatever is damaged or missing, the shipped agent is started.
It needs the standard library only and must not import anything of the kit. Leaves out: how updates come (agent_slots.py, agent_update.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

SLOTS_FOLDER = Path("/var/lib/spacemoe/agent")
SLOTS = ("a", "b")
SHIPPED = ""
TRIES = 2
MAX_STARTS = 10
MAX_FAILED = 8
MAX_STATE_BYTES = 64 * 1024
MAX_LIST_BYTES = 16 * 1024 * 1024
STATE, LIST = "state.json", "slot.json"
SLOT_VARIABLE, FOLDER_VARIABLE = "SPACEMOE_SLOT", "SPACEMOE_SLOTS"
SHIPPED_WORD = "shipped"  # in SLOT_VARIABLE
_RUN = """import sys
sys.argv[0] = "node-agent"
count = int(sys.argv.pop(1))
sys.path[:0] = [sys.argv.pop(1) for _ in range(count)]
from node_agent.cli import main
sys.exit(main())"""


@dataclass(frozen=True)
class State:
    """`current`: the slot that was good last, or SHIPPED; `trial`: one that is to be tried, with `tries_left`; `package`, `trial_package`:
    sha256 of the packages that they came by; `starts`: of current since it was last seen to live; `failed`: packages that fell back."""

    current: str = SHIPPED
    package: str = ""
    trial: str = ""
    trial_package: str = ""
    tries_left: int = 0
    starts: int = 0
    failed: tuple[str, ...] = ()


def fallen_back(state: State) -> State:
    """After a trial that did not become good."""
    failed = tuple(each for each in state.failed if each != state.trial_package)
    failed = (*failed, state.trial_package)[-MAX_FAILED:]
    return replace(state, trial="", trial_package="", tries_left=0, starts=0, failed=failed)


def decide(state: State, usable: Callable[[str, str], bool]) -> tuple[str, State]:
    """(slot to start, the state that has to be on the disk before it starts). `usable(slot, package)`: whether its files are whole."""
    if state.trial:
        if state.tries_left > 0 and usable(state.trial, state.trial_package):
            return state.trial, replace(state, tries_left=state.tries_left - 1)
        state = fallen_back(state)
    if state.current and state.starts < MAX_STARTS and usable(state.current, state.package):
        return state.current, replace(state, starts=state.starts + 1)
    return SHIPPED, state


# ------------------------------------------------------------ the disk


def _bounded(path: Path, limit: int) -> bytes:
    """Raises: OSError, ValueError for what is too large or no plain file."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError(f"{path} is no plain file")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path} is over {limit} bytes")
    return data


def read_state(folder: Path) -> State:
    """What the file says; a missing or damaged one says nothing: the shipped agent."""
    try:
        tree = json.loads(_bounded(folder / STATE, MAX_STATE_BYTES))
        known = {
            name: value for name, value in tree.items() if name in State.__dataclass_fields__
        }  # a newer agent's may be more
        state = State(**{**known, "failed": tuple(tree["failed"])})
        texts = (state.package, state.trial_package, *state.failed)
        sound = {state.current, state.trial} <= {*SLOTS, SHIPPED} and all(isinstance(each, str) for each in texts)
        sound = sound and all(type(each) is int and 0 <= each <= 1000 for each in (state.tries_left, state.starts))
        return state if sound and len(state.failed) <= MAX_FAILED else State()
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return State()


def write_state(folder: Path, state: State) -> None:
    """Whole or not at all, also after a power cut.  Raises: OSError."""
    path, partial = folder / STATE, folder / f"{STATE}.partial"
    partial.unlink(missing_ok=True)
    with open(partial, "xb") as file:
        file.write(json.dumps(asdict(state), indent=1).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def damage(folder: Path, slot: str, package: str) -> str:
    """What is wrong with a slot, or an empty text: every file that its list names must be there, with its size and sha256."""
    root = folder / slot
    try:
        tree = json.loads(_bounded(root / LIST, MAX_LIST_BYTES))
        if tree["package"] != package:
            return f"slot {slot} holds another package than {package[:16]}"
        for path, size, sha256 in tree["files"]:
            if Path(path).is_absolute() or ".." in Path(path).parts:
                return f"slot {slot} lists {path[:80]!r}"
            if hashlib.sha256(_bounded(root / path, size)).hexdigest() != sha256:
                return f"slot {slot}: {path[:80]} is altered"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return f"slot {slot} is damaged ({str(error)[:120]})"
    return ""


# ------------------------------------------------------------ starting


def chosen(folder: Path, say: Callable[[str], None]) -> str:
    """The slot to start; what that changes is on the disk. A state that cannot be written starts no trial: it would have no end."""
    if not folder.is_dir():
        return SHIPPED

    def usable(slot: str, package: str) -> bool:
        text = damage(folder, slot, package)
        if text:
            say(text)
        return not text

    before = read_state(folder)
    slot, after = decide(before, usable)
    if before.trial and not after.trial:
        say(
            f"the update in slot {before.trial} did not become good: going back to {after.current or 'the shipped agent'}"
        )
    elif before.current and slot == SHIPPED:
        say(f"slot {before.current} does not live or is damaged: starting the shipped agent")
    try:
        if after != before:
            write_state(folder, after)
    except OSError as error:
        say(f"{folder / STATE} cannot be written ({error.strerror}): no trial is started")
        return after.current if slot != SHIPPED and not damage(folder, after.current, after.package) else SHIPPED
    return slot


def command(
    slot: str, folder: Path, shipped: Path, arguments: list[str], environment: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """(command line, environment) of an agent: the slot's tree comes before the shipped one, which has what the update lacks."""
    paths = [str(shipped)] if slot == SHIPPED else [str(folder / slot), str(shipped)]
    line = [sys.executable, "-IB", "-c", _RUN, str(len(paths)), *paths, *arguments]
    return line, {**environment, SLOT_VARIABLE: slot or SHIPPED_WORD, FOLDER_VARIABLE: str(folder)}


def main(arguments: list[str]) -> None:
    """Only `run` may start a slot: everything else is done by the shipped agent."""
    folder = Path(os.environ.get(FOLDER_VARIABLE) or SLOTS_FOLDER)
    shipped = Path(__file__).resolve().parent.parent
    slot = SHIPPED
    if arguments[:1] == ["run"]:
        slot = chosen(folder, lambda text: print(f"node-agent launcher: {text}", file=sys.stderr, flush=True))
    line, environment = command(slot, folder, shipped, arguments, os.environ)
    os.execve(line[0], line, environment)


if __name__ == "__main__":
    main(sys.argv[1:])
