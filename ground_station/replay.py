"""Replays a recorded run without boards: recorded looks -> prices -> policy -> choices, in this process, and compares decision by decision.

Experts run here, with the same partition, codec and grouping; nothing recorded decides anything but the looks (and the first costs). The
ladder's answers cannot be had again: from a token that used a rung, or where nodes were down that the policy did not know of, the rest of
that text is not comparable.
Beside it a shadow policy decides on the same router logits with the thermal model's temperatures in place of the sensors': how many
decisions hang on the difference. Leaves out: other machines, whose arithmetic may round another way (then decisions may differ).
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from firmware_sim import scenario as scenarios
from ground_station import live_prices, rates, recording, replay_heat, selection
from ground_station.decode import Decoder
from ground_station.dispatch import Table
from ground_station.live_prices import COLUMNS, Look, Setting
from ground_station.live_setting import BLIND, policy_of, setting_of
from ground_station.local import LocalExperts
from ground_station.local_wire import Importance, WiredExperts
from ground_station.placement import round_robin
from ground_station.recording import Recording, RecordingError
from ground_station.sampling import Sampling
from ground_station.selection_choice import Choice, Policy
from ground_station.selection_world import World
from ground_station.text import Text
from ground_station.trunk import Trunk
from node_agent import compress, shard


@dataclass(frozen=True, eq=False)
class Updates:
    """Recorded looks, and before which call of the policy each came."""

    looks: list[Look]
    calls: list[int]


class Priced:
    """A policy under the prices of recorded looks: each takes effect before its call. `prices`: what followed, [2, N] per look."""

    def __init__(self, policy: Policy, setting: Setting, world: World, updates: Updates, blind: bool):
        self._policy, self._setting, self._world, self._updates, self._blind = policy, setting, world, updates, blind
        self._state = live_prices.start(setting)
        self._next = self._call = 0
        self.prices: list[np.ndarray] = []

    def __call__(self, layer: int, logits: np.ndarray, world: World | None = None) -> Choice:
        updates = self._updates
        while self._next < len(updates.looks) and updates.calls[self._next] <= self._call:
            look = updates.looks[self._next]
            self._state, self._world = live_prices.step(self._setting, self._state, look, self._world)
            self.prices.append(np.stack([self._state.joule_price, self._state.byte_price]))
            self._next += 1
        self._call += 1
        return self._policy(layer, logits) if self._blind else self._policy(layer, logits, self._world)


def same(a: Choice, b: Choice) -> bool:
    """Whether two decisions are one, to the last bit."""
    for name in ("experts", "gates", "nodes", "precisions"):
        mine, other = getattr(a, name), getattr(b, name)
        if (mine is None) != (other is None) or (mine is not None and not np.array_equal(mine, other)):
            return False
    return True


class Compared:
    """A policy whose decisions are compared, call by call, with recorded ones where `comparable` [Q]; `shadow` is asked too, and
    never followed."""

    def __init__(self, policy: Policy, recorded: list[Choice], comparable: np.ndarray, shadow: Policy | None):
        self._policy, self._recorded, self._comparable, self._shadow = policy, recorded, comparable, shadow
        self.choices: list[Choice] = []
        self.equal = self.otherwise = 0
        self.first: tuple[int, int] | None = None  # call and layer of the first difference

    def __call__(self, layer: int, logits: np.ndarray, world: World | None = None) -> Choice:
        call = len(self.choices)
        choice = self._policy(layer, logits, world)
        self.choices.append(choice)
        if call >= len(self._comparable) or self._comparable[call]:
            if call < len(self._recorded) and same(choice, self._recorded[call]):
                self.equal += 1
            elif self.first is None:
                self.first = (call, layer)
        if self._shadow is not None and not same(choice, self._shadow(layer, logits, world)):
            self.otherwise += 1
        return choice


def run(folder: Path, bundle: Path) -> dict:
    """Replays and compares; the figures as JSON has them, `equal` first.

    Raises: RecordingError for a recording that cannot be used or is of another bundle, shard.BundleError.
    """
    found = recording.read(folder)
    head = found.head
    manifest = shard.read_manifest(bundle)
    if shard.sha256_of(bundle / shard.MANIFEST) != head.manifest_sha256:
        raise RecordingError(
            f"{folder} was recorded with another bundle ({head.bundle[:60]}) than {bundle}: give that one by --bundle DIR"
        )
    table, setting, world = _fleet(found, manifest)
    trunk, text = Trunk(bundle, manifest), Text(bundle, manifest)
    experts = _experts(found, bundle, manifest, table)
    prompt_ids = ([manifest.bos_id] if manifest.bos_id is not None else []) + text.encode(head.prompt)
    longest = int(found.text_tokens.max()) if len(found.text_tokens) else 0
    if len(prompt_ids) + longest > manifest.dims.max_context:
        raise RecordingError(f"{folder} holds a text that is longer than the model's context: record again")
    blind = head.policy in BLIND
    temperature, stands = replay_heat.compare(found)
    tokens_alike, comparable = _comparable(found)
    priced = Priced(policy_of(head.policy, head.seed, bundle, manifest), setting, world, _updates(found), blind)
    shadow = None
    if not blind and setting.orbit is None and len(found.looks):
        other = replace(found, looks=replay_heat.replaced(found.looks, COLUMNS, stands))
        shadow = Priced(policy_of(head.policy, head.seed, bundle, manifest), setting, world, _updates(other), False)
    compared = Compared(priced, found.choices, comparable, shadow)
    tokens = _generate(found, Decoder(trunk, compared, experts, manifest.eos_ids), prompt_ids)
    return _result(found, manifest, compared, priced, shadow, tokens, tokens_alike, comparable, temperature)


def _comparable(found: Recording) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens [T] and calls [Q] can be had again: in each text those before its first token that is not whole. A codec that is steered
    by what it has spent carries a difference on into the texts after it."""
    tokens, calls = np.ones(len(found.tokens), bool), np.zeros(len(found.choices), bool)
    start = 0
    for count in found.text_tokens.tolist():
        broken = np.flatnonzero(~found.token_whole[start : start + count])
        if len(broken):
            end = len(tokens) if found.head.bits_per_value is not None else start + count
            tokens[start + broken[0] : end] = False
        start += count
    ends = np.append(found.token_call[1:], len(found.choices))
    for first, end, alike in zip(found.token_call.tolist(), ends.tolist(), tokens.tolist()):
        calls[first:end] = alike
    return tokens, calls


def _updates(found: Recording) -> Updates:
    return Updates([found.look(i) for i in range(len(found.looks))], found.look_call.tolist())


def _fleet(found: Recording, manifest: shard.Manifest) -> tuple[Table, Setting, World]:
    head = found.head
    if head.codec not in compress.CODECS or head.policy not in selection.POLICIES:
        raise RecordingError(
            f"the recording's codec or policy is unknown to this build ({head.codec[:20]}, {head.policy[:20]})"
        )
    if not 0 < head.temp_limit_c < 1000:
        raise RecordingError("the recording's temperature limit cannot be: record again")
    memory = {board.node: board.memory_bytes for board in head.boards}
    table = Table(round_robin(manifest, memory, head.precision, (head.replica,) if head.replica else ()))
    if tuple(table.nodes) != tuple(board.node for board in head.boards):
        raise RecordingError("the recording's nodes are not those of its partition: record again")
    orbit = None
    if head.scenario:
        from ground_station import scenario_demo

        scenario = scenarios.parse(head.scenario, "the recording's scenario")
        orbit = scenario_demo.orbit(scenario, tuple(table.nodes))
    setting = setting_of(table, manifest, found.costs, head.temp_limit_c, orbit)
    world = World.of(table, manifest.dims.experts, found.costs.joules, found.costs.ms)
    return table, setting, world


def _experts(found: Recording, bundle: Path, manifest: shard.Manifest, table: Table) -> LocalExperts:
    head = found.head
    allocator = rates.for_codec(head.codec, bundle, manifest, bits_per_value=head.bits_per_value)
    if allocator is None:
        return LocalExperts(bundle, manifest, table, head.codec)
    return WiredExperts(bundle, manifest, table, Importance(allocator))


def _generate(found: Recording, decoder: Decoder, prompt_ids: list[int]) -> list[int]:
    sampling = Sampling(found.head.temperature, found.head.top_p, found.head.seed)
    return [
        cost.token_id
        for count in found.text_tokens.tolist()
        for cost in decoder.generate(prompt_ids, count, sampling, ignore_eos=True)
    ]


def _result(
    found: Recording,
    manifest: shard.Manifest,
    compared: Compared,
    priced: Priced,
    shadow: Priced | None,
    tokens: list[int],
    tokens_alike: np.ndarray,
    calls_alike: np.ndarray,
    temperature: dict[str, dict],
) -> dict:
    head, recorded, comparable = found.head, len(found.choices), int(calls_alike.sum())
    left_out = np.flatnonzero(~tokens_alike)
    alike = np.array(tokens) == found.tokens
    different = np.flatnonzero(~alike & tokens_alike)
    first_token = int(different[0]) if len(different) else None
    prices = np.array(priced.prices).reshape(-1, 2, len(head.boards))
    used = int((found.look_call < recorded).sum())  # a look after the last call decided nothing
    prices_equal = len(prices) == used and np.array_equal(prices, found.prices[:used], equal_nan=True)
    first = None
    if compared.first is not None:
        call, layer = compared.first
        token = int(np.searchsorted(found.token_call, call, "right")) - 1
        first = {"call": call, "token": token, "layer": layer}
    decisions_equal = compared.equal == comparable and len(compared.choices) == recorded
    nothing = comparable == 0
    why_not = "" if shadow is not None else _no_shadow(head)
    equal = decisions_equal and first_token is None and prices_equal
    return {
        "equal": None if nothing and equal else equal,
        "decisions": {
            "recorded": recorded,
            "replayed": len(compared.choices),
            "comparable": comparable,
            "equal": compared.equal,
            "first_difference": first,
            "not_comparable_because": ""
            if not len(left_out)
            else f"the ladder or a node that was down: {len(left_out)} tokens, the first {left_out[0]}",
            "recorded_sha256": head.choices_sha256,
            "replayed_sha256": recording.digest(compared.choices),
        },
        "tokens": {
            "recorded": len(found.tokens),
            "replayed": len(tokens),
            "comparable": int(tokens_alike.sum()),
            "equal": int((alike & tokens_alike).sum()),
            "first_difference": first_token,
        },
        "prices": {"updates": used, "equal": bool(prices_equal), "nodes": [board.node for board in head.boards]},
        "temperature": temperature,
        "with_simulated_temperatures": {
            "different_decisions": None if shadow is None else compared.otherwise,
            "of": len(compared.choices),
            "why_not": why_not,
        },
        "policy": head.policy,
        "seed": head.seed,
        "scenario": bool(head.scenario),
        "bundle": manifest.name,
        "truncated": head.truncated,
    }


def _no_shadow(head: recording.Head) -> str:
    if head.policy in BLIND:
        return f"{head.policy} sees no temperature"
    if head.scenario:
        return "prices follow the virtual satellites, whose temperatures are simulated in the run itself"
    return "there is no look at the fleet"


def report(result: dict) -> str:
    """The same as text of at most 80 columns."""
    decisions, tokens, shadow = result["decisions"], result["tokens"], result["with_simulated_temperatures"]
    verdict = {True: "the same decisions", False: "DIFFERENT decisions", None: "nothing to compare"}[result["equal"]]
    lines = [
        f"replay of {result['policy']} on {result['bundle']}: {verdict}",
        f"decisions: {decisions['equal']} of {decisions['comparable']} equal, {decisions['recorded']} recorded",
        f"tokens: {tokens['equal']} of {tokens['comparable']} equal",
        f"price updates: {result['prices']['updates']}, " + ("equal" if result["prices"]["equal"] else "DIFFERENT"),
    ]
    if decisions["not_comparable_because"]:
        lines.append(f"not comparable: {decisions['not_comparable_because']}")
    if (first := decisions["first_difference"]) is not None:
        lines.append(f"first difference: token {first['token']}, layer {first['layer']} (call {first['call']})")
    lines += ["", f"{'node':16}{'model':10}{'n':>6}{'mean K':>9}{'rms K':>8}{'largest K':>11}  sensor says"]
    for node, row in result["temperature"].items():
        for name in ("foster", "one_node"):
            each = row[name]
            if each["n"]:
                figures = f"{each['n']:>6}{each['mean_k']:>9.2f}{each['rms_k']:>8.2f}{each['largest_k']:>11.2f}"
                lines.append(f"{node:16}{name:10}{figures}  {row['measured']['temp_c']}")
            else:
                lines.append(f"{node:16}{name:10}  {each['source'][:52]}")
    lines.append("")
    if shadow["different_decisions"] is None:
        lines.append(
            textwrap.fill(f"modelled temperatures in place of the sensors': not asked, {shadow['why_not']}", 80)
        )
    else:
        lines.append(
            f"with modelled temperatures in place of the sensors': {shadow['different_decisions']} of {shadow['of']} "
            "decisions\nwould have been others"
        )
    return "\n".join(lines)
