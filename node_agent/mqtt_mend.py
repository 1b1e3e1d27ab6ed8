"""Contract: what both ends of the control plane mend in paho's client, in one place. Needs no paho: it stands before its Client.

    class Client(Mended, mqtt.Client): ...

A message that paho cannot decode (a property out of its range, which mosquitto 2.0.11 and iotcore pass on) makes it end the
connection, and again after every reconnection where the broker retains it. Here it is acknowledged, told and dropped.
Uses paho 2.2's private `_handle_publish`, `_in_packet` and `_send_puback`; leaves out everything else about the connection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SUCCESS = 0  # paho.mqtt.MQTT_ERR_SUCCESS


class Mended:
    """Mixin. `decode_errors`: what paho raises for such a message; `unreadable(error)` is told of it, in paho's thread."""

    decode_errors: tuple[type[Exception], ...]
    unreadable: Callable[[Exception], None]

    def _handle_publish(self) -> Any:
        try:
            return super()._handle_publish()
        except self.decode_errors as error:
            packet, qos = self._in_packet["packet"], self._in_packet["command"] >> 1 & 3
            at = 2 + int.from_bytes(packet[:2], "big")  # behind the topic: the packet's id, with QoS 1
            if len(packet) < at + 2 or qos > 1:
                raise
            self.unreadable(error)
            return self._send_puback(int.from_bytes(packet[at : at + 2], "big")) if qos else SUCCESS
