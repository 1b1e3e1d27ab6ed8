"""The report of an experiment: figures against means worked out here, a page that fetches nothing, and folders that cannot be used.

The folders are written here, by pyarrow, in the form that experiment_store.py documents; one test goes through the real commands.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ground_station import experiment_page, experiment_pictures, experiment_sections, results_folder
from ground_station.picture_svg import Style
from ground_station.results_head import ResultsError

ROOT = Path(__file__).resolve().parents[1]
HOSTILE = "<script>alert(1)</script> \"'& $\\frac{ x"
POLICIES = (
    ("topk hot", "topk", "throttle"),
    ("topk", "topk", "cap"),
    (HOSTILE, "des", "cap"),
    ("ours", "budgeted", "cap"),
)
NODES, SEEDS, SLOTS, SLOT_S = ("sat-1", "sat-2"), (0, 1, 2), 700, 10.0
LIMIT_C, FLOOR, BOUND = 95.0, 0.3, 50_000.0
FIGURES = {
    "tokens": (40_000, 500),
    "useful_tokens": (35_000, 900),
    "perplexity_ratio": (1.02, 0.003),
    "kl_nats": (0.01, 0.001),
    "joules_per_token": (0.04, 0.0005),
    "joules": (1600, 10),
    "hottest_c": (93, 0.2),
    "lowest_soc": (0.7, 0.01),
    "final_soc": (0.9, 0.01),
    "least_coverage": (0.6, 0.01),
    "lost_capacity_ppm": (20, 1),
    "latency_ms_p50": (6, 0.1),
    "latency_ms_p99": (9, 0.1),
    "bytes_per_token": (6000, 20),
    "wall_s": (10, 1),
}


def head() -> dict:
    experiment = {
        "name": "trial",
        "scenario": "made-up",
        "slots": SLOTS,
        "slot_s": SLOT_S,
        "tokens_per_s": 8.0,
        "coverage": 0.5,
        "kl_nats": 0.1,
        "contacts": True,
        "seeds": list(SEEDS),
        "precisions": ["int8", "int4"],
        "costs": {"int8": [0.004, 0.9], "int4": [0.003, 0.6]},
        "source": "made up <b>here</b>",
        "contenders": [
            {"label": label, "policy": policy, "admission": admission, "knobs": {}}
            for label, policy, admission in POLICIES
        ],
    }
    scenario = {"name": "made-up", "limit_c": LIMIT_C, "floor_soc": FLOOR, "idle_w": 4.0, "busy_w": 8.0, "nodes": NODES}
    return {
        "format": 1,
        "digest": "ab" * 32,
        "experiment": experiment,
        "scenario": scenario,
        "bundle": {"name": "tiny", "manifest_sha256": "cd" * 32},
        "provenance": "simulated",
        "versions": {"numpy": "2"},
        "written_utc": "2026-01-01T00:00:00Z",
    }


def tables() -> dict[str, dict[str, list]]:
    rng = np.random.default_rng(5)
    found: dict[str, dict[str, list]] = {"runs": {}, "nodes": {}, "tokens": {}}

    def add(table: str, **row) -> None:
        for name, value in row.items():
            found[table].setdefault(name, []).extend(value if isinstance(value, (list, np.ndarray)) else [value])

    at = np.arange(SLOTS)
    for number, (label, policy, admission) in enumerate(POLICIES):
        for seed in SEEDS:
            drawn = {name: centre + spread * rng.standard_normal() for name, (centre, spread) in FIGURES.items()}
            drawn |= {
                "useful_tokens": drawn["useful_tokens"] + 1000 * number,
                "over_limit_s": 70.0 if number == 0 else 0.0,
            }
            add("runs", label=label, policy=policy, admission=admission, seed=seed, decisions_sha256="00" * 32, **drawn)
            add("tokens", label=[label] * 50, seed=[seed] * 50, slot=at[:50], bytes=[6000] * 50)
            add(
                "tokens",
                latency_ms=6 + number + rng.random(50),
                nats=rng.random(50),
                kl=rng.random(50),
                coverage=rng.random(50),
            )
            for node in NODES:
                temp_c = 80 + 5 * np.sin(at / 50) + number
                if number == 0 and node == "sat-2":
                    temp_c[333] = 97.25  # a single slot over the limit: thinning must not lose it
                keys = {"label": [label] * SLOTS, "seed": [seed] * SLOTS, "slot": at, "node": [node] * SLOTS}
                keys |= {"mission_s": (at + 1) * SLOT_S, "temp_c": temp_c, "soc": 0.8 - at / 2000, "price": at / 100.0}
                keys |= {
                    "lit": (at % 100 < 60) * 1.0,
                    "up": at % 50 < 40,
                    "runs_int8": 3.0 + 0 * at,
                    "runs_int4": 1.0 + 0 * at,
                }
                add("nodes", **keys)
    return found


def write(folder: Path, of: dict[str, dict[str, list]]) -> Path:
    folder.mkdir()
    (folder / "experiment.json").write_text(json.dumps(head()))
    for name, columns in of.items():
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    bound = {"useful_tokens": BOUND, "share_of_demand": 0.9, "mixes": 3, "too_kind_k": 0.05}
    (folder / "summary.json").write_text(json.dumps({"useful": "so and so", "bound": bound, "notes": ["a note"]}))
    return folder


@pytest.fixture(scope="module")
def made():
    return tables()


@pytest.fixture
def folder(made, tmp_path):
    return write(tmp_path / "results", made)


class Page(HTMLParser):
    """What a browser would see: nesting checked, cells of tables, attributes."""

    EMPTY = ("meta", "br", "link")

    def __init__(self, content: bytes):
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.feed(content.decode())
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.EMPTY:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if "style" in self.open:
            return
        self.words.append(text)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += text


def page_of(folder: Path, compression: Path | None = None) -> tuple[Page, bytes]:
    experiment_page.write(folder, compression=compression)
    content = (folder / "report.html").read_bytes()
    return Page(content), content


def cells(page: Page, label: str, columns: int) -> list[str]:
    return next(row for row in page.rows if row and row[0].endswith(f"  {label}") and len(row) == columns)


def test_the_table_holds_means_and_deviations_over_seeds(folder, made):
    page, _ = page_of(folder)
    runs = made["runs"]
    for label, _, _ in POLICIES:
        got = cells(page, label, 13)
        at = [index for index, each in enumerate(runs["label"]) if each == label]
        shapes = {"useful_tokens": (2, ",.0f", 1), "perplexity_ratio": (3, ".4f", 1), "joules_per_token": (4, ".5f", 1)}
        shapes |= {"over_limit_s": (5, ",.0f", 1), "hottest_c": (6, ".1f", 1), "lowest_soc": (7, ".1f", 100)}
        shapes |= {"latency_ms_p50": (8, ".2f", 1), "latency_ms_p99": (9, ".2f", 1), "bytes_per_token": (10, ",.0f", 1)}
        for name, (column, form, scale) in shapes.items():
            values = [scale * runs[name][index] for index in at]
            assert got[column] == f"{mean(values):{form}} ± {stdev(values):{form}}", (label, name)
        assert got[1] == "3"
        shares = [100 * runs["useful_tokens"][index] / BOUND for index in at]
        over = label == "topk hot"
        assert got[11] == ("–" if over else f"{mean(shares):.1f} ± {stdev(shares):.1f}")
        assert got[12] == ("invalid: 70 s over 95 °C" if over else "valid")
    best = next(text for text in page.words if text.startswith("Best of the baselines"))
    assert HOSTILE in best  # of the three baselines the one with the most useful tokens; `ours` has still more
    assert any(text.startswith("Best of budgeted within the limits: ours") for text in page.words)


def test_latencies_are_those_of_the_tokens_and_a_single_hot_slot_is_kept(folder, made):
    page, content = page_of(folder)
    values = sorted(v for v, label in zip(made["tokens"]["latency_ms"], made["tokens"]["label"]) if label == "ours")
    got = cells(page, "ours", 7)
    # rank 0.9 (n - 1) of 150 values is 134.1: a tenth of the way from the 135th to the 136th
    assert got[3] == f"{values[134] + 0.1 * (values[135] - values[134]):.2f}" and got[6] == "150"
    assert any(
        row[0] == "topk hot" and row[1:] == ["85.0 °C, 0 s over", "97.2 °C, 10 s over"] for row in page.rows if row
    )
    # and as a line: the highest of each 3 of 700 slots
    peaks = experiment_pictures.thinned(np.where(np.arange(700) == 333, 97.25, 80.0), np.max)
    assert len(peaks) == 234 and peaks.max() == 97.25 and (peaks > 80).sum() == 1


def test_nothing_is_fetched_run_or_named_twice(folder):
    page, content = page_of(folder)
    text = content.decode()
    assert not re.search(r"https?:|//|<script|@import|javascript:|<(img|link|iframe|object|embed)\b", text, re.I)
    names = {name for _, name, _ in page.attributes}
    assert not names & {"src", "srcset", "action", "data", "xmlns"} and not [n for n in names if n.startswith("on")]
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert ids and len(ids) == len(set(ids))
    pointed = [value for _, name, value in page.attributes if name == "href"]
    pointed += [found for _, _, value in page.attributes for found in re.findall(r"url\(([^)]*)\)", value)]
    assert pointed and all(value[0] == "#" and value[1:] in ids for value in pointed)
    assert "url(" not in text.partition("</style>")[0]
    pictures = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert len(pictures) == 11 and all(len(each) > 20 for each in pictures)  # 2 nodes x 3 traces, and 5 others
    assert all(f"var(--{name})" in text and f"--{name}:" in text for name in ("ink", "c1", "c2", "c3", "c4", "shade"))
    assert "fd" not in set(re.findall(r"#01[0-9a-f]{2}(fd)", text)) and "DejaVu" not in text


def test_hostile_labels_are_text(folder):
    page, content = page_of(folder)
    assert b"<script" not in content and b"<b>here" not in content
    assert sum(HOSTILE in row[0] for row in page.rows if row) >= 3
    assert any("made up <b>here</b>" in text for text in page.words)


def test_the_same_folder_gives_the_same_bytes(folder, tmp_path):
    first = experiment_page.write(folder, tmp_path / "a.html")
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7", "MATPLOTLIBRC": str(tmp_path / "matplotlibrc")}
    (tmp_path / "matplotlibrc").write_text("font.size: 30\nsvg.fonttype: path\n")  # what a user has set is not obeyed
    command = [
        sys.executable,
        "-m",
        "ground_station.cli",
        "experiment",
        "report",
        str(folder),
        "-o",
        "b.html",
        "--json",
    ]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == first | {"page": "b.html"} and first["finished"]
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert len(list(tmp_path.glob("*.partial"))) == 0


def test_the_commands_together(tmp_path):
    """experiment run, experiment report: the report reads what is really written, and shares are those of the summary."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}

    def spacemoe(*words: str) -> dict:
        command = [sys.executable, "-m", "ground_station.cli", "experiment", *words, "--json"]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    ran = spacemoe("run", "hot-eclipse", "--seeds", "3", "--slots", "2", "--only", "topk", "budgeted", "-o", "out")
    assert spacemoe("report", "out")["finished"]
    page = Page((tmp_path / "out" / "report.html").read_bytes())
    for row in ran["policies"]:
        got = cells(page, row["label"], 13)
        assert got[2] == f"{row['useful_tokens']['mean']:,.0f}"
        assert abs(float(got[11]) - 100 * row["share_of_bound"]) < 0.06  # both are rounded
        assert got[1] == "1"
    assert ran["bound"]["useful_tokens"] > 0 and "± " not in "".join(cells(page, "topk", 13))


def test_an_unfinished_folder_says_so(folder):
    (folder / "summary.json").unlink()
    (folder / "tokens.parquet").unlink()
    columns = pq.read_table(folder / "runs.parquet")
    pq.write_table(columns.slice(0, 5), folder / "runs.parquet")
    page, _ = page_of(folder)
    assert any("Unfinished: 5 of 12 runs" in text and "no upper bound" in text for text in page.words)
    assert cells(page, "topk", 13)[1] == "2" and cells(page, "topk", 13)[11] == "–"
    assert any("tokens.parquet is missing" in text for text in page.words)
    for name in ("runs", "nodes"):
        (folder / f"{name}.parquet").unlink()
    (folder / "parts").mkdir()
    (folder / "parts" / "0-1.npz").write_bytes(b"")
    page, content = page_of(folder)
    assert any("Unfinished: 1 of 12 runs" in text for text in page.words) and b'class="picture"' not in content
    assert not any(text.startswith("Best of") for text in page.words)


def _column(name: str, change) -> object:
    def damage(folder: Path) -> None:
        table, _, column = name.partition("/")
        read = pq.read_table(folder / f"{table}.parquet").to_pydict()
        read[column] = change(read[column])
        pq.write_table(
            pa.table({key: value for key, value in read.items() if value is not None}), folder / f"{table}.parquet"
        )

    return damage


def _bytes(name: str, change) -> object:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def _json(change) -> object:
    def damage(folder: Path) -> None:
        tree = json.loads((folder / "experiment.json").read_text())
        change(tree)
        (folder / "experiment.json").write_text(json.dumps(tree))

    return damage


DAMAGE = {
    "cut": (_bytes("runs.parquet", lambda b: b[: len(b) // 2]), "runs.parquet is damaged"),
    "no Parquet": (_bytes("nodes.parquet", lambda b: b"x" * 1000), "nodes.parquet is damaged"),
    "empty": (_bytes("tokens.parquet", lambda b: b""), "tokens.parquet is damaged"),
    "pages overwritten": (
        _bytes("nodes.parquet", lambda b: b[:4] + b"\xff" * 400 + b[404:]),
        "nodes.parquet is damaged",
    ),
    "no column": (_column("nodes/temp_c", lambda v: None), "no column temp_c"),
    "no labels": (_column("nodes/label", lambda v: None), "no column"),
    "texts": (_column("nodes/temp_c", lambda v: ["9"] * len(v)), "holds string, not numbers"),
    "lists": (_column("runs/hottest_c", lambda v: [[each] for each in v]), "not numbers"),
    "label of numbers": (_column("runs/label", lambda v: list(range(len(v)))), "not texts"),
    "no label": (_column("runs/label", lambda v: [None, *v[1:]]), "without a text"),
    "gap": (_column("nodes/temp_c", lambda v: [float("nan"), *v[1:]]), "has gaps"),
    "endless": (_column("nodes/temp_c", lambda v: [float("inf"), *v[1:]]), "holds a number over"),
    "other slots": (_column("nodes/slot", lambda v: [each + 1 for each in v]), "are not 0, 1, 2"),
    "other node": (_column("nodes/node", lambda v: ["sat-9"] * len(v)), "'sat-9'"),
    "run twice": (_column("runs/seed", lambda v: [0] * len(v)), "a run twice"),
    "other experiment": (_column("runs/label", lambda v: ["else"] + v[1:]), "two experiments"),
    "too many rows": (_column("runs/seed", lambda v: v), "over the limits"),
    "JSON cut": (_bytes("experiment.json", lambda b: b[:100]), "experiment.json is not JSON"),
    "summary of NaN": (
        _bytes("summary.json", lambda b: b'{"useful": "", "bound": {"useful_tokens": NaN}}'),
        "not JSON",
    ),
    "bound of text": (
        _bytes("summary.json", lambda b: b'{"useful": "", "bound": {"useful_tokens": "9"}}'),
        "is damaged",
    ),
    "newer": (_json(lambda tree: tree.update(format=2)), "is not of format 1"),
    "no scenario": (_json(lambda tree: tree.pop("scenario")), "lacks 'scenario'"),
    "no demand": (_json(lambda tree: tree["experiment"].update(tokens_per_s=0)), "cannot be"),
    "two alike": (_json(lambda tree: tree["experiment"].update(seeds=[1, 1, 2])), "different ones"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_line_and_leaves_no_page(folder, name, monkeypatch):
    damage, says = DAMAGE[name]
    damage(folder)
    if name == "too many rows":
        monkeypatch.setitem(results_folder.MAX_ROWS, "runs", 11)
    with pytest.raises(ResultsError) as caught:
        experiment_page.write(folder)
    text = str(caught.value)
    assert says in text and "\n" not in text and len(text) < 500 and not (folder / "report.html").exists()


def test_the_limits_hold_before_anything_is_read(folder, monkeypatch):
    monkeypatch.setattr(results_folder, "MAX_TABLE_BYTES", 1000)
    with pytest.raises(ResultsError, match="unpacks to"):
        experiment_page.write(folder)
    monkeypatch.undo()
    (folder / "runs.parquet").unlink()
    os.mkfifo(folder / "runs.parquet")  # would be waited for without end
    with pytest.raises(ResultsError, match="no plain file"):
        experiment_page.write(folder)
    with pytest.raises(ResultsError, match="is no folder"):
        experiment_page.write(folder / "nowhere")


def test_the_curve_of_codecs(folder, tmp_path):
    point = {"bytes_per_token": 1000.5, "spread": None}
    curve = {
        "blocks of 32, 4 bits": point | {"bits_per_value": 4.7, "loss_percent": 1.0},
        "blocks of 32, 8 bits": point | {"bits_per_value": 8.7, "loss_percent": -0.01},
        "importance 0.1": point | {"bits_per_value": 3.04, "loss_percent": 1.38},
        "importance 0.2": point | {"bits_per_value": 2.6, "loss_percent": 5.1},
    }
    path = tmp_path / "compression.json"
    path.write_text(json.dumps({"bundle": "<i>tiny", "n": 3, "curve": curve}))
    page, content = page_of(folder, path)
    assert ["importance 0.1", "3.04", "1,000", "+1.38"] in page.rows and [
        "blocks of 32, 8 bits",
        "8.70",
        "1,000",
        "-0.01",
    ] in page.rows
    assert b"<i>" not in content and any("<i>tiny, 3 draws" in text for text in page.words)
    for bad in (b"[]", b"{}", b'{"bundle": "x", "n": 3, "curve": {"importance 1": {"bits_per_value": "4"}}}'):
        path.write_bytes(bad)
        with pytest.raises(ResultsError, match="benchmark compression --json"):
            experiment_sections.wire_bytes((), path)


def test_the_limit_is_drawn_where_it_is():
    """Axes in a picture 190 high, 22 below its top and 34 above its foot: 134 units for 80 to 100, so 95 is at 22 + 33.5."""
    minutes = np.arange(1.0, 11.0)
    line = experiment_pictures.Line(minutes, np.full(10, 90.0), Style("c1"))
    svg = experiment_pictures.over_time("t", "alt", [line], "°C", (80, 100), (95, "limit 95 °C"), [(2, 4)])
    assert 'd="M 44 55.5 L 348 55.5"' in svg and "limit 95 °C" in svg
    assert re.search(r'd="M 74.4 89 L[^"]*348 89"', svg)  # 90 from minute 1 of 10 on: 44 + 304 / 10
    assert "M 104.8 156" in svg  # the eclipse begins at minute 2
    lit = np.array([1, 1, 0, 0, 0, 1, 1, 1, 0, 0])
    assert experiment_pictures.spans(minutes, lit < 0.5, 1.0) == [(2.0, 5.0), (8.0, 10.0)]


def test_numbers_stand_beside_their_points_and_hide_nothing():
    rng = np.random.default_rng(0)
    at, box = 150 + 12 * rng.standard_normal((12, 2)), (0.0, 300.0, 0.0, 300.0)
    wide = np.full(12, 14.0)

    def hidden(centres: np.ndarray) -> int:
        low, high = centres - (7, 5.5), centres + (7, 5.5)
        points = ((at[None] > low[:, None]) & (at[None] < high[:, None])).all(2).sum()
        over = ((low[:, None] < high[None]) & (high[:, None] > low[None])).all(2).sum() - len(at)
        return int(points + over)

    assert hidden(at + (12, 0)) > 0  # control: always on the right
    assert hidden(experiment_pictures.beside(at, wide, 11.0, box)) == 0
    points, texts = experiment_pictures.merged(np.array([[10.0, 10], [50, 50], [11, 10]]), ["1", "2", "3"])
    assert texts == ["1, 3", "2"] and points.tolist() == [[10, 10], [50, 50]]


def test_help_loads_nothing_of_this():
    code = "import sys, ground_station.cli as c\ntry:\n c.main(['experiment', 'report', '--help'])\nexcept SystemExit:\n pass\n"
    code += "assert not {'matplotlib', 'pyarrow', 'numpy'} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0 and "report.html" in done.stdout, done.stderr
