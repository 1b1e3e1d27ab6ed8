"""The alarms of a whole fleet: feeds telemetry, events, silence and what operators do into the state machines of alarms.py.

Thread safe, bounded, and quick where all is well: a value inside its limits costs a look-up and two comparisons. Every method
returns what has changed, for the archive and for whoever watches. Leaves out both, and the file of limits (limits_file.py).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ground_station import alarms, alarms_latch
from ground_station.alarms import Reading, SignalState
from ground_station.alarms_latch import Alarm, AlarmError, Bad, Changes, Latch
from ground_station.archive_records import AlarmRecord
from ground_station.fleet import Instant
from ground_station.limits import LETTERS, SEVERITIES, UNKNOWN, Limits, NodeLimits
from node_agent.wire import Event, Sample, Satellite

NODE = "(node)"  # the signal of what concerns a node as a whole
FULL = "(alarms)"
SATELLITE = "satellite."  # goes before the names of what the virtual satellite says
OWN = ("(", SATELLITE, "event:")  # no node's sample has limits under such a name
MAX_NODES = 2000
MAX_SIGNALS = 400  # with limits, of one node
MAX_ALARMS = 100  # of one node, so that none crowds out the others

Key = tuple[str, str]  # signal and kind


@dataclass(frozen=True, slots=True)
class Sight:
    """A node as fleet.NodeState knows it. `silent_s`: since it was heard; None: it never was."""

    online: bool
    silent_s: float | None


@dataclass
class _Node:
    known: NodeLimits
    states: dict[str, SignalState] = field(default_factory=dict)
    latches: dict[Key, Latch] = field(default_factory=dict)  # all but limits, and limits from before a restart
    valid_at_s: dict[str, float] = field(default_factory=dict)  # monotonic, of signals that may become stale
    standing: int = 0  # alarms


class FleetAlarms:
    """Alarms by node and signal under `limits`. `not_kept`: how many more there would be, had a node room for them."""

    def __init__(self, limits: Limits) -> None:
        self._lock = threading.RLock()
        self._limits = limits
        self._nodes: dict[str, _Node] = {}
        self._by_id: dict[str, tuple[str, Key]] = {}
        self.not_kept = 0

    # ------------------------------------------------------------ limits

    @property
    def limits(self) -> Limits:
        return self._limits

    def use(self, limits: Limits, at: Instant) -> Changes:
        """Puts other limits in force. What has no limit any more returns to normal; the rest waits for its next reading."""
        with self._lock:
            self._limits = limits
            return tuple(change for name in self._nodes for change in self._relimit(name, None, at))

    def _relimit(self, name: str, board: str | None, at: Instant) -> Changes:
        node, changes = self._nodes[name], ()
        node.known = self._limits.of_node(name, node.known.board if board is None else board)
        for signal, state in list(node.states.items()):
            limit = node.known[signal]
            if limit == state.limit:
                continue
            if limit is None:
                changes += self._put(name, (signal, "limit"), *alarms_latch.step(state.latch, None, at))
                latch = self._latch(name, (signal, "limit"))
                del node.states[signal]
                if latch.alarm is not None:
                    node.latches[(signal, "limit")] = latch
            else:
                node.states[signal] = alarms.relimit(state, limit)
        for signal, kind in list(node.latches):  # from before a restart, or of a signal that had a limit once
            if kind == "limit" and node.known[signal] is None:
                changes += self._step(name, (signal, kind), None, at)
        for signal in list(node.valid_at_s):
            limit = node.known[signal]
            if limit is None or limit.stale_after_s is None:
                del node.valid_at_s[signal]
                changes += self._step(name, (signal, alarms_latch.STALE), None, at)
        return changes

    def bands(self) -> dict[str, Any]:
        """For plots: the bands of each signal that was seen, by name, and by node where a node's are different."""
        with self._lock:
            common: dict[str, dict[str, float]] = {}
            own: dict[str, dict[str, dict[str, float]]] = {}
            for name, node in self._nodes.items():
                for signal, limit in node.known.items():
                    if limit is None or not (bands := limit.bands()):
                        continue
                    if common.setdefault(signal, bands) != bands:
                        own.setdefault(name, {})[signal] = bands
            return {
                "set": self._limits.active,
                "sets": {name: each.text for name, each in self._limits.sets.items()},
                "signals": common,
                "nodes": own,
            }

    # ------------------------------------------------------------ what is heard

    def telemetry(
        self, name: str, board: str, samples: Iterable[Sample], at: Instant
    ) -> tuple[dict[str, str], Changes]:
        """Live samples of a node, of one message.  Returns one letter of limits.LETTERS, or UNKNOWN, by signal that has limits."""
        with self._lock:
            node = self._node(name, board, at)
            if node is None:
                return {}, ()
            changes: Changes = ()
            if node.known.board != board:
                changes = self._relimit(name, board, at)
            return self._take(name, node, samples, at, "", changes)

    def satellite(self, message: Satellite, at: Instant) -> tuple[dict[str, str], Changes]:
        """What the virtual satellite of a node says; its signals are named 'satellite.soc' and so on."""
        with self._lock:
            node = self._node(message.node, "", at)
            if node is None:
                return {}, ()
            return self._take(message.node, node, message.samples, at, SATELLITE, ())

    def _node(self, name: str, board: str, at: Instant) -> _Node | None:
        node = self._nodes.get(name)
        if node is None:
            if len(self._nodes) >= MAX_NODES:
                self.not_kept += 1
                return None
            node = self._nodes[name] = _Node(self._limits.of_node(name, board))
        return node

    def _take(
        self, name: str, node: _Node, samples: Iterable[Sample], at: Instant, prefix: str, changes: Changes
    ) -> tuple[dict[str, str], Changes]:
        letters: dict[str, str] = {}
        known, states, valid_at_s, now_s = node.known, node.states, node.valid_at_s, at.mono_s
        for sample in samples:
            signal = prefix + sample.name if prefix else sample.name
            limit = known[signal]
            if limit is None or (not prefix and signal.startswith(OWN)):
                continue
            value, usable = sample.value, sample.validity == "ok" and limit.usable(sample.value)
            if usable and limit.stale_after_s is not None:
                if signal not in valid_at_s and len(valid_at_s) >= MAX_SIGNALS:
                    self.not_kept += 1
                else:
                    valid_at_s[signal] = now_s
            state = states.get(signal)
            if state is None:
                if not usable:
                    letters[signal] = UNKNOWN
                    continue
                if limit.zone(value) == 0 and (signal, "limit") not in node.latches:
                    letters[signal] = LETTERS[0]
                    continue
                if len(states) >= MAX_SIGNALS:
                    self.not_kept += 1
                    letters[signal] = UNKNOWN
                    continue
                latch = node.latches.pop((signal, "limit"), None) or Latch(name, signal)
                state = SignalState(limit, latch)
            after, new = alarms.apply(state, Reading(value, sample.unit[:20], sample.validity), at)
            standing = after.standing
            if after.latch.alarm is None and not (standing.zone or standing.pending or after.latch.waived):
                states.pop(signal, None)  # as if it had never been seen: that is what is quick
            else:
                states[signal] = after
            if new:
                changes += self._counted(name, (signal, "limit"), new)
            letters[signal] = LETTERS[limit.severity(standing.zone)] if usable else UNKNOWN
        return letters, changes

    def letters(self, name: str, board: str, samples: Iterable[Sample]) -> dict[str, str]:
        """The same letters of samples of another time, under the limits of now, each by itself: for a replay."""
        known = self._limits.of_node(name, board)
        found = ((sample, known[sample.name]) for sample in samples if not sample.name.startswith(OWN))
        return {
            sample.name: LETTERS[limit.severity(limit.zone(sample.value))]
            if sample.validity == "ok" and limit.usable(sample.value)
            else UNKNOWN
            for sample, limit in found
            if limit is not None
        }

    def event(self, event: Event, at: Instant) -> Changes:
        """An event of a node or of the ground. One of the same kind that is mere information says that all is well again."""
        rank = SEVERITIES.index(event.severity) if event.severity in SEVERITIES else 0
        key = ("event:" + event.kind[:100], alarms_latch.EVENT)
        with self._lock:
            if self._node(event.node, "", at) is None:
                return ()
            if event.severity == "info":
                return self._step(event.node, key, None, at)
            if rank < self._limits.event_severity:
                return ()
            return self._step(event.node, key, Bad(alarms_latch.EVENT, rank, text=event.text), at)

    def tick(self, sights: Mapping[str, Sight], at: Instant) -> Changes:
        """Once a second or so: shelves whose time is over, nodes that are offline or silent, signals without a valid value."""
        changes: Changes = ()
        with self._lock:
            for name, key in list(self._by_id.values()):
                latch = self._latch(name, key)
                if latch.alarm is not None and latch.alarm.until is not None:
                    changes += self._put(name, key, *alarms_latch.wake(latch, at))
            rule = self._limits.node
            for name, sight in sights.items():
                node = self._node(name, "", at)
                if node is None:
                    continue
                if not sight.online:  # nothing can be said of its signals then, and staleness is told already
                    bad = Bad(alarms_latch.OFFLINE, rule.offline_severity, text="the node is offline")
                    changes += self._step(name, (NODE, alarms_latch.OFFLINE), bad, at)
                    continue
                changes += self._step(name, (NODE, alarms_latch.OFFLINE), None, at)
                if sight.silent_s is None or sight.silent_s > rule.stale_after_s:
                    told = "ever" if sight.silent_s is None else f"for over {rule.stale_after_s:g} s"
                    bad = Bad(
                        alarms_latch.STALE,
                        rule.stale_severity,
                        sight.silent_s,
                        "s",
                        rule.stale_after_s,
                        f"not heard {told}",
                    )
                    changes += self._step(name, (NODE, alarms_latch.STALE), bad, at)
                    continue
                changes += self._step(name, (NODE, alarms_latch.STALE), None, at)
                changes += self._stale_signals(name, node, at)
        return changes

    def _stale_signals(self, name: str, node: _Node, at: Instant) -> Changes:
        changes: Changes = ()
        for signal, valid_at_s in node.valid_at_s.items():
            limit = node.known[signal]
            age_s = at.mono_s - valid_at_s
            bad = None
            if limit is not None and limit.stale_after_s is not None and age_s > limit.stale_after_s:
                text = f"no valid value for over {limit.stale_after_s:g} s" + (f": {limit.text}" if limit.text else "")
                bad = Bad(alarms_latch.STALE, limit.stale_severity, age_s, "s", limit.stale_after_s, text)
            if bad is not None or (signal, alarms_latch.STALE) in node.latches:
                changes += self._step(name, (signal, alarms_latch.STALE), bad, at)
        return changes

    # ------------------------------------------------------------ what people do

    def acknowledge(self, alarm: str, who: str, comment: str, at: Instant) -> Changes:
        """Raises: AlarmError, as do the others."""
        return self._act(alarm, lambda latch: alarms_latch.acknowledge(latch, who, comment, at))

    def shelve(self, alarm: str, who: str, comment: str, for_s: float, at: Instant) -> Changes:
        return self._act(alarm, lambda latch: alarms_latch.shelve(latch, who, comment, for_s, at))

    def unshelve(self, alarm: str, who: str, comment: str, at: Instant) -> Changes:
        def wake(latch: Latch) -> tuple[Latch, Changes]:
            if latch.alarm is None or latch.alarm.until is None:
                raise AlarmError("it is on no shelf", "nothing is to be done")
            return alarms_latch.wake(latch, at, who or "operator", comment)

        return self._act(alarm, wake)

    def clear(self, alarm: str, who: str, comment: str, at: Instant, force: bool = False) -> Changes:
        return self._act(alarm, lambda latch: alarms_latch.clear(latch, who, comment, at, force))

    def _act(self, alarm: str, act) -> Changes:
        with self._lock:
            if alarm not in self._by_id:
                raise AlarmError(f"there is no alarm {alarm[:40]!a}", "list the alarms again")
            name, key = self._by_id[alarm]
            return self._put(name, key, *act(self._latch(name, key)))

    # ------------------------------------------------------------ what stands

    def standing(self) -> list[dict[str, Any]]:
        """The alarms that stand as dicts for JSON: who is not acknowledged first, then the gravest, then the youngest."""
        with self._lock:
            found = [self._latch(name, key).alarm for name, key in self._by_id.values()]
        order = {"unacknowledged": 0, "returned": 1, "acknowledged": 2, "shelved": 3}
        found.sort(key=lambda alarm: (order[alarm.state], -alarm.severity, -alarm.since_utc_s, alarm.id))
        return [alarm.as_dict() for alarm in found]

    def alarm(self, alarm: str) -> Alarm | None:
        """The one that stands under that id."""
        with self._lock:
            return self._latch(*self._by_id[alarm]).alarm if alarm in self._by_id else None

    def restore(self, records: Iterable[AlarmRecord], at: Instant) -> int:
        """Takes up what stood when the archive's `records` (oldest first) end; before anything is heard.  Returns how many."""
        taken = 0
        with self._lock:
            for latch in alarms.restored(records):
                node = self._node(latch.node, "", at)
                key = (latch.signal, latch.alarm.kind)
                if node is None or node.standing >= MAX_ALARMS or latch.alarm.id in self._by_id:
                    self.not_kept += 1
                    continue
                node.latches[key] = latch
                node.standing += 1
                self._by_id[latch.alarm.id] = (latch.node, key)
                taken += 1
        return taken

    # ------------------------------------------------------------ latches

    def _latch(self, name: str, key: Key) -> Latch:
        node = self._nodes[name]
        if key[1] == "limit" and key[0] in node.states:
            return node.states[key[0]].latch
        return node.latches.get(key) or Latch(name, key[0])

    def _step(self, name: str, key: Key, bad: Bad | None, at: Instant) -> Changes:
        latch = self._nodes[name].latches.get(key)
        if latch is None:
            if bad is None:
                return ()
            latch = Latch(name, key[0])
        return self._put(name, key, *alarms_latch.step(latch, bad, at))

    def _put(self, name: str, key: Key, latch: Latch, changes: Changes) -> Changes:
        node = self._nodes[name]
        if key[1] == "limit" and key[0] in node.states:
            node.states[key[0]] = replace(node.states[key[0]], latch=latch)
        elif latch.alarm is None and not latch.waived:
            node.latches.pop(key, None)
        else:
            node.latches[key] = latch
        return self._counted(name, key, changes) if changes else ()

    def _counted(self, name: str, key: Key, changes: Changes) -> Changes:
        """Books what was raised and cleared; an alarm for which the node has no room is not kept, and that is one alarm."""
        node = self._nodes[name]
        for change in changes:
            if change.what == "cleared":
                node.standing -= self._by_id.pop(change.alarm.id, None) is not None
            elif change.what == "raised":
                if node.standing < MAX_ALARMS or key[0] == FULL:
                    node.standing += 1
                    self._by_id[change.alarm.id] = (name, key)
                    continue
                self.not_kept += 1
                at = Instant(change.at_utc_s, change.at_utc_s)
                if key[1] == "limit" and key[0] in node.states:
                    node.states[key[0]] = replace(node.states[key[0]], latch=Latch(name, key[0]))
                else:
                    node.latches.pop(key, None)
                text = f"this node has {MAX_ALARMS} alarms: more are not kept; clear some"
                return self._step(name, (FULL, alarms_latch.EVENT), Bad(alarms_latch.EVENT, 2, text=text), at)
        return changes
