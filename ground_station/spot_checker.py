"""Spot re-computation, the loop: asks a second node, or the bundle, what an answer should have been; quarantines who is wrong.

One check at a time and none of it waits: a question goes out when a layer's answers are in and the nodes are idle, its answer
is taken in with whatever comes later. First the very same request goes to a node that holds the same copies; where the two
answers differ by a bit, both are asked again without a codec, and a third opinion is asked for where they still differ. What is
decided when is spot_check's. `RemoteExperts` calls `answered` and `step` from the thread that owns the link; the ground station's
own opinion is computed in another thread. Leaves out: storage of the fleet's records (a callback), and publishing (another).
"""

from __future__ import annotations

import logging
import random
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ground_station import dispatch, spot_check, spot_sample
from ground_station.link import Failure, Link
from ground_station.spot_bundle import Bundle
from ground_station.spot_check import GROUND, Opinion, Part, Rules, Verdict
from ground_station.spot_sample import ROWS_COMPARED, Sample, Sent
from node_agent import frame, wire

if TYPE_CHECKING:
    from ground_station.paced_link import PacedLink

log = logging.getLogger("spacemoe.spot_check")

TRIES = 3  # of one check, each with another second node


@dataclass
class _Check:
    """The one under way. `waiting`: request id -> (part, whose); `futures` the same for the bundle; `opinions`: (part, whose) -> sum."""

    sample: Sample
    parts: list[Part]
    whole: bool  # the parts are all of the request
    stage: str = "same"  # then "pair", then "third"
    waiting: dict[int, tuple[int, str]] = field(default_factory=dict)
    futures: dict[tuple[int, str], Future] = field(default_factory=dict)
    opinions: dict[tuple[int, str], np.ndarray | Failure] = field(default_factory=dict)
    who: dict[tuple[int, str], str] = field(default_factory=dict)
    until_s: float = 0.0
    more: np.ndarray | None = None  # further rows on which single experts are compared

    def sent(self, index: int) -> Sent:
        """What a part asks of whoever is to compute it without a codec."""
        sent, part = self.sample.sent, self.parts[index]
        return (
            spot_sample.precise(sent, part.pairs)
            if self.more is None
            else spot_sample.one_expert(sent, part.pairs, self.more)
        )


class Way(NamedTuple):
    """How nodes are asked: the link, what they hold, and the next request's number."""

    link: Link | PacedLink
    table: dispatch.Table
    next_id: Callable[[], int]


LOCAL = -1  # node index of the bundle, in a Part


class SpotChecker:
    """State: what was checked, what waits, the check under way. `counts`: checks by outcome; `alarms`: the last hundred."""

    def __init__(
        self,
        rules: Rules = Rules(),
        bundle: Bundle | None = None,
        on_alarm: Callable[[wire.Event], None] = lambda event: None,
        on_quarantine: Callable[[str, str], None] = lambda node, reason: None,
        seed: int | None = None,
        kinds: Mapping[str, str] | None = None,
    ):
        """`bundle`: for the ground station's own opinion, and the calibrated norms; `on_quarantine(node, reason)` keeps it for good;
        `seed`: None: choices that nobody can foresee; `kinds`: node -> kind of board, of which like ones compute alike; None: all do,
        this machine too (agents on one machine).  Raises: shard.BundleError."""
        self.rules, self.bundle = rules, bundle
        self.counts: Counter[str] = Counter()
        self.alarms: deque[wire.Event] = deque(maxlen=100)
        self._on_alarm, self._on_quarantine = on_alarm, on_quarantine
        self._draw = random.Random(secrets.randbits(128) if seed is None else seed).random
        norms = None if bundle is None else bundle.norms()
        layers = () if bundle is None else bundle.manifest.moe_layers
        self._norms: dict[int, list[float]] = {} if norms is None else dict(zip(layers, norms.tolist()))
        self._seen: Counter[int] = Counter()
        self._checked: set[tuple[int, int, int, int]] = set()  # (node, layer, expert, precision)
        self._strikes: Counter[int] = Counter()
        self._waiting: deque[Sample] = deque()
        self._check: _Check | None = None
        self._kinds = kinds
        self._alike: set[frozenset[str]] = set()  # who was seen to compute the same to the last bit
        self._recent: dict[int, deque[np.ndarray]] = {}  # rows that layers were asked for of late
        self._said: set[tuple[str, str]] = set()

    @property
    def busy(self) -> bool:
        return self._check is not None or bool(self._waiting)

    def alike(self, one: str, other: str) -> bool:
        """Whether these two are known to compute alike."""
        if self._kinds is None or frozenset((one, other)) in self._alike:
            return True
        return one in self._kinds and self._kinds.get(one) == self._kinds.get(other)

    # ------------------------------------------------------------ on the hot path

    def answered(
        self, layer: int, node: int, sent: Sent, answer: frame.Frame | Failure, energy: float
    ) -> Failure | None:
        """Hears of each answer, and the `energy_of` its sum; a Failure for one that must not be used."""
        if isinstance(answer, Failure):
            if spot_check.NOT_FINITE in answer.text:
                self._enqueue(Sample(layer, node, sent, None, "not finite"))
            return None
        self._seen[node] += 1
        if layer not in self._recent:
            self._recent[layer] = deque(maxlen=ROWS_COMPARED)
        self._recent[layer].append(sent.x[:1])
        norms = self._norms.get(layer)
        if norms is not None:
            times = spot_check.norm_over_expected(answer.x, energy, sent.pairs, norms)
            if times > spot_check.DOUBTFUL:
                self._enqueue(Sample(layer, node, sent, answer.x, "norm"))
                if times > spot_check.ABSURD:
                    return Failure("error", f"a sum of {times:.3g} times the norm that calibration expects")
                return None
        seen = self._seen[node] - 1
        draw = self._draw()
        # what has been checked is looked up only where it matters
        new = draw < self.rules.new_rate and not self._checked.issuperset(spot_sample.copies(node, layer, sent.pairs))
        if reason := spot_check.why_check(self.rules, seen, new, draw):
            self._enqueue(Sample(layer, node, sent, answer.x, reason))
        return None

    def absurd(self, layer: int, node: int, sent: Sent, answer: np.ndarray) -> None:
        """Hears of an answer that was not used because of its size."""
        self._enqueue(Sample(layer, node, sent, answer, "norm"))

    def _enqueue(self, sample: Sample) -> None:
        if sample.reason in ("not finite", "norm"):  # a node that is doubted goes before the rest, once at a time
            if not any(item.node == sample.node and item.reason == sample.reason for item in self._waiting):
                self._waiting.appendleft(spot_sample.fewer_rows(sample, self.rules.max_rows, self._draw))
                while len(self._waiting) > self.rules.waiting:
                    self._waiting.pop()
        elif len(self._waiting) < self.rules.waiting:
            self._waiting.append(spot_sample.fewer_rows(sample, self.rules.max_rows, self._draw))
        else:
            self.counts["no room"] += 1

    # ------------------------------------------------------------ between layers

    def step(self, link: Link | PacedLink, table: dispatch.Table, next_id: Callable[[], int]) -> None:
        """Takes in what came and sends what is due; never waits."""
        way = Way(link, table, next_id)
        if self._check is None and not self._waiting:
            return
        if self._check is None:
            sample = self._waiting.popleft()
            if way.table.nodes[sample.node] in way.link.quarantined:
                return
            self._begin(sample, way)
            return
        check = self._check
        for request_id in [i for i in check.waiting if i in way.link.came_aside]:
            key = check.waiting.pop(request_id)
            shape = check.sample.sent.x.shape if check.stage == "same" else check.sent(key[0]).x.shape
            check.opinions[key] = spot_sample.sum_of(way.link.came_aside.pop(request_id), shape)
        for key in [key for key, future in check.futures.items() if future.done()]:
            check.opinions[key] = spot_sample.result_of(check.futures.pop(key))
        if not (check.waiting or check.futures):
            self._advance(check, way)
        elif time.monotonic() > check.until_s:
            for request_id, key in check.waiting.items():
                way.link.forget_aside(request_id)
                check.opinions[key] = Failure("late", "no opinion in time")
            for key in check.futures:
                check.opinions[key] = Failure("late", "the bundle's opinion takes too long")
            check.waiting, check.futures = {}, {}
            self._advance(check, way)

    def _begin(self, sample: Sample, way: Way) -> None:
        usable = [
            way.link.is_up(name) and index != sample.node and index not in sample.without
            for index, name in enumerate(way.table.nodes)
        ]
        name = way.table.nodes[sample.node]
        like = [here and self.alike(name, other) for here, other in zip(usable, way.table.nodes)]
        found, whole = spot_check.parts(sample.sent.pairs, sample.layer, way.table.copies, like)
        if not whole:
            found, whole = spot_check.parts(sample.sent.pairs, sample.layer, way.table.copies, usable)
        if not whole and self.bundle is not None and LOCAL not in sample.without:
            found, whole = [Part(LOCAL, np.ones(len(sample.sent.pairs), bool))], True
        if not found:
            self._nobody(sample, way)
            return
        self._check = check = _Check(sample, found, whole)
        check.until_s = time.monotonic() + self.rules.answer_s
        if sample.answer is None or not whole or len(found) > 1:
            self._ask_both(check, way)
        elif found[0].node == LOCAL:
            self._ask_bundle(check, 0, "second", sample.sent._replace(x=spot_sample.as_received(sample.sent)))
        else:
            self._ask(check, 0, "second", found[0].node, sample.sent, way)

    def _nobody(self, sample: Sample, way: Way) -> None:
        self.counts["nobody to ask"] += 1
        if sample.answer is None:
            self._strikes[sample.node] += 1
            if self._strikes[sample.node] >= self.rules.strikes:
                why = f"its sums were not finite {self._strikes[sample.node]} times, and nobody else can be asked"
                verdict = Verdict((way.table.nodes[sample.node],), deviation=float("inf"), why=why)
                self._act(sample.layer, sample.sent.pairs, verdict, way)

    def _ask(self, check: _Check, part: int, whose: str, node: int, sent: Sent, way: Way) -> None:
        name = way.table.nodes[node]
        check.who[part, whose] = name
        request_id = way.next_id()
        data = frame.pack(
            frame.Frame(
                frame.EXPERTS,
                request_id,
                check.sample.layer,
                destination=way.link.peers[name].number if name in way.link.peers else 0,
                codec=sent.codec,
                reply_codec=sent.reply_codec,
                x=sent.x,
                pairs=sent.pairs,
                budget_us=int(self.rules.answer_s * 1e6),
                reply_step=sent.reply_step,
            ),
            sent.payload,
        )
        self.counts["requests"] += 1
        failure = way.link.ask_aside(name, request_id, data)
        if failure is None:
            check.waiting[request_id] = (part, whose)
        else:
            check.opinions[part, whose] = failure

    def _ask_bundle(self, check: _Check, part: int, whose: str, sent: Sent) -> None:
        check.who[part, whose] = GROUND
        self.counts["computed here"] += 1
        check.futures[part, whose] = self.bundle.ask(check.sample.layer, sent.x, sent.pairs)

    def _ask_both(self, check: _Check, way: Way) -> None:
        """Each part again, without a codec: of the node that is checked and of the second one."""
        check.stage = "pair"
        check.opinions.clear()
        check.until_s = time.monotonic() + self.rules.answer_s
        for index, part in enumerate(check.parts):
            sent = check.sent(index)
            if check.sample.answer is not None:
                self._ask(check, index, "first", check.sample.node, sent, way)
            if part.node == LOCAL:
                self._ask_bundle(check, index, "second", sent)
            else:
                self._ask(check, index, "second", part.node, sent, way)

    # ------------------------------------------------------------ what opinions mean

    def _advance(self, check: _Check, way: Way) -> None:
        silent = [part.node for index, part in enumerate(check.parts) if self._says_nothing(check, index)]
        if silent:  # another one is asked
            self._check = None
            sample = replace(check.sample, without=check.sample.without | {*silent}, tries=check.sample.tries + 1)
            self.counts["no opinion"] += 1
            if sample.tries < TRIES:
                self._waiting.appendleft(sample)
            else:
                self._nobody(sample, way)
            return
        if check.stage == "same":
            self._compare_same(check, way)
        elif check.stage == "pair":
            self._compare_pair(check, way)
        else:
            self._decide(check, way)

    def _says_nothing(self, check: _Check, index: int) -> bool:
        """Who was to confirm it did not answer, or has no finite sum either where the doubt is just that."""
        second = check.opinions.get((index, "second"))
        return isinstance(second, Failure) or (check.sample.answer is None and not np.isfinite(second).all())

    def _compare_same(self, check: _Check, way: Way) -> None:
        sample, other = check.sample, check.opinions[0, "second"]
        if check.parts[0].node == LOCAL:
            other = spot_sample.through(sample.sent, other)
        if other is not None and np.array_equal(sample.answer, other):
            self._finish(check, Verdict(), way)
        else:
            self._ask_both(check, way)

    def _compare_pair(self, check: _Check, way: Way) -> None:
        sample = check.sample
        if sample.answer is not None and any(
            isinstance(check.opinions[index, "first"], Failure) for index in range(len(check.parts))
        ):
            self.counts["no opinion"] += (
                1  # it does not answer: the ladder deals with that, and its next answer is checked
            )
            self._seen[sample.node] = 0
            self._check = None
            return
        self._learn(check)
        apart = [index for index in range(len(check.parts)) if not self._agree(check, index)]
        if not apart:
            self._finish(check, self._of_answer(check, way), way)
            return
        if check.more is None:
            # one expert at a time: then the alarm names it, and who holds that one alone may be the third; and on more rows, since
            # what another kind of machine computes is then told apart from what is wrong
            check.more = np.concatenate(list(self._recent[sample.layer]))
            check.parts = [one for index in apart for one in spot_sample.each(check.parts[index], sample.sent.pairs)]
            check.whole = False
            self._ask_both(check, way)
            return
        check.stage = "third"
        check.until_s = time.monotonic() + self.rules.answer_s
        for index in apart:
            part = check.parts[index]
            if part.node == LOCAL:
                continue  # it settles it alone
            sent = check.sent(index)
            usable = [
                way.link.is_up(name) and i not in (sample.node, part.node) for i, name in enumerate(way.table.nodes)
            ]
            like = [
                here and self.alike(name, way.table.nodes[sample.node]) for here, name in zip(usable, way.table.nodes)
            ]
            found, _ = spot_check.parts(sent.pairs, sample.layer, way.table.copies, like)
            if (
                self.bundle is not None
                and LOCAL not in sample.without
                and not (found and not self._like_us(sample, way))
            ):
                self._ask_bundle(check, index, "third", sent)
                continue
            found = found or spot_check.parts(sent.pairs, sample.layer, way.table.copies, usable)[0]
            if found:
                self._ask(check, index, "third", found[0].node, sent, way)
        if not (check.waiting or check.futures):
            self._decide(check, way)

    def _like_us(self, sample: Sample, way: Way) -> bool:
        return self.alike(way.table.nodes[sample.node], GROUND)

    def _learn(self, check: _Check) -> None:
        """Who gave the same sum of quantised experts, to the last bit, is of one kind."""
        for index, part in enumerate(check.parts):
            first, second = (check.opinions.get((index, whose)) for whose in ("first", "second"))
            if (
                first is not None
                and np.array_equal(first, second)
                and check.sample.sent.pairs["precision"][part.pairs].all()
            ):
                self._alike.add(frozenset((check.who[index, "first"], check.who[index, "second"])))

    def _agree(self, check: _Check, index: int) -> bool:
        if check.sample.answer is None:
            return True
        alike = self.alike(check.who[index, "first"], check.who[index, "second"])
        allowed = spot_check.tolerance(check.sample.sent.pairs[check.parts[index].pairs], alike)
        return spot_check.deviation(check.opinions[index, "first"], check.opinions[index, "second"]) <= allowed

    def _of_answer(self, check: _Check, way: Way) -> Verdict:
        """All parts agree: was the answer that was used their sum?"""
        sample = check.sample
        if not check.whole and sample.answer is not None:
            return Verdict()
        total = np.zeros(sample.sent.x.shape, np.float32)
        for index in range(len(check.parts)):
            with np.errstate(over="ignore", invalid="ignore"):
                total += check.opinions[index, "second"]
        name = way.table.nodes[sample.node]
        alike = all(self.alike(name, check.who[index, "second"]) for index in range(len(check.parts)))
        allowed = spot_check.tolerance(sample.sent.pairs, alike)
        if sample.answer is None:
            return spot_check.judge_answer(name, None, total, allowed)
        coded = spot_sample.through(sample.sent, total)
        if coded is None:
            return Verdict()
        allowed += spot_check.rounding(sample.sent.reply_codec, sample.sent.reply_step, coded)
        return spot_check.judge_answer(name, sample.answer, coded, allowed)

    def _decide(self, check: _Check, way: Way) -> None:
        """Votes part by part; a third opinion that failed is none."""
        self._check = None
        name = way.table.nodes[check.sample.node]
        found: dict[tuple[tuple[str, ...], bool], tuple[Verdict, np.ndarray]] = {}
        for index, part in enumerate(check.parts):
            if self._agree(check, index):
                continue
            third = check.opinions.get((index, "third"))
            pairs = check.sample.sent.pairs[part.pairs]
            verdict = spot_check.vote(
                Opinion(name, check.opinions[index, "first"]),
                Opinion(check.who[index, "second"], check.opinions[index, "second"]),
                None if third is None or isinstance(third, Failure) else Opinion(check.who[index, "third"], third),
                pairs,
                self.alike,
            )
            before = found.get((verdict.wrong, verdict.undecided))
            if before is not None:
                pairs = np.concatenate([before[1], pairs])
                verdict = max(before[0], verdict, key=lambda item: item.deviation)
            found[verdict.wrong, verdict.undecided] = verdict, pairs
        for verdict, pairs in found.values():
            self._act(check.sample.layer, pairs, verdict, way)

    def _finish(self, check: _Check, verdict: Verdict, way: Way) -> None:
        self._check = None
        if not verdict.wrong:
            sample = check.sample
            self.counts["agree"] += 1
            covered = np.zeros(len(sample.sent.pairs), bool)
            for part in check.parts:
                covered |= part.pairs
            self._checked |= spot_sample.copies(sample.node, sample.layer, sample.sent.pairs[covered])
        self._act(check.sample.layer, check.sample.sent.pairs, verdict, way)

    # ------------------------------------------------------------ consequences

    def _act(self, layer: int, pairs: np.ndarray, verdict: Verdict, way: Way) -> None:
        where = (
            f"layer {layer}, experts {','.join(map(str, np.unique(pairs['expert']).tolist()))} "
            f"({','.join(frame.PRECISIONS[p] for p in np.unique(pairs['precision']).tolist())}): "
            f"relative deviation {verdict.deviation:.2g}, allowed {verdict.allowed:.2g}; {verdict.why}"
        )
        if verdict.undecided:
            self.counts["undecided"] += 1
            self._alarm(GROUND_ID, "warning", "spot-check", f"sums differ: {where}")
        for node in verdict.wrong:
            if node in way.link.quarantined:
                continue
            if not spot_check.may_quarantine(len(way.link.quarantined), len(way.table.nodes)):
                text = f"{node} seems wrong and stays in use, since half of the fleet is quarantined: check the bundle here; {where}"
                self._alarm(node, "critical", "spot-check", text)
                continue
            text = f"{node} returns wrong sums: {where}"
            self.counts["quarantined"] += 1
            way.link.quarantine(node, text)
            self._waiting = deque(item for item in self._waiting if way.table.nodes[item.node] != node)
            try:
                self._on_quarantine(node, text)
            except (OSError, ValueError, RuntimeError) as error:
                text += f"; it could not be recorded ({error}): after a restart it serves again"
            self._alarm(
                node, "critical", "quarantine", f"{text}; quarantined: `spacemoe fleet release {node}` puts it back"
            )

    def _alarm(self, node: str, severity: str, kind: str, text: str) -> None:
        if kind != "quarantine":
            if (node, text.partition(":")[0]) in self._said:  # told once; the counts go on
                return
            self._said.add((node, text.partition(":")[0]))
        event = wire.Event(node, time.time(), severity, kind, text)
        self.alarms.append(event)
        log.critical("%s: %s", kind, text)
        self._on_alarm(event)


GROUND_ID = "ground"
