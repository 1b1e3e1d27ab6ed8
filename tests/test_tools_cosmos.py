"""The COSMOS definition, judged by OpenC3's own parser and accessor where there is one: in a Python of its own, since it is no
free software and pins other versions. SPACEMOE_OPENC3_PYTHON names that Python (`python -m venv X && X/bin/pip install openc3`)."""

from __future__ import annotations

import json
import os
import re
import subprocess

import pytest
from mission_cli import here

from ground_station import cosmos
from node_agent import wire

HOSTILE = 'a"\nAPPEND_ITEM X 8 UINT "'
SIGNALS = [
    ("temp_c", "degC"),
    ("power_w", "W"),
    ("errors.link.timeout", "errors"),
    ("duty", "1"),
    (HOSTILE, "W"),
    ("TEMP.C", "degC"),
]
READ = """
import json, sys
from openc3.packets.packet_config import PacketConfig
config = PacketConfig()
config.process_file(sys.argv[1], "TEST_FLEET")
packet = config.telemetry["TEST_FLEET"]["SAT_1"]
told = {"items": sorted(packet.items), "topic": packet.meta["TOPIC"], "warnings": config.warnings, "read": []}
for line in sys.stdin:
    packet.buffer = line.strip().encode()
    names = ("NODE", "SEQ", "TEMP_C", "POWER_W", "DUTY", "ERRORS_LINK_TIMEOUT")
    told["read"].append({name: packet.read(name) for name in names} | {"units": packet.read("TEMP_C", "WITH_UNITS")})
print(json.dumps(told))
"""


def message(*samples: tuple[str, float | None, str]) -> bytes:
    made = tuple(wire.Sample(name, value, "u", validity, "measured", "board", 1.0) for name, value, validity in samples)
    return wire.encode(wire.Telemetry("sat-1", 7, 3, 1.5, made, 1, 1))


def test_its_text():
    text = cosmos.definition("test-fleet", [("sat-1", SIGNALS), ("sat-2", [])])
    assert re.findall(r"^TELEMETRY (\S+ \S+) BIG_ENDIAN", text, re.M) == ["TEST_FLEET SAT_1", "TEST_FLEET SAT_2"]
    assert "  META TOPIC spacemoe/v1/test-fleet/node/sat-1/telemetry" in text
    items = re.findall(r"^  (?:APPEND_)?(?:ID_)?ITEM (\S+)", text.partition("SAT_2")[0], re.M)
    assert len(items) == len(set(items)) and "TEMP_C" in items and "X" not in items
    with pytest.raises(wire.WireError):
        cosmos.definition("test-fleet", [("sat 1", [])])


def test_openc3_reads_values_by_name(tmp_path):
    python = os.environ.get("SPACEMOE_OPENC3_PYTHON")
    if not python:
        pytest.skip("SPACEMOE_OPENC3_PYTHON names no Python with openc3")
    file = tmp_path / "telemetry.txt"
    file.write_text(cosmos.definition("test-fleet", [("sat-1", SIGNALS), ("sat-2", SIGNALS)]))
    messages = (
        message(("temp_c", 45.5, "ok"), ("power_w", 5.25, "ok"), ("duty", 0.5, "ok")),
        message(
            ("errors.link.timeout", 2.0, "ok"),
            ("power_w", None, "missing"),
            ("duty", 1.0, "ok"),
            ("temp_c", 1e308, "ok"),
        ),
    )
    done = subprocess.run(
        [python, "-c", READ, str(file)], input=b"\n".join(messages), capture_output=True, timeout=120, cwd=tmp_path,
        env={**os.environ, "OPENC3_NO_STORE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    told = json.loads(done.stdout.decode().splitlines()[-1])
    first, second = told["read"]
    assert told["topic"] == ["spacemoe/v1/test-fleet/node/sat-1/telemetry"] and not told["warnings"]
    assert (
        first["NODE"] == "sat-1"
        and first["SEQ"] == 3
        and (first["TEMP_C"], first["POWER_W"], first["DUTY"]) == (45.5, 5.25, 0.5)
    )
    assert first["units"] == "45.5 C" and first["ERRORS_LINK_TIMEOUT"] is None
    # another order, one not valid, one more: a value is never another signal's
    assert (second["TEMP_C"], second["POWER_W"], second["DUTY"], second["ERRORS_LINK_TIMEOUT"]) == (
        1e308,
        None,
        1.0,
        2.0,
    )
    file.write_text(file.read_text().replace("GENERIC_READ_CONVERSION_END", "NO_SUCH_WORD", 1))
    wrong = subprocess.run([python, "-c", READ, str(file)], input=b"", capture_output=True, timeout=120, cwd=tmp_path)
    assert wrong.returncode != 0  # it does look


def test_the_command(tmp_path):
    done = here("tools", "cosmos", "--fleet", "lab", "--node", "sat-1", "-o", tmp_path / "tlm.txt")
    assert done.returncode == 0 and "TELEMETRY LAB SAT_1" in (tmp_path / "tlm.txt").read_text(), done.stderr
