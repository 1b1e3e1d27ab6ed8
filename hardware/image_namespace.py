"""Runs a script as root over the files of a foreign root file system, without being root, and without touching this machine.

A user namespace with its own mounts and its own binfmt_misc (Linux 6.7 or newer): the emulator for the board's processor is
registered in there alone and is gone afterwards. An ordinary user gets 65,536 ids from /etc/subuid (newuidmap); root maps the ids
to themselves, so that files made inside belong to whom they belong outside.
Leaves out: the network (the mirror must be reached), limits on memory and time.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Callable

BINFMT = Path("/usr/lib/binfmt.d/qemu-aarch64.conf")
"""Debian's registration of the emulator (qemu-user-static)."""
PROGRAMS = {
    "unshare": "util-linux",
    "newuidmap": "uidmap",
    "mmdebstrap": "mmdebstrap",
    "qemu-aarch64-static": "qemu-user-static",
}
WATCH_S = 10.0
SUB_IDS = Path("/etc/subuid")
_CLONE_NEWNS, _CLONE_NEWUSER, _PR_SET_PDEATHSIG = 0x00020000, 0x10000000, 1
# exec'd with what follows: the script's own arguments
_ENTER = """
set -eu
# an older kernel has one binfmt_misc for all, in which the emulator may be registered already
mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc 2>/dev/null || :
if ! test -e /proc/sys/fs/binfmt_misc/qemu-aarch64 && ! cat "$1" >/proc/sys/fs/binfmt_misc/register; then
    echo "this kernel (before 6.7) keeps no emulators per user: let root register qemu-aarch64 (systemctl restart systemd-binfmt)" >&2
    exit 125
fi
shift
exec unshare --mount --pid --fork --kill-child --mount-proc "$@"
"""


class NamespaceError(RuntimeError):
    """This kernel or user cannot have a namespace of its own; the text says what to install or set."""


def missing() -> list[str]:
    """Debian packages that are not installed here."""
    lacks = [package for program, package in PROGRAMS.items() if find(program) is None]
    if not BINFMT.is_file() and "qemu-user-static" not in lacks:
        lacks.append("qemu-user-static")
    return sorted(set(lacks))


def find(program: str) -> str | None:
    """Path of a program, also where an ordinary user's PATH does not lead."""
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin")


def check() -> None:
    """Raises: NamespaceError when this machine cannot run such a script."""
    lacks = missing()
    if lacks:
        raise NamespaceError(f"not installed: {', '.join(lacks)}: apt-get install {' '.join(lacks)}")
    if os.geteuid() != 0:
        user = pwd.getpwuid(os.geteuid()).pw_name
        entries = SUB_IDS.read_text().splitlines() if SUB_IDS.is_file() else []
        if not any(line.split(":")[0] in (user, str(os.geteuid())) for line in entries):
            raise NamespaceError(
                f"{SUB_IDS} has no ids for {user}: sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}"
            )


def run(
    command: list[str], log: Path, environment: dict[str, str], watch: Callable[[str], None] = lambda text: None
) -> None:
    """Runs the command inside, its output going to `log`, which `watch` is shown now and then.

    Raises: NamespaceError, with the log's last line; OSError.
    """
    check()
    inside = ["sh", "-c", _ENTER, "sh", str(BINFMT), *command]
    environment = environment | {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LC_ALL": "C.UTF-8",
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as output:
        if os.geteuid() == 0:
            outer = [sys.executable, "-I", __file__, *inside]
        else:
            outer = ["unshare", "--user", "--map-auto", "--map-root-user", "--mount", "--fork", "--kill-child", *inside]
        process = subprocess.Popen(
            outer, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
        )
        try:
            while (code := _code(process)) is None:
                watch(log.read_text(errors="replace"))
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise
    if code:
        tail = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        raise NamespaceError(f"{Path(command[0]).name} failed ({code}): {' '.join(tail)[-300:]}; see {log}")


def _code(process: subprocess.Popen) -> int | None:
    try:
        return process.wait(WATCH_S)
    except subprocess.TimeoutExpired:
        return None


def _enter_as_root(command: list[str]) -> int:
    """For root: a namespace in which every id stands for itself; the parent writes the map, the child then becomes its root."""
    ready, ready_out = os.pipe()
    go, go_out = os.pipe()
    child = os.fork()
    if child == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS):
            print(f"unshare: {os.strerror(ctypes.get_errno())}: this kernel gives no user namespaces", file=sys.stderr)
            os._exit(125)
        os.write(ready_out, b"x")
        os.close(ready_out)
        os.close(go_out)
        if os.read(go, 1) != b"x":
            os._exit(125)
        os.setgid(0)
        os.setuid(0)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.execvp(command[0], command)
    os.close(ready_out)
    os.close(go)
    if os.read(ready, 1) == b"x":
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{child}/{name}").write_text("0 0 65536\n")
        os.write(go_out, b"x")
    os.close(go_out)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    sys.exit(abs(_enter_as_root(sys.argv[1:])))
