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

import numpy as np  # noqa: E402
import torch  # noqa: E402

from quantize.reference import model as reference  # noqa: E402
from quantize.reference.model import ModelConfig, ReferenceModel, flat_size, layout  # noqa: E402

DOCUMENT_START = 0
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What decides the result of a run apart from the model's sizes. Kept in the checkpoint."""

    sequences_per_step: int = 16
    sequences_per_micro: int = 4
    matrix_rate: float = 0.02
    matrix_decay: float = 0.02
    matrix_momentum: float = 0.95
    other_rate: float = 3e-3
    other_betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    warmup_steps: int = 200
    balance_weight: float = 0.01
    z_weight: float = 1e-4
    optimiser: str = "muon"
    expected_tokens: float = 40e6
    max_epochs: float = 5.0
    seed: int = 1


# --- data --------------------------------------------------------------------------------------------------


def domain_weights(sizes: dict[str, int], expected_tokens: float, max_epochs: float) -> dict[str, float]:
    """Shares proportional to sqrt(tokens), none above `max_epochs` passes over its text in `expected_tokens`.

    What a capped domain loses goes to the others; if all are capped, shares are proportional to tokens.
    """
    cap = {d: max_epochs * n / expected_tokens for d, n in sizes.items()}
    if sum(cap.values()) <= 1:
        total = sum(sizes.values())
        return {d: n / total for d, n in sizes.items()}
    weights: dict[str, float] = {}
    free = set(sizes)
    while True:
        left = 1 - sum(weights.values())
        scale = left / sum(sizes[d] ** 0.5 for d in free)
        over = {d for d in free if sizes[d] ** 0.5 * scale > cap[d]}
        if not over:
            return weights | {d: sizes[d] ** 0.5 * scale for d in sorted(free)}
        weights |= {d: cap[d] for d in over}
        free -= over


class TokenMix:
    """Windows of `context`+1 tokens: a domain by weight, then its windows in a shuffled order per pass.

    The order depends on (seed, domain, pass) and the domain on (seed, step), so `counters` is the whole state.
    """

    def __init__(self, folder: Path, recipe: Recipe, context: int) -> None:
        names = sorted(p.stem for p in folder.glob("*.npy") if not p.stem.startswith(("dev-", "heldout-")))
        self.streams = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
        self.names, self.seed, self.context = names, recipe.seed, context
        weights = domain_weights(
            {n: len(s) for n, s in self.streams.items()}, recipe.expected_tokens, recipe.max_epochs
        )
        self.weights = np.array([weights[n] for n in names])
        self.weights /= self.weights.sum()
        self.counters = [0] * len(names)
        self._order: dict[int, tuple[int, int, np.ndarray]] = {}

    def _window(self, domain: int) -> np.ndarray:
        stream = self.streams[self.names[domain]]
        per_pass = (len(stream) - self.context) // self.context  # one window is left out: the random offset
        number, place = divmod(self.counters[domain], per_pass)
        if self._order.get(domain, (-1,))[0] != number:
            rng = np.random.default_rng((self.seed, domain, number))
            self._order[domain] = (number, int(rng.integers(self.context)), rng.permutation(per_pass))
        _, offset, order = self._order[domain]
        self.counters[domain] += 1
        start = offset + int(order[place]) * self.context
        window = stream[start : start + self.context + 1]
        return window if len(window) == self.context + 1 else stream[-self.context - 1 :]

    def batch(self, step: int, sequences: int) -> np.ndarray:
        """[sequences, context+1] int64."""
        rng = np.random.default_rng((self.seed, 7, step))
        chosen = rng.choice(len(self.names), size=sequences, p=self.weights)
        return np.stack([self._window(int(d)) for d in chosen]).astype(np.int64)


# --- quality -----------------------------------------------------------------------------------------------


def evaluate_bits_per_byte(
    model, tokens: np.ndarray, n_bytes: int, *, context: int = 512, stride: int = 256, batch: int = 4
) -> float:
    """Bits per byte of `tokens` (which stand for `n_bytes` bytes of text); every token is scored exactly once.

    Windows of `context` tokens move by `stride`, so that a token sees at least context - stride tokens before it
    (fewer only at the very beginning). `model.token_nll(ids [B,S], targets [B,S])` gives nats.
    """
    sequence = torch.from_numpy(np.concatenate(([DOCUMENT_START], tokens.astype(np.int64))))
    total, scored = len(tokens), 0
    windows = []  # (start, first position scored inside the window)
    start = 0
    while scored < total:
        start = min(start, max(0, total - context))
        windows.append((start, scored - start))
        scored = min(start + context, total)
        start += stride
    bits = 0.0
    for at in range(0, len(windows), batch):
        group = windows[at : at + batch]
        ids = torch.zeros(batch, context, dtype=torch.long)
        target = torch.zeros(batch, context, dtype=torch.long)
        for row, (start, _) in enumerate(group):
            piece = sequence[start : start + context + 1]
            ids[row, : len(piece) - 1], target[row, : len(piece) - 1] = piece[:-1], piece[1:]
        nll = model.token_nll(ids, target)
        for row, (start, first) in enumerate(group):
            bits += float(nll[row, first : min(context, total - start)].double().sum()) / np.log(2)
    return bits / n_bytes


def text_sample(work: Path, kind: str, limit: int | None) -> dict[str, tuple[np.ndarray, int]]:
    """domain -> (the first `limit` tokens of its `kind`- file, the bytes of text they stand for)."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    sample = {}
    for path in sorted((work / "tokens").glob(f"{kind}-*.npy")):
        tokens = np.load(path)[:limit]
        text = tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
        sample[path.stem.removeprefix(f"{kind}-")] = (tokens, len(text.encode()))
    return sample


# --- optimiser ---------------------------------------------------------------------------------------------


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz iteration of Muon on [M, rows, columns] with rows <= columns, in bf16."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).bfloat16()
    for _ in range(5):
        gram = torch.bmm(x, x.transpose(1, 2))
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    return x


class Optimiser:
    """Muon for the matrices, AdamW for the rest; process `rank` of `world` updates its share of both.

    state fp32 [2, P] in shared memory: first moment (or Muon's momentum) and second moment.
    """

    def __init__(self, model: ReferenceModel, recipe: Recipe, state: torch.Tensor, rank: int, world: int) -> None:
        self.model, self.recipe, self.state = model, recipe, state
        slots = model.slots
        other_end = next(s.start for s in slots if s.kind == "matrix")
        if recipe.optimiser == "adamw":
            other_end = model.master.numel()
        share = -(-other_end // world)
        self.other_all = slice(0, other_end)
        self.other = slice(rank * share, min(other_end, (rank + 1) * share))
        self.matrices = [
            s for s in slots if s.kind == "matrix" and int(s.name.split(".")[0]) % world == rank
        ]  # fmt: skip
        if recipe.optimiser == "adamw":
            self.matrices = []

    def _parts(self, slot, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The separate matrices of one parameter as views [M, rows, columns]."""
        c = self.model.config
        view = tensor[slot.start : slot.start + slot.size].view(slot.shape)
        if slot.name.endswith(".qkv"):
            q, k, v = view.split([c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim])
            return [q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)]
        if slot.name.endswith(".gate_up"):
            return [view.view(-1, view.shape[1] // 2, view.shape[2])]
        return [view if view.dim() == 3 else view.unsqueeze(0)]

    @torch.no_grad()
    def step(self, gradients: list[torch.Tensor], scale: float, number: int, multiplier: float) -> float:
        """One update from the sum of `gradients` times `scale`; returns the norm of AdamW's gradient."""
        r, model = self.recipe, self.model
        everything = gradients[0][self.other_all]
        for g in gradients[1:]:
            everything = everything + g[self.other_all]
        norm = float(everything.norm()) * scale
        grad = everything[self.other] * (scale * min(1.0, r.clip / (norm + 1e-6)))
        first, second = self.state[0, self.other], self.state[1, self.other]
        first.lerp_(grad, 1 - r.other_betas[0])
        second.mul_(r.other_betas[1]).addcmul_(grad, grad, value=1 - r.other_betas[1])
        correct1 = 1 - r.other_betas[0] ** (number + 1)
        correct2 = 1 - r.other_betas[1] ** (number + 1)
        denominator = second.sqrt().div_(correct2**0.5).add_(1e-8)
        master = model.master[self.other]
        rate = r.other_rate * multiplier
        if r.optimiser == "adamw":
            master.mul_(1 - rate * 0.05)
        master.addcdiv_(first, denominator, value=-rate / correct1)
        model.compute[self.other].copy_(master)

        groups: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor, bool]]] = {}
        for slot in self.matrices:
            where = slice(slot.start, slot.start + slot.size)
            grad = gradients[0][where]
            for g in gradients[1:]:
                grad = grad + g[where]
            momentum = self.state[0, where]
            momentum.lerp_(grad, 1 - r.matrix_momentum)
            update = grad.lerp(momentum, r.matrix_momentum)
            flat = dataclasses.replace(slot, start=0)
            for part, target in zip(self._parts(flat, update), self._parts(slot, model.master), strict=True):
                tall = part.shape[1] > part.shape[2]
                wide = part.transpose(1, 2) if tall else part
                groups.setdefault(tuple(wide.shape[1:]), []).append((wide, target, tall))
        rate = r.matrix_rate * multiplier
        for members in groups.values():
            result = orthogonalise(torch.cat([wide for wide, _, _ in members]))
            for piece, (_, target, tall) in zip(
                result.split([len(wide) for wide, _, _ in members]), members, strict=True
            ):
                stretch = max(1.0, target.shape[1] / target.shape[2]) ** 0.5
                target.mul_(1 - rate * r.matrix_decay)
                target.add_(piece.transpose(1, 2) if tall else piece, alpha=-rate * stretch)
        for slot in self.matrices:
            where = slice(slot.start, slot.start + slot.size)
            model.compute[where].copy_(model.master[where])
        return norm


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
        falls.append((tokens - (plan.until_tokens - length)) / length)
    if decay_from_s is None and plan.deadline_s is not None:
        falls.append((now_s - (plan.deadline_s - plan.decay_s)) / plan.decay_s)
    progress = max(falls, default=-1.0)
    return max(0.0, min(warm, 1 - max(0.0, progress))), progress >= 0


# --- the run -----------------------------------------------------------------------------------------------


def _shared(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros in memory that forked processes share."""
    width = torch.empty((), dtype=dtype).element_size()
    return torch.frombuffer(mmap.mmap(-1, size * width), dtype=dtype)


def _write_atomically(path: Path, write) -> None:
    temporary = path.with_name(path.name + ".part")
    write(temporary)
    os.replace(temporary, path)


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
        _write_atomically(self.folder / name, lambda path: torch.save(saved, path))

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
    torch.set_num_threads(1)
    folder = Path(args.work) / "runs" / args.name
    folder.mkdir(parents=True, exist_ok=True)
    saved = None
    if args.resume:
        saved = torch.load(folder / "state.pt", weights_only=True)
        if saved["phase"] != "stable":
            saved = torch.load(folder / "stable.pt", weights_only=True)
        config, recipe = config_of(saved), recipe_of(saved)
        rows = (folder / "schedule.csv").read_text().splitlines()[: saved["step"]]
        (folder / "schedule.csv").write_text("".join(row + "\n" for row in rows))
    else:
        config = ModelConfig()
        recipe = Recipe(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Recipe) if hasattr(args, f.name)})
        if args.follow:
            other = torch.load(folder.parent / args.follow / "state.pt", weights_only=True)
            config, recipe = config_of(other), recipe_of(other)
        if args.dense:
            config = config.as_dense()
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
    run = Run(args, config, recipe, shared, 0, world)
    if saved:
        run.restore(saved)
    weights = {n: round(float(w), 4) for n, w in zip(run.mix.names, run.mix.weights, strict=True)}
    run.log(start=True, step=run.step, recipe=dataclasses.asdict(recipe), weights=weights, torch=torch.__version__)
    deadline = None
    if args.minutes is not None:
        deadline = begin + args.minutes * 60 - args.reserve_seconds
    if deadline is None and args.until_tokens is None and replay is None:
        raise SystemExit("train: give --minutes, --until-tokens or --follow, else the run would never end")
    run.lead(Plan(args.decay_minutes * 60, deadline, args.until_tokens), replay)
    for child in children:
        child.join(60)


def config_of(saved: dict) -> ModelConfig:
    return ModelConfig(**saved["config"])


def recipe_of(saved: dict) -> Recipe:
    return Recipe(**{**saved["recipe"], "other_betas": tuple(saved["recipe"]["other_betas"])})


# --- export ------------------------------------------------------------------------------------------------


def load_model(path: Path) -> tuple[ReferenceModel, dict]:
    """(the model of a checkpoint, the checkpoint)."""
    saved = torch.load(path, weights_only=True)
    model = ReferenceModel.allocate(config_of(saved))
    model.master.copy_(saved["master"])
    model.refresh()
    return model, saved


def hugging_face_config(config: ModelConfig) -> dict:
    """config.json as transformers 4.57 reads it."""
    dense = bool(config.dense_intermediate)
    values = {
        "architectures": ["Qwen3ForCausalLM" if dense else "Qwen3MoeForCausalLM"],
        "model_type": "qwen3" if dense else "qwen3_moe",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": DOCUMENT_START,
        "eos_token_id": DOCUMENT_START,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden,
        "initializer_range": 0.02,
        "intermediate_size": config.dense_intermediate or config.experts_per_token * config.intermediate,
        "max_position_embeddings": 2048,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config.vocab,
    }
    if not dense:
        values |= {
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": config.intermediate,
            "norm_topk_prob": True,
            "num_experts": config.experts,
            "num_experts_per_tok": config.experts_per_token,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.01,
        }
    return values


def hugging_face_tensors(model: ReferenceModel) -> dict[str, torch.Tensor]:
    """The weights under transformers' names, bf16, one tensor per expert and projection."""
    c, out = model.config, {}

    def put(name: str, tensor: torch.Tensor) -> None:
        out[f"model.{name}.weight"] = tensor.to(torch.bfloat16).contiguous().clone()

    put("embed_tokens", model.master_view("embed"))
    put("norm", model.master_view("norm"))
    for n in range(c.layers):
        prefix = f"layers.{n}"
        put(f"{prefix}.input_layernorm", model.master_view(f"{n}.norm1"))
        put(f"{prefix}.post_attention_layernorm", model.master_view(f"{n}.norm2"))
        rows = [c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim]
        for letter, part in zip("qkv", model.master_view(f"{n}.qkv").split(rows), strict=True):
            put(f"{prefix}.self_attn.{letter}_proj", part)
        put(f"{prefix}.self_attn.o_proj", model.master_view(f"{n}.o"))
        put(f"{prefix}.self_attn.q_norm", model.master_view(f"{n}.q_norm"))
        put(f"{prefix}.self_attn.k_norm", model.master_view(f"{n}.k_norm"))
        gate_up, down = model.master_view(f"{n}.gate_up"), model.master_view(f"{n}.down")
        if not c.dense_intermediate:
            put(f"{prefix}.mlp.gate", model.master_view(f"{n}.router"))
        for e in range(gate_up.shape[0]):
            mlp = f"{prefix}.mlp" if c.dense_intermediate else f"{prefix}.mlp.experts.{e}"
            gate, up = gate_up[e].chunk(2, 0)
            put(f"{mlp}.gate_proj", gate)
            put(f"{mlp}.up_proj", up)
            put(f"{mlp}.down_proj", down[e])
    return out


def export(work: Path, name: str, out: Path, checkpoint: str = "state.pt") -> None:
    """Writes a Hugging Face folder: config.json, model.safetensors, tokenizer files, training.json."""
    from safetensors.torch import save_file

    model, saved = load_model(work / "runs" / name / checkpoint)
    out.mkdir(parents=True, exist_ok=True)

    def write_json(path: Path, value: dict) -> None:
        _write_atomically(path, lambda p: p.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n"))

    write_json(out / "config.json", hugging_face_config(model.config))
    write_json(out / "generation_config.json", {"bos_token_id": DOCUMENT_START, "eos_token_id": DOCUMENT_START})
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "add_bos_token": True,  # training documents begin with it
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    write_json(out / "tokenizer_config.json", tokenizer)
    _write_atomically(out / "tokenizer.json", lambda p: p.write_bytes((work / "tokenizer.json").read_bytes()))
    tensors = hugging_face_tensors(model)
    _write_atomically(out / "model.safetensors", lambda p: save_file(tensors, p, metadata={"format": "pt"}))
    (out / "model.safetensors").chmod(0o644)  # the library makes it private
    facts = {k: saved[k] for k in ("step", "tokens", "elapsed_s", "phase", "recipe")}
    write_json(out / "training.json", facts)


def evaluate_held_out(work: Path, name: str, checkpoint: str = "state.pt") -> dict:
    """Held-out bits per byte per domain and their mean, for a run with or without experts."""
    model, saved = load_model(work / "runs" / name / checkpoint)
    domains = {
        domain: round(evaluate_bits_per_byte(model, tokens, n_bytes), 4)
        for domain, (tokens, n_bytes) in text_sample(work, "heldout", None).items()
    }
    return {
        "run": name,
        "tokens": saved["tokens"],
        "steps": saved["step"],
        "elapsed_s": round(saved["elapsed_s"]),
        "domains": domains,
        "mean_bits_per_byte": round(sum(domains.values()) / len(domains), 4),
    }


def default_work() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "spacemoe-kit" / "reference"


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
