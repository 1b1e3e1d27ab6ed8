"""The import arrows between the rooms, what a light command may load, and that every file says what it is for.

Each module is loaded in a fresh interpreter, so that what counts is what is really imported and not what the text says;
imports inside functions are checked in the text as well, since an import at run time is an arrow too.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("firmware_sim", "ground_station", "hardware", "node_agent", "quantize")
CONTRACT = (
    "node_agent",
    "node_agent.wire",
    "node_agent.frame",
    "node_agent.compress",
    "node_agent.entropy",
    "node_agent.entropy_code",
    "node_agent.shard",
    # What the model's own routing is: the ground station, calibration and later a gateway board need the same.
    "node_agent.routing",
    # The order of the partial sum is what a node and the single-process reference must agree on, bit by bit.
    "node_agent.partial",
    # How shards move is the same at both ends of the second socket.
    "node_agent.delivery_frame",
    # How a plain link cuts bytes into messages is the same at both of its ends.
    "node_agent.zmtp",
    # A stranger's file is read with the same bounds wherever it lies.
    "node_agent.npz_file",
    "node_agent.toml_file",
    # What a board's self-test measured is checked alike where it is written, stored and read.
    "node_agent.costs",
    # A file is put into a finished bundle in one way, whoever does it.
    "node_agent.bundle_file",
    # What a fleet's key signs is what a node checks, byte by byte.
    "node_agent.signature",
    # What paho lacks, it lacks at both ends of the control plane.
    "node_agent.mqtt_mend",
    # What a board asks for and what a fleet answers is one text.
    "node_agent.enrolment",
)
# firmware_sim modules that are physics and nothing else, open to the ground station's twin.
PHYSICS = (
    "firmware_sim",
    "firmware_sim.ageing",
    "firmware_sim.battery",
    "firmware_sim.board",
    "firmware_sim.bus",
    "firmware_sim.constellation",
    "firmware_sim.constellation_numba",
    "firmware_sim.contact",
    "firmware_sim.eclipse",
    "firmware_sim.environment",
    "firmware_sim.foster",
    "firmware_sim.links",
    "firmware_sim.orbit",
    "firmware_sim.pacing",
    "firmware_sim.paths",
    "firmware_sim.profiles",
    "firmware_sim.satellite",
    "firmware_sim.scenario",
    "firmware_sim.scenario_table",
    "firmware_sim.sun",
    "firmware_sim.thermal",
    "firmware_sim.throttle",
    "firmware_sim.tle",
    "firmware_sim.wear",
)
# The sub-commands of the umbrella command are where the rooms are put together.
COMPOSITION_ROOTS = (
    "ground_station.cli_benchmark",
    "ground_station.cli_boards",
    "ground_station.cli_customize",
    "ground_station.cli_flash",
    "ground_station.cli_fleet",
    "ground_station.cli_image",
    "ground_station.cli_models",
)
# Training, the uncut export and parity need torch; nothing else may.
TORCH_ROOM = "quantize.reference"
HEAVY = ("torch", "transformers", "optimum", "onnx")
BASE_PACKAGES = {"cryptography", "numpy", "onnxruntime", "paho", "psutil", "zmq", "tomli"}


def modules() -> list[str]:
    names = []
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def path_of(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


@lru_cache(maxsize=None)
def loaded_by(statement: str) -> frozenset[str]:
    """Names in sys.modules after `statement` in a fresh interpreter."""
    code = f"import sys\n{statement}\nprint('=modules=', *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd="/", timeout=120
    )
    assert done.returncode == 0, f"{statement}: {done.stderr.strip()[-400:]}"
    return frozenset(done.stdout.rpartition("=modules=")[2].split())


def imports_in(path: Path) -> set[str]:
    """Every module that a file's text names in an import, also inside functions; `from a import b` gives a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms_modules(names) -> set[str]:
    """Those of `names` that are modules of this project."""
    known = set(modules())
    return {name for name in names if name in known}


def allowed(module: str) -> tuple[str, ...]:
    """Prefixes of project modules that `module` may import (exact names for contract and physics)."""
    room = module.split(".")[0]
    return {
        "node_agent": ("node_agent.*",),
        "firmware_sim": ("firmware_sim.*", *CONTRACT),
        "hardware": ("hardware.*", *CONTRACT),
        "quantize": ("quantize.*", *CONTRACT),
        "ground_station": ("ground_station.*", *CONTRACT, *PHYSICS),
    }[room]


def forbidden(module: str, imported) -> set[str]:
    """Project modules among `imported` that `module` may not import."""
    rules = allowed(module)
    own = tuple(rule[:-2] for rule in rules if rule.endswith(".*"))
    return {
        name
        for name in rooms_modules(imported)
        if name not in rules and not any(name == room or name.startswith(room + ".") for room in own)
    }


def needs_torch(module: str) -> bool:
    return module.startswith(TORCH_ROOM)


ZYGOTE = """
import importlib, os, sys, traceback
for name in PRELOADED:
    try:
        importlib.import_module(name)
    except ImportError:
        pass
assert not {name.split(".")[0] for name in sys.modules} & {*ROOMS}
for module in MODULES:
    read, write = os.pipe()
    if not os.fork():
        os.close(read)
        try:
            importlib.import_module(module)
            said = " ".join(sys.modules)
        except BaseException:
            said = "!" + traceback.format_exc()[-400:]
        with os.fdopen(write, "w") as out:
            out.write(said)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as came:
        print(module, came.read().replace(chr(10), " | "))
    os.wait()
"""
PRELOADED = (
    *("numpy", "onnxruntime", "zmq", "paho.mqtt.client", "psutil", "cryptography.x509", "onnx", "tokenizers", "tqdm"),
    *(
        "scipy.optimize",
        "scipy.stats",
        "scipy.sparse.csgraph",
        "sgp4.api",
        "rainflow",
        "matplotlib.pyplot",
        "packaging",
    ),
    *("pyarrow.parquet", "joblib", "http.server", "importlib.metadata", "concurrent.futures", "asyncio"),
)


@pytest.fixture(scope="session")
def loaded_after() -> dict[str, frozenset[str]]:
    """Module -> names in sys.modules after its import, each in a process of its own that had none of ours before.

    The processes are forks of one that has other people's large packages already, which is where the time of some 250 fresh
    interpreters would go; what is ours, and torch, is loaded by the module alone.
    """
    names = [module for module in modules() if not needs_torch(module)]
    head = f"MODULES, ROOMS, PRELOADED = {names!r}, {ROOMS!r}, {PRELOADED!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", head + ZYGOTE], capture_output=True, text=True, env=environment(), cwd="/", timeout=280
    )
    assert done.returncode == 0, done.stderr.strip()[-400:]
    found = {}
    for line in done.stdout.splitlines():
        module, _, loaded = line.partition(" ")
        found[module] = frozenset(loaded.split()) if not loaded.startswith("!") else frozenset({loaded})
    assert found.keys() == {*names}
    return found


@pytest.mark.parametrize("module", modules())
def test_module_follows_the_arrows(module, loaded_after):
    text = imports_in(path_of(module))
    if module in COMPOSITION_ROOTS:
        # Inside sub-commands it may import anything, at its top nothing but its own room.
        loaded = loaded_after[module]
        assert forbidden(module, loaded) == set()
        return
    assert forbidden(module, text) == set(), "by its text"
    # Reference training is a script with torch at its top: its arrows are checked by text alone.
    if not needs_torch(module):
        loaded = loaded_after[module]
        assert module in loaded, f"it cannot be imported: {loaded}"
        assert forbidden(module, loaded) == set(), "by what it loads"
        assert {"torch", "transformers", "optimum"} & loaded == set()


@pytest.mark.parametrize("module", CONTRACT)
def test_contract_modules_need_only_the_standard_library_and_numpy(module):
    third_party = {name.split(".")[0] for name in loaded_by(f"import {module}")} - set(sys.stdlib_module_names)
    # What a bare interpreter loads by itself (site's .pth files of an editable install and the like) is not the module's.
    third_party -= {name.split(".")[0] for name in loaded_by("pass")}
    assert third_party <= {"node_agent", "numpy", "tomli"}  # tomli: the standard library's tomllib before Python 3.11
    assert rooms_modules(loaded_by(f"import {module}")) <= set(CONTRACT)


@pytest.mark.parametrize("module", [name for name in modules() if name.startswith("node_agent")])
def test_a_board_needs_only_the_base_packages(module):
    """What node_agent's text imports is in the base dependencies, also inside functions."""
    top = {name.split(".")[0] for name in imports_in(path_of(module))} - set(sys.stdlib_module_names) - {"tomllib"}
    assert top <= BASE_PACKAGES | {"node_agent"}


@pytest.mark.parametrize("module", [name for name in modules() if name.startswith("ground_station")])
def test_the_ground_station_needs_no_torch_and_no_onnx(module):
    """Onnxruntime runs the trunk; a machine that only runs bundles installs neither torch nor onnx."""
    assert not [name for name in imports_in(path_of(module)) if name.split(".")[0] in HEAVY]


def test_only_the_reference_room_and_marked_modules_name_torch():
    naming = {
        module
        for module in modules()
        if {name.split(".")[0] for name in imports_in(path_of(module))} & {"torch", "transformers", "optimum"}
    }
    outside = {module for module in naming if not needs_torch(module)}
    # Optimum's recipes and export are optional parts of quantize, imported when they are asked for.
    assert all(module.startswith("quantize.") for module in outside)
    for module in outside:
        assert {"torch", "transformers", "optimum"} & loaded_by(f"import {module}") == set()


def test_help_is_light():
    loaded = loaded_by("import ground_station.cli as cli\ntry:\n cli.main(['--help'])\nexcept SystemExit:\n pass")
    tops = {name.split(".")[0] for name in loaded}
    assert tops & {*HEAVY, "onnxruntime", "numpy", "node_agent", "quantize", "firmware_sim", "hardware"} == set()
    loaded = loaded_by("import node_agent.cli as cli\ntry:\n cli.main(['--help'])\nexcept SystemExit:\n pass")
    assert {name.split(".")[0] for name in loaded} & {*HEAVY, "ground_station", "quantize", "firmware_sim"} == set()


@pytest.mark.parametrize("path", sorted({*ROOT.glob("*/*.py"), *ROOT.glob("quantize/*/*.py")}), ids=lambda p: p.name)
def test_every_file_says_what_it_is_for(path):
    if ".venv" in path.parts or path.parent.name.startswith("."):
        pytest.skip("not ours")
    tree = ast.parse(path.read_text())
    assert len((ast.get_docstring(tree) or "").strip()) >= 20, f"{path} has no docstring that says what it is for"
    if path.parent.name != "tests":
        first = next(iter(ast.get_docstring(tree).splitlines()))
        assert first.strip()[-1] in ".;:,?" or len(first) > 20


def test_the_checks_can_fail(tmp_path, loaded_after):
    """Negative controls: the same functions on arrows that are wrong."""
    assert "node_agent.wire" in loaded_after["ground_station.fleet"]
    assert "node_agent.agent" not in loaded_after["node_agent.wire"]
    assert loaded_after["node_agent.wire"] & {*modules()} == loaded_by("import node_agent.wire") & {*modules()}
    assert forbidden("node_agent.agent", {"ground_station.broker", "json"}) == {"ground_station.broker"}
    assert forbidden("quantize.nbits", {"node_agent.agent", "node_agent.shard"}) == {"node_agent.agent"}
    assert forbidden("firmware_sim.run", {"node_agent.wire", "ground_station.fleet"}) == {"ground_station.fleet"}
    assert forbidden("ground_station.fleet", {"firmware_sim.board", "firmware_sim.run"}) == {"firmware_sim.run"}
    inside = tmp_path / "inside.py"
    inside.write_text("def f():\n    from quantize import nbits\n    import torch.nn\n")
    assert imports_in(inside) == {"quantize", "quantize.nbits", "torch.nn"}
    assert "psutil" in {name.split(".")[0] for name in loaded_by("import psutil")}
    with pytest.raises(AssertionError, match="No module named"):
        loaded_by("import no_such_module_here")


@pytest.mark.parametrize("module", ["node_agent.experts", "ground_station.trunk", "quantize.pipeline"])
def test_onnxruntime_reports_to_nobody(module, tmp_path):
    """Builds that do leave a `.ses` file in the temporary folder on import; control: without our packages they may."""
    code = f"import {module}, onnxruntime, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment() | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, "1"), done.stderr
    assert not list(tmp_path.iterdir())
