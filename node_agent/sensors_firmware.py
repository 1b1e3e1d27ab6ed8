"""A Raspberry Pi: under-voltage and throttling as flags, and on a Pi 5 the rails of its power chip.

The sum of the rails is not the board: what goes out of the 5 V input to USB ports and HATs has no current sensor. Before a Pi 5
there is none at all, and none is guessed. Leaves out: running vcgencmd (vcgencmd.py); the board's whole power, which users of
the board estimate from the sum by a fit: a reader may, a sensor does not.
Source: raspberrypi.com/documentation/computers/os.html#vcgencmd; drivers/hwmon/raspberrypi-hwmon.c of the Linux kernel.
"""

from __future__ import annotations

from functools import partial

from node_agent import vcgencmd
from node_agent.reading import LeftOut, Sensor
from node_agent.sensors_power import PMIC_SUM, POWER_LIMITS_W
from node_agent.sensors_tree import Finding, Tree, slug


def under_voltage_alarm(tree: Tree) -> Finding:
    """hwmon `rpi_volt`: in0_lcrit_alarm is 1 while the supply is too low (the driver asks the firmware every 2 s)."""
    sensors, left_out = [], []
    for device in tree.hwmons[0]:
        if device.name != "rpi_volt" or "in0_lcrit_alarm" not in device.files:
            continue
        path = device.folder / "in0_lcrit_alarm"
        if reason := tree.unreadable(path):
            left_out.append(LeftOut(path, reason))
        else:
            name, state = "flag.under_voltage_alarm", "under_voltage"
            sensors.append(Sensor(name, "flag", "board", "measured", (path,), 1.0, (0.0, 1.0), state=state))
    return sensors, left_out


def _is_raspberry_pi(tree: Tree) -> bool:
    compatible = tree.text(tree.root / "proc/device-tree/compatible")[0] or ""
    return "raspberrypi," in compatible or any(device.name == "rpi_volt" for device in tree.hwmons[0])


def firmware(tree: Tree) -> Finding:
    """vcgencmd get_throttled and pmic_read_adc."""
    program = vcgencmd.find_program(tree.root, tree.simulated)
    if isinstance(program, LeftOut):
        return [], [program]
    if program is None:
        if not _is_raspberry_pi(tree):
            return [], []
        reason = "not there: no throttling flags, no power chip; install it (apt install raspi-utils)"
        return [], [LeftOut(tree.root / "usr/bin/vcgencmd", reason)]
    asked = vcgencmd.Firmware(program)
    sensors, left_out = [], []
    try:
        vcgencmd.flag_bits(asked.answer("get_throttled")[0])
        sensors += _flags(asked)
    except (OSError, ValueError) as error:
        left_out.append(LeftOut(program, f"get_throttled: {error}"))
        if isinstance(error, OSError) and not isinstance(error, vcgencmd.UnknownCommandError):
            return sensors, left_out  # what cannot be run or hangs is not tried twice
    try:
        sensors += _power_chip(asked, left_out)
    except vcgencmd.UnknownCommandError:
        reason = (
            "pmic_read_adc: unknown to this board, which has no power sensor of its own; put an INA226 in its supply"
        )
        left_out.append(LeftOut(program, reason))
    except (OSError, ValueError) as error:
        left_out.append(LeftOut(program, f"pmic_read_adc: {error}"))
    return sensors, left_out


def _flags(asked: vcgencmd.Firmware) -> list[Sensor]:
    def bit(number: int) -> tuple[float, float]:
        text, at = asked.answer("get_throttled")
        return float(vcgencmd.flag_bits(text) >> number & 1), at

    return [
        Sensor(
            f"flag.{name}",
            "flag",
            "board",
            "measured",
            (asked.program,),
            1.0,
            (0.0, 1.0),
            rate_hz=1 / vcgencmd.ASK_PERIOD_S,
            state=name if number < 16 else None,
            ask=partial(bit, number),
        )
        for number, name in vcgencmd.FLAGS.items()
    ]


def _power_chip(asked: vcgencmd.Firmware, left_out: list[LeftOut]) -> list[Sensor]:
    found = vcgencmd.rails(asked.answer("pmic_read_adc")[0])
    metered = tuple(rail for rail, values in found.items() if set(values) == {"A", "V"})

    def ask(function) -> tuple[float, float]:
        text, at = asked.answer("pmic_read_adc")
        return function(text), at

    def sensor(
        name: str, unit: str, scope: str, provenance: str, function, limits=POWER_LIMITS_W, total=False
    ) -> Sensor:
        rate_hz, paths = 1 / vcgencmd.ASK_PERIOD_S, (asked.program,)
        return Sensor(
            name,
            unit,
            scope,
            provenance,
            paths,
            1.0,
            limits,
            in_total=total,
            rate_hz=rate_hz,
            doubt="stuck",
            ask=partial(ask, function),
        )

    sensors = [
        sensor(f"power_w.{slug(rail)}", "W", "rail", "derived", partial(vcgencmd.rail_w, rail=rail)) for rail in metered
    ]
    if metered:
        total_w = partial(vcgencmd.rails_sum_w, wanted=metered)
        sensors.append(sensor(PMIC_SUM, "W", "rail", "derived", total_w, total=True))
    if "V" in found.get("EXT5V", {}):
        sensors.append(
            sensor(
                "voltage_v.ext5v",
                "V",
                "board",
                "measured",
                lambda text: vcgencmd.rails(text)["EXT5V"]["V"],
                (0.0, 60.0),
            )
        )
        left_out.append(LeftOut(asked.program, "EXT5V has no current: USB ports and 5 V loads are in no sum"))
    return sensors
