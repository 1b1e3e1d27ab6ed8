"""The journal of a bundle that is being written: what is finished, so that a run that was cut off goes on from there.

One JSON object per line, flushed to disk before the next piece begins; a line cut short by a crash is dropped on reading.
Leaves out: deciding what to write (pipeline) and the manifest (node_agent.shard), which replaces the journal at the end.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from node_agent import wire
from node_agent.shard import BundleError, FileEntry, Segment, ShardEntry, verify_file

JOURNAL = ".progress.jsonl"
WORK = ".work"


class ResumeError(ValueError):
    """The output folder holds something that this run must not continue or overwrite; the text names the next step."""


class Journal:
    """Finished shards, trunk segments and layers of a bundle under `root`.

    `recipe_hash` stands for model and recipe: another one's journal is refused.  Raises: ResumeError.
    """

    def __init__(self, root: Path, recipe_hash: str) -> None:
        self.path = root / JOURNAL
        self.root = root
        self._shards: dict[tuple[int, int, str], ShardEntry] = {}
        self._segments: dict[int, Segment] = {}
        self.layers: set[int] = set()
        if self.path.exists():
            self._read(recipe_hash)
        else:
            root.mkdir(parents=True, exist_ok=True)
            self._append({"recipe": recipe_hash})

    def _read(self, recipe_hash: str) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self.path, whole)
        lines = content[:whole].splitlines()
        try:
            records = [json.loads(line) for line in lines]
            if not records:
                self._append({"recipe": recipe_hash})
                return
            alone = [path.name for path in self.root.iterdir()] == [JOURNAL]
            if alone and records[0].get("recipe") != recipe_hash:
                # nothing was finished, say because the checkpoint was damaged: there is nothing to protect
                os.truncate(self.path, 0)
                self._append({"recipe": recipe_hash})
                return
            if records[0].get("recipe") != recipe_hash:
                raise ResumeError(
                    f"{self.root} holds the unfinished bundle of another model or recipe: give another -o, or --force to replace it"
                )
            for record in records[1:]:
                self._take(record)
        except (ValueError, AttributeError, KeyError) as error:
            if isinstance(error, ResumeError):
                raise
            raise ResumeError(f"{self.path} is damaged: give --force to begin again") from None

    def _take(self, record: dict) -> None:
        if "shard" in record:
            entry = wire.build(ShardEntry, record["shard"])
            self._shards[entry.layer, entry.expert, entry.precision] = entry
        elif "segment" in record:
            self._segments[record["index"]] = wire.build(Segment, record["segment"])
        elif "layer" in record:
            self.layers.add(record["layer"])

    def _append(self, record: dict) -> None:
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "ab") as file:
                file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            if self.path.exists():
                os.truncate(self.path, size)
            raise

    def _good(self, entries: tuple[FileEntry, ...]) -> bool:
        try:
            for entry in entries:
                verify_file(self.root, entry)
        except BundleError:
            return False
        return True

    def shard(self, layer: int, expert: int, precision: str) -> ShardEntry | None:
        """The finished shard, if its files still are what the journal says."""
        entry = self._shards.get((layer, expert, precision))
        return entry if entry and self._good(entry.files) else None

    def segment(self, index: int) -> Segment | None:
        entry = self._segments.get(index)
        return entry if entry and self._good(entry.files) else None

    def add_shard(self, entry: ShardEntry) -> None:
        self._append({"shard": dataclasses.asdict(entry)})
        self._shards[entry.layer, entry.expert, entry.precision] = entry

    def add_segment(self, index: int, segment: Segment) -> None:
        self._append({"segment": dataclasses.asdict(segment), "index": index})
        self._segments[index] = segment

    def add_layer(self, position: int) -> None:
        self._append({"layer": position})
        self.layers.add(position)

    def good_shared(self) -> dict[str, FileEntry]:
        """Shared files of the trunk that are complete, by name."""
        known = {Path(e.path).name: e for segment in self._segments.values() for e in segment.files[2:]}
        return {name: entry for name, entry in known.items() if self._good((entry,))}
