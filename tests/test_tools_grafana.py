"""The Grafana dashboard: each metric in it is on /metrics, and promtool reads each query."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

from conftest import lacking
from mission_cli import here

from ground_station import grafana, metrics, metrics_names
from ground_station.fleet import Instant

NAME = re.compile(r"\bspacemoe_[a-z_]+")


def queries(dashboard: dict) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_it_is_written_as_json(tmp_path):
    done = here("tools", "grafana", "-o", tmp_path / "fleet.json", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["panels"] == len(grafana.PANELS), done.stderr
    assert json.loads((tmp_path / "fleet.json").read_text()) == grafana.dashboard()
    assert json.loads(here("tools", "grafana").stdout) == grafana.dashboard()
    assert here("tools", "grafana", "-o", tmp_path).returncode == 2


def test_every_metric_in_it_exists():
    """Against what is really rendered, of a station that has everything."""
    from test_metrics import FULL, NODE, state_of, values

    shown = {key[0] for key in values(metrics.render({"sat-1": state_of(*NODE)}, Instant(1001.0, 51.0), FULL))}
    dashboard = grafana.dashboard()
    used = {name for query in queries(dashboard) for name in NAME.findall(query)}
    used |= set(NAME.findall(dashboard["templating"]["list"][1]["query"]["query"]))
    assert len(used) > 12 and used <= shown | {"spacemoe_archive_dropped_total"}
    assert used <= metrics_names.FAMILIES.keys()
    labels = {label for query in queries(dashboard) for label in re.findall(r"(\w+)=~?\"", query)}
    assert labels <= {label for family in metrics_names.FAMILIES.values() for label in family.labels}


def test_promtool_reads_every_query(tmp_path):
    if shutil.which("promtool") is None:
        lacking("promtool", "apt-get install --no-install-recommends prometheus")

    def check(expressions: list[str]) -> subprocess.CompletedProcess:
        rules = [
            {"record": f"q{i}", "expr": each.replace("$__rate_interval", "1m").replace("$node", ".*")}
            for i, each in enumerate(expressions)
        ]
        path = tmp_path / "rules.yml"
        path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))  # JSON is YAML
        return subprocess.run(["promtool", "check", "rules", str(path)], capture_output=True, text=True, timeout=60)

    done = check(queries(grafana.dashboard()))
    assert done.returncode == 0 and f"SUCCESS: {len(queries(grafana.dashboard()))} rules" in done.stdout, done.stderr
    assert check(["rate(spacemoe_tokens_total[1m]"]).returncode != 0  # it does look


def test_panels_do_not_overlap():
    places = [panel["gridPos"] for panel in grafana.dashboard()["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    ids = [panel["id"] for panel in grafana.dashboard()["panels"]]
    assert len(ids) == len(set(ids))
