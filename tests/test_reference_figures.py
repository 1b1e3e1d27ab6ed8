"""The reference model's card and the compressors beside it: every figure comes from a file, xz is the xz of the shell.

Left out: the real figures, which a training run and `spacemoe evaluate` write.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import subprocess

import pytest
from conftest import lacking

from quantize.reference import baselines, card

WORDS = [f"{a}{b}" for a in ("ka", "mo", "tri", "sel", "un", "ver") for b in ("lo", "dan", "rit", "ma", "pes", "quo")]


def prose(seed: int, count: int) -> bytes:
    generator = random.Random(seed)
    return " ".join(generator.choice(WORDS) for _ in range(count)).encode()


# --- compressors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [prose(1, 300), prose(2, 9000)], ids=["2 kB", "50 kB"])
def test_xz_is_the_programs_xz(text):
    if shutil.which("xz") is None:
        lacking("xz", "apt-get install xz-utils")
    packed = subprocess.run(
        ["xz", "-9e", "--stdout", "--threads=1"], input=text, capture_output=True, check=True
    ).stdout
    ours_bytes = baselines.xz_bits_per_byte(text) * len(text) / 8
    assert abs(ours_bytes - len(packed)) <= 16  # a container field at most
    assert ours_bytes < len(text) / 2


def test_ppmd_against_its_own_container_and_priming():
    pyppmd = pytest.importorskip("pyppmd")
    text = prose(3, 3000)
    plain = baselines.ppmd_bits_per_byte(text)
    packed = pyppmd.compress(text, max_order=8, mem_size=1 << 24, variant="H")
    assert plain * len(text) / 8 == pytest.approx(len(packed), abs=8)

    def primed(reading: bytes):
        encoder = baselines._encoder()
        encoder.encode(reading)
        return encoder

    assert baselines.ppmd_bits_per_byte(text, primed(prose(4, 9000))) < plain  # the same words
    noise = random.Random(5).randbytes(50_000)
    assert baselines.ppmd_bits_per_byte(text, primed(noise)) > plain  # bytes that have nothing to do with it
    letters = (
        random.Random(9).randbytes(5000).hex().encode()
    )  # no run of eight comes twice: only priming can tell the next one
    assert baselines.ppmd_bits_per_byte(letters) > 4
    assert baselines.ppmd_bits_per_byte(letters, primed(letters)) < 1


def test_every_domain_is_coded_from_the_same_primed_state():
    pytest.importorskip("pyppmd")
    encoder = baselines._encoder()
    encoder.encode(prose(6, 4000))
    text, other = prose(7, 2000), prose(8, 2000)
    first = baselines._in_child(encoder, text)
    baselines._in_child(encoder, other)
    assert baselines._in_child(encoder, text) == first == baselines.ppmd_bits_per_byte(text, encoder)
    assert baselines.ppmd_bits_per_byte(text, encoder) < first  # the parent's own state did move on


def test_a_failed_child_is_reported():
    class Broken:
        def encode(self, text):
            raise MemoryError

    with pytest.raises(RuntimeError, match="is there 2 GB of memory"):
        baselines._in_child(Broken(), b"text")


def test_held_out_text_is_joined_by_blank_lines(tmp_path):
    (tmp_path / "heldout").mkdir()
    rows = [{"id": "a", "text": "one"}, {"id": "b", "text": "zw\u00f6lf\n"}]
    (tmp_path / "heldout/oak.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert baselines.held_out_text(tmp_path, "oak") == b"one\n\nzw\xc3\xb6lf\n"


# --- card ------------------------------------------------------------------------------------------------------------

FIGURES = {
    "sources.json": [
        {
            "domain": "oak",
            "packages": {"oak-text": "1.23-4"},
            "licence": "public domain",
            "documents": {"train": 321, "near_duplicates_dropped": 17},
            "bytes": {"train": 1234567},
            "heldout_containment_in_train": 0.0123,
        },
        {
            "domain": "ink",
            "packages": {"ink-a": "5", "ink-b": "6"},
            "licence": "MIT",
            "documents": {"train": 11, "near_duplicates_dropped": 4},
            "bytes": {"train": 7654},
            "heldout_containment_in_train": 0.0456,
        },
    ],
    "curve.json": {
        "loss": [{"tokens": 1e6 * n, "loss": 8 - n / 5, "lr": 1.0} for n in range(1, 21)],
        "dev": [
            {"tokens": 2_000_000, "mean_bits_per_byte": 2.3456, "lr": 1.0},
            {"tokens": 6_000_000, "mean_bits_per_byte": 1.9456, "lr": 1.0},
            {"tokens": 9_000_000, "mean_bits_per_byte": 1.2, "lr": 0.1},
        ],
    },
    "training.json": {
        "step": 3456,
        "tokens": 28_311_552,
        "elapsed_s": 7380,
        "recipe": {
            "sequences_per_step": 16,
            "matrix_rate": 0.0234,
            "matrix_momentum": 0.95,
            "matrix_decay": 0.02,
            "other_rate": 0.00345,
            "warmup_steps": 211,
            "balance_weight": 0.01,
            "z_weight": 0.0001,
            "clip": 1.5,
        },
    },
    "baselines.json": {
        "domains": {
            "oak": {"xz_9e": 2.1111, "ppmd_o8": 1.9191, "ppmd_o8_primed": 1.8181},
            "ink": {"xz_9e": 3.1111, "ppmd_o8": 2.9191, "ppmd_o8_primed": 2.8181},
        },
        "mean": {"xz_9e": 2.6111, "ppmd_o8": 2.4191, "ppmd_o8_primed": 2.3181},
        "primed_with_bytes": 31_400_000,
    },
    "evaluation.json": {
        "fp32": {
            "domains": {"oak": 1.5151, "ink": 2.5252},
            "mean_bits_per_byte": 2.0202,
            "expert_use": {
                "mutual_information_bits": [0.1234, 0.5678],
                "domains": {
                    "oak": [[0.1, 0.6, 0.3, 0.0], [0.25, 0.25, 0.3, 0.2]],
                    "ink": [[0.7, 0.1, 0.2, 0.0], [0.0, 0.5, 0.5, 0.0]],
                },
            },
        },
        "int8": {
            "domains": {"oak": 1.5353, "ink": 2.5454},
            "mean_bits_per_byte": 2.0404,
            "perplexity_ratio_to_fp32": 1.0067,
        },
    },
}
CONTROL = {"domains": {"oak": 1.6161, "ink": 2.6262}, "mean_bits_per_byte": 2.1212, "tokens": 28_311_552}


@pytest.fixture
def figures(tmp_path, monkeypatch):
    """A folder of made-up figures that the card reads; none of them is the real model's."""
    folder = tmp_path / "figures"
    folder.mkdir()
    monkeypatch.setattr(card, "FIGURES", folder)
    monkeypatch.setattr(card, "CHECKPOINT", tmp_path / "checkpoint")
    for name, value in copy.deepcopy(FIGURES).items():
        (folder / name).write_text(json.dumps(value))
    return folder


def rows(text: str) -> dict[str, list[list[str]]]:
    """The tables' rows by their first cell."""
    found: dict[str, list[list[str]]] = {}
    for line in text.splitlines():
        if line.startswith("| "):
            first, *rest = [cell.strip() for cell in line.strip("|").split("|")]
            found.setdefault(first, []).append(rest)
    return found


def test_card_holds_the_figures(figures):
    text = card.render()
    table = rows(text)
    data, quality, experts = table["oak"]
    assert data == ["oak-text (1.23-4)", "public domain", "321", "1,234,567"]
    assert quality == ["1.515", "1.535", "-", "2.111", "1.919", "1.818"]
    assert experts == ["1 (60%), 2 (30%), 0 (10%)", "2 (30%), 0 (25%), 1 (25%)"]
    assert table["**mean**"] == [["**2.020**", "**2.040**", "-", "**2.611**", "**2.419**", "**2.318**"]]
    assert table["dev bits per byte (mean)"] == [["2.346", "1.946", "1.200"]]
    assert table["training loss (nats/token)"][0][0] == "7.80" and table["training loss (nats/token)"][0][-1] == "4.00"
    for words in (
        "21 near-duplicates were dropped",
        "at most 4.6% of a domain's held-out",
        "28.3 M tokens in 3,456 steps of 16 x 512, 123 minutes",
        "(rate 0.0234, momentum 0.95, decay 0.02)",
        "AdamW (0.00345)",
        "warm-up 211 steps",
        "clip 1.5",
        "all 31 MB of the training text",
        "int8 1.0067",
        "0.123, 0.568 bit",
        "has not been trained",
    ):
        assert words in text, words


def test_card_follows_its_files(figures):
    before = card.render()
    changed = copy.deepcopy(FIGURES["evaluation.json"])
    changed["fp32"]["domains"]["oak"] = 1.7171
    (figures / "evaluation.json").write_text(json.dumps(changed))
    (figures / "control.json").write_text(json.dumps(CONTROL))
    text = card.render()
    assert rows(before)["oak"][1][0] == "1.515" and rows(text)["oak"][1][:3] == ["1.717", "1.535", "1.616"]
    assert rows(text)["**mean**"][0][2] == "**2.121**"
    assert "saw the same 28.3 M tokens" in text and "has not been trained" not in text


def test_unfinished_control_is_compared_at_equal_tokens_and_rates(figures):
    dev = [
        {"tokens": 3_000_000, "mean_bits_per_byte": 2.4, "lr": 1.0},
        {"tokens": 7_000_000, "mean_bits_per_byte": 2.2, "lr": 1.0},  # the model's rate was falling by then
        {"tokens": 5_000_000, "mean_bits_per_byte": 2.3, "lr": 0.9},  # the control's own was
    ]
    assert rows(card.render()).get("3.0") is None
    (figures / "control_curve.json").write_text(json.dumps({"dev": dev}))
    table = rows(card.render())
    # a quarter of the way from 2.3456 at 2 M to 1.9456 at 6 M
    assert table["3.0"] == [["2.246", "2.400"]] and not {"7.0", "5.0"} & set(table)


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_missing_figures_are_named(figures, name):
    (figures / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        card.render()


def test_collect_copies_what_a_run_recorded(figures, tmp_path):
    run = tmp_path / "work/runs/moe"
    run.mkdir(parents=True)
    lines = [{"start": True, "step": 0}]
    lines += [{"step": n, "tokens": 100 * n, "loss": 9 - n / 100, "lr": 1.0, "norm": 3} for n in range(1, 251)]
    lines.insert(100, {"step": 99, "tokens": 9900, "dev_mean": 3.25, "dev": {"oak": 3.25}})
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "work/sources.json").write_text(json.dumps([]))
    card.CHECKPOINT.mkdir()
    (card.CHECKPOINT / "training.json").write_text('{"step": 250}')
    card.collect(tmp_path / "work", "moe")
    curve = json.loads((figures / "curve.json").read_text())
    assert curve["dev"] == [{"tokens": 9900, "mean_bits_per_byte": 3.25, "lr": 1.0}]
    assert curve["loss"][0] == {"tokens": 100, "loss": 8.99, "lr": 1.0} and curve["loss"][-1]["tokens"] == 25000
    assert len(curve["loss"]) < 100  # thinned out from 250
    assert json.loads((figures / "training.json").read_text()) == {"step": 250}
    assert json.loads((figures / "sources.json").read_text()) == []


def test_what_was_given_up_of_a_run_is_not_in_its_curve():
    log = [{"start": True, "step": 0}, {"step": 5, "loss": 3.0}, {"step": 9, "loss": 2.0}, {"step": 9, "dev_mean": 1.2}]
    again = [{"start": True, "step": 5}, {"step": 8, "loss": 2.5}]
    assert card.final_branch(log) == log
    assert card.final_branch(log + again) == [*log[:2], *again]
