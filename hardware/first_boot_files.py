"""What a vendor's base image reads at its first boot: host name, WLAN and an SSH key, in the form that each kind of base has for it.

Everything here is text made of checked values; who puts it where is customize.py's. The agent itself needs none of this: its files
and units are written into the root file system, its identity comes with the provision pack.
JSON is YAML (YAML 1.2.2, section 1.2), so that cloud-init's files need no YAML library.
Sources: cloud-init's NoCloud, cloud-config and network-config (version 2) documentation; raspberrypi-sys-mods' imager_custom;
systemd-run-generator(8); NetworkManager's nm-settings-keyfile(5); interfaces(5); wpa_passphrase(8).
Leaves out: passwords (there is no login with one), keyboards, time zones.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import uuid
from dataclasses import dataclass

ADMIN = "spacemoe-admin"
"""The user that an SSH key opens where the base makes users at its first boot."""
_HOST_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_COUNTRY = re.compile(r"[A-Z]{2}")
_SSH_KEY = re.compile(
    r"(?:ssh-(?:ed25519|rsa)|ecdsa-sha2-nistp(?:256|384|521)|sk-[a-z0-9@.-]{1,60}) [A-Za-z0-9+/]{40,4000}={0,2}(?: [ -~]{0,200})?"
)


class SettingError(ValueError):
    """A host name, a WLAN or an SSH key cannot be used; the text says what is wanted."""


@dataclass(frozen=True)
class Wlan:
    """`key` is the network's 256-bit key in hex: the passphrase itself does not go on the card."""

    ssid: str
    key: str
    country: str


def wlan(ssid: str, passphrase: str, country: str) -> Wlan:
    """Raises: SettingError; its text never holds the passphrase."""
    if not (1 <= len(ssid) <= 32 and ssid.isascii() and ssid.isprintable() and ssid == ssid.strip()):
        raise SettingError(
            f"the WLAN's name {ssid[:40]!r} must be 1 to 32 printable ASCII characters without spaces around it"
        )
    if not _COUNTRY.fullmatch(country):
        raise SettingError(f"{country[:10]!r} is no country for the WLAN: give two capital letters, such as DE")
    if re.fullmatch(r"[0-9a-fA-F]{64}", passphrase):
        return Wlan(ssid, passphrase.lower(), country)
    if not (8 <= len(passphrase) <= 63 and passphrase.isascii() and passphrase.isprintable()):
        raise SettingError("the WLAN's passphrase must be 8 to 63 printable ASCII characters, or 64 hex digits")
    return Wlan(ssid, hashlib.pbkdf2_hmac("sha1", passphrase.encode(), ssid.encode(), 4096, 32).hex(), country)


def host_name(text: str) -> str:
    """Raises: SettingError."""
    if not _HOST_NAME.fullmatch(text):
        raise SettingError(f"{text[:70]!r} is no host name: give --hostname with a-z, 0-9 and -, at most 63")
    return text


def ssh_key(text: str) -> str:
    """The one public key in a file's text.  Raises: SettingError."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if len(lines) != 1 or not _SSH_KEY.fullmatch(lines[0]):
        raise SettingError("the SSH key file must hold one public key (a line such as `ssh-ed25519 AAAA... name`)")
    return lines[0]


def user_data(host: str, key: str | None) -> bytes:
    """cloud-init's user-data."""
    tree: dict = {"hostname": host, "manage_etc_hosts": True, "ssh_pwauth": False}
    if key is not None:
        tree["users"] = [
            {
                "name": ADMIN,
                "gecos": "SpaceMoE administrator",
                "groups": ["adm", "sudo"],
                "shell": "/bin/bash",
                "lock_passwd": True,
                "sudo": "ALL=(ALL) NOPASSWD:ALL",
                "ssh_authorized_keys": [key],
            }
        ]
        tree["runcmd"] = [["systemctl", "enable", "--now", "ssh.service"]]
    return b"#cloud-config\n" + _json(tree)


def meta_data(node: str, pack_sha256: str) -> bytes:
    """cloud-init's meta-data: another pack is another instance, so that a card that is provisioned anew is configured anew."""
    return _json({"instance-id": f"spacemoe-{node}-{pack_sha256[:12]}", "dsmode": "local"})


def network_config(network: Wlan) -> bytes:
    """cloud-init's network-config (netplan's format): the cable if there is one, and the WLAN."""
    point = {network.ssid: {"password": network.key}}
    radio = {"dhcp4": True, "optional": True, "regulatory-domain": network.country, "access-points": point}
    cable = {"dhcp4": True, "optional": True}
    return _json({"network": {"version": 2, "ethernets": {"eth0": cable}, "wifis": {"wlan0": radio}}})


def first_run(host: str, network: Wlan | None, key: str | None, mount: str) -> bytes:
    """Raspberry Pi OS bookworm's firstrun.sh: sets what there is to set, then removes itself and its call, and always succeeds.

    The base's own tool is used, as Raspberry Pi Imager does. The last lines have the form that the base's imager_fixup looks for.
    """
    tool = "/usr/lib/raspberrypi-sys-mods/imager_custom"
    lines = ["#!/bin/sh", "# Runs once, at the first boot (systemd.run= in cmdline.txt).", "set +e", ""]
    lines += [f"if [ -x {tool} ]; then"]
    lines += [f"  {tool} set_hostname {host}"]
    if key is not None:
        lines += [f"  {tool} enable_ssh -k {shlex.quote(key)}"]
    if network is not None:
        words = " ".join(shlex.quote(word) for word in (network.ssid, network.key, network.country))
        lines += [f"  {tool} set_wlan {words}", "  rfkill unblock wifi"]
    lines += [
        "else",
        f"  echo {host} >/etc/hostname",
        f"  sed -i 's/^127\\.0\\.1\\.1.*/127.0.1.1\\t{host}/' /etc/hosts",
        "fi",
    ]
    if key is not None:
        # marks the first user as set up, without a password
        lines += ["[ -x /usr/lib/userconf-pi/userconf ] && /usr/lib/userconf-pi/userconf pi ''"]
    lines += [f"rm -f {mount}/firstrun.sh", f"sed -i 's| systemd\\.[^ ]*||g' {mount}/cmdline.txt", "exit 0", ""]
    return "\n".join(lines).encode()


def command_line(old: bytes, network: Wlan | None, mount: str) -> bytes:
    """cmdline.txt with the call of firstrun.sh; one that is there already is not repeated.  Raises: SettingError for no one line."""
    text = old.decode("utf-8", "replace").strip()
    if "\n" in text or not text.isprintable():
        raise SettingError("cmdline.txt of the base is not one line of text: the image is damaged")
    words = [word for word in text.split() if not word.startswith(("systemd.run", "systemd.unit="))]
    if network is not None:
        words = [word for word in words if not word.startswith("cfg80211.ieee80211_regdom=")]
        words.append(f"cfg80211.ieee80211_regdom={network.country}")
    words += [
        f"systemd.run={mount}/firstrun.sh",
        "systemd.run_success_action=reboot",
        "systemd.unit=kernel-command-line.target",
    ]
    return (" ".join(words) + "\n").encode()


def hosts(old: bytes | None, host: str) -> bytes:
    """/etc/hosts with the host's own name."""
    lines = (old or b"127.0.0.1\tlocalhost\n").decode("utf-8", "replace").splitlines()
    return "\n".join(
        [*(line for line in lines if line.split()[:1] != ["127.0.1.1"]), f"127.0.1.1\t{host}", ""]
    ).encode()


def interfaces(network: Wlan) -> bytes:
    """A file for /etc/network/interfaces.d (Debian's own images)."""
    lines = [
        "allow-hotplug wlan0",
        "iface wlan0 inet dhcp",
        f"    wpa-ssid {network.ssid}",
        f"    wpa-psk {network.key}",
        "",
    ]
    return "\n".join(lines).encode()


def nm_connection(network: Wlan) -> bytes:
    """A NetworkManager keyfile (Jetson Linux); it must be readable by root only."""
    own = uuid.uuid5(uuid.NAMESPACE_DNS, f"spacemoe-wlan.{network.ssid}")
    # A keyfile's SSID is text, but for one that reads as a list of numbers
    ssid = network.ssid.replace("\\", "\\\\").replace(";", "\\;")
    sections = {
        "connection": {"id": "spacemoe-wlan", "uuid": str(own), "type": "wifi"},
        "wifi": {"mode": "infrastructure", "ssid": ssid},
        "wifi-security": {"key-mgmt": "wpa-psk", "psk": network.key},
        "ipv4": {"method": "auto"},
        "ipv6": {"method": "auto"},
    }
    texts = (
        f"[{name}]\n" + "".join(f"{key}={value}\n" for key, value in rows.items()) for name, rows in sections.items()
    )
    return "\n".join(texts).encode()


def regulatory_domain(network: Wlan) -> bytes:
    """A file for /etc/modprobe.d: the country whose rules the radio keeps."""
    return f"options cfg80211 ieee80211_regdom={network.country}\n".encode()


def pack_drop_in(folder: str, mount: str | None) -> bytes:
    """A drop-in for the first-boot unit: the pack is in `folder`, not in /boot/firmware."""
    lines = ["# The provision pack of this base is not in /boot/firmware."]
    if mount is not None:
        lines += ["[Unit]", f"RequiresMountsFor={mount}"]
    command = f"/usr/bin/node-agent first-boot --pack {folder} --to /var/lib/spacemoe/node"
    lines += ["[Service]", "ExecStart=", f"ExecStart={command}", f"ReadWritePaths={mount or folder}", ""]
    return "\n".join(lines).encode()


def _json(tree: dict) -> bytes:
    return (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode()
