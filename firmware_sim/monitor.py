"""Power monitors INA226 and INA3221: what their registers hold after averaging, and the hwmon attributes that show them.

A chip converts shunt and bus voltage in turn, rail after rail, and loads the mean of `samples` rounds into its registers: so
current flows unseen during the bus conversions, and a load that switches in step with them is read wrong. Register steps and
timing: data sheets SBOS547 and SBOS576. Attributes: Documentation/hwmon/ina2xx.rst and ina3221.rst; for JetPack 4 NVIDIA's own
driver ina3221x (drivers/staging/iio/meter/ina3221.c of its kernel 4.9). Leaves out the supply's own droop (the bus voltage is
constant), and attributes that change the chip when written to.
"""

from __future__ import annotations

from bisect import bisect_right

from firmware_sim.board import Monitor, Profile, rail_w

INA226_SHUNT_UV, INA226_BUS_MV, INA226_MAX = 2.5, 1.25, 0x7FFF
INA3221_SHUNT_UV, INA3221_BUS_MV, INA3221_MAX = 40, 8, 0xFFF


class PowerHistory:
    """The board's power over the last moments as its integral, piece by piece; what a monitor's averages are taken from."""

    def __init__(self, power_w: float) -> None:
        """`power_w`: what the board has taken until now, time 0."""
        self._before_w = power_w
        self._times_s: list[float] = [0.0]
        self._energies_j: list[float] = [0.0]

    @property
    def until_s(self) -> float:
        return self._times_s[-1]

    def add(self, dt_s: float, power_w: float) -> None:
        """The next `dt_s` at a constant power."""
        self._times_s.append(self._times_s[-1] + dt_s)
        self._energies_j.append(self._energies_j[-1] + dt_s * power_w)

    def forget(self, before_s: float) -> None:
        """Drops what no window from `before_s` on needs."""
        first = bisect_right(self._times_s, before_s) - 1
        if first > 0:
            del self._times_s[:first], self._energies_j[:first]

    def mean_w(self, start_s: float, end_s: float) -> float:
        return (self._energy(end_s) - self._energy(start_s)) / (end_s - start_s)

    def _energy(self, at_s: float) -> float:
        if at_s <= self._times_s[0]:
            return self._energies_j[0] - (self._times_s[0] - at_s) * self._before_w
        index = min(bisect_right(self._times_s, at_s), len(self._times_s) - 1)
        (t0, t1), (e0, e1) = self._times_s[index - 1 : index + 1], self._energies_j[index - 1 : index + 1]
        return e0 + (at_s - t0) * (e1 - e0) / (t1 - t0)


def rounds_done(monitor: Monitor, at_s: float) -> int:
    """How many times the registers have been loaded by then."""
    return int(at_s / monitor.period_s + 1e-9)


def register_w(monitor: Monitor, profile: Profile, history: PowerHistory) -> tuple[float, ...]:
    """Power of each rail as the registers hold it now, before rounding to steps: the mean over its shunt conversions."""
    conversion_s = monitor.conversion_us * 1e-6
    start_s = (rounds_done(monitor, history.until_s) - 1) * monitor.period_s
    channels = len(monitor.rails)
    rails_w = []
    for channel, rail in enumerate(monitor.rails):
        total_w = 0.0
        for sample in range(monitor.samples):
            shunt_s = start_s + (sample * channels + channel) * 2 * conversion_s
            total_w += history.mean_w(shunt_s, shunt_s + conversion_s)
        rails_w.append(rail_w(profile, rail, total_w / monitor.samples))
    return tuple(rails_w)


def ina226_files(power_w: float, supply_v: float, shunt_uohm: int) -> dict[str, str]:
    """hwmon attributes of the ina2xx driver for an INA226 in a board's supply.

    Steps: shunt 2.5 µV, bus 1.25 mV; current 2.5 µV / shunt; power 25 current steps.
    """
    current_step_ua = round(INA226_SHUNT_UV * 1e6 / shunt_uohm)
    shunt_register = min(INA226_MAX, max(-INA226_MAX - 1, round(power_w / supply_v * shunt_uohm / INA226_SHUNT_UV)))
    bus_register = round(supply_v * 1000 / INA226_BUS_MV)
    # The chip multiplies its registers and drops the rest.
    power_register = max(0, shunt_register) * bus_register // 20_000
    return {
        "in0_input": str(round(shunt_register * INA226_SHUNT_UV / 1000)),
        "in1_input": str(round(bus_register * INA226_BUS_MV)),
        "curr1_input": str(round(shunt_register * current_step_ua / 1000)),
        "power1_input": str(power_register * 25 * current_step_ua),
    }


def ina3221_files(rails: list[tuple[float, float, int]]) -> dict[str, str]:
    """hwmon attributes of the ina3221 driver for up to three (watts, volts, shunt in µOhm); 0 V: nothing is connected.

    Steps: bus 8 mV, shunt 40 µV. There is no power attribute: it is mV times mA. in4..in6 are the shunts in µV, in7 their sum.
    """
    files = {}
    total_uv = 0
    for channel, (watts, volts, shunt_uohm) in enumerate(rails, start=1):
        # 13 bits with sign
        current_a = watts / volts if volts else 0.0
        register = round(current_a * shunt_uohm / INA3221_SHUNT_UV)
        shunt_uv = min(INA3221_MAX, max(-INA3221_MAX - 1, register)) * INA3221_SHUNT_UV
        total_uv += shunt_uv
        files |= {
            f"in{channel}_input": str(round(volts * 1000 / INA3221_BUS_MV) * INA3221_BUS_MV),
            f"curr{channel}_input": str(round(shunt_uv * 1000 / shunt_uohm)),
            f"in{channel + 3}_input": str(shunt_uv),
        }
    files["in7_input"] = str(total_uv)
    # Only where all rails have the same shunt (ina3221.rst).
    if len({shunt for _, _, shunt in rails}) == 1:
        files["curr4_input"] = str(round(total_uv * 1000 / rails[0][2]))
    return files


def ina3221x_files(rails: list[tuple[float, float, int]]) -> dict[str, str]:
    """iio attributes of NVIDIA's driver for up to three (watts, volts, shunt in µOhm); 0 V: nothing is connected.

    Voltages in mV, currents in mA (rounded), powers in mW (their product, cut off), counted from 0. `ui_input` is "mV mA"; the
    `trigger` ones are 0 only while the chip is switched off between readings, which continuous mode never does.
    """
    files = {}
    for channel, (watts, volts, shunt_uohm) in enumerate(rails):
        current_a = watts / volts if volts else 0.0
        register = round(current_a * shunt_uohm / INA3221_SHUNT_UV)
        shunt_uv = min(INA3221_MAX, max(-INA3221_MAX - 1, register)) * INA3221_SHUNT_UV
        # As the driver computes it: whole numbers, mOhm, division cut off towards 0.
        current_ma = (abs(shunt_uv) * 2 // (shunt_uohm // 1000) + 1) // 2 * (1 if shunt_uv > 0 else -1)
        voltage_mv = round(volts * 1000 / INA3221_BUS_MV) * INA3221_BUS_MV
        power_mw = int(voltage_mv * current_ma / 1000)
        files |= {
            f"in_voltage{channel}_input": str(voltage_mv),
            f"in_current{channel}_input": str(current_ma),
            f"in_power{channel}_input": str(power_mw),
            f"in_current{channel}_trigger_input": str(current_ma),
            f"in_power{channel}_trigger_input": str(power_mw),
            f"ui_input_{channel}": f"{voltage_mv} {current_ma}",
        }
    return files


def fixed_files(monitor: Monitor) -> dict[str, str]:
    """Attributes that do not change by themselves."""
    if monitor.chip == "ina3221x":
        return _fixed_iio_files(monitor)
    files = {"name": monitor.chip, "update_interval": str(round(monitor.period_s * 1000))}
    if monitor.chip == "ina226":
        return files | {"shunt_resistor": str(monitor.rails[0].shunt_uohm)}
    files |= {"samples": str(monitor.samples), "in7_label": "sum of shunt voltages"}
    for channel, rail in enumerate(monitor.rails, start=1):
        # The limits' power-on value is the largest: 163.8 mV of shunt voltage.
        limit_ma = str(round(INA3221_MAX * INA3221_SHUNT_UV * 1000 / rail.shunt_uohm))
        files |= {
            f"in{channel}_enable": "1",
            f"shunt{channel}_resistor": str(rail.shunt_uohm),
            f"curr{channel}_max": limit_ma,
            f"curr{channel}_crit": limit_ma,
            f"curr{channel}_max_alarm": "0",
            f"curr{channel}_crit_alarm": "0",
        }
    return files


def _fixed_iio_files(monitor: Monitor) -> dict[str, str]:
    """That driver tells neither period nor shunts. Without limits of the device tree, those of power-on stand."""
    files = {"name": monitor.chip, "running_mode": "1"}  # continuous
    for channel, rail in enumerate(monitor.rails):
        limit_ma = round(INA3221_MAX * INA3221_SHUNT_UV * 1000 / rail.shunt_uohm)
        files |= {
            f"crit_power_limit_{channel}": f"{round(limit_ma * rail.volts)} mw",
            f"crit_current_limit_{channel}": f"{limit_ma} ma",
            f"warn_current_limit_{channel}": f"{limit_ma} ma",
        }
    return files


def noisy(monitor: Monitor, rails_w: tuple[float, ...], gauss) -> tuple[float, ...]:
    """`rails_w` with noise of one shunt step's size, as `gauss()` draws it (mean 0, deviation 1); [U]."""
    step_uv = INA226_SHUNT_UV if monitor.chip == "ina226" else INA3221_SHUNT_UV
    return tuple(
        watts + gauss() * step_uv / rail.shunt_uohm * rail.volts if rail.volts else watts
        for watts, rail in zip(rails_w, monitor.rails)
    )
