"""The demo's result: the ledger as JSON has it, and the same as text. Leaves out: the demo itself (demo.py), a scenario's part
(scenario_demo.py).
"""

from __future__ import annotations

from collections import Counter

from ground_station import demo_links, ledger

BUSY_SHARE = 0.7  # load average per core before the start, above which speeds are said to be of a busy machine


def _sample(states, node: str, name: str):
    state = states.get(node)
    return None if state is None else state.samples.get(name)


def _value(states, node: str, name: str) -> float | None:
    state = states.get(node)
    return None if state is None else state.value(name)


def ledger_of(options, text, costs, energy: ledger.Ledger, remote, table, states, parity, broker_kind) -> dict:
    """Everything that is known after the last token."""
    decode = costs[1:] or costs
    seconds = sum(cost.total_ms for cost in decode) / 1e3
    total = energy.total
    nodes = []
    for name, spent in energy.nodes.items():
        known = isinstance(spent, ledger.Spent)
        temp, power = _sample(states, name, "temp_c"), _sample(states, name, "power_w")
        nodes.append(
            {
                "id": name,
                "served": remote.served[name],
                "temp_c": _value(states, name, "temp_c"),
                "power_w": _value(states, name, "power_w"),
                "energy_j": round(spent.joules.total, 3) if known else None,
                "joules": spent.joules.tree() if known else None,
                "joules_provenance": spent.provenance if known else None,
                "joules_scope": spent.scope if known else None,
                "joules_unknown": energy.unknown.get(name),
                "provenance": power.provenance if power is not None else temp.provenance if temp is not None else None,
            }
        )
    return {
        "text": text.decode([cost.token_id for cost in costs]),
        "tokens": len(costs),
        "tokens_per_s": round(len(decode) / seconds, 2),
        "ttft_s": round(costs[0].total_ms / 1e3, 4),
        "bytes_per_token": {
            "sent": round(sum(cost.sent_bytes for cost in decode) / len(decode), 1),
            "received": round(sum(cost.received_bytes for cost in decode) / len(decode), 1),
        },
        "joules_per_token": None if total is None else round(total.total / len(costs), 4),
        "joules": None if total is None else total.tree(),
        "joules_method": ledger.METHOD,
        "joules_unknown": energy.unknown,
        "joules_scope": "what each board's meter meters (a Jetson's module, a Raspberry Pi's supply), summed over all nodes from just "
        "before the prompt to just after the last token, idle power included; per generated token",
        "joules_provenance": energy.provenance,
        "breakdown_ms": {
            part: round(sum(getattr(cost, f"{part}_ms") for cost in decode) / len(decode), 4)
            for part in ("total", "trunk", "select", "codec", "wire", "expert")
        },
        "nodes": nodes,
        "ladder": dict(Counter(rung.rung for cost in costs for rung in cost.rungs)),
        "parity": parity,
        "broker": broker_kind,
        "precision": options.precision,
        "codec": options.codec,
        "policy": options.policy,
        "seed": options.sampling.seed,
        "temperature": options.sampling.temperature,
        "top_p": options.sampling.top_p,
    }


def report(result: dict) -> str:
    """The ledger as text of at most 80 columns."""
    sent, received = result["bytes_per_token"]["sent"], result["bytes_per_token"]["received"]
    joules = result["joules_per_token"]
    parts = result["joules"]
    energy = [
        f"{'joules unknown' if parts is None else 'joules'}: {name}: {reason}"
        for name, reason in result["joules_unknown"].items()
    ]
    if parts is not None:
        energy.append(f"{joules:.3f} J/token ({result['joules_provenance']}; boards, idle power included)")
        if parts["compute"] is not None:
            energy.append(f"{parts['total']:.2f} J: " + ", ".join(f"{kind} {parts[kind]:.2f}" for kind in ledger.KINDS))
    lines = [
        f"{result['tokens']} tokens, {result['tokens_per_s']:.1f} tokens/s, first after {result['ttft_s'] * 1e3:.0f} ms",
        f"{sent:.0f} bytes/token to the experts, {received:.0f} back ({result['codec']})",
        *energy,
        "ms/token: " + ", ".join(f"{name} {value:.2f}" for name, value in result["breakdown_ms"].items()),
        "",
        f"{'node':16}{'served':>8}{'temp °C':>9}{'power W':>9}{'J':>8}  provenance",
    ]
    for node in result["nodes"]:
        cells = ["-" if node[key] is None else f"{node[key]:.1f}" for key in ("temp_c", "power_w", "energy_j")]
        lines.append(f"{node['id']:16}{node['served']:>8}{cells[0]:>9}{cells[1]:>9}{cells[2]:>8}  {node['provenance']}")
    ladder = result["ladder"]
    lines.append(
        "ladder: "
        + (", ".join(f"{rung} {count}" for rung, count in ladder.items()) if ladder else "no fallback was needed")
    )
    lines += demo_links.lines(result["links"])
    lines += _prices(result["prices"], result["expert_runs_per_token"])
    parity = result["parity"]
    if parity is not None:
        verdict = {True: "equal", False: "DIFFERENT", None: "not comparable (ladder used)"}[parity["equal"]]
        lines.append(
            f"parity with one process: {verdict}, {parity['tokens_equal']} of {parity['tokens']} tokens, "
            f"largest logit difference {parity['max_logit_diff']:g}"
        )
    if result["load_average"] > BUSY_SHARE * result["cores"]:
        lines.append(
            f"the machine was busy before this began (load {result['load_average']:.1f} on {result['cores']} cores):\n"
            "speed, and with it joules per token, say little"
        )
    if "scenario" in result:
        from ground_station import scenario_demo

        lines += ["", scenario_demo.table(result["scenario"])]
    return "\n".join(lines)


def _prices(prices: dict | None, runs: dict) -> list[str]:
    """What the prices did, in a line per node."""
    if prices is None:
        return []
    lines = [
        f"expert runs/token: {runs['policy']:.2f} of topk's {runs['topk']}"
        + ("" if runs["policy_under_load"] is None else f"; under load {runs['policy_under_load']:.2f}")
        + f"; price updates: {prices['updates']}",
        f"{'nats per joule':16}{'first':>9}{'last':>9}{'max':>9}{'heat J':>9}{'battery J':>10}{'uJ/run':>9}",
    ]
    for node, row in prices["nodes"].items():
        price, run_j = row["price"], max(row["joules_per_run"].values(), default=0.0)
        lines.append(
            f"{node:16}{price['first']:>9.3g}{price['last']:>9.3g}{price['max']:>9.3g}"
            f"{row['heat_queue_j']['last']:>9.3g}{row['battery_queue_j']['last']:>10.3g}{run_j * 1e6:>9.3g}"
        )
    return lines
