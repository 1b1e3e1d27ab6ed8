"""A COSMOS definition of the fleet's telemetry: one packet per node over our JSON, items found by their name. Pure.

COSMOS reads MQTT by its own interface and JSON by its JsonAccessor (docs.openc3.com/docs/configuration/telemetry, .../accessors).
A sample's place in a message may change, and the accessor's paths cannot pick by name: a conversion does, in a target whose
LANGUAGE is python. Leaves out commands, and XTCE, whose containers are of bits and know no JSON.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from node_agent import wire

MAX_SIGNALS = 256
SIGNAL = re.compile(r"[A-Za-z0-9_.:-]{1,120}")
UNITS = {
    "degC": "Celsius C",
    "W": "Watts W",
    "J": "Joules J",
    "V": "Volts V",
    "s": "Seconds s",
    "bytes": "Bytes B",
    "%": "Percent %",
}
COMMENT = """\
# Telemetry of fleet {fleet}, for OpenC3 COSMOS. Put it into a target's cmd_tlm folder, with `LANGUAGE python` in its plugin.txt, and
# give the target an interface `mqtt_interface.py BROKER 1883`. A sample that is not valid has no value.
"""
PICK = (
    "next((s['value'] for s in __import__('json').loads(bytes(buffer))['samples'] "
    "if s['name'] == '{signal}' and s['validity'] == 'ok'), None)"
)
HEAD = (
    ("BD_SEQ", 64, "UINT", "$.bd_seq", "Session"),
    ("SEQ", 64, "UINT", "$.seq", "Number in the session"),
    ("GENERATED_AT", 64, "FLOAT", "$.generated_at", "UTC seconds by the clock of the node"),
)


def item_name(signal: str) -> str:
    """As COSMOS writes names: capitals, digits, underscores."""
    return re.sub(r"[^A-Z0-9]+", "_", signal.upper()).strip("_") or "SIGNAL"


def definition(fleet: str, nodes: Iterable[tuple[str, Iterable[tuple[str, str]]]]) -> str:
    """The text of a cmd_tlm file for (node, ((signal, unit), ...)). Signals with other characters are left out.  Raises: WireError."""
    target, topics, lines = item_name(fleet), wire.Topics(fleet), [COMMENT.format(fleet=fleet)]
    for node, signals in nodes:
        lines += [
            f'TELEMETRY {target} {item_name(wire.check_id(node))} BIG_ENDIAN "Telemetry of {node}"',
            "  ACCESSOR JsonAccessor",
            f"  META TOPIC {topics.telemetry(node)}",
        ]
        lines += [f'  APPEND_ID_ITEM NODE 0 STRING "{node}" "Name of the node"', "    KEY $.node"]
        used = {"NODE"}
        for name, bits, kind, key, about in HEAD:
            used.add(name)
            lines += [f'  APPEND_ITEM {name} {bits} {kind} "{about}"', f"    KEY {key}"]
        for signal, unit in list(signals)[:MAX_SIGNALS]:
            name = item_name(signal)
            if not SIGNAL.fullmatch(signal) or name in used:
                continue
            used.add(name)
            lines.append(f'  ITEM {name} 0 0 DERIVED "{signal}"')
            if unit in UNITS:
                lines.append(f"    UNITS {UNITS[unit]}")
            lines += ["    GENERIC_READ_CONVERSION_START FLOAT 64", f"      {PICK.format(signal=signal)}"]
            lines.append("    GENERIC_READ_CONVERSION_END")
        lines.append("")
    return "\n".join(lines)
