"""Store-and-forward: when what is kept goes out as history, how much of it is under way, and who is there to take it in.

Nothing is sent while there is no broker or the ground station says that it is offline. A batch counts as received when the
broker has acknowledged it and had somebody to give it to; what is lost in a broker all the same is asked for again by the
ground station, by number. Leaves out: locks (its one user, control.py, has one) and the store itself (history.py).
"""

from __future__ import annotations

import time
from typing import Callable

from paho.mqtt import client as mqtt

from node_agent import wire
from node_agent.history import History, RangesError, parse_ranges

MAX_BATCHES = 4  # under way at a time: the rest of the link is for what happens now
# The ground station comes back from a broker's restart as we do, some time within its reconnection delay. History that is
# there first is lost to it until it asks again.
GROUND_RETURNS_S = 3.0


class Forwarder:
    """Telemetry of one run of an agent.

    `publish(payload)` sends a History, QoS 1; `unheard(mid)`: the broker acknowledged that message and had no subscriber.
    """

    def __init__(
        self,
        node: str,
        run: int,
        publish: Callable[[bytes], mqtt.MQTTMessageInfo | None],
        unheard: Callable[[int], bool],
        history: History | None = None,
    ):
        self.ground_away = False  # until somebody says so, there may be receivers that say nothing
        self._node, self._run, self._publish, self._unheard = node, run, publish, unheard
        self._history = History() if history is None else history  # an empty one is false
        self._batches: list[tuple[tuple[int, ...], mqtt.MQTTMessageInfo]] = []
        self._up = False
        self._due_s = 0.0

    def up(self) -> None:
        """There is a broker and a birth."""
        if not self._up:
            self._up, self._due_s = True, time.monotonic() + GROUND_RETURNS_S

    def down(self) -> None:
        """The connection has ended: what was under way is owed again."""
        self._up = False
        for numbers, _ in self._batches:
            self._history.came_back(numbers)
        self._batches.clear()

    def ground(self, online: bool, retained: bool) -> None:
        """The ground station's status has come. One that is not retained is from this moment: there is nothing to wait for."""
        self.ground_away = not online
        if online and not retained:
            self._due_s = 0.0

    def keep(self, number: int, payload: bytes, sent: bool) -> None:
        """Keeps a telemetry message. One that was sent while the ground station is away is owed to it all the same."""
        self._history.keep(number, payload, owed=not sent or self.ground_away)

    def send(self) -> None:
        """Sends what is owed, as far as batches may be under way; called with every telemetry message."""
        for batch in [batch for batch in self._batches if batch[1].is_published()]:
            self._batches.remove(batch)
            if self._unheard(batch[1].mid):
                self._history.came_back(batch[0])
                self._due_s = time.monotonic() + GROUND_RETURNS_S
            else:
                self._history.arrived(batch[0])
        if not self._up or self.ground_away or time.monotonic() < self._due_s:
            return
        while len(self._batches) < MAX_BATCHES:
            numbers, payloads = self._history.next_batch()
            if not numbers:
                return
            under_way = len(numbers) + sum(len(batch[0]) for batch in self._batches)
            sent = self._publish(wire.encode_history(self._head(self._history.owed - under_way), payloads))
            if sent is None or sent.rc != mqtt.MQTT_ERR_SUCCESS:  # the connection is about to end
                self._history.came_back(numbers)
                return
            self._batches.append((numbers, sent))

    def owe_again(self, run: str, ranges: str) -> tuple[bool, str]:
        """What the command `history` asks for; (ok, text) of its answer."""
        try:
            wanted = parse_ranges(ranges)
        except RangesError as error:
            return False, str(error)
        if run != str(self._run):
            return False, f"this agent's run is {self._run}: what an earlier one kept is gone"
        held = self._history.owe(wanted)
        self._due_s = 0.0
        if held:
            self.send()
        else:  # says that it is gone
            self._publish(wire.encode(self._head(self._history.owed)))
        return True, f"{held} messages are kept and will come as history; the oldest kept is {self._history.oldest}"

    def _head(self, to_come: int) -> wire.History:
        return wire.History(self._node, self._run, self._history.oldest, self._history.dropped, to_come, ())

    def samples(self, generated_at: float) -> tuple[wire.Sample, ...]:
        """Telemetry: messages that are kept, that nobody has got yet, and that were dropped for want of room."""
        history = self._history
        counts = {"kept": len(history), "owed": history.owed, "dropped": history.dropped}
        return tuple(
            wire.Sample(f"history_{name}", float(count), "messages", "ok", "measured", "agent", generated_at)
            for name, count in counts.items()
        )
