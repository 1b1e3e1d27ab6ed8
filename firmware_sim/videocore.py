"""The firmware of a Raspberry Pi as `vcgencmd` shows it: `get_throttled`, and on a Pi 5 its power chip by `pmic_read_adc`.

The program is put below the simulated root and prints the answers that the simulator keeps in files. It prints and exits like
the real one (raspberrypi/utils, vcgencmd.c): refused its device it says so on stdout and exits with 255. Rails, their order and
their numbers are a Pi 5's; leaves out every other command.
"""

from __future__ import annotations

ANSWERS = "run/simulated-firmware"  # below the simulated root; a real board has nothing there
# vcgencmd works through /dev/vcio. `exec cat` of a file that may not be read is where a real open() of that fails.
VCGENCMD = f"""#!/bin/sh
# Simulated Raspberry Pi: prints what the simulated firmware last wrote.
answer="$(dirname "$0")/../../{ANSWERS}/$1"
case "$1" in
get_throttled|pmic_read_adc) ;;
*) answer= ;;
esac
if [ -n "$answer" ] && [ -e "$answer" ]; then
    cat "$answer" 2>/dev/null && exit 0
    echo "Can't open device file: /dev/vcio"
    echo "Try creating a device file with: sudo mknod /dev/vcio c 100 0"
    exit 255
fi
echo 'error=1 error_msg="Command not registered"'
exit 255
"""
# (rail, number of its current, number of its voltage, volts, share of idle, share of what the load adds); numbers, order and
# about these volts: a Pi 5's answer; shares are [U].
PMIC_RAILS = (
    ("3V7_WL_SW", 0, 8, 3.7, 0.01, 0.00),
    ("3V3_SYS", 1, 9, 3.3, 0.20, 0.02),
    ("1V8_SYS", 2, 10, 1.8, 0.18, 0.02),
    ("DDR_VDD2", 3, 11, 1.1, 0.02, 0.08),
    ("DDR_VDDQ", 4, 12, 0.6, 0.00, 0.00),
    ("1V1_SYS", 5, 13, 1.1, 0.12, 0.01),
    ("0V8_SW", 6, 14, 0.8, 0.15, 0.02),
    ("VDD_CORE", 7, 15, 0.8, 0.30, 0.85),
    ("3V3_DAC", 17, 20, 3.3, 0.00, 0.00),
    ("3V3_ADC", 18, 21, 3.3, 0.00, 0.00),
    ("0V8_AON", 16, 19, 0.8, 0.00, 0.00),
    ("HDMI", 22, 23, 5.1, 0.02, 0.00),
)
INPUT_V, CLOCK_BATTERY_V = 5.1, 0.0
# W = 1.1451 sum(V I) + 0.5879, a fit by users of the board, turned round: what the rails see of the board's power.
FIT_SLOPE, FIT_OFFSET_W = 1.1451, 0.5879


def throttled_text(flags: int) -> str:
    return f"throttled={flags:#x}"


def rails_sum_w(board_w: float) -> float:
    """What all rails take together while the board takes `board_w`: its converters and USB are not metered."""
    return max(0.0, (board_w - FIT_OFFSET_W) / FIT_SLOPE)


def pmic_text(board_w: float, idle_w: float, gauss) -> str:
    """The answer to pmic_read_adc. `gauss()`: noise of mean 0 and deviation 1, for 0.2 % of each current [U]."""
    idle_sum_w = rails_sum_w(idle_w)
    added_w = rails_sum_w(board_w) - idle_sum_w
    currents, voltages = [], []
    for rail, current, voltage, volts, idle_share, load_share in PMIC_RAILS:
        amperes = max(0.0, (idle_share * idle_sum_w + load_share * added_w) / volts * (1 + 0.002 * gauss()))
        currents.append(f"{rail + '_A':>12} current({current})={amperes:.8f}A")
        voltages.append(f"{rail + '_V':>12} volt({voltage})={volts:.8f}V")
    voltages.append(f"{'EXT5V_V':>12} volt(24)={INPUT_V:.8f}V")
    voltages.append(f"{'BATT_V':>12} volt(25)={CLOCK_BATTERY_V:.8f}V")
    return "\n".join(currents + voltages)
