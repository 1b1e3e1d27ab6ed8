"""The file of limits: what ships, what is refused and how, agreement with the JSON Schema, and reading it again."""

from __future__ import annotations

import os

import jsonschema
import pytest

from ground_station import limits_file, limits_shape
from ground_station.limits import LimitsError
from ground_station.limits_file import LimitsWatch, load, loads
from node_agent import toml_file, wire

HEAD = 'active = "bench"\n[sets.bench]\n'


def entry(body: str) -> str:
    return f'{HEAD}[[sets.bench.signals]]\nname = "temp_c"\n{body}\n'


GOOD = {
    "least": HEAD,
    "one": entry("red_high = 80"),
    "all": entry(
        'node = "sat-*"\nboard = "Raspberry Pi ?"\nred_low = 0\nyellow_low = 5\ngreen_low = 10\ngreen_high = 70\n'
        "yellow_high = 75.5\nred_high = 80\npersistence_up = 3\npersistence_down = 5\nhysteresis = 2\n"
        'text = "x"\nstale_after_s = 10\nseverity = { green = "watch", yellow = "distress", red = "severe", stale = "warning" }'
    ),
    "equal limits": entry("yellow_high = 80\nred_high = 80"),
    "bits": entry('bits = [{ bit = 0, severity = "watch", text = "heat" }, { bit = 52, severity = "severe" }]'),
    "off": entry("off = true"),
    "stale alone": entry("stale_after_s = 0.5"),
    "stars": HEAD + '[[sets.bench.signals]]\nname = "*a*b*"\nboard = "* ? *"\nred_high = 1\n',
    "inherits": HEAD + '[sets.flight]\nextends = "bench"\n',
    "rules": 'active = "bench"\n[events]\nseverity = "distress"\n[node]\nstale_after_s = 3\nstale_severity = "watch"\n'
    'offline_severity = "severe"\n[sets.bench]\n',
}  # fmt: skip
# what the schema must refuse too: (file, what the reader's error says)
BAD_SHAPE = {
    "unknown key": (entry("red_hihg = 80"), r"sets.bench.signals\[1\] \(temp_c\): 'red_hihg' is unknown"),
    "unknown at the top": ("colour = 1\n" + HEAD, "'colour' is unknown: the file takes active"),
    "unknown in a set": (HEAD + "extend = 'x'\n", "sets.bench: 'extend' is unknown"),
    "unknown in node": (HEAD + "[node]\nx = 1\n", r"node: 'x' is unknown: \[node\] takes stale_after_s"),
    "unknown in severity": (entry('red_high = 1\nseverity = { orange = "watch" }'), "severity: 'orange' is unknown"),
    "unknown in a bit": (entry('bits = [{ bit = 0, severity = "watch", x = 1 }]'), r"bits\[1\]: 'x' is unknown"),
    "no active": ("[sets.bench]\n", "active is missing: give it"),
    "no sets": ('active = "bench"\n', "sets is missing"),
    "empty sets": ('active = "bench"\n[sets]\n', "sets must hold 1 to 32 tables"),
    "no name": (HEAD + "[[sets.bench.signals]]\nred_high = 1\n", r"sets.bench.signals\[1\]: name is missing"),
    "text for a number": (entry('red_high = "80"'), r"\(temp_c\).red_high is '80': give a number"),
    "true for a number": (entry("red_high = true"), "red_high is True: give a number"),
    "date for a number": (entry("red_high = 2026-01-01"), "red_high is datetime.date.*: give a number"),
    "infinite": (entry("red_high = inf"), "red_high is inf: give a number of -1e"),
    "huge": (entry(f"red_high = {'9' * 400}"), "red_high is 9+: give a number of"),
    "persistence of 0": (entry("red_high = 1\npersistence_up = 0"), "give a whole number of 1 to 100"),
    "half a persistence": (entry("red_high = 1\npersistence_up = 1.5"), "give a whole number"),
    "negative hysteresis": (entry("red_high = 1\nhysteresis = -1"), "give a number of 0 to"),
    "stale at once": (entry("stale_after_s = 0"), "give a number above 0"),
    "no severity": (entry('red_high = 1\nseverity = { red = "fatal" }'), "'fatal': give one of watch, warning"),
    "nominal severity": (entry('red_high = 1\nseverity = { red = "nominal" }'), "give one of watch"),
    "bad pattern": (HEAD + '[[sets.bench.signals]]\nname = "temp c"\nred_high = 1\n', "name is 'temp c': give 1 to 120"),
    "line end in a pattern": (HEAD + '[[sets.bench.signals]]\nname = "temp_c\\n"\nred_high = 1\n', "name is 'temp_c.n'"),
    "many stars": (HEAD + '[[sets.bench.signals]]\nname = "a*b*c*d*e"\nred_high = 1\n', "give 3 . at most"),
    "node in capitals": (entry('red_high = 1\nnode = "SAT"'), "node is 'SAT': give 1 to 32 characters"),
    "long text": (entry(f'red_high = 1\ntext = "{"x" * 301}"'), "give 0 to 300 characters"),
    "control characters": (entry('red_high = 1\ntext = "\\u001b[2J"'), "all of printable ASCII"),
    "set name": ('active = "bench"\n[sets.bench]\n[sets."Be nch"]\n', "sets has the name 'Be nch'"),
    "too many sets": (HEAD + "".join(f"[sets.s{i}]\n" for i in range(40)), "1 to 32 tables"),
    "too many signals": (HEAD + '[[sets.bench.signals]]\nname = "a"\noff = true\n' * 501, "501 entries: give 500"),
    "bit 53": (entry('bits = [{ bit = 53, severity = "watch" }]'), "whole number of 0 to 52"),
    "signals no list": (HEAD + "signals = 3\n", r"no list of tables: write each as \[\[sets.bench.signals\]\]"),
    "signals of numbers": (HEAD + "signals = [3]\n", "is no table"),
    "sets a number": ('active = "bench"\nsets = 3\n', "sets must hold"),
    "off a word": (entry('off = "yes"'), "give true or false"),
}  # fmt: skip
# what no schema can say, or jsonschema cannot (it fails to print a number of 9000 digits)
BAD_SENSE = {
    "huge hex": (entry(f"red_high = 0x{'f' * 9000}"), "a number of thousands of digits: give a number"),
    "nan": (entry("red_high = nan"), "red_high is nan: give a number"),
    "order": (entry("yellow_high = 80\nred_high = 75"), "yellow_high 80 is above red_high 75: the order is red_low <="),
    "order across": (entry("red_low = 90\nred_high = 75"), "red_low 90 is above red_high 75"),
    "falling severity": (entry('red_high = 1\nseverity = { yellow = "severe" }'), "severity falls from green to red"),
    "limits nothing": (entry("persistence_up = 3"), "limits nothing: give one of red_low"),
    "off with limits": (entry("off = true\nred_high = 1"), "is off and has limits"),
    "twice": (entry("red_high = 1") + '[[sets.bench.signals]]\nname = "temp_c"\nred_high = 2\n', "number 1 once more"),
    "wide hysteresis": (entry("red_low = 1\nred_high = 3\nhysteresis = 2"), "no way back into a band 2 wide"),
    "bits and bands": (entry('red_high = 1\nbits = [{ bit = 0, severity = "watch" }]'), "red_high does not go with bits"),
    "no bits": (entry("bits = []"), "bits is empty"),
    "a bit twice": (entry('bits = [{ bit = 1, severity = "watch" }, { bit = 1, severity = "severe" }]'), "a bit twice"),
    "no such set": ('active = "flight"\n[sets.bench]\n', "no limit set 'flight': choose one of bench"),
    "extends nothing": (HEAD + 'extends = "x"\n', "sets.bench.extends is 'x': choose one of bench"),
    "extends itself": (HEAD + 'extends = "bench"\n', "bench -> bench never ends"),
    "a circle": (HEAD + 'extends = "b"\n[sets.b]\nextends = "bench"\n', "bench -> b -> bench never ends"),
}  # fmt: skip


def schema_accepts(text: str) -> bool:
    validator = jsonschema.Draft202012Validator(limits_shape.schema())
    return validator.is_valid(toml_file.loads(text))


def test_the_schema_is_one_and_ships_as_it_is_made():
    jsonschema.Draft202012Validator.check_schema(limits_shape.schema())
    assert limits_file.SCHEMA.read_text() == limits_shape.schema_text(), "write it anew from limits_shape.schema_text()"


@pytest.mark.parametrize("name", GOOD)
def test_good_files(name):
    loads(GOOD[name].encode())
    assert schema_accepts(GOOD[name])


@pytest.mark.parametrize("name", BAD_SHAPE)
def test_bad_shapes_are_refused_by_both(name):
    text, told = BAD_SHAPE[name]
    with pytest.raises(LimitsError, match=told):
        loads(text.encode())
    assert not schema_accepts(text)


@pytest.mark.parametrize("name", BAD_SENSE)
def test_bad_sense_is_refused_by_the_reader(name):
    text, told = BAD_SENSE[name]
    with pytest.raises(LimitsError, match=told):
        loads(text.encode())


def test_what_is_no_toml():
    for raw in (b"\xff", b"a = ", b"a" + b".a" * 5000 + b" = 1", b"[" * 100_000):
        with pytest.raises(LimitsError, match="is no TOML"):
            loads(raw)
    with pytest.raises(LimitsError, match="is over 262144 bytes"):
        loads(b"#" * (limits_shape.MAX_FILE_BYTES + 1))


def test_values_arrive():
    limit = loads(GOOD["all"].encode()).sets["bench"].limits[0]
    assert limit.bands() == {
        "red_low": 0, "yellow_low": 5, "green_low": 10, "green_high": 70, "yellow_high": 75.5, "red_high": 80,
    }  # fmt: skip
    assert (limit.up, limit.down, limit.hysteresis, limit.stale_after_s) == (3, 5, 2, 10)
    assert [limit.severity(zone) for zone in (-3, -2, -1, 0, 1, 2, 3)] == [5, 3, 1, 0, 1, 3, 5]
    rules = loads(GOOD["rules"].encode())
    assert (rules.node.stale_after_s, rules.node.stale_severity, rules.node.offline_severity) == (3, 1, 5)
    assert rules.event_severity == 3


def test_inherited_limits_come_after_a_sets_own():
    text = (
        entry("red_high = 80")
        + '[[sets.bench.signals]]\nname = "soc"\nred_low = 0.2\n[sets.flight]\nextends = "bench"\n'
        + '[[sets.flight.signals]]\nname = "temp_*"\nred_high = 60\n'
    )
    made = loads(text.encode())
    known = made.using("flight").of_node("n", "b")
    assert known["temp_c"].high == (60.0,) and known["soc"].low == (0.2,)
    assert made.of_node("n", "b")["temp_c"].high == (80.0,)


# ---------------------------------------------------------------- what ships


def test_what_ships_knows_the_signals_of_the_kit():
    limits = load()
    assert limits.active == "bench" and set(limits.sets) == {"bench", "flight", "eclipse"}
    assert schema_accepts(limits_file.SHIPPED.read_text())
    for name in limits.sets:
        known = limits.using(name).of_node("n1", "Raspberry Pi 5")

        def level(signal: str, value: float, known=known) -> str:
            return known[signal].level(known[signal].zone(value))

        assert level("temp_c", 45.0) == "nominal" and level("temp_c", 86.0) == "red_high"
        assert level("flag.under_voltage", 0.0) == "nominal" and level("flag.under_voltage_alarm", 1.0) == "red_high"
        assert level("flag.under_voltage_since_boot", 1.0) == "green_high"
        assert known["flag.throttled_since_boot"] is None and known["tokens_served"] is None
        assert level("memory_available_bytes", 2e9) == "nominal" and level("memory_available_bytes", 5e7) == "red_low"
        assert level("satellite.soc", 0.9) == "nominal" and level("satellite.soc", 0.1) == "red_low"
        assert level("guard_state", 0.0) == "nominal" and level("guard_state", 33.0) == "bits"
    order = [limits.using(name).of_node("n", "b")["temp_c"].high[1] for name in ("eclipse", "flight", "bench")]
    assert order == sorted(order) and len(set(order)) == 3


def test_every_bit_of_the_guard_has_a_severity():
    bits = {1 << each.bit for each in load().of_node("n", "b")["guard_state"].bits}
    assert bits == {getattr(wire, name) for name in dir(wire) if name.startswith("GUARD_")}


# ---------------------------------------------------------------- read again


def replace_file(path, text: str) -> None:
    new = path.with_suffix(".new")
    new.write_text(text)
    os.replace(new, path)


def test_a_file_is_read_again_and_a_bad_one_changes_nothing(tmp_path):
    path = tmp_path / "limits.toml"
    path.write_text(entry("red_high = 80"))
    watch = LimitsWatch(path)
    assert watch.look() == (None, None)
    replace_file(path, entry("red_high = 70"))
    limits, error = watch.look()
    assert error is None and limits.of_node("n", "b")["temp_c"].high == (70.0,) and watch.look() == (None, None)

    replace_file(path, entry("red_hihg = 60"))
    limits, error = watch.look()
    assert limits is None and "limits.toml: sets.bench.signals[1] (temp_c): 'red_hihg' is unknown" in error
    assert error.endswith("the old limits hold") and watch.look() == (None, None), "told once"
    assert watch.limits.of_node("n", "b")["temp_c"].high == (70.0,)

    path.unlink()
    assert "cannot be read: No such file" in watch.look()[1] and watch.look() == (None, None)
    replace_file(path, entry("red_high = 60"))
    assert watch.look()[0].of_node("n", "b")["temp_c"].high == (60.0,)


def test_a_switched_set_stays_switched(tmp_path):
    path = tmp_path / "limits.toml"
    flight = '[sets.flight]\n[[sets.flight.signals]]\nname = "temp_c"\nred_high = '
    path.write_text(entry("red_high = 80") + flight + "60\n")
    watch = LimitsWatch(path)
    with pytest.raises(LimitsError, match="choose one of bench, flight"):
        watch.switch("orbit")
    assert watch.switch("flight").active == "flight"
    replace_file(path, entry("red_high = 80") + flight + "50\n")
    assert watch.look()[0].of_node("n", "b")["temp_c"].high == (50.0,)
    replace_file(path, entry("red_high = 80"))
    limits, error = watch.look()
    assert limits is None and "no limit set 'flight'" in error and watch.limits.active == "flight"


def test_no_file_at_the_start_is_an_error(tmp_path):
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(LimitsError, match="cannot be read|is no file"):
            LimitsWatch(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(LimitsError, match="is no file"):
        load(tmp_path / "pipe")
