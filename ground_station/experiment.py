"""Experiments: one scenario, one text, several selection policies side by side in mission time (`spacemoe experiment run FILE`).

The file (TOML) names the scenario, the demand, what a run of an expert costs and how that was had, and the policies with their knobs.
Every policy sees the same passages of held-out text in the same order, once per seed. Everything is simulated but the model, its text and
what the costs say of themselves. Leaves out: the loop (experiment_orbit.py), several processes (experiment_sweep.py), what is written
(experiment_store.py), the upper bound (experiment_bound.py), pictures.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from firmware_sim.scenario import Scenario
from ground_station import costs as stored_costs
from ground_station import dispatch, evaluate, selection
from ground_station.experiment_orbit import ADMISSIONS, Costs, Setting, Trace, play, surroundings
from ground_station.experiment_text import PASSAGE_TOKENS, Rehearsal, passages
from ground_station.placement import round_robin
from ground_station.selection_world import PRECISIONS, Calibration
from ground_station.text import Text
from node_agent import frame, shard, toml_file

SHIPPED = Path(__file__).with_name("experiments")
MAX_FILE_BYTES = 1 << 20
MAX_SLOTS = 20_000
MAX_KNOB = 1e12
MAX_POLICIES = 64
MAX_SEEDS = 100
LOOK_TOKENS = 8
MAX_TEXT_TOKENS = 64 * PASSAGE_TOKENS  # of one seed; after its end the text is read again


class ExperimentError(ValueError):
    """An experiment cannot be run as it is written; the text names the entry and what to give."""


@dataclass(frozen=True)
class Contender:
    """A policy with its knobs, and what bounds its load (see experiment_orbit.play). `label`: its row in reports."""

    label: str
    policy: str
    admission: str
    knobs: dict[str, float]


@dataclass(frozen=True)
class Experiment:
    """The whole file. costs: precision -> (joules, ms) of one row through one expert; none where it names a `board` instead, until
    `priced` has taken them from the bundle."""

    name: str
    scenario: str
    slots: int
    slot_s: float
    tokens_per_s: float
    coverage: float
    kl_nats: float
    contacts: bool
    seeds: tuple[int, ...]
    precisions: tuple[str, ...]
    costs: dict[str, tuple[float, float]]
    source: str
    contenders: tuple[Contender, ...]
    board: str = ""

    def priced(self, bundle: Path) -> Experiment:
        """With the costs that the bundle has of `board`, where one is named.  Raises: ExperimentError, CostsError, BundleError."""
        if not self.board or self.costs:
            return self
        found = stored_costs.read(bundle, shard.read_manifest(bundle), self.board)
        costs = {}
        for precision in self.precisions:
            joules, ms = (float(each[frame.PRECISION_ID[precision]]) for each in (found.joules, found.ms))
            if not joules > 0 or not ms > 0:
                raise ExperimentError(
                    f"the bundle has no {'ms' if joules > 0 else 'joules'} of {precision} on {self.board[:40]} ({found.source[:80]}): "
                    "run node-agent selftest where there is a power sensor, then spacemoe bundle costs, or give figures in [costs]"
                )
            costs[precision] = joules, ms
        return replace(self, costs=costs, source=found.source)

    def narrowed(self, seeds: list[int] | None, slots: int | None, only: list[str] | None) -> Experiment:
        """With other seeds, fewer slots, only some contenders (by label); None: as it is.  Raises: ExperimentError."""
        chosen = tuple(each for each in self.contenders if only is None or each.label in only)
        if only is not None and len(chosen) != len(set(only)):
            labels = ", ".join(repr(each.label) for each in self.contenders)
            raise ExperimentError(
                f"not every one of {', '.join(only)[:100]} is a policy of the experiment; there are {labels}"
            )
        seeds = self.seeds if seeds is None else tuple(_seeds(seeds, "--seeds"))
        if slots is not None and slots > MAX_SLOTS:
            raise ExperimentError(f"--slots {slots} is over the limit of {MAX_SLOTS}")
        return replace(self, contenders=chosen, seeds=seeds, slots=slots or self.slots)


def _seeds(values: list, where: str) -> list[int]:
    if not 1 <= len(values) <= MAX_SEEDS or not all(
        isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**32 for seed in values
    ):
        raise ExperimentError(f"{where}: seeds are 1 to {MAX_SEEDS} whole numbers of at least 0")
    if len(set(values)) != len(values):
        raise ExperimentError(f"{where}: a seed is there twice, which would count one run as two")
    return values


def _short(value: object) -> str:
    try:
        return str(value)[:40]
    except ValueError:  # Python writes no whole number of thousands of digits
        return "a number of thousands of digits"


def find(name: str) -> Experiment:
    """An experiment by its file, or one that ships with the kit by its name.  Raises: ExperimentError."""
    path = Path(name)
    if "/" not in name and not name.endswith(".toml"):
        path = SHIPPED / f"{name}.toml"
        if not path.is_file():
            names = ", ".join(sorted(each.stem for each in SHIPPED.glob("*.toml")))
            raise ExperimentError(f"{name} is no file and no experiment of the kit; there are {names}")
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ExperimentError(f"{path} cannot be read ({error.strerror}); give an experiment file (TOML)") from None
    if len(content) > MAX_FILE_BYTES:
        raise ExperimentError(f"{path} is over the limit of {MAX_FILE_BYTES} bytes")
    try:
        tree = toml_file.loads(content)
    except toml_file.TomlError as error:
        raise ExperimentError(f"{path} is not TOML: {str(error)[:200]}; correct that line") from None
    return parse(tree, str(path))


def parse(tree: dict[str, Any], where: str = "experiment") -> Experiment:
    """An experiment from a TOML tree.  Raises: ExperimentError."""
    rest = dict(tree)

    def take(
        name: str, kind: type, low: float = 0, high: float = 0, default: Any = None, of: dict | None = None
    ) -> Any:
        value = (rest if of is None else of).pop(name, default)
        if value is None:
            raise ExperimentError(f"{where}: give {name}")
        if kind is float:
            good = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
        elif kind is int:
            good = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        elif kind is str:
            good = isinstance(value, str) and 0 < len(value) <= 300 and value.isprintable()
        else:
            good = isinstance(value, kind)
        if not good:
            want = (
                f"{'a whole number' if kind is int else 'a number'} from {low:g} to {high:g}"
                if kind in (int, float)
                else "a text of 1 to 300 printable characters"
                if kind is str
                else f"a {kind.__name__}"
            )
            raise ExperimentError(f"{where}: {name} is {_short(value)}; give {want}")
        return float(value) if kind is float else value

    costs_tree = dict(take("costs", dict))
    board = take("board", str, of=costs_tree) if "board" in costs_tree else ""
    source = "" if board else take("source", str, of=costs_tree)
    if board and costs_tree:
        raise ExperimentError(f"{where}: [costs] names a board and gives figures; give one of both")
    costs = {}
    for precision, entry in costs_tree.items():
        if precision not in frame.PRECISIONS or not isinstance(entry, dict):
            raise ExperimentError(
                f"{where}: [costs.{precision[:20]}] is no precision; use {', '.join(frame.PRECISIONS)}"
            )
        entry = dict(entry)
        costs[precision] = take("joules", float, 1e-12, 1e6, of=entry), take("ms", float, 1e-6, 1e6, of=entry)
        if entry:
            raise ExperimentError(f"{where}: [costs.{precision}] {min(entry)[:40]} is unknown; use joules, ms")
    precisions = tuple(take("precisions", list))
    if (
        not precisions
        or not all(isinstance(each, str) for each in precisions)
        or not set(precisions) <= set(frame.PRECISIONS if board else costs)
        or len(set(precisions)) != len(precisions)
    ):
        raise ExperimentError(
            f"{where}: precisions names {_short(list(precisions))}; give different ones, each with its [costs.*]"
        )
    contenders = []
    for index, entry in enumerate(take("policy", list)):
        at = f"{where}: [[policy]] {index + 1}"
        if not isinstance(entry, dict):
            raise ExperimentError(f"{at} is no table; write [[policy]]")
        knobs = dict(entry)
        name = take("name", str, of=knobs)
        admission = take("admission", str, default="cap", of=knobs)
        label = take("label", str, default=name, of=knobs)
        if name not in selection.POLICIES:
            raise ExperimentError(f"{at}: {name[:40]} is unknown; use {', '.join(selection.POLICIES)}")
        if admission not in ADMISSIONS:
            raise ExperimentError(f"{at}: admission {admission[:40]} is unknown; use {', '.join(ADMISSIONS)}")
        for knob, value in knobs.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= MAX_KNOB:
                raise ExperimentError(
                    f"{at}: {_short(knob)} = {_short(value)} is no number; give one up to {MAX_KNOB:g}"
                )
        contenders.append(Contender(label, name, admission, knobs))
    if not 1 <= len(contenders) <= MAX_POLICIES or len({each.label for each in contenders}) != len(contenders):
        raise ExperimentError(f"{where}: give 1 to {MAX_POLICIES} tables [[policy]], each with its own label")
    seeds = tuple(_seeds(take("seeds", list, default=[0]), where))
    found = Experiment(
        take("name", str),
        take("scenario", str),
        take("slots", int, 1, MAX_SLOTS),
        take("slot_s", float, 1, 60),
        take("tokens_per_s", float, 1e-6, 1e9),
        take("coverage", float, 0, 1, 0.5),
        take("kl_nats", float, 0, 100, 0.1),
        take("contacts", bool, default=False),
        seeds,
        precisions,
        costs,
        source,
        tuple(contenders),
        board,
    )
    if rest:
        raise ExperimentError(f"{where}: {min(rest)[:40]} is unknown; see the experiments of the kit")
    return found


@dataclass(frozen=True, eq=False)
class Run:
    """One contender with one seed."""

    contender: Contender
    seed: int
    trace: Trace
    wall_s: float


def setting_of(experiment: Experiment, scenario: Scenario) -> Setting:
    """What the loop needs of the file."""
    joules, ms = np.zeros(PRECISIONS), np.zeros(PRECISIONS)
    for precision, (each_j, each_ms) in experiment.costs.items():
        joules[frame.PRECISION_ID[precision]], ms[frame.PRECISION_ID[precision]] = each_j, each_ms
    return Setting(
        scenario,
        Costs(joules, ms, experiment.source),
        experiment.slots,
        experiment.slot_s,
        experiment.tokens_per_s,
        experiment.coverage,
        experiment.kl_nats,
        experiment.contacts,
    )


class Stage:
    """What the runs of an experiment share: model, table of copies, the surroundings, and the text of the seed played last.

    Making one reads the bundle; the first run of a seed reads its text once through the unconstrained model (some seconds).
    """

    def __init__(self, experiment: Experiment, scenario: Scenario, bundle: Path):
        """Raises: ExperimentError, shard.BundleError, ValueError of the scenario's physics."""
        experiment = experiment.priced(bundle)
        manifest = shard.read_manifest(bundle)
        missing = [name for name in experiment.precisions if name not in manifest.precisions]
        if missing:
            raise ExperimentError(
                f"bundle {manifest.name} has no {missing[0]} shards: it holds {', '.join(manifest.precisions)}"
            )
        start = manifest.bos_id if manifest.bos_id is not None else next(iter(manifest.eos_ids), None)
        if start is None:
            raise ExperimentError(f"{bundle} names no begin- or end-of-text token: cannot start a text")
        first, *replicas = experiment.precisions
        names = {board.node: board.memory_mb * 1_000_000 for board in scenario.boards}
        table = dispatch.Table(round_robin(manifest, names, first, tuple(replicas)))
        if table.nodes != [board.node for board in scenario.boards]:
            raise ExperimentError(
                "the scenario's boards are not in the order of their names, or one holds no expert; correct that"
            )
        self.experiment, self.manifest, self.table = experiment, manifest, table
        self.bundle, self.start = bundle, start
        self.calibration = Calibration.load(bundle / "calibration.npz", manifest.moe_layers, manifest.dims.experts)
        for contender in experiment.contenders:  # knobs that cannot be are told now, not after an hour
            self._policy(contender, 0)
        self.setting = setting_of(experiment, scenario)
        self.around = surroundings(self.setting)
        self._rehearsal: tuple[int, Rehearsal] | None = None

    def _policy(self, contender: Contender, seed: int) -> selection.Policy:
        dims = self.manifest.dims
        knobs = {"coverage": self.experiment.coverage} | contender.knobs
        try:
            return selection.make(
                contender.policy,
                self.manifest.routing,
                dims.top_k,
                dims.experts,
                seed,
                calibration=self.calibration,
                **knobs,
            )
        except (TypeError, ValueError) as error:
            raise ExperimentError(f"policy {contender.label}: {error}; correct its knobs") from None

    def _text(self, seed: int) -> Rehearsal:
        if self._rehearsal is None or self._rehearsal[0] != seed:
            self._rehearsal = None  # its memory first
            tokens = min(self.experiment.slots * self.setting.looks * LOOK_TOKENS, MAX_TEXT_TOKENS)
            text = Text(self.bundle, self.manifest)
            texts = passages(text, documents(self.bundle), self.start, tokens, np.random.default_rng(seed))
            self._rehearsal = seed, Rehearsal(self.bundle, self.manifest, self.table, texts, LOOK_TOKENS)
        return self._rehearsal[1]

    def play(self, contender: Contender, seed: int) -> Run:
        """The same contender and seed give the same run.  Raises: experiment_text.TextTooShort, shard.BundleError."""
        policy, rehearsal = self._policy(contender, seed), self._text(seed)
        began = time.perf_counter()
        trace = play(self.setting, self.around, rehearsal, policy, contender.admission)
        return Run(contender, seed, trace, time.perf_counter() - began)


def documents(bundle: Path) -> list[str]:
    """The held-out text beside a bundle.  Raises: evaluate.EvaluationError."""
    return [text for texts in evaluate.domains(bundle.parent / "heldout").values() for text in texts]


def run(
    experiment: Experiment, scenario: Scenario, bundle: Path, progress: Callable[[str], None] = lambda text: None
) -> tuple[Run, ...]:
    """Every contender with every seed, one after the other.  Raises: as Stage and its play."""
    stage, runs = Stage(experiment, scenario, bundle), []
    for seed in experiment.seeds:
        for contender in experiment.contenders:
            progress(f"{contender.label}, seed {seed}")
            runs.append(stage.play(contender, seed))
    return tuple(runs)
