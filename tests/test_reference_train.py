"""Training as a user runs it: processes on a made-up corpus of two domains, full-size model, a few short steps.

The schedule is checked against multipliers worked out by hand; a resumed run must equal one that was never interrupted.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.torch, pytest.mark.slow]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from quantize.reference import train as training  # noqa: E402
from quantize.reference.export import evaluate_held_out, load_model  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
STEP_TOKENS = 1024  # 2 sequences of 512
COMMON = ["--no-compile", "--log-seconds", "0"]
SHORT = ["--sequences-per-step", "2", "--sequences-per-micro", "1", "--warmup-steps", "2"]


def command(work: Path, name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "quantize.reference.train", "--work", str(work), "--name", name, *arguments]


def run(work: Path, name: str, *arguments: str) -> list[dict]:
    """The lines that a run logs."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command(work, name, *arguments), env=environment, cwd=work, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def schedule(work: Path, name: str) -> list[list[float]]:
    return [
        [float(cell) for cell in line.split(",")]
        for line in (work / "runs" / name / "schedule.csv").read_text().split()
    ]


def saved(work: Path, name: str, file: str = "state.pt") -> dict:
    return torch.load(work / "runs" / name / file, weights_only=True)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Token files of two domains: counting in words, and a short list of commands, with a tokenizer of their own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    work = tmp_path_factory.mktemp("work")
    digits = "nought one two three four five six seven eight nine".split()
    rng = np.random.default_rng(0)
    texts = {
        "count": [" ".join(digits[int(d)] for d in str(n)) + ".\n" for n in range(1000, 3000)],
        "shell": [f"ls -l /tmp/{rng.integers(10**6)} | wc -{'lcw'[rng.integers(3)]}\n" for _ in range(1500)],
    }
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator((line for lines in texts.values() for line in lines), trainer)
    tokenizer.save(str(work / "tokenizer.json"))
    (work / "tokens").mkdir()
    for name, lines in texts.items():
        ids = np.array([0, *tokenizer.encode("".join(lines)).ids], dtype=np.uint16)
        for prefix, part in (("", ids[:6000]), ("dev-", ids[6000:6700]), ("heldout-", ids[6700:7400])):
            assert len(part) > 600
            np.save(work / "tokens" / f"{prefix}{name}.npy", part)
    return work


@pytest.fixture(scope="module")
def moe(work) -> list[dict]:
    """The log of a run of six steps, one process."""
    return run(work, "moe", *COMMON, *SHORT, "--processes", "1", "--until-tokens", str(6 * STEP_TOKENS))


def test_run_learns_and_its_schedule_is_the_one_worked_out_by_hand(work, moe):
    # The fall takes 22 % of 6144 tokens: 1351.68, from 4792.32 on. At 5120 a share of 327.68 / 1351.68 is behind it.
    rows = schedule(work, "moe")
    assert [row[:2] for row in rows] == [[step, step * STEP_TOKENS] for step in range(6)]
    assert [row[2] for row in rows] == pytest.approx([0.5, 1, 1, 1, 1, 1 - 327.68 / 1351.68])
    losses = [line["loss"] for line in moe if "loss" in line]
    assert len(losses) == 6 and losses[0] == pytest.approx(np.log(4096), abs=0.2)  # it starts knowing nothing
    assert losses[-1] < losses[0] - 1
    dev = [line for line in moe if "dev_mean" in line]
    assert [line["tokens"] for line in dev] == [5 * STEP_TOKENS, 6 * STEP_TOKENS]  # before the fall, and at the end
    assert set(dev[0]["dev"]) == {"count", "shell"}
    assert dev[0]["dev_mean"] == pytest.approx(sum(dev[0]["dev"].values()) / 2, abs=1e-3)
    state, stable = saved(work, "moe"), saved(work, "moe", "stable.pt")
    assert (state["step"], state["phase"], stable["step"], stable["phase"]) == (6, "done", 5, "stable")
    assert sum(state["counters"]) == 12 and sum(stable["counters"]) == 10
    assert not list((work / "runs/moe").glob("*.part"))
    model, _ = load_model(work / "runs/moe/state.pt")
    assert model.master.numel() == state["master"].numel() > 8e6


def test_resumed_run_equals_an_uninterrupted_one(work, moe, tmp_path):
    until = ["--processes", "1", "--until-tokens", str(8 * STEP_TOKENS)]
    (work / "runs/more").mkdir()
    for name in ("state.pt", "stable.pt", "schedule.csv"):
        (work / "runs/more" / name).write_bytes((work / "runs/moe" / name).read_bytes())
    log = run(work, "more", *COMMON, *until, "--resume")
    assert log[0]["step"] == 5  # from stable.pt: the finished run's last step was part of the fall
    run(work, "whole", *COMMON, *SHORT, *until)
    # 22 % of 8192 tokens: 1802.24, from 6389.76 on
    expected = [0.5, 1, 1, 1, 1, 1, 1, 1 - (7168 - 6389.76) / 1802.24]
    assert [row[2] for row in schedule(work, "whole")] == pytest.approx(expected)
    assert schedule(work, "more") == schedule(work, "whole")
    resumed, whole = saved(work, "more"), saved(work, "whole")
    assert resumed["recipe"] == whole["recipe"] and resumed["counters"] == whole["counters"]
    assert resumed["step"] == whole["step"] == 8
    torch.testing.assert_close(resumed["master"], whole["master"], rtol=0, atol=1e-5)
    torch.testing.assert_close(resumed["state"], whole["state"], rtol=0, atol=1e-5)
    assert (saved(work, "moe")["master"] - whole["master"]).abs().max() > 1e-3  # another run would not pass


def test_dense_control_replays_the_schedule_in_two_processes(work, moe):
    log = run(work, "dense", *COMMON, "--dense", "--follow", "moe")
    assert schedule(work, "dense") == schedule(work, "moe")
    dense, followed = saved(work, "dense"), saved(work, "moe")
    assert dense["config"] == followed["config"] | {"dense_intermediate": 512}
    assert dense["recipe"] == followed["recipe"]
    assert dense["counters"] == followed["counters"]  # the same windows
    assert dense["tokens"] == followed["tokens"] and dense["phase"] == "done"
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[-1] < losses[0] - 1


def test_terminated_run_saves_and_can_be_resumed(work):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command(work, "cut", *COMMON, *SHORT, "--minutes", "30", "--decay-minutes", "1"),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in process.stdout:
            if "loss" in line:
                break
        process.send_signal(signal.SIGTERM)
        rest, errors = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    assert process.returncode == 0, errors
    last = json.loads(rest.splitlines()[-1])
    state = saved(work, "cut")
    assert last["stopped"] == state["phase"] == "stable"
    assert state["step"] == last["step"] == len(schedule(work, "cut")) >= 1
    log = run(
        work, "cut", *COMMON, "--resume", "--until-tokens", str((state["step"] + 1) * STEP_TOKENS), "--processes", "1"
    )
    assert log[0]["step"] == state["step"] and log[-1]["step"] == state["step"] + 1


@pytest.mark.parametrize("name", ["moe", "dense"])
def test_exported_folder_is_read_by_transformers(work, moe, name, tmp_path):
    if name == "dense" and not (work / "runs/dense/state.pt").exists():
        run(work, "dense", *COMMON, "--dense", "--follow", "moe")
    run(work, name, "--export", str(tmp_path / "out"))
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(theirs).__name__ == {"moe": "Qwen3MoeForCausalLM", "dense": "Qwen3ForCausalLM"}[name]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = np.load(work / "tokens/heldout-count.npy")[:256].astype(int)
    assert tokenizer(tokenizer.decode(ids), add_special_tokens=False).input_ids == ids.tolist()
    assert tokenizer.convert_tokens_to_ids(tokenizer.bos_token) == 0
    row = torch.tensor([[0, *ids]])
    model, state = load_model(work / "runs" / name / "state.pt")
    with torch.no_grad():
        logits = theirs(input_ids=row[:, :-1]).logits[0]
        expected = torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="none")
    ours = model.token_nll(row[:, :-1], row[:, 1:])[0]
    assert (ours - expected).abs().mean() < 0.05
    assert float(expected.mean()) < np.log(4096) - 1
    assert (ours.roll(1) - expected).abs().mean() > 0.3
    assert json.loads((tmp_path / "out/training.json").read_text())["tokens"] == state["tokens"]


def test_held_out_figure_is_the_likelihood_that_transformers_gives(work, moe, tmp_path):
    figures = evaluate_held_out(work, "moe")
    run(work, "moe", "--export", str(tmp_path / "out"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for domain in ("count", "shell"):
        ids = np.load(work / f"tokens/heldout-{domain}.npy").astype(int).tolist()
        row = torch.tensor([[0, *ids]])
        nats = 0.0
        # 700 tokens in windows of 512: the first scores 512, the last window ends the text and scores the other 188
        for start, first in ((0, 0), (188, 324)):
            with torch.no_grad():
                logits = theirs(input_ids=row[:, start : start + 512]).logits[0]
            nll = torch.nn.functional.cross_entropy(logits, row[0, start + 1 : start + 513], reduction="none")
            nats += float(nll[first:].sum())
        bits = nats / np.log(2) / len(tokenizer.decode(ids).encode())
        assert figures["domains"][domain] == pytest.approx(bits, rel=0.01)
    assert figures["mean_bits_per_byte"] == pytest.approx(sum(figures["domains"].values()) / 2, abs=1e-3)


def test_a_run_without_an_end_is_refused_at_once(work):
    done = subprocess.run(
        command(work, "endless", *COMMON, *SHORT),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.strip() == "train: give --minutes, --until-tokens or --follow, else the run would never end"


# --- the schedule ----------------------------------------------------------------------------------------------------


def test_multiplier_by_hand():
    by_time = training.Plan(decay_s=100, deadline_s=1000)
    for now, step, expected in [
        (0, 0, (0.1, False)),
        (0, 9, (1.0, False)),
        (899, 50, (1.0, False)),
        (900, 50, (1.0, True)),
        (975, 50, (0.25, True)),
        (975, 0, (0.1, True)),  # warm-up and fall at once: the smaller
        (1000, 50, (0.0, True)),
        (5000, 50, (0.0, True)),
    ]:
        assert training.multiplier(by_time, now, 0, step, 10, None) == pytest.approx(expected)
    # asked to finish at 300: the deadline no longer counts
    assert training.multiplier(by_time, 350, 0, 50, 10, 300) == pytest.approx((0.5, True))
    both = training.Plan(decay_s=100, deadline_s=1000, until_tokens=1000)
    assert training.multiplier(both, 925, 890, 50, 10, None) == pytest.approx((0.5, True))  # tokens are further on
    assert training.multiplier(both, 990, 890, 50, 10, None) == pytest.approx((0.1, True))  # time is further on


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("moe", ["--until-tokens", "1024"], "holds a run: give --resume"),
        ("absent", ["--resume", "--minutes", "1"], "state.pt is missing"),
        ("absent", ["--export", "out"], "state.pt is missing"),
    ],
)
def test_a_run_is_never_written_over_and_a_missing_one_is_named(work, moe, name, arguments, said):
    log = work / "runs" / "moe" / "log.jsonl"
    before = log.read_bytes()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command(work, name, *COMMON, *arguments), env=environment, cwd=work, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr
    assert log.read_bytes() == before
