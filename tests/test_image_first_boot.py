"""What bases read at their first boot: judged by cloud-init's own schema, netplan, a shell, and a standard's test vector."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from conftest import lacking
from vendor_images import CMDLINE, KEY, LAYOUTS, WLAN, base_image, fat_text, made, make_pack, need_programs

from hardware import first_boot_files, image_bootstrap

# netplan with its libraries, so that it runs on any release by its own loader
TRIXIE_PACKAGES = (
    *(
        "cloud-init",
        "netplan-generator",
        "libnetplan1",
        "libc6",
        "libglib2.0-0t64",
        "libyaml-0-2",
        "libuuid1",
        "zlib1g",
    ),
    *("libpcre2-8-0", "libmount1", "libblkid1", "libselinux1", "libffi8"),
)


@pytest.fixture(scope="session", autouse=True)
def programs():
    need_programs()


def test_the_key_of_a_wlan_is_the_standards():
    # IEEE 802.11-2020, annex J.4.2: test vectors of the passphrase to key mapping
    key = "f42c6fc52df0ebef9ebb4b90b38a5f902e83fe1b135a70e23aed762e9710a12e"
    assert first_boot_files.wlan("IEEE", "password", "DE").key == key
    assert first_boot_files.wlan("IEEE", key.upper(), "DE").key == key
    for wrong in (("", "password", "DE"), ("a\nb", "password", "DE"), ("a", "short", "DE"), ("a", "password", "de")):
        with pytest.raises(first_boot_files.SettingError) as error:
            first_boot_files.wlan(*wrong)
        assert "password" not in str(error.value) and "short" not in str(error.value)


@pytest.mark.parametrize("tool", [True, False])
def test_firstrun_does_its_work_once_and_removes_itself(tool, tmp_path):
    """In a root of its own, with busybox for the base's programs; `tool` writes down how the base's imager_custom is called."""
    shell = shutil.which("busybox")
    root = tmp_path / "root"
    for folder in ("bin", "etc", "boot/firmware", "usr/lib/raspberrypi-sys-mods"):
        (root / folder).mkdir(parents=True)
    shutil.copy(shell, root / "bin/busybox")
    for name in ("sh", "rm", "sed", "cat"):
        (root / "bin" / name).symlink_to("busybox")
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n127.0.1.1\traspberrypi\n")
    recorder = root / "usr/lib/raspberrypi-sys-mods/imager_custom"
    if tool:
        recorder.write_text('#!/bin/sh\nfor each in "$@"; do echo "<$each>" >>/calls; done\n')
        recorder.chmod(0o755)
    network = dataclasses.replace(WLAN, ssid='it\'s "$(x)"')
    script = root / "boot/firmware/firstrun.sh"
    script.write_bytes(first_boot_files.first_run("sat-7", network, KEY, "/boot/firmware"))
    script.chmod(0o755)
    line = root / "boot/firmware/cmdline.txt"
    line.write_bytes(first_boot_files.command_line(CMDLINE.encode(), None, "/boot/firmware"))
    assert "systemd.run=" in line.read_text()
    argv = ["chroot", str(root), "/boot/firmware/firstrun.sh"]
    if os.geteuid():
        argv = ["unshare", "--user", "--map-root-user", *argv]
    done = subprocess.run(argv, capture_output=True, env={"PATH": "/bin:/usr/sbin:/usr/bin:/sbin"}, timeout=30)
    if b"unshare" in done.stderr:
        lacking("a user namespace", "allow unprivileged ones (kernel.unprivileged_userns_clone=1), or run as root")
    assert done.returncode == 0, done.stderr
    assert not script.exists() and line.read_text() == CMDLINE
    if tool:
        calls = (root / "calls").read_text().splitlines()
        assert calls[:2] == ["<set_hostname>", "<sat-7>"]
        assert calls[2:5] == ["<enable_ssh>", "<-k>", f"<{KEY}>"]
        assert calls[5:] == ["<set_wlan>", '<it\'s "$(x)">', f"<{WLAN.key}>", "<DE>"]
    else:
        assert (root / "etc/hostname").read_text() == "sat-7\n"
        assert "127.0.1.1\tsat-7" in (root / "etc/hosts").read_text()


@pytest.fixture(scope="session")
def packages() -> Path:
    """Debian trixie's cloud-init and netplan, unpacked outside the tree and not installed."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spacemoe" / "tests" / "trixie"
    if (cache / "unpacked").is_dir():
        return cache / "unpacked"
    if shutil.which("apt-get") is None:
        lacking("cloud-init's schema", "it comes with Debian's package, fetched by apt-get")
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        for path in ("lists/partial", "archives/partial", "unpacked"):
            (here / path).mkdir(parents=True, exist_ok=True)
        try:
            mirror = image_bootstrap.sources(None)[0]  # the one that this machine's apt is set to
        except image_bootstrap.MirrorError as error:
            lacking("cloud-init's schema", str(error))
        (here / "sources.list").write_text(f"deb [signed-by={mirror.keyring}] {mirror.uri} {mirror.suite} main\n")
        options = {
            "Dir::Etc::SourceList": here / "sources.list",
            "Dir::Etc::SourceParts": "-",
            "Dir::State::Lists": here / "lists",
            "Dir::Cache": here,
            "Acquire::Languages": "none",
        }
        apt = ["apt-get", "-q", *(part for name, value in options.items() for part in ("-o", f"{name}={value}"))]
        for step in (["update"], ["download", *TRIXIE_PACKAGES]):
            done = subprocess.run([*apt, *step], cwd=here, capture_output=True, timeout=120)
            if done.returncode:
                lacking("cloud-init's schema", f"apt-get could not fetch Debian trixie's: {done.stderr[-200:]!r}")
        for package in here.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package.name, "unpacked"], cwd=here, check=True)
        cache.mkdir(parents=True, exist_ok=True)
        shutil.move(here / "unpacked", cache / f"partial-{os.getpid()}")
        (cache / f"partial-{os.getpid()}").rename(cache / "unpacked")
    return cache / "unpacked"


def cloud_files(image: Path, path: str) -> dict:
    return json.loads(re.sub(r"^#cloud-config\n", "", fat_text(image, path)))


def test_cloud_init_files_validate_against_its_own_schema(packages, tmp_path):
    import jsonschema

    folder = packages / "usr/lib/python3/dist-packages/cloudinit/config/schemas"
    config = jsonschema.Draft4Validator(json.loads((folder / "schema-cloud-config-v1.json").read_text()))
    network = jsonschema.Draft7Validator(json.loads((folder / "schema-network-config-v2.json").read_text()))
    base = base_image(tmp_path / "base", LAYOUTS["raspios-trixie"])
    made(base, make_pack(tmp_path / "pack", "sat-7", "pi4"), tmp_path / "out.img", network=WLAN, ssh_key=KEY)
    config.validate(cloud_files(tmp_path / "out.img", "/user-data"))
    config.validate(json.loads(first_boot_files.user_data("sat-7", None).split(b"\n", 1)[1]))
    # cloud-init's own schema knows no WLAN: it hands that part to netplan, which judges it in the next test
    tree = cloud_files(tmp_path / "out.img", "/network-config")
    assert tree["network"].pop("wifis")
    network.validate(tree)
    # controls: the judges can say no
    for judge, wrong in (
        (config, {"hostname": "a", "no_such_module": 1}),
        (config, {"hostname": 7}),
        (network, {"network": {"version": 2, "ethernets": {"eth0": {"dhcp4": "perhaps"}}}}),
        (network, {"network": {"version": 2, "no_such": {}}}),
    ):
        with pytest.raises(jsonschema.ValidationError):
            judge.validate(wrong)


def test_netplan_reads_the_wlan(packages, tmp_path):
    """netplan's own generator, which cloud-init's file goes to, writes what wpa_supplicant reads."""
    network = dataclasses.replace(WLAN, ssid="a 'b' (c)")
    (loader,) = packages.glob("usr/lib/*-linux-gnu/ld-linux-*")
    program = packages / "usr/libexec/netplan/generate"

    def generate(data: bytes) -> subprocess.CompletedProcess:
        config = tmp_path / "root/etc/netplan/50-cloud-init.yaml"
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_bytes(data)
        config.chmod(0o600)
        argv = [str(loader), "--library-path", str(loader.parent), str(program), "--root-dir", str(tmp_path / "root")]
        return subprocess.run(argv, capture_output=True, timeout=30)

    data = first_boot_files.network_config(network)
    done = generate(data)
    assert (done.returncode, done.stderr) == (0, b"")
    text = (tmp_path / "root/run/netplan/wpa-wlan0.conf").read_text()
    assert f"psk={WLAN.key}\n" in text and "country=DE\n" in text and f'ssid=P"{network.ssid}"\n' in text
    assert generate(data.replace(b"access-points", b"access-pints")).returncode != 0
