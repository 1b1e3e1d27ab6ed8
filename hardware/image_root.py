"""What our own image has beside Debian's packages and the payload: mounts, network, names, logs, and nothing that calls home.

The board speaks DHCP, ARP and IPv6 neighbour discovery, and with the ground station. Timers of the package manager are masked, no
time server but the ground station is known, nobody can log in (root has no password; --ssh-key adds a server for that key).
Leaves out: Wi-Fi (the boards use a cable or a USB adapter), more than one user, updates of Debian's packages (flash a new image).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hardware.payload import UNITS, Entry

RECIPE = 1
ROOT_LABEL, DATA_LABEL, BOOT_LABEL = "spacemoe-root", "spacemoe-data", "SPACEMOE"
SYSTEM = "/usr/lib/systemd/system"
ENABLED = {
    "multi-user.target.wants": ("systemd-networkd.service",),
    "sockets.target.wants": ("systemd-networkd.socket",),
    "sysinit.target.wants": ("systemd-resolved.service", "systemd-timesyncd.service"),
}
MASKED = (
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "apt-daily.service",
    "apt-daily-upgrade.service",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "getty@tty1.service",
    "getty-static.service",
    "systemd-networkd-wait-online.service",
)
MASKED_READ_ONLY = (
    "systemd-random-seed.service",
    "systemd-journal-catalog-update.service",
    "systemd-update-done.service",
)
# mounted over what the system writes and may forget
READ_ONLY_TMPFS = {"/var/log": "0755", "/var/tmp": "1777", "/var/cache": "0755"}


@dataclass(frozen=True)
class Options:
    read_only: bool = False
    ssh_key: str = ""
    """The line of a public key; empty: no SSH server."""
    console: bool = False


def entries(options: Options) -> list[Entry]:
    """Files and links to lay over the root file system, sorted by path.  Raises: OSError."""
    found = {
        "etc/fstab": _fstab(options.read_only),
        "etc/hostname": "spacemoe\n",
        "etc/hosts": "127.0.0.1 localhost\n127.0.1.1 spacemoe\n::1 localhost ip6-localhost\n",
        # empty: systemd makes one at first boot, without taking that for a new installation (which would enable all units)
        "etc/machine-id": "",
        "etc/systemd/network/80-spacemoe.network": _unit("80-spacemoe.network"),
        "etc/systemd/resolved.conf.d/spacemoe.conf": _unit("resolved.conf"),
        "etc/systemd/journald.conf.d/spacemoe.conf": _unit("journald.conf"),
        "etc/systemd/system.conf.d/spacemoe.conf": _unit("system.conf"),
        "etc/sysctl.d/80-spacemoe.conf": _unit("sysctl.conf"),
        "etc/systemd/system/spacemoe-grow.service": _unit("spacemoe-grow.service"),
    }
    programs = {"usr/lib/spacemoe/grow": _unit("grow")}
    enabled = {kind: tuple(f"{SYSTEM}/{name}" for name in names) for kind, names in ENABLED.items()}
    ours = ["spacemoe-grow.service"]
    masked = list(MASKED)
    if options.read_only:
        found["etc/systemd/journald.conf.d/read-only.conf"] = "[Journal]\nStorage=volatile\n"
        masked += MASKED_READ_ONLY
    if options.console:
        found["etc/systemd/journald.conf.d/console.conf"] = _unit("journald-console.conf")
        found["etc/systemd/system/spacemoe-report.service"] = _unit("spacemoe-report.service")
        programs["usr/lib/spacemoe/report"] = _unit("report")
        ours.append("spacemoe-report.service")
    if options.ssh_key:
        found["etc/ssh/sshd_config.d/spacemoe.conf"] = _unit("sshd.conf")
        found["etc/systemd/system/spacemoe-ssh-keys.service"] = _unit("spacemoe-ssh-keys.service")
        ours.append("spacemoe-ssh-keys.service")
    made = {path: Entry(path, 0o644, text.encode()) for path, text in found.items()}
    made |= {path: Entry(path, 0o755, text.encode()) for path, text in programs.items()}
    if options.ssh_key:
        path = "root/.ssh/authorized_keys"
        made[path] = Entry(path, 0o600, options.ssh_key.encode() + b"\n")
    links = {"etc/resolv.conf": "/run/systemd/resolve/resolv.conf"}
    for kind, targets in enabled.items():
        links |= {f"etc/systemd/system/{kind}/{target.rpartition('/')[2]}": target for target in targets}
    links |= {f"etc/systemd/system/multi-user.target.wants/{name}": f"/etc/systemd/system/{name}" for name in ours}
    links |= {f"etc/systemd/system/{name}": "/dev/null" for name in masked}
    made |= {path: Entry(path, 0o777, target=target) for path, target in links.items()}
    return [made[path] for path in sorted(made)]


def _unit(name: str) -> str:
    return (UNITS / name).read_text()


def _fstab(read_only: bool) -> str:
    boot = f"LABEL={BOOT_LABEL} /boot/firmware vfat rw,noatime,umask=0077,nodev,nosuid,noexec,nofail,x-systemd.device-timeout=300s 0 2"
    if not read_only:
        lines = [f"LABEL={ROOT_LABEL} / ext4 rw,noatime 0 1", boot]
    else:
        lines = [f"LABEL={ROOT_LABEL} / ext4 ro,noatime 0 1", boot]
        lines.append(f"LABEL={DATA_LABEL} /var/lib/spacemoe ext4 rw,noatime,nodev,nosuid 0 2")
        lines += [
            f"tmpfs {path} tmpfs rw,nodev,nosuid,size=16m,mode={mode} 0 0" for path, mode in READ_ONLY_TMPFS.items()
        ]
        # the clock of a board without a battery is kept across power cuts
        lines.append(
            "/var/lib/spacemoe/.system/timesync /var/lib/systemd/timesync none bind,x-systemd.requires-mounts-for=/var/lib/spacemoe 0 0"
        )
    return "\n".join(lines) + "\n"


def ssh_key(path: Path) -> str:
    """One line of a public key file.  Raises: ValueError, OSError."""
    if not path.is_file() or path.stat().st_size > 16_384:
        raise ValueError(f"{path} is no public key: give the .pub file")
    text = path.read_text(errors="replace").strip()
    kind = text.split(" ")[0]
    if (
        "\n" in text
        or not (kind.startswith(("ssh-", "ecdsa-", "sk-")) and len(text.split(" ")) >= 2)
        or not text.isprintable()
    ):
        raise ValueError(f"{path} is no public key of one line: give the .pub file, not the private one")
    return text
