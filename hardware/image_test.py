"""From nothing to boards that serve, in emulation: `make image-test` (python -m hardware.image_test; not part of the normal tests).

Builds the images (layers are kept from run to run), makes a fleet of two nodes, starts the ground station, boots both cards in QEMU
(-M virt and -M raspi3b), and checks step by step what the boards say, what they need, whom they speak to, and what they write.
Prints one line for each check and writes everything measured to FOLDER/report.json. Exit code 0: all checks held, 1: one did not.
Leaves out: real boards; times are those of an emulator on this machine, under whatever load it has.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Callable

from hardware import image_namespace, image_test_start, image_test_tokens, qemu_machine, qemu_packets
from hardware.qemu_machine import GROUND, Machine, QemuError

NODES = {"sat-virt": ("virt", "qemu-virt"), "sat-pi3": ("raspi3b", "pi3")}
"""Node -> QEMU's machine, board of the image."""
CUT = "sat-virt"
"""Whose power is cut."""
CHECKPOINT = Path(__file__).resolve().parents[1] / "quantize" / "reference" / "checkpoint"
BOOT_S = 900.0
QUIET_S = 300.0
MAX_IDLE_KIB = 200 * 1024
MAX_IMAGE_BYTES = 350_000_000
FREE_BYTES = 8 * 1024**3
PACKAGES = {
    "mmdebstrap": "mmdebstrap",
    "qemu-aarch64-static": "qemu-user-static",
    "newuidmap": "uidmap",
    "qemu-system-aarch64": "qemu-system-arm",
    "mcopy": "mtools",
    "mkfs.vfat": "dosfstools",
    "sfdisk": "fdisk",
    "mke2fs": "e2fsprogs",
    "zstd": "zstd",
    "mosquitto": "mosquitto",
}


class Report:
    """Prints as it goes, and keeps what was measured."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ok = folder, True
        self.facts: dict[str, object] = {}
        self.started_s = time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started_s:6.0f} s] {text}", flush=True)

    def check(self, name: str, held: bool, fact: object) -> None:
        self.facts[name] = {"ok": bool(held), "value": fact}
        self.ok = self.ok and bool(held)
        self.say(f"{'ok    ' if held else 'FAILED'} {name}: {fact if isinstance(fact, str) else json.dumps(fact)}")

    def write(self) -> None:
        self.facts["seconds"] = round(time.monotonic() - self.started_s, 1)
        (self.folder / "report.json").write_text(json.dumps(self.facts, indent=1) + "\n")


def spacemoe(*words: object, timeout_s: float = 3600.0) -> dict:
    """One call of the umbrella command with --json.  Raises: RuntimeError."""
    line = [sys.executable, "-m", "ground_station.cli", *map(str, words), "--json"]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, timeout=timeout_s)
    if done.returncode:
        raise RuntimeError(f"spacemoe {' '.join(map(str, words[:3]))} failed ({done.returncode})")
    return json.loads(done.stdout)


def need_packages(say: Callable[[str], None]) -> None:
    """Installs what is missing where that is allowed.  Raises: RuntimeError naming the packages."""
    lacks = sorted({package for name, package in PACKAGES.items() if image_namespace.find(name) is None})
    if lacks and os.geteuid() == 0 and shutil.which("apt-get"):
        say(f"apt-get install {' '.join(lacks)}")
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update", "-q"], ["install", "-q", "-y", "--no-install-recommends", *lacks]):
            subprocess.run(["apt-get", *words], stdout=subprocess.DEVNULL, env=environment, check=False)
        lacks = sorted({package for name, package in PACKAGES.items() if image_namespace.find(name) is None})
    if lacks:
        raise RuntimeError(f"not installed: apt-get install {' '.join(lacks)}")


def build_images(report: Report, cache: Path, offline: bool) -> dict[str, Path]:
    """Node -> its image."""
    images = {}
    for node, (_, board) in NODES.items():
        image = report.folder / f"{board}.img.zst"
        words = ["image", "build", "--board", board, "-o", image, "--cache", cache, "--console", "--progress"]
        made = spacemoe(*words, *(["--offline"] if offline else []))
        report.check(
            f"{board}: under {MAX_IMAGE_BYTES / 1e6:.0f} MB compressed", made["bytes"] <= MAX_IMAGE_BYTES, made["bytes"]
        )
        report.facts[f"{board}: build"] = made
        images[node] = image
    return images


def same_again(report: Report, cache: Path, images: dict[str, Path]) -> None:
    """The second build of the same inputs, in a cache that has the downloads (packages set up, wheels) and nothing else."""
    node, (_, board) = next(iter(NODES.items()))
    other = report.folder / "cache-again"
    shutil.rmtree(other, ignore_errors=True)
    for name in ("bootstrap", "wheels"):
        shutil.copytree(cache / name, other / name, copy_function=os.link)
    image = report.folder / "again.img.zst"
    spacemoe("image", "build", "--board", board, "-o", image, "--cache", other, "--console", "--progress", "--offline")
    shutil.rmtree(other)
    one, two = (hashlib.sha256(path.read_bytes()).hexdigest() for path in (images[node], image))
    image.unlink()
    report.check("two builds of the same inputs give the same sha256", one == two, [one, two])


def provision(report: Report, fleet: Path, images: dict[str, Path]) -> dict[str, Path]:
    """Node -> its card, with its pack."""
    shutil.rmtree(fleet, ignore_errors=True)
    ports = zip(("--broker-port", "--enrol-port", "--data-port", "--delivery-port"), free_ports(4))
    spacemoe(
        "fleet", "init", "image-test", "--host", GROUND, "--dir", fleet, *(word for pair in ports for word in pair)
    )
    cards = {}
    for node, (_, board) in NODES.items():
        pack = Path(spacemoe("fleet", "add", node, "--dir", fleet, "--board", board)["pack"])
        card = report.folder / f"{node}.card"
        card.unlink(missing_ok=True)
        qemu_machine.card(images[node], card)
        qemu_machine.put_pack(card, pack)
        cards[node] = card
        report.say(f"card of {node} is ready: {card.stat().st_blocks * 512 / 1e6:.0f} MB on this disk")
    return cards


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody has now: an operator's own ground station may run here."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def time_port() -> int:
    """123, which boards ask, where this user may have it; else 0: boards then keep the time of their packs."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as attempt:
        try:
            attempt.bind(("127.0.0.1", 123))
        except OSError:
            return 0
    return 123


def ground(fleet: Path, log: Path) -> subprocess.Popen:
    """`spacemoe up` for the fleet; it answers on loopback, where the emulated boards reach it."""
    with open(log, "wb") as output:
        line = [
            sys.executable,
            "-m",
            "ground_station.cli",
            "up",
            "--dir",
            str(fleet),
            "--json",
            "--time-port",
            str(time_port()),
        ]
        return subprocess.Popen(line, stdout=output, stderr=output, stdin=subprocess.DEVNULL)


def check_boot(report: Report, node: str, machine: Machine) -> None:
    """Waits until the agent serves; checks what it needs."""
    machine.wait_for(r"spacemoe-report .*agent_state=running", BOOT_S)
    report.check(f"{node}: the agent serves", True, f"{time.monotonic() - machine.started_s:.0f} s after power-on")
    last = machine.reports()[-1]
    ready, started = int(last["agent_ready_us"]), int(last["agent_started_us"])
    report.facts[f"{node}: report"] = last
    report.facts[f"{node}: power-on to ready, by the board's clock"] = ready / 1e6
    report.facts[f"{node}: agent start to ready, emulated"] = (ready - started) / 1e6


def check_idle(report: Report, node: str, machine: Machine) -> None:
    """What the system and the agent hold when nothing is asked of them."""
    last = machine.reports()[-1]
    used = int(last["MemTotal"]) - int(last["MemAvailable"])
    fact = {"used_kib": used, "agent_rss_kib": int(last.get("agent_VmRSS", 0)), "up_s": int(last["up_s"])}
    report.check(f"{node}: idle memory with the agent under 200 MB", used < MAX_IDLE_KIB, fact)
    packets = qemu_packets.summary(qemu_packets.read(machine.packets, GROUND))
    held = packets["seconds"] >= QUIET_S and packets["kinds"].get("ground", 0) > 0 and not packets["elsewhere"]
    report.check(f"{node}: no packet but to the ground station in {packets['seconds']:.0f} s", held, packets)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="image_test", description="boots what `spacemoe image build` makes, in QEMU")
    parser.add_argument(
        "--folder", type=Path, default=Path(".image-test"), help="logs, cards, report (default: %(default)s)"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path.home() / ".cache" / "spacemoe" / "image",
        help="of the layers (default: %(default)s)",
    )
    parser.add_argument("--offline", action="store_true", help="with the cached packages as they are")
    parser.add_argument(
        "--quiet-s", type=float, default=QUIET_S, help="how long packets are watched (default: %(default)g)"
    )
    parser.add_argument(
        "--once", action="store_true", help="leave out the second build that is compared with the first"
    )
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    folder = args.folder.resolve()
    report = Report(folder)
    try:
        free = shutil.disk_usage(folder).free
        if free < FREE_BYTES:
            raise RuntimeError(
                f"{folder} has {free / 1e9:.1f} GB free, {FREE_BYTES / 1e9:.0f} are needed: give another --folder"
            )
        need_packages(report.say)
        images = build_images(report, args.cache.resolve(), args.offline)
        if not args.once:
            same_again(report, args.cache.resolve(), images)
        image_test_start.check_start(report, CHECKPOINT.parent / "bundle")
        cards = provision(report, folder / "fleet", images)
        with ExitStack() as stack:
            station = ground(folder / "fleet", folder / "ground.log")
            stack.callback(station.wait)
            stack.callback(station.terminate)
            machines = {}
            for node, (kind, _) in NODES.items():
                shutil.rmtree(folder / node, ignore_errors=True)
                machines[node] = stack.enter_context(Machine(kind, cards[node], folder / node))
            for node, machine in machines.items():
                check_boot(report, node, machine)
            nodes = {
                each["id"]: each["state"] for each in spacemoe("fleet", "list", "--dir", folder / "fleet")["nodes"]
            }
            report.check("both nodes have claimed their certificates", set(nodes.values()) == {"enrolled"}, nodes)
            bundle, newer = image_test_tokens.bundles(report, spacemoe, folder / "fleet", CHECKPOINT)
            newest = max(machine.started_s for machine in machines.values())
            time.sleep(max(0.0, newest + args.quiet_s + 20 - time.monotonic()))
            for node, machine in machines.items():
                check_idle(report, node, machine)
            update_s = image_test_tokens.check_tokens(report, folder / "fleet", bundle, set(NODES))
            stack.callback(lambda: [machine.cut_power() for machine in machines.values()])
            victim, kind = CUT, NODES[CUT][0]
            image_test_tokens.check_power_cut(
                report,
                folder / "fleet",
                newer,
                update_s,
                victim,
                machines,
                lambda: Machine(kind, cards[victim], folder / victim),
                BOOT_S,
            )
    except (OSError, ValueError, RuntimeError, QemuError, subprocess.TimeoutExpired) as error:
        report.check("the test ran to its end", False, " ".join(str(error).split()))
    except KeyboardInterrupt:
        report.check("the test ran to its end", False, "interrupted")
    report.write()
    report.say(f"{'all checks held' if report.ok else 'NOT all checks held'}; {folder / 'report.json'}")
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
