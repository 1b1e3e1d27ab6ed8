"""A Raspberry Pi's firmware, asked through its program `vcgencmd`: throttling flags, and the rails of a Pi 5's power chip.

The program is run without a shell, in a session of its own, with a time limit and a bound on what it may print; its answer is
shared by all sensors that need it. Which program is run, and why:
- On this machine's own root: the first on PATH in an absolute folder. An agent often runs as root, so a program or folder that
  everybody may write to is refused.
- Below another root (a simulated board): `usr/bin/vcgencmd` of that root, and only a script that belongs to root or to this user
  and that nobody else may write to. A compiled one is a real board's: run here it would ask this machine's firmware, not the
  board's. A script is trusted as much as the folder given as --sysroot is: name no folder of a stranger.
Leaves out: every other command of the firmware, /dev/vcio itself (one kernel interface less to get wrong).
Source: raspberrypi.com/documentation/computers/os.html#vcgencmd; raspberrypi/utils vcgencmd.c (exit codes, messages).
"""

from __future__ import annotations

import os
import re
import select
import signal
import stat
import subprocess
import threading
import time
from pathlib import Path

from node_agent.reading import CALLS, Late, LeftOut

RUN_LIMIT_S = 1.0
MAX_ANSWER_BYTES = 16 * 1024
ASK_PERIOD_S = 0.2  # a process each time: at 5 Hz a few milliseconds each are some 2 % of a core
HUNG_PERIOD_S = 10.0  # one that hung is not asked again for so long: each try costs its caller the time limit
FLAGS = {
    0: "under_voltage",
    1: "arm_frequency_capped",
    2: "throttled",
    3: "soft_temperature_limit",
    16: "under_voltage_since_boot",
    17: "arm_frequency_capped_since_boot",
    18: "throttled_since_boot",
    19: "soft_temperature_limit_since_boot",
}
THROTTLED = re.compile(r"throttled=0x([0-9a-fA-F]{1,8})")
ADC_LINE = re.compile(r"([A-Z0-9_]{1,24})_([AV]) (current|volt)\(\d{1,3}\)=(-?\d{1,6}(?:\.\d{1,12})?)([AV])")
KINDS = {("A", "current", "A"), ("V", "volt", "V")}
MAX_RAILS = 32


class FirmwareError(OSError):
    """The firmware gave no answer; the text says why and what to do."""


class UnknownCommandError(FirmwareError):
    """This board's firmware has no such command."""


def find_program(sysroot: Path, simulated: bool) -> Path | LeftOut | None:
    """The program to run, why it is not run, or None where there is none."""
    if simulated:
        program = sysroot.resolve() / "usr/bin/vcgencmd"
        return (_refusal(program, scripts_only=True) or program) if os.path.lexists(program) else None
    for folder in os.get_exec_path():
        program = Path(folder) / "vcgencmd"
        if program.is_absolute() and os.access(program, os.X_OK):
            return _refusal(program.resolve(), scripts_only=False) or program
    return None


def _refusal(program: Path, scripts_only: bool) -> LeftOut | None:
    """Why a program is not run, None where it may be."""
    try:
        status = os.lstat(program)
        folder = os.stat(program.parent)
        if not stat.S_ISREG(status.st_mode):
            return LeftOut(program, "not run: it is no plain file")
        for what, entry in (("it", status), ("its folder", folder)):
            if entry.st_uid not in (0, os.geteuid()):
                return LeftOut(program, f"not run: {what} belongs to another user (uid {entry.st_uid})")
            sticky = what != "it" and entry.st_mode & stat.S_ISVTX
            if entry.st_mode & stat.S_IWOTH and not sticky:
                return LeftOut(program, f"not run: everybody may write to {'it' if what == 'it' else 'its folder'}")
        if scripts_only:
            with open(program, "rb") as file:
                if file.read(2) != b"#!":
                    return LeftOut(
                        program, "not run: it is no script, and a real board's would ask this machine's firmware"
                    )
    except OSError as error:
        return LeftOut(program, f"not run: {error.strerror}")
    return None


class Firmware:
    """Asks the firmware; an answer serves all who ask within ASK_PERIOD_S. Any thread."""

    def __init__(self, program: Path, limit_s: float = RUN_LIMIT_S, period_s: float = ASK_PERIOD_S):
        self.program = program
        self._limit_s = limit_s
        self._period_s = period_s
        self._lock = threading.Lock()  # guards the dictionaries, never held while the program runs
        self._asking: dict[str, threading.Lock] = {}
        # monotonic s until which it is kept, UTC s it is of, answer
        self._answers: dict[str, tuple[float, float, str | FirmwareError]] = {}

    def answer(self, command: str) -> tuple[str, float]:
        """What the firmware says, and the UTC time in s it is of.  Raises: FirmwareError, TimeoutError."""
        with self._lock:
            asking = self._asking.setdefault(command, threading.Lock())
        with asking:  # whoever comes meanwhile gets the same answer; held for the time limit at most
            kept = self._answers.get(command)
            if kept is None or time.monotonic() > kept[0]:
                kept = self._ask(command)
                self._answers[command] = kept
        if isinstance(kept[2], Exception):
            raise kept[2].with_traceback(None)
        return kept[2], kept[1]

    def _ask(self, command: str) -> tuple[float, float, str | FirmwareError]:
        # One that hangs in the kernel cannot be killed: the outer limit gives up its thread, and the key starts no second one.
        key = (self.program, command)
        got: str | FirmwareError
        at, keep_s = time.time(), self._period_s
        try:
            ran = CALLS.call(key, lambda: run(self.program, command, self._limit_s), 2 * self._limit_s)
            if isinstance(ran, Late):
                at, ran = ran.at, ran.value
            got = _checked(command, *ran)
        except FirmwareError as error:
            got = error
        except TimeoutError as error:
            got, keep_s = FirmwareError(f"vcgencmd {command} {error}"), HUNG_PERIOD_S
        except OSError as error:
            got = FirmwareError(f"vcgencmd cannot be run: {error.strerror or error}")
        return time.monotonic() + keep_s, at, got


def run(program: Path, command: str, limit_s: float) -> tuple[int, str]:
    """(exit code, what it printed) of `program command`.  Raises: OSError; TimeoutError, after which it is killed."""
    process = subprocess.Popen(
        [program, command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"},
        start_new_session=True,  # so that what it starts is killed with it
        bufsize=0,
    )
    end_s = time.monotonic() + limit_s
    content = b""
    try:
        descriptor = process.stdout.fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN | select.POLLHUP)
        while True:
            if not poll.poll(max(0.0, end_s - time.monotonic()) * 1000):
                raise TimeoutError(f"took longer than {limit_s:g} s and was ended")
            piece = os.read(descriptor, 4096)
            if not piece:
                break
            content += piece
            if len(content) > MAX_ANSWER_BYTES:
                raise FirmwareError(f"vcgencmd {command} prints more than {MAX_ANSWER_BYTES} bytes and was ended")
        try:
            process.wait(max(0.05, end_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"took longer than {limit_s:g} s and was ended") from None
    finally:
        process.stdout.close()
        if process.returncode is None:  # not reaped, so its number is still its own
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
    return process.returncode, content.decode("ascii", "replace").strip()


def _checked(command: str, code: int, text: str) -> str:
    """The answer, if it is one.  Raises: FirmwareError."""
    if "Can't open device file" in text or "VCHI initialization failed" in text:
        raise FirmwareError(
            "vcgencmd cannot open the firmware's device: add this user to the group video "
            "(usermod -aG video USER) and start again"
        )
    if "Command not registered" in text:
        raise UnknownCommandError(f"this board's firmware does not know {command}")
    if code != 0:
        raise FirmwareError(f"vcgencmd {command} failed with exit code {code}: {ascii(text)[:60]}")
    return text


def flag_bits(text: str) -> int:
    """The bits of an answer to get_throttled, as `throttled=0x50005`.  Raises: ValueError."""
    match = THROTTLED.fullmatch(text)
    if not match:
        raise ValueError(f"get_throttled says {ascii(text)[:40]}, which is no throttled=0x...")
    return int(match[1], 16)


def rails(text: str) -> dict[str, dict[str, float]]:
    """{"VDD_CORE": {"A": 1.1, "V": 0.75}, "EXT5V": {"V": 5.1}} from an answer to pmic_read_adc.  Raises: ValueError."""
    found: dict[str, dict[str, float]] = {}
    for line in text.splitlines():
        match = ADC_LINE.fullmatch(line.strip())
        if not match or (match[2], match[3], match[5]) not in KINDS:
            raise ValueError(f"pmic_read_adc says {ascii(line.strip())[:40]}, which is no rail")
        rail = found.setdefault(match[1], {})
        if match[2] in rail:
            raise ValueError(f"pmic_read_adc names {match[1]}_{match[2]} twice")
        rail[match[2]] = float(match[4])
    if not 1 <= len(found) <= MAX_RAILS:
        raise ValueError(f"pmic_read_adc names {len(found)} rails; 1 to {MAX_RAILS} are expected")
    return found


def rail_w(text: str, rail: str) -> float:
    """Power in W of one rail.  Raises: ValueError."""
    values = rails(text).get(rail, {})
    if set(values) != {"A", "V"}:
        raise ValueError(f"pmic_read_adc lacks current or voltage of {rail}")
    return values["A"] * values["V"]


def rails_sum_w(text: str, wanted: tuple[str, ...]) -> float:
    """Power in W of `wanted` together; one that is missing makes the sum invalid and not smaller.  Raises: ValueError."""
    found = rails(text)
    if not all(set(found.get(rail, {})) == {"A", "V"} for rail in wanted):
        raise ValueError("pmic_read_adc lacks current or voltage of a rail")
    return sum(found[rail]["A"] * found[rail]["V"] for rail in wanted)
