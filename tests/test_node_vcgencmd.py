"""A Raspberry Pi's firmware by `vcgencmd`: real processes that answer, hang, flood and fail; and which program is run at all.

Answers are a Pi 5's and a Pi 4's as printed: raspberrypi.com/documentation/computers/os.html#vcgencmd (get_throttled and its
bits), a published pmic_read_adc of a Pi 5; messages and exit codes of raspberrypi/utils vcgencmd.c.
"""

from __future__ import annotations

import os
import signal
import stat
import threading
import time
from pathlib import Path

import pytest

from node_agent import sensors, vcgencmd
from node_agent.reading import LeftOut

PI5 = """ 3V7_WL_SW_A current(0)=0.06149170A
   3V3_SYS_A current(1)=0.08197812A
   1V8_SYS_A current(2)=0.15029320A
  DDR_VDD2_A current(3)=0.00390372A
  DDR_VDDQ_A current(4)=0.00000000A
   1V1_SYS_A current(5)=0.20299340A
    0V8_SW_A current(6)=0.30546610A
  VDD_CORE_A current(7)=1.11625000A
   3V3_DAC_A current(17)=0.00000000A
   3V3_ADC_A current(18)=0.00018315A
   0V8_AON_A current(16)=0.00274725A
      HDMI_A current(22)=0.01660560A
 3V7_WL_SW_V volt(8)=3.62925200V
   3V3_SYS_V volt(9)=3.31652900V
   1V8_SYS_V volt(10)=1.79877700V
  DDR_VDD2_V volt(11)=1.10146400V
  DDR_VDDQ_V volt(12)=0.60622650V
   1V1_SYS_V volt(13)=1.10402800V
    0V8_SW_V volt(14)=0.79853400V
  VDD_CORE_V volt(15)=0.74944980V
   3V3_DAC_V volt(20)=3.31043600V
   3V3_ADC_V volt(21)=3.31684600V
   0V8_AON_V volt(19)=0.79794790V
      HDMI_V volt(23)=5.10138000V
     EXT5V_V volt(24)=5.14800000V
      BATT_V volt(25)=0.00000000V
"""
# current times voltage of the twelve rails, by hand
PI5_SUM_W = (
    0.06149170 * 3.629252
    + 0.08197812 * 3.316529
    + 0.15029320 * 1.798777
    + 0.00390372 * 1.101464
    + 0.20299340 * 1.104028
    + 0.30546610 * 0.798534
    + 1.11625000 * 0.7494498
    + 0.00018315 * 3.316846
    + 0.00274725 * 0.7979479
    + 0.01660560 * 5.10138
)
DEVICE_REFUSED = """echo "Can't open device file: /dev/vcio"
echo "Try creating a device file with: sudo mknod /dev/vcio c 100 0"
exit 255
"""
UNKNOWN = """echo 'error=1 error_msg="Command not registered"'; exit 255\n"""


def program(root: Path, throttled: str, pmic: str = UNKNOWN) -> Path:
    """usr/bin/vcgencmd below `root`: shell code for each of two commands; each run leaves a line in `runs`."""
    path = root / "usr/bin/vcgencmd"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"#!/bin/sh\necho $1 >> {root}/runs\ncase $1 in\nget_throttled)\n{throttled}\n;;\npmic_read_adc)\n{pmic}\n;;\nesac\n"
    )
    path.chmod(0o755)
    return path


def pi(root: Path, throttled: str = "0x0", pmic: bool = True) -> Path:
    (root / "pmic").write_text(PI5)
    return program(root, f"echo throttled={throttled}", f"cat {root}/pmic" if pmic else UNKNOWN)


def runs(root: Path) -> list[str]:
    return (root / "runs").read_text().split() if (root / "runs").exists() else []


def test_pi_5(tmp_path):
    pi(tmp_path, "0x50005")
    found = sensors.find(tmp_path)
    got = {sensor.name: sensors.read(sensor) for sensor in found.sensors}
    # os.html: 0x50005 = bits 0 and 2 now, 16 and 18 since boot
    assert {name[5:]: sample.value for name, sample in got.items() if name.startswith("flag.")} == {
        "under_voltage": 1,
        "arm_frequency_capped": 0,
        "throttled": 1,
        "soft_temperature_limit": 0,
        "under_voltage_since_boot": 1,
        "arm_frequency_capped_since_boot": 0,
        "throttled_since_boot": 1,
        "soft_temperature_limit_since_boot": 0,
    }
    assert sensors.flags(found) == {
        "under_voltage": True,
        "arm_frequency_capped": False,
        "throttled": True,
        "soft_temperature_limit": False,
    }
    assert [(s.name, s.scope) for s in found.total] == [("power_w.pmic_sum", "rail")]
    assert got["power_w.pmic_sum"].value == pytest.approx(PI5_SUM_W, abs=1e-9)
    assert got["power_w.vdd_core"].value == pytest.approx(0.836573, abs=1e-6)  # 1.11625 A * 0.7494498 V
    assert (got["voltage_v.ext5v"].value, got["voltage_v.ext5v"].unit) == (5.148, "V")
    assert "without USB" in found.total_scope and any("EXT5V has no current" in item.reason for item in found.left_out)
    assert not [name for name in got if "ext5v" in name and name.startswith("power")] and "power_w.batt" not in got
    assert {sample.provenance for sample in got.values()} == {"simulated"}


def test_provenance_of_a_real_board_is_derived_for_products_and_measured_for_flags(tmp_path, monkeypatch):
    from node_agent import sensors_tree

    path = pi(tmp_path)
    monkeypatch.setattr(sensors_tree, "is_simulated", lambda sysroot: False)
    monkeypatch.setenv("PATH", str(path.parent))
    got = {sensor.name: sensor.provenance for sensor in sensors.find(tmp_path).sensors}
    assert got["power_w.pmic_sum"] == got["power_w.vdd_core"] == "derived"
    assert got["flag.throttled"] == got["voltage_v.ext5v"] == "measured"


def test_one_answer_serves_all_sensors_and_says_when_it_was(tmp_path):
    pi(tmp_path)
    found = sensors.find(tmp_path)
    before = len(runs(tmp_path))
    assert before == 2
    time.sleep(vcgencmd.ASK_PERIOD_S + 0.01)
    at = {sensors.read(sensor).generated_at for sensor in found.sensors if sensor.name.startswith("flag.")}
    assert len(at) == 1 and len(runs(tmp_path)) == before + 1
    assert {sensor.rate_hz for sensor in found.sensors} == {1 / vcgencmd.ASK_PERIOD_S}


def test_pi_4_has_flags_and_says_that_it_has_no_power(tmp_path):
    pi(tmp_path, "0xe0008", pmic=False)
    found = sensors.find(tmp_path)
    assert found.total == () and len(found.sensors) == 8
    assert sensors.flags(found)["soft_temperature_limit"] is True
    assert any("no power sensor of its own" in item.reason for item in found.left_out)


def test_flags_join_the_firmware_and_the_kernel_and_leave_out_what_is_not_known(tmp_path):
    folder = tmp_path / "sys/class/hwmon/hwmon1"
    folder.mkdir(parents=True)
    (folder / "name").write_text("rpi_volt\n")
    (folder / "in0_lcrit_alarm").write_text("1\n")
    found = sensors.find(tmp_path)
    assert sensors.flags(found) == {"under_voltage": True}
    assert any("apt install raspi-utils" in item.reason for item in found.left_out)
    pi(tmp_path, "0x0")
    found = sensors.find(tmp_path)
    assert sensors.flags(found)["under_voltage"] is True  # one of the two is enough
    (folder / "in0_lcrit_alarm").write_text("0\n")
    assert sensors.flags(found)["under_voltage"] is False
    (folder / "in0_lcrit_alarm").unlink()
    (tmp_path / "usr/bin/vcgencmd").unlink()
    time.sleep(vcgencmd.ASK_PERIOD_S + 0.01)
    assert sensors.flags(found) == {}  # not known is not False


def test_without_the_group_video_it_says_so(tmp_path):
    program(tmp_path, DEVICE_REFUSED, DEVICE_REFUSED)
    found = sensors.find(tmp_path)
    assert found.sensors == () and "usermod -aG video" in found.left_out[0].reason
    assert runs(tmp_path) == ["get_throttled"]  # what cannot be opened is not tried twice


@pytest.mark.parametrize(
    "code",
    [
        "echo throttled=0x",
        "echo throttled=50005",
        "echo throttled=0x123456789",
        "echo throttled=0x0; echo throttled=0x1",
        "echo",
        "head -c 3000 /dev/urandom",
        "printf 'throttled=0x0\\0'",
        "echo throttled=0x0; exit 1",
        "exit 0",
        "kill -9 $$",
        UNKNOWN,
    ],
)
def test_rubbish_is_left_out_with_a_reason_and_later_no_value(tmp_path, code):
    program(tmp_path, code)
    found = sensors.find(tmp_path)
    assert found.sensors == () and found.left_out[0].reason.startswith("get_throttled: ")
    assert all(item.reason.isprintable() and len(item.reason) < 200 for item in found.left_out)
    pi(tmp_path)
    found = sensors.find(tmp_path)
    assert sensors.flags(found)["throttled"] is False
    program(tmp_path, code, code)
    time.sleep(vcgencmd.ASK_PERIOD_S + 0.01)
    assert {sensors.read(sensor).value for sensor in found.sensors} == {None}
    assert {sensors.read(sensor).validity for sensor in found.sensors} <= {"missing", "invalid"}


@pytest.mark.parametrize(
    "old, new",
    [
        ("VDD_CORE_V volt(15)=0.74944980V", ""),  # a rail without voltage: the sum is not made smaller
        ("VDD_CORE_A current(7)=1.11625000A", "VDD_CORE_A current(7)=1.11625000V"),
        ("VDD_CORE_A current(7)=1.11625000A", "VDD_CORE_A current(7)=nan"),
        ("VDD_CORE_A current(7)=1.11625000A", "VDD_CORE_A current(7)=1e9A"),
        ("HDMI_V volt(23)=5.10138000V", "HDMI_V volt(23)=5.10138000V\nHDMI_V volt(23)=5.10138000V"),
        ("HDMI_V volt(23)=5.10138000V", "HDMI_V volt(23)=5.1013"),  # cut off
    ],
)
def test_an_answer_of_the_power_chip_that_is_not_whole_is_no_sum(tmp_path, old, new):
    pi(tmp_path)
    found = sensors.find(tmp_path)
    (total,) = found.total
    assert old in PI5 and sensors.read(total).validity == "ok"
    (tmp_path / "pmic").write_text("\n".join(line for line in PI5.replace(old, new).splitlines() if line.strip()))
    time.sleep(vcgencmd.ASK_PERIOD_S + 0.01)
    assert (sensors.read(total).value, sensors.read(total).validity) == (None, "invalid")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]


@pytest.mark.parametrize("how", ["exec sleep 600", "sleep 600", "sleep 600 & wait", "trap '' TERM INT; sleep 600"])
def test_one_that_hangs_costs_its_limit_and_leaves_no_process(tmp_path, how):
    """Also a child that holds the pipe open after the shell is gone."""
    path = program(tmp_path, f"echo $$ > {tmp_path}/pid\n{how}")
    threads = threading.active_count()
    firmware = vcgencmd.Firmware(path, limit_s=0.3)
    with pytest.raises(vcgencmd.FirmwareError, match="took longer than 0.3 s and was ended"):
        firmware.answer("get_throttled")
    for _ in range(5):  # kept for a while: not another 0.3 s for each sensor
        with pytest.raises(vcgencmd.FirmwareError):
            firmware.answer("get_throttled")
    assert runs(tmp_path) == ["get_throttled"]
    pid = int((tmp_path / "pid").read_text())
    assert not alive(pid)
    end = time.monotonic() + 10  # killed is killed; that the kernel takes it off the list may come a moment later
    while [p for p in Path("/proc").iterdir() if p.name.isdigit() and _group(p) == pid]:
        assert time.monotonic() < end, "a child is left"
        time.sleep(0.01)
    assert threading.active_count() <= threads + 1


def _group(process: Path) -> int | None:
    try:
        state, _, group = (process / "stat").read_text().rpartition(")")[2].split()[:3]
    except OSError:
        return None
    return int(group) if state != "Z" else None


def test_one_that_hangs_while_sensors_are_looked_for_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(vcgencmd.Firmware.__init__, "__defaults__", (0.2, 0.2))
    program(tmp_path, "sleep 600", "sleep 600")
    found = sensors.find(tmp_path)
    assert found.sensors == () and "took longer than 0.2 s" in found.left_out[0].reason
    assert runs(tmp_path) == ["get_throttled"]


def test_one_that_cannot_be_killed_costs_one_thread_and_is_not_started_again(tmp_path, monkeypatch):
    """A process in the kernel's hands (state D) survives SIGKILL: here killpg does nothing, and its end is awaited."""
    path = program(tmp_path, f"echo $$ > {tmp_path}/pid\nexec sleep 600")
    monkeypatch.setattr(vcgencmd.os, "killpg", lambda *_: None)
    firmware = vcgencmd.Firmware(path, limit_s=0.2)
    monkeypatch.setattr(vcgencmd, "HUNG_PERIOD_S", -1.0)  # asked again at once
    for _ in range(4):
        with pytest.raises(vcgencmd.FirmwareError, match="took longer|still hangs"):
            firmware.answer("get_throttled")
    assert runs(tmp_path) == ["get_throttled"]
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def test_one_that_prints_without_end_is_ended_at_its_bound(tmp_path):
    path = program(tmp_path, f"echo $$ > {tmp_path}/pid\nexec cat /dev/zero")
    with pytest.raises(vcgencmd.FirmwareError, match="prints more than 16384 bytes"):
        vcgencmd.Firmware(path).answer("get_throttled")
    assert not alive(int((tmp_path / "pid").read_text()))


# ---------------------------------------------------------------- which program is run


def test_below_another_root_only_a_script_of_ones_own_is_run(tmp_path):
    path = pi(tmp_path)
    assert vcgencmd.find_program(tmp_path, True) == path
    for mode, word in ((0o757, "everybody may write to it"), (0o755, None)):
        path.chmod(mode)
        got = vcgencmd.find_program(tmp_path, True)
        assert (word in got.reason) if word else got == path
    path.parent.chmod(0o777)
    assert "everybody may write to its folder" in vcgencmd.find_program(tmp_path, True).reason
    path.parent.chmod(0o755)
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
        assert "another user (uid 12345)" in vcgencmd.find_program(tmp_path, True).reason
        os.chown(path, 0, -1)
    path.unlink()
    path.symlink_to("/bin/sh")
    assert "no plain file" in vcgencmd.find_program(tmp_path, True).reason
    path.unlink()
    os.mkfifo(path)
    assert "no plain file" in vcgencmd.find_program(tmp_path, True).reason
    path.unlink()
    path.write_bytes(b"\x7fELF" + bytes(60))  # a real board's: it would ask this machine's firmware
    path.chmod(0o755)
    assert "no script" in vcgencmd.find_program(tmp_path, True).reason
    found = sensors.find(tmp_path)
    assert found.sensors == () and isinstance(found.left_out[0], LeftOut)
    path.unlink()
    assert vcgencmd.find_program(tmp_path, True) is None and sensors.find(tmp_path).left_out == ()


def test_a_simulated_board_never_asks_the_program_on_path(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(pi(tmp_path / "machine").parent) if (tmp_path / "machine").mkdir() is None else "")
    (tmp_path / "board").mkdir()
    assert sensors.find(tmp_path / "board").sensors == ()
    assert runs(tmp_path / "machine") == []


def test_on_path_only_from_an_absolute_folder_that_is_safe(tmp_path, monkeypatch):
    path = pi(tmp_path)
    monkeypatch.chdir(path.parent)
    for value in (".", "", "usr/bin", str(tmp_path / "none")):
        monkeypatch.setenv("PATH", value)
        assert vcgencmd.find_program(Path("/"), False) is None
    monkeypatch.setenv("PATH", f".:{path.parent}")
    assert vcgencmd.find_program(Path("/"), False) == path
    path.parent.chmod(0o777)
    assert "everybody" in vcgencmd.find_program(Path("/"), False).reason
    path.parent.chmod(0o777 | stat.S_ISVTX)
    assert vcgencmd.find_program(Path("/"), False) == path


def test_environment_and_arguments_are_its_own(tmp_path, monkeypatch):
    """Nothing of the agent's environment (keys, LD_PRELOAD) reaches it."""
    monkeypatch.setenv("SECRET", "x")
    path = program(tmp_path, f"env > {tmp_path}/env; pwd > {tmp_path}/cwd; echo throttled=0x0")
    assert vcgencmd.run(path, "get_throttled", 5.0) == (0, "throttled=0x0")
    names = {line.partition("=")[0] for line in (tmp_path / "env").read_text().splitlines()}
    assert names <= {"PATH", "LC_ALL", "PWD", "OLDPWD", "SHLVL", "_"} and (tmp_path / "cwd").read_text() == "/\n"
