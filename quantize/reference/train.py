"""Trains the reference model on the CPU and exports it as a Hugging Face folder.

    python -m quantize.reference.train --work DIR --name moe --minutes 120 --decay-minutes 25
    python -m quantize.reference.train --work DIR --name moe --resume --minutes 180
    python -m quantize.reference.train --work DIR --name dense --dense --follow moe
    python -m quantize.reference.train --work DIR --name moe --export OUT

The learning rate warms up, stays, and falls linearly to zero over the last `--decay-minutes` of wall time, so a
run ends on time however busy the machine is. `stable.pt` is written just before the fall: `--resume` goes on
from there, and so a finished run can always be extended. `schedule.csv` holds the multiplier of every step;
`--follow RUN` replays it (same data, tokens and rates), which makes a control comparable.

Two processes of one thread each claim micro-batches from a shared counter (a slower core takes fewer); weights,
gradients and optimiser state lie in shared memory, and each process updates half of them.

Files in DIR/runs/NAME: state.pt, stable.pt, log.jsonl, schedule.csv; `touch finish` there starts the fall now.
Needs torch, numpy, tokenizers, safetensors. Left out: GPUs, several machines, resuming inside the fall.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import mmap
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

# glibc and OpenMP settings that matter as much as threads do here; read at process start, hence the re-exec.
ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_ARENA_MAX": "1",
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "0",
    "OMP_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8192",
}

if __name__ == "__main__" and any(os.environ.get(k) != v for k, v in ENVIRONMENT.items()):
    os.environ.update(ENVIRONMENT)
    os.execv(sys.executable, sys.orig_argv)

import torch  # noqa: E402

from quantize.reference import model as reference  # noqa: E402
from quantize.reference.export import evaluate_bits_per_byte, evaluate_held_out, export, text_sample  # noqa: E402
from quantize.reference.mix import TokenMix  # noqa: E402
from quantize.reference.model import ModelConfig, ReferenceModel, flat_size, layout  # noqa: E402
from quantize.reference.muon import Optimiser  # noqa: E402
from quantize.reference.sources import default_work  # noqa: E402
from quantize.reference.state import Recipe, config_of, load_checkpoint, recipe_of, write_atomically  # noqa: E402

# --- schedule ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """When the rate falls, in seconds of time.monotonic or in tokens. None: not by this."""

    decay_s: float
    deadline_s: float | None = None
    until_tokens: int | None = None
    decay_share: float = 0.22


def multiplier(
    plan: Plan, now_s: float, tokens: int, step: int, warmup_steps: int, decay_from_s: float | None
) -> tuple[float, bool]:
    """(rate multiplier, whether the fall has begun); 0 means: stop. `decay_from_s` is set once it has begun."""
    warm = min(1.0, (step + 1) / warmup_steps)
    falls = []
    if decay_from_s is not None:
        falls.append((now_s - decay_from_s) / plan.decay_s)
    if plan.until_tokens is not None:
        length = plan.decay_share * plan.until_tokens
        falls.append(1 + (tokens - plan.until_tokens) / length)  # exactly 1 at the end: rounding would add a step
    if decay_from_s is None and plan.deadline_s is not None:
        falls.append((now_s - (plan.deadline_s - plan.decay_s)) / plan.decay_s)
    progress = max(falls, default=-1.0)
    return max(0.0, min(warm, 1 - max(0.0, progress))), progress >= 0


# --- the run -----------------------------------------------------------------------------------------------


def _shared(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros in memory that forked processes share."""
    width = torch.empty((), dtype=dtype).element_size()
    return torch.frombuffer(mmap.mmap(-1, size * width), dtype=dtype)


@dataclasses.dataclass
class Shared:
    """Everything both processes see. control: multiplier, evaluate, stop, loss and balance sums, micro-batches."""

    master: torch.Tensor
    compute: torch.Tensor
    gradients: list[torch.Tensor]
    state: torch.Tensor
    control: torch.Tensor
    done: torch.Tensor
    results: torch.Tensor
    claimed: object
    barrier: object


class Run:
    """One process's part of a training run."""

    def __init__(self, args, config: ModelConfig, recipe: Recipe, shared: Shared, rank: int, world: int) -> None:
        self.args, self.config, self.recipe, self.shared = args, config, recipe, shared
        self.rank, self.world = rank, world
        self.folder = Path(args.work) / "runs" / args.name
        self.model = ReferenceModel(config, shared.master, shared.compute, shared.gradients[rank])
        self.optimiser = Optimiser(self.model, recipe, shared.state, rank, world)
        self.mix = TokenMix(Path(args.work) / "tokens", recipe, config.context)
        self.dev = text_sample(Path(args.work), "dev", 8192)
        self.step = self.tokens = 0
        self.elapsed_s = 0.0

    def restore(self, saved: dict) -> None:
        self.step, self.tokens, self.elapsed_s = saved["step"], saved["tokens"], saved["elapsed_s"]
        self.mix.counters = list(saved["counters"])

    def save(self, name: str, phase: str) -> None:
        saved = {
            "config": dataclasses.asdict(self.config),
            "recipe": dataclasses.asdict(self.recipe),
            "master": self.shared.master.clone(),
            "state": self.shared.state.clone(),
            "counters": self.mix.counters,
            "step": self.step,
            "tokens": self.tokens,
            "elapsed_s": self.elapsed_s,
            "phase": phase,
        }
        write_atomically(self.folder / name, lambda path: torch.save(saved, path))

    def log(self, **values) -> None:
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(values) + "\n")
        print(json.dumps(values), flush=True)

    def evaluate(self) -> dict[str, float] | None:
        """Dev bits per byte per domain, the domains shared out; None except in process 0."""
        results, names = self.shared.results, sorted(self.dev)
        for place in range(self.rank, len(names), self.world):
            tokens, n_bytes = self.dev[names[place]]
            results[place] = evaluate_bits_per_byte(
                self.model, tokens, n_bytes, batch=self.recipe.sequences_per_micro, context=self.config.context
            )
        self.shared.barrier.wait(600)
        if self.rank:
            return None
        return {name: round(float(results[place]), 4) for place, name in enumerate(names)}

    def gradients(self) -> None:
        """This process's share of the micro-batches of one step."""
        r, s = self.recipe, self.shared
        batch = torch.from_numpy(self.mix.batch(self.step, r.sequences_per_step))
        micro = r.sequences_per_micro
        first = True
        while True:
            with s.claimed.get_lock():
                at = s.claimed.value
                s.claimed.value += 1
            if at * micro >= r.sequences_per_step:
                break
            rows = batch[at * micro : (at + 1) * micro]
            loss, balance = self.model.backward(rows[:, :-1], rows[:, 1:], r.balance_weight, r.z_weight, first)
            s.done[self.rank] += torch.tensor([1.0, loss, balance])
            first = False

    def update(self) -> float:
        s = self.shared
        used = [g for g, done in zip(s.gradients, s.done, strict=True) if done[0] > 0]
        return self.optimiser.step(used, 1.0 / float(s.done[:, 0].sum()), self.step, float(s.control[0]))

    def follow(self) -> None:
        """Process 1 and above: do as process 0 says."""
        s = self.shared
        while True:
            s.barrier.wait(900)
            if s.control[1]:
                self.evaluate()
            if s.control[2]:
                return
            self.gradients()
            s.barrier.wait(900)
            self.update()
            s.barrier.wait(900)  # process 0 clears `done` for the next step: not before everybody has read it
            self.step += 1

    def lead(self, plan: Plan, replay: list[float] | None) -> None:
        """Process 0: the schedule, the log and the checkpoints."""
        r, s, args = self.recipe, self.shared, self.args
        tokens_per_step = r.sequences_per_step * self.config.context
        finish = self.folder / "finish"
        terminated = []
        signal.signal(signal.SIGTERM, lambda *_: terminated.append(True))
        signal.signal(signal.SIGINT, lambda *_: terminated.append(True))
        begin = time.monotonic()
        before = self.elapsed_s
        decay_from = None
        stable_saved = False
        last_log = last_save = last_eval = begin
        losses: list[float] = []
        logged_tokens = self.tokens
        schedule = open(self.folder / "schedule.csv", "a", newline="")  # noqa: SIM115
        writer = csv.writer(schedule, lineterminator="\n")
        while True:
            now = time.monotonic()
            self.elapsed_s = before + now - begin
            if replay is not None:
                value = replay[self.step] if self.step < len(replay) else 0.0
                falling = value < 1 and self.step > r.warmup_steps
            else:
                if decay_from is None and finish.exists():
                    finish.unlink()
                    decay_from = now
                value, falling = multiplier(plan, now, self.tokens, self.step, r.warmup_steps, decay_from)
            stop = value <= 0 or bool(terminated)
            save_stable = falling and not stable_saved
            evaluate = stop or save_stable or now - last_eval > args.evaluate_minutes * 60
            s.control[0], s.control[1], s.control[2] = value, evaluate and not terminated, stop
            s.done.zero_()
            s.claimed.value = 0
            s.barrier.wait(900)
            phase = "done" if value <= 0 else "decay" if falling else "stable"
            if save_stable:
                self.save("stable.pt", "stable")
                stable_saved = True
            if stop or now - last_save > args.checkpoint_minutes * 60:
                schedule.flush()
                self.save("state.pt", phase)
                last_save = now
            if s.control[1]:
                bits = self.evaluate()
                mean = round(sum(bits.values()) / len(bits), 4)
                self.log(step=self.step, tokens=self.tokens, dev_mean=mean, dev=bits)
                last_eval = now
            if stop:
                schedule.close()
                self.log(step=self.step, tokens=self.tokens, stopped=phase, elapsed_s=round(self.elapsed_s, 1))
                return
            self.gradients()
            s.barrier.wait(900)
            done = s.done.sum(0)
            losses.append(float(done[1] / done[0]))
            balance = float(done[2] / done[0])
            norm = self.update()
            s.barrier.wait(900)
            writer.writerow((self.step, self.tokens, repr(value)))
            self.step += 1
            self.tokens += tokens_per_step
            now = time.monotonic()
            if now - last_log > args.log_seconds:
                self.log(
                    step=self.step,
                    tokens=self.tokens,
                    loss=round(sum(losses) / len(losses), 4),
                    lr=round(value, 4),
                    tokens_per_s=round((self.tokens - logged_tokens) / (now - last_log)),
                    balance=round(balance, 3),
                    norm=round(norm, 3),
                    elapsed_s=round(before + now - begin, 1),
                )
                last_log, logged_tokens, losses = now, self.tokens, []


def _work_in_child(args, config, recipe, shared, rank, world, saved) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the leader decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run = Run(args, config, recipe, shared, rank, world)
    if saved:
        run.restore(saved)
    run.follow()


def _read_schedule(path: Path) -> list[float]:
    with open(path, newline="") as file:
        return [float(row[2]) for row in csv.reader(file)]


def train(args) -> None:
    """One run, or one more stretch of it."""
    begin = time.monotonic()
    # Before anything is deleted or forked: a child waits 15 minutes at the barrier for a leader that gave up.
    if args.minutes is None and args.until_tokens is None and not args.follow:
        raise SystemExit("train: give --minutes, --until-tokens or --follow, else the run would never end")
    torch.set_num_threads(1)
    folder = Path(args.work) / "runs" / args.name
    folder.mkdir(parents=True, exist_ok=True)
    saved = None
    if args.resume:
        saved = load_checkpoint(folder / "state.pt")
        if saved["phase"] != "stable":
            saved = load_checkpoint(folder / "stable.pt")
        config, recipe = config_of(saved), recipe_of(saved)
        rows = (folder / "schedule.csv").read_text().splitlines()[: saved["step"]]
        write_atomically(folder / "schedule.csv", lambda path: path.write_text("".join(row + "\n" for row in rows)))
    else:
        config = ModelConfig()
        recipe = Recipe(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Recipe) if hasattr(args, f.name)})
        if args.follow:
            other = load_checkpoint(folder.parent / args.follow / "state.pt")
            config, recipe = config_of(other), recipe_of(other)
        if args.dense:
            config = config.as_dense()
        if (folder / "state.pt").exists():
            raise SystemExit(f"train: {folder} holds a run: give --resume, or another --name, or move it away")
        for name in ("log.jsonl", "schedule.csv", "finish"):
            (folder / name).unlink(missing_ok=True)
    replay = _read_schedule(folder.parent / args.follow / "schedule.csv") if args.follow else None

    world = args.processes
    size = flat_size(layout(config))
    context = multiprocessing.get_context("fork")
    shared = Shared(
        master=_shared(size, torch.float32),
        compute=_shared(size, torch.bfloat16),
        gradients=[_shared(size, torch.float32) for _ in range(world)],
        state=_shared(2 * size, torch.float32).view(2, size),
        control=_shared(4, torch.float64),
        done=_shared(3 * world, torch.float32).view(world, 3),
        results=_shared(64, torch.float64),
        claimed=context.Value("i", 0),
        barrier=context.Barrier(world),
    )
    if saved:
        shared.master.copy_(saved.pop("master"))
        shared.state.copy_(saved.pop("state"))
        shared.compute.copy_(shared.master)
    else:
        ReferenceModel(config, shared.master, shared.compute).initialise(recipe.seed)
    if not args.no_compile:
        reference.compile_pieces()
    children = [
        context.Process(target=_work_in_child, args=(args, config, recipe, shared, rank, world, saved), daemon=True)
        for rank in range(1, world)
    ]
    for child in children:
        child.start()
    try:
        run = Run(args, config, recipe, shared, 0, world)
        if saved:
            run.restore(saved)
        weights = {n: round(float(w), 4) for n, w in zip(run.mix.names, run.mix.weights, strict=True)}
        run.log(start=True, step=run.step, recipe=dataclasses.asdict(recipe), weights=weights, torch=torch.__version__)
        deadline = None
        if args.minutes is not None:
            deadline = begin + args.minutes * 60 - args.reserve_seconds
        run.lead(Plan(args.decay_minutes * 60, deadline, args.until_tokens), replay)
        for child in children:
            child.join(60)
    except BaseException:  # children ignore SIGTERM and would wait for their leader
        for child in children:
            child.kill()
        raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--work", default=default_work(), help="folder with tokens/ and tokenizer.json")
    parser.add_argument("--name", default="moe", help="name of the run")
    parser.add_argument("--minutes", type=float, help="wall time of this start, the fall included")
    parser.add_argument("--until-tokens", type=int, help="end at this many tokens in all")
    parser.add_argument("--decay-minutes", type=float, default=25.0, help="wall time of the fall to zero")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint before the fall")
    parser.add_argument("--dense", action="store_true", help="train the control without experts")
    parser.add_argument("--follow", metavar="RUN", help="replay tokens and rates of this run")
    parser.add_argument("--export", metavar="OUT", type=Path, help="write a Hugging Face folder and stop")
    parser.add_argument("--evaluate", action="store_true", help="print held-out bits per byte as JSON and stop")
    parser.add_argument("--checkpoint", default="state.pt", help="which checkpoint --export and --evaluate take")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true", help="do without a C++ compiler")
    parser.add_argument("--checkpoint-minutes", type=float, default=5.0)
    parser.add_argument("--evaluate-minutes", type=float, default=10.0)
    parser.add_argument("--log-seconds", type=float, default=20.0)
    parser.add_argument("--reserve-seconds", type=float, default=45.0, help="kept for the last evaluation")
    for field in dataclasses.fields(Recipe):
        if field.name != "other_betas":
            kind = {"int": int, "float": float, "str": str}[field.type]
            option = "--" + field.name.replace("_", "-")
            parser.add_argument(option, type=kind, default=argparse.SUPPRESS, help=f"default {field.default}")
    args = parser.parse_args()
    if args.export:
        export(Path(args.work), args.name, args.export, args.checkpoint)
    elif args.evaluate:
        print(json.dumps(evaluate_held_out(Path(args.work), args.name, args.checkpoint), indent=1))
    else:
        train(args)


if __name__ == "__main__":
    main()
