"""How a sensor is read: time limits with real FIFOs, bounded sizes, what is no number, and doubts about what a driver says.

A FIFO without a writer hangs in open(2), as an offline zone's driver does in read. Run lengths are checked against direct
products, the number of the kernel's attributes against Documentation/hwmon/sysfs-interface.rst ("an integer").
"""

from __future__ import annotations

import itertools
import math
import os
import random
import threading
import time
from pathlib import Path

import pytest

from node_agent import sensors
from node_agent.reading import MAX_HUNG, Sensor, TimedCalls, take
from node_agent.sensors_doubt import Watch, run_log_chance


def zone(root: Path, number: int, kind: str, temp: object) -> Path:
    folder = root / f"sys/class/thermal/thermal_zone{number}"
    folder.mkdir(parents=True)
    (folder / "type").write_text(f"{kind}\n")
    (folder / "temp").write_text(f"{temp}\n")
    return folder


def file_sensor(path: Path, **more: object) -> Sensor:
    return Sensor("temp_c.test", "degC", "module", "measured", (path,), 1e-3, (-100.0, 200.0), **more)


def until(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def answer(fifo: Path, text: str) -> None:
    """The driver returns."""
    with open(fifo, "w") as file:
        file.write(text)


def test_a_hung_read_costs_its_limit_once_and_what_comes_late_is_stale(tmp_path):
    folder = zone(tmp_path, 0, "hung", 1)
    zone(tmp_path, 1, "good", 30000)
    hung, good = sensors.find(tmp_path).sensors
    (folder / "temp").unlink()
    os.mkfifo(folder / "temp")
    calls = TimedCalls(limit_s=0.2)
    threads = threading.active_count()
    first, reason = take(hung, calls)
    assert (first.validity, reason) == ("missing", "took longer than 0.2 s")
    for _ in range(20):
        sample, reason = take(hung, calls)
        assert (sample.validity, reason) == ("missing", "still hangs from an earlier try")
        assert sensors.read(good, calls).value == 30.0
    assert threading.active_count() <= threads + 2  # one hangs, one serves: not one more for each try
    before = time.time()
    answer(folder / "temp", "55000\n")
    until(lambda: sensors.read(hung, calls).validity == "stale")
    # That one was delivered in `until`; let it hang once more and look at the whole sample.
    assert sensors.read(hung, calls).validity == "missing"
    answer(folder / "temp", "56000\n")
    time.sleep(0.1)
    late = sensors.read(hung, calls)
    assert (late.value, late.validity) == (56.0, "stale") and before <= late.generated_at <= time.time()
    (folder / "temp").unlink()
    (folder / "temp").write_text("57000\n")
    assert (sensors.read(hung, calls).value, sensors.read(hung, calls).validity) == (57.0, "ok")
    until(lambda: threading.active_count() <= threads + 2)


def test_finding_is_not_held_up_by_zones_that_hang(tmp_path):
    """The type hangs: left out with the reason. The value hangs: a sensor that is missing now."""
    folder = zone(tmp_path, 0, "x", 1)
    (folder / "type").unlink()
    os.mkfifo(folder / "type")
    folder = zone(tmp_path, 1, "offline", 1)
    (folder / "temp").unlink()
    os.mkfifo(folder / "temp")
    zone(tmp_path, 2, "good", 1000)
    found = sensors.find(tmp_path)
    assert [(s.name, sensors.read(s).validity) for s in found.sensors] == [
        ("temp_c.offline", "missing"),
        ("temp_c.good", "ok"),
    ]
    assert [item.reason for item in found.left_out] == ["its type cannot be read: took longer than 0.25 s"]
    for fifo in (tmp_path / "sys/class/thermal/thermal_zone0/type", folder / "temp"):
        answer(fifo, "")  # lets the threads go


def test_no_more_than_some_threads_ever_hang(tmp_path):
    calls = TimedCalls(limit_s=0.005)
    fifos = [tmp_path / str(n) for n in range(MAX_HUNG + 3)]
    reasons = []
    for fifo in fifos:
        os.mkfifo(fifo)
        reasons.append(take(file_sensor(fifo), calls)[1])
    assert reasons[:MAX_HUNG] == ["took longer than 0.005 s"] * MAX_HUNG
    assert reasons[MAX_HUNG:] == [f"not tried: {MAX_HUNG} other sensors hang"] * 3
    for fifo in fifos[:MAX_HUNG]:
        answer(fifo, "1")
    plain = tmp_path / "plain"
    plain.write_text("2000")
    until(lambda: sensors.read(file_sensor(plain), calls).value == 2.0)


def test_slow_callers_do_not_wait_for_each_other(tmp_path):
    """While one thread waits in a hung read, another's reads go on: energy is sampled while a zone is offline."""
    os.mkfifo(tmp_path / "hung")
    (tmp_path / "good").write_text("1000")
    calls = TimedCalls(limit_s=5.0)
    waiting = threading.Thread(target=take, args=(file_sensor(tmp_path / "hung"), calls))
    waiting.start()
    for _ in range(100):
        assert sensors.read(file_sensor(tmp_path / "good"), calls).value == 1.0
    assert waiting.is_alive()  # all hundred came before the first one's limit
    answer(tmp_path / "hung", "1")
    waiting.join(10)


def test_a_call_that_raises_and_one_that_is_interrupted_leave_no_worker_lost():
    calls = TimedCalls(limit_s=1.0)

    def fail() -> None:
        raise TimeoutError("of its own")

    for _ in range(3):
        with pytest.raises(TimeoutError, match="of its own"):
            calls.call("key", fail)
    assert calls.call("key", lambda: 7) == 7
    assert len(calls._idle) == 1


@pytest.mark.parametrize(
    ("content", "validity", "word"),
    [
        (b"", "invalid", "empty"),
        (b"4x", "invalid", "no number"),
        (b"48.5", "invalid", "no number"),
        (b"1_000", "invalid", "no number"),  # int() would take it
        (b"1e3", "invalid", "no number"),
        (b"0x10", "invalid", "no number"),
        (b"nan", "invalid", "no number"),
        (b"1 2", "invalid", "no number"),
        ("٤٠".encode(), "invalid", "no number"),
        (bytes(range(256)) * 4, "invalid", "no number"),
        (b"\x00" * 50, "invalid", "no number"),
        (b"9" * 21, "invalid", "no number"),
        (b"9" * 4096, "invalid", "no number"),  # over the range of a float: int() * 1.0 would raise OverflowError
        (b"7" * 5_000_000, "invalid", "over the limit"),
        (b"999999", "invalid", "no possible value"),
        (b"-256000", "invalid", "no possible value"),
        (b"-5000", "ok", None),
        (b"+21000\n\n", "ok", None),
    ],
)
def test_what_is_no_number_is_no_value(tmp_path, content, validity, word):
    (tmp_path / "temp").write_bytes(content)
    sample, reason = take(file_sensor(tmp_path / "temp"))
    assert sample.validity == validity
    assert (sample.value is None) == (validity == "invalid")
    assert (reason is None and word is None) or (word in reason and len(reason) < 200 and reason.isprintable())


def test_what_cannot_be_opened_is_missing(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("/proc/version")
    for name in ("none", "folder", "link"):
        assert sensors.read(file_sensor(tmp_path / name)).validity == "missing"


def test_rubbish_for_names_gives_sensors_names_that_are_plain(tmp_path):
    for n in range(8):
        folder = zone(tmp_path, n, "x", 1000 * n)
        (folder / "type").write_bytes(random.Random(n).randbytes(300))
    names = [sensor.name for sensor in sensors.find(tmp_path).sensors]
    assert len(set(names)) == 8
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_.") and len(name) < 48 for name in names)


def test_thousands_of_devices_are_bounded(tmp_path):
    for n in range(400):
        zone(tmp_path, n, f"z{n}", 1000)
        folder = tmp_path / f"sys/class/hwmon/hwmon{n}"
        folder.mkdir(parents=True)
        (folder / "name").write_text("amdgpu")
        (folder / "power1_input").write_text("1")
    found = sensors.find(tmp_path)
    assert len(found.sensors) == 256 and any("over the limit" in item.reason for item in found.left_out)


# ---------------------------------------------------------------- doubts


def test_chance_of_a_run_is_the_product_of_its_steps():
    """Rule of succession: after r repeats and c changes the next repeats with (r + 1) / (r + c + 2), and so on."""
    for changes, repeats, run in ((8, 8, 30), (20, 300, 100), (1, 5, 3)):
        chance = 1.0
        for step in range(run):
            chance *= (repeats + 1 + step) / (repeats + changes + 2 + step)
        assert run_log_chance(changes, repeats, run) == pytest.approx(math.log(chance))
    assert run_log_chance(0, 0, 1000) > math.log(1e-4)  # nothing is known: never out of the question
    assert run_log_chance(50, 0, 20) == run_log_chance(50, 50, 20)  # none is thought livelier than every other reading


def readings(watch: Watch, values, period_s: float, start_s: float = 0.0, limit_s: float | None = None) -> list[bool]:
    return [watch.stuck("k", (value,), start_s + n * period_s, limit_s) is not None for n, value in enumerate(values)]


def test_a_sensor_that_was_alive_and_stands_still_is_stuck(tmp_path):
    noise = random.Random(1)
    watch = Watch()
    alive = [round(noise.gauss(90, 1)) for _ in range(600)]  # in half-degree steps with 0.5 K of noise, once a second
    assert not any(readings(watch, alive, 1.0))
    still = readings(watch, [alive[-1]] * 120, 1.0, 600.0)
    assert not any(still[:12]) and still[-1]
    assert still.index(True) < 100
    assert watch.stuck("k", (91,), 721.0, None) is None  # moves again: believed at once
    assert watch._habits["k"].repeats < 500  # the dead time is no habit


def test_a_sensor_that_seldom_moves_is_not_called_stuck():
    """Control: the same hour of standing still, from one that changes every two minutes, and from one never seen to move."""
    watch = Watch()
    values = [n // 120 for n in range(3600)]
    assert not any(readings(watch, values, 1.0))
    assert not any(readings(watch, [values[-1]] * 600, 1.0, 3600.0))
    assert not any(readings(Watch(), [5] * 36000, 1.0))


def test_a_quiet_sensor_with_coarse_steps_is_not_called_stuck():
    """A day of a drifting temperature, once a second, in steps of 1 K with 0.1 K of noise: it flickers between two steps for
    minutes and rests in one for an hour, and is alive all the time."""
    noise = random.Random(3)
    values = [round(45 + 8 * math.sin(n / 9000) + noise.gauss(0, 0.1)) for n in range(86_400)]
    longest = max(len(list(run)) for _, run in itertools.groupby(values))
    assert longest > 1000 and len(set(values)) == 17
    assert not any(readings(Watch(), values, 1.0))


def test_the_whole_power_counts_every_move_and_is_given_longer():
    """Noise of one step: for a rail no sign of life, for the board's whole power one, since the agent works on that board."""
    noise = random.Random(4)
    alive = [(noise.choice((800, 801)),) for _ in range(300)]
    for whole in (False, True):
        watch = Watch()
        got = [watch.stuck("k", raw, float(n), None, whole) for n, raw in enumerate(alive + [(800,)] * 100)]
        assert not any(got[:328])
        assert bool(got[-1]) is whole


def test_reading_faster_than_the_sensor_measures_is_no_standing_still():
    """500 readings a second of a sensor with ten new values a second: 49 of 50 repeat, also over minutes."""
    noise = random.Random(2)
    watch = Watch()
    values = [value for _ in range(600) for value in [noise.random()] * 50]
    assert not any(readings(watch, values, 0.002))
    assert any(readings(watch, [values[-1]] * 20_000, 0.002, 60.0))


def test_an_energy_counter_that_stands_still_is_stale(tmp_path):
    """No habits needed: a running processor's energy always grows."""
    (tmp_path / "energy_uj").write_text("5000000")
    sensor = Sensor(
        "counter_j.p", "J", "module", "measured", (tmp_path / "energy_uj",), 1e-6, (0, math.inf), doubt="stuck"
    )
    sensor = Sensor(**{**sensor.__dict__, "stuck_after_s": 0.1})
    watch = Watch()
    assert take(sensor, watch=watch)[0].validity == "ok"
    until(lambda: take(sensor, watch=watch)[0].validity == "stale")
    (tmp_path / "energy_uj").write_text("5000001")
    assert take(sensor, watch=watch)[0].validity == "ok"


def jumps(watch: Watch, values, period_s: float, ratio: bool = False, start_s: float = 0.0) -> list[bool]:
    doubted = []
    for n, value in enumerate(values):
        now_s = start_s + n * period_s
        watch.stuck("k", (value,), now_s, None)
        doubted.append(watch.jumped("k", value, now_s, ratio) is not None)
    return doubted


def test_a_die_that_jumps_is_not_believed_until_it_stays():
    watch = Watch()
    assert not any(jumps(watch, [50.0 + 2.4 * n * 0.1 for n in range(100)], 0.1))  # 24 K/s is a slope, not a jump
    assert jumps(watch, [103.8, 43.8, 103.8, 73.8], 0.1, start_s=10.0) == [True, True, True, False]
    restless = [73.8 + (30 if n % 2 else -30) for n in range(400)]
    assert all(jumps(watch, restless, 0.1, start_s=10.4))  # up and down for 40 s: never a level
    doubted = jumps(watch, [140.0] * 30, 0.1, start_s=50.4)
    assert all(doubted[:9]) and not any(
        doubted[16:]
    )  # one that stays is one, after 1.5 s: a guard must not wait longer
    assert jumps(Watch(), [20.0, 90.0], 60.0) == [False, False]  # nobody looked for a minute
    assert jumps(Watch(), [20.0, 90.0, 90.0, 90.0, 90.0], 0.5) == [False, True, True, True, False]


def test_a_supply_that_jumps_makes_its_power_invalid(tmp_path):
    volt, current = tmp_path / "in1_input", tmp_path / "curr1_input"
    sensor = Sensor("power_w.r", "W", "rail", "derived", (volt, current), 1e-6, (-1e4, 1e4), doubt="volts")
    watch = Watch()
    got = []
    for mv, ma in ((5000, 1000), (4992, 5000), (25000, 5000), (1000, 200), (5008, 200)):
        volt.write_text(str(mv))
        current.write_text(str(ma))
        got.append(take(sensor, watch=watch))
    # a load that takes five times as much is believed, five times the voltage is not
    assert [sample.validity for sample, _ in got] == ["ok", "ok", "invalid", "invalid", "ok"]
    assert got[2][1] == "jumped from 4.992 to 25 V"
