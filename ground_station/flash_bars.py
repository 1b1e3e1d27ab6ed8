"""Progress of `spacemoe flash` on stderr: a bar for each card with rate and remaining time; without a terminal a line for each stage.

Leaves out: everything else (cli_flash.py).
"""

from __future__ import annotations

import sys
import threading


def counting(quiet: bool):
    """A callback for while an image is read through for its size; None where nobody looks."""
    if quiet or not sys.stderr.isatty():
        return None
    from tqdm import tqdm

    bar = None

    def show(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(desc="size of the image", total=total, unit="B", unit_scale=True, leave=False)
        bar.update(done - bar.n)
        if done >= total:
            bar.close()

    return show


class Bars:
    """A context manager, and the callback that flash.flash calls from the cards' threads."""

    def __init__(self, jobs: tuple, quiet: bool) -> None:
        self._names = [job.pack.node if job.pack is not None else job.target.path.name for job in jobs]
        self._quiet = quiet
        self._bars: list = [None] * len(jobs)
        self._stages = [""] * len(jobs)
        self._lock = threading.Lock()

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            for bar in self._bars:
                if bar is not None:
                    bar.close()

    def __call__(self, step) -> None:
        if step.stage == "left":
            print(
                f"\n{self._names[step.job]}: could not be zeroed, it may boot half-written: erase it", file=sys.stderr
            )
            return
        if self._quiet:
            return
        with self._lock:
            number, new = step.job, step.stage != self._stages[step.job]
            self._stages[number] = step.stage
            if not sys.stderr.isatty():
                if new:
                    print(f"{self._names[number]}: {step.stage}", file=sys.stderr, flush=True)
                return
            from tqdm import tqdm

            text = f"{self._names[number][:20]} {step.stage}"
            if new and step.stage in ("write", "verify"):
                if self._bars[number] is not None:
                    self._bars[number].close()
                self._bars[number] = tqdm(
                    total=step.total_bytes, desc=text, unit="B", unit_scale=True, position=number, leave=False
                )
            bar = self._bars[number]
            bar.set_description(text, refresh=new)
            bar.update(step.done_bytes - bar.n)
