"""A whole ground station with four real agents on loopback, for the tests that need the main path."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ground_station import selection
from ground_station.broker import Broker
from ground_station.decode import Decoder
from ground_station.dispatch import Table
from ground_station.link import Link
from ground_station.local import LocalExperts
from ground_station.local_fleet import LocalFleet
from ground_station.placement import round_robin
from ground_station.remote import RemoteExperts
from ground_station.trunk import Trunk
from node_agent import shard

NODES = ("node-1", "node-2", "node-3", "node-4")
PROMPT = [5, 9, 200, 31, 7, 77, 8]


class Cluster:
    """A broker, a link, four agents and a decoder; closed in reverse order."""

    def __init__(
        self, bundle: Path, run_dir: Path, codec: str, replicas: tuple[str, ...] = ("int4",), precision: str = "int8"
    ):
        self.manifest = shard.read_manifest(bundle)
        self.bundle = bundle
        self.holdings = round_robin(self.manifest, dict.fromkeys(NODES, 1 << 30), precision, replicas)
        self.table = Table(self.holdings)
        self.policy = selection.make(
            "topk", self.manifest.routing, self.manifest.dims.top_k, self.manifest.dims.experts
        )
        self.broker = Broker(run_dir)
        self.link = Link()
        self.codec, self.run_dir = codec, run_dir

    def __enter__(self) -> Cluster:
        self.broker.start()
        self.fleet = LocalFleet(
            self.run_dir, self.bundle, self.holdings, self.link.endpoint, (self.broker.host, self.broker.port)
        )
        self.fleet.__enter__()
        self.fleet.wait_joined(self.link)
        self.remote = RemoteExperts(self.link, self.table, self.codec)
        self.decoder = Decoder(Trunk(self.bundle, self.manifest), self.policy, self.remote)
        return self

    def __exit__(self, *_) -> None:
        self.fleet.stop()
        self.link.close()
        self.broker.stop()

    def single(self) -> Decoder:
        experts = LocalExperts(self.bundle, self.manifest, self.table, self.codec)
        return Decoder(Trunk(self.bundle, self.manifest), self.policy, experts)


def greedy(decoder: Decoder, tokens: int, prompt: list[int] = PROMPT, **options) -> tuple[list[int], np.ndarray, list]:
    """(tokens, logits [n, V], costs); a `sampling` option makes it not greedy."""
    logits: list[np.ndarray] = []
    costs = list(decoder.generate(prompt, tokens, keep_logits=logits, ignore_eos=True, **options))
    return [cost.token_id for cost in costs], np.stack(logits), costs
