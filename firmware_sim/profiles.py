"""The boards that can be simulated: what each is like, with sources. Leaves out the physics (board.py).

Values that no source backs are common engineering values, marked [U]: parameters to be fitted to a board, not facts.
"""

from __future__ import annotations

import math

from firmware_sim.board import Branch, Monitor, Profile, Rail, Throttle, Trip, Zone

_AMBIENT_C = 24.7  # BUPT-1's fit on the ground
# Their sum, 7.28 K/W, is BUPT-1's Raspberry Pi 4B on the ground, their times lie in its fitted ranges (53-126 s, 366-1382 s);
# how the sum is split is [U], and so is that a Pi 5 is like a Pi 4B.
_PI_FOSTER = (Branch(3.0, 80.0), Branch(4.28, 600.0))
# raspberrypi.com: the Arm clock goes down from 80 C on, and at 85 C the GPU's too; 600 of 1500 MHz is the lowest clock.
_PI_THROTTLE = Throttle(80.0, 85.0, 0.4)
_PI4_ZONES = (Zone("cpu-thermal", (Trip(110.0, "critical", 0.0),)),)  # bcm270x-rpi.dtsi
_PI5_ZONES = (  # bcm2712.dtsi, bcm2712-rpi-5-b.dts: what the fan does
    Zone(
        "cpu-thermal",
        (
            Trip(110.0, "critical", 0.0),
            Trip(50.0, "active", 5.0),
            Trip(60.0, "active", 5.0),
            Trip(67.5, "active", 5.0),
            Trip(75.0, "active", 5.0),
        ),
    ),
)
# 10 mOhm: 0.1 Ohm, common on INA226 modules, clips at 0.82 A. 588 us, 4 averages: 4.7 ms. Supply as on a Pi 5's adapter.
_INA226 = Monitor("ina226", "1-0040", (Rail("", 1.0, 1.0, 5.1, 10_000),), 588, 4)
_NC = Rail("NC", 0.0, 0.0, 0.0, 2_000)
# tegra234-p3768-0000+p3767: critical, hot and passive; NVIDIA's guides differ (PHYSICS: 80, 87, 97 C).
_ORIN_TRIPS = (Trip(104.5, "critical", 0.0), Trip(99.0, "hot", 1.0), Trip(95.0, "passive", 2.0))
_ORIN_THROTTLE = Throttle(95.0, 99.0, 0.3)  # passive to hot; the floor is [U]
_ORIN_ZONES = (  # tegra234-bpmp-thermal.h; offsets to the hottest are [U]
    Zone("cpu-thermal", _ORIN_TRIPS, -0.6),
    Zone("gpu-thermal", _ORIN_TRIPS, -1.5, powered_from=0.02),  # [U] from which load on
    Zone("cv0-thermal", powered_from=math.inf),  # nothing here uses the vision accelerators
    Zone("soc0-thermal", (), -2.0),
    Zone("tj-thermal", _ORIN_TRIPS),
    Zone("PMIC-Die", says_c=100.0),
)
# NVIDIA's device tree of the Jetson Nano developer kit (tegra210-p3448-0000-p3449-0000-b00, built July 2020), in its order. The 70 C
# of PLL-therm are for the memory's refresh. Offsets from the processor are [U]: from two owners' listings (AO 5 and 7.5 K over it,
# PLL 2.5 and 3 K under it). PMIC-Die cannot measure: its driver tells over or under 120 C and says 100 C. Trips of the fan's own
# zone (thermal-fan-est, a weighted sum) are left out.
_NANO_ZONES = (
    Zone(
        "AO-therm",
        (
            Trip(110.0, "critical", 0.0),
            Trip(-25.0, "active", 0.0),
            *(Trip(c, "active", 1.0) for c in (15.0, 30.0, 50.0, 70.0, 105.0, 83.0, 15.0, 85.0, 15.0)),
        ),
        6.0,
    ),
    Zone(
        "CPU-therm",
        (
            Trip(66.0, "active", 1.0),
            Trip(86.0, "active", 1.0),
            Trip(102.0, "critical", 0.0),
            Trip(100.5, "hot", 0.0),
            Trip(97.0, "passive", 0.0),
        ),
    ),
    Zone("GPU-therm", (Trip(102.5, "critical", 0.0), Trip(101.0, "hot", 0.0), Trip(97.5, "passive", 0.0)), -1.5),
    Zone("PLL-therm", (Trip(70.0, "passive", 1.0),), -2.5),
    Zone("PMIC-Die", (Trip(120.0, "active", 0.0),), says_c=100.0),
    Zone("thermal-fan-est", (), -1.0),
)


def _pi(name: str, zones: tuple[Zone, ...], step_mc: int, pmic: bool, *monitors: Monitor) -> Profile:
    return Profile(
        name,
        "raspberry-pi",
        cores=4,
        idle_w=3.0,  # [U]
        max_w=8.0,  # [U]
        ambient_c=_AMBIENT_C,
        foster=_PI_FOSTER,
        throttle=_PI_THROTTLE,
        monitors=monitors,
        zones=zones,
        zone_step_mc=step_mc,  # the coefficients of bcm2712.dtsi (550) and bcm2711.dtsi (487)
        zone_noise_k=0.3,
        pmic=pmic,
    )


PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        _pi("raspberry-pi-5", _PI5_ZONES, 550, True),
        _pi("raspberry-pi-5-ina226", _PI5_ZONES, 550, True, _INA226),
        _pi("raspberry-pi-4-ina226", _PI4_ZONES, 487, False, _INA226),
        Profile(
            name="jetson-orin-nano",
            maker="nvidia",
            cores=6,
            idle_w=4.5,  # [U]
            max_w=15.0,  # the module's 15 W power budget (NVIDIA data sheet)
            ambient_c=_AMBIENT_C,
            foster=(Branch(0.6, 5.0), Branch(1.9, 180.0)),  # [U], with the developer kit's fan
            throttle=_ORIN_THROTTLE,
            # Labels and shunts: tegra234-p3767.dtsi; shares are [U]. VDD_IN is the total, the others are parts of it. 1.1 ms
            # and one sample are the chip's power-on setting.
            monitors=(
                Monitor(
                    "ina3221",
                    "1-0040",
                    (
                        Rail("VDD_IN", 1.0, 1.0, 5.0, 5_000),
                        Rail("VDD_CPU_GPU_CV", 0.15, 0.65, 5.0, 5_000),
                        Rail("VDD_SOC", 0.30, 0.15, 5.0, 5_000),
                    ),
                    1100,
                    1,
                ),
            ),
            zones=_ORIN_ZONES,
            zone_step_mc=1,
            zone_noise_k=0.1,  # [U]
        ),
        Profile(
            name="jetson-agx-orin",
            maker="nvidia",
            cores=12,
            idle_w=9.0,  # [U]
            max_w=60.0,  # the module's 60 W power budget (NVIDIA data sheet)
            ambient_c=_AMBIENT_C,
            foster=(Branch(0.15, 8.0), Branch(0.5, 200.0)),  # [U], with the developer kit's fan
            throttle=_ORIN_THROTTLE,
            # Labels and shunts: tegra234-p3701.dtsi, and NC where JetPack labels the channels without a rail; voltages and
            # shares are [U]. No rail holds the others: the module's power is their sum.
            monitors=(
                Monitor(
                    "ina3221",
                    "1-0040",
                    (
                        Rail("VDD_GPU_SOC", 0.35, 0.55, 19.0, 2_000),
                        Rail("VDD_CPU_CV", 0.10, 0.25, 19.0, 2_000),
                        Rail("VIN_SYS_5V0", 0.45, 0.12, 5.0, 2_000),
                    ),
                    1100,
                    1,
                ),
                Monitor("ina3221", "1-0041", (_NC, Rail("VDDQ_VDD2_1V8AO", 0.10, 0.08, 5.0, 2_000), _NC), 1100, 1),
            ),
            zones=_ORIN_ZONES,
            zone_step_mc=1,
            zone_noise_k=0.1,  # [U]
        ),
        Profile(
            name="jetson-nano",  # JetPack 4, kernel 4.9
            maker="nvidia",
            cores=4,
            idle_w=1.7,  # [U] one tegrastats line of JetPack 4.6.1 on a desktop: POM_5V_IN 1.75 now, 1.63 on average
            max_w=10.0,  # power mode MaxN's budget (NVIDIA L4T guide, power management of the Nano)
            ambient_c=_AMBIENT_C,
            foster=(Branch(1.0, 6.0), Branch(3.5, 300.0)),  # [U], with the developer kit's heat sink and no fan
            throttle=Throttle(97.0, 100.5, 0.3),  # CPU-therm, passive to hot; the floor is [U]
            # Labels are JetPack 4's; POM_5V_IN is the total and the others are parts of it. Shares (idle: that tegrastats line) and
            # shunts are [U]. 64 averages of 1.1 ms are the driver's own constants; the device tree may set others: [U].
            monitors=(
                Monitor(
                    "ina3221x",
                    "6-0040",
                    (
                        Rail("POM_5V_IN", 1.0, 1.0, 5.0, 5_000),
                        Rail("POM_5V_GPU", 0.0, 0.05, 5.0, 5_000),
                        Rail("POM_5V_CPU", 0.24, 0.60, 5.0, 5_000),
                    ),
                    1100,
                    64,
                ),
            ),
            zones=_NANO_ZONES,
            zone_step_mc=500,  # the soctherm sensors' resolution
            zone_noise_k=0.3,  # [U]
        ),
    )
}
