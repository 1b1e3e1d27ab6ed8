"""What a label maker prints for a card: who the board is, which image is on it, when. Four lines of at most 32 characters.

Leaves out: printing; the lines go to the terminal or into --json.
"""

from __future__ import annotations

from hardware.flash_pack import Pack

COLUMNS = 32


def label(pack: Pack | None, image_name: str, digest: str, date: str) -> tuple[str, ...]:
    """`digest` is the beginning of the image's sha256, `date` is as "2026-11-30". A card without a pack has no node on its label."""
    who = (f"{pack.node} of {pack.fleet}", pack.board) if pack is not None else ("no node identity",)
    return tuple(map(_short, (*who, image_name, f"{digest} {date}")))


def _short(line: str) -> str:
    return line if len(line) <= COLUMNS else line[: COLUMNS - 1] + "~"
