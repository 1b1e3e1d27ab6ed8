"""Where a board's power and temperature settle when its firmware lowers the clock with heat. Leaves out the way there.

The controller is board.py's: full clock up to a soft limit, in proportion down to a floor at the hard limit. The load's power
above idle goes with the clock; voltage is held. On a Raspberry Pi 4 the limits are 80 and 85 C and the clocks 1500 and 600 MHz
(raspberrypi.com, config.txt: arm_freq, arm_freq_min; "Frequency management and thermal control"); that it is a straight line in
between is [U].
"""

from __future__ import annotations

from firmware_sim.board import Throttle, clock
from firmware_sim.thermal import ThermalError


def plateau(
    full_w: float, idle_w: float, ambient_c: float, r_k_per_w: float, throttle: Throttle | None
) -> tuple[float, float]:
    """Power (W) and temperature (C) at which a load that would draw `full_w` at full clock comes to rest.

    T = ambient + R P and P = idle + (full - idle) clock(T) cross exactly once, since one rises and the other falls.
    Raises: ThermalError.
    """
    if not (0.0 <= idle_w <= full_w < float("inf") and 0.0 < r_k_per_w < float("inf")):
        raise ThermalError(f"idle {idle_w} W, full {full_w} W, {r_k_per_w} K/W; give 0 <= idle <= full and R above 0")
    above_w = full_w - idle_w
    temp_c = ambient_c + r_k_per_w * full_w
    if throttle is not None and temp_c > throttle.soft_c:
        # On the ramp both are straight lines; beyond it the clock stays at its floor.
        slope = r_k_per_w * above_w * (1.0 - throttle.floor) / (throttle.hard_c - throttle.soft_c)
        temp_c = (temp_c + slope * throttle.soft_c) / (1.0 + slope)
        if temp_c > throttle.hard_c:
            temp_c = ambient_c + r_k_per_w * (idle_w + above_w * throttle.floor)
    return idle_w + above_w * clock(throttle, temp_c), temp_c
