"""Files of strangers that cost time or memory, or make a traceback: TOML with endless keys, damaged .npz, texts that a terminal obeys."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import struct
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tomllib
from hypothesis import given, settings
from hypothesis import strategies as st

from firmware_sim import scenario
from ground_station import (
    cli_models,
    cli_shared,
    contacts,
    evaluate,
    experiment,
    plan_fleet,
    rates,
    text_stream,
    up,
)
from ground_station.cli import main
from ground_station.dispatch import Table
from ground_station.fleet import NodeState
from ground_station.fleet_records import FleetFolder
from ground_station.placement import PlacementError, round_robin
from ground_station.selection_world import Calibration, CalibrationUnusable, World
from node_agent import config, npz_file, shard, toml_file, wire
from node_agent.errors import ConfigError

BUNDLE = Path(evaluate.__file__).parents[1] / "quantize" / "reference" / "bundle"
LONG = ".".join("a" * 33)


@pytest.mark.parametrize(
    "text",
    [
        f"{LONG} = 1",
        f"[{LONG}]",
        f"[[ {LONG} ]]",
        f"x = {{ {LONG} = 1 }}",
        f"x = [1.5, {{ y = {{ {LONG} = 1 }} }}]",
        '\'a\' . "b\\"." \t.' * 16 + "c = 1",
        f'x = "\\\\" # "\n{LONG} = 1',
        f'x = """a\\"""b""""" # """\n{LONG} = 1',
        f'x = ["""a"""", {{ {LONG} = 1 }}]',
        f"x = '''a\\'''\n{LONG} = 1",
        f"x = 'a\\'\n{LONG} = 1",
        f"x = ''\r\ny = '' # '''\r\n{LONG} = 1",
    ],
)
def test_keys_of_many_parts_are_refused(text):
    tomllib.loads(text)  # it is TOML
    with pytest.raises(toml_file.TomlError, match="more than 32 parts"):
        toml_file.loads(text.encode())
    with pytest.raises(toml_file.TomlError, match="more than 32 parts"):
        toml_file.loads(text)


@pytest.mark.parametrize(
    "text",
    [
        f"{'.'.join('a' * 32)} = 1\n[{'.'.join('b' * 32)}]",
        f'x = "{LONG}"',
        f"x = '{LONG}'",
        f'x = """\n{LONG}"" \\""" {LONG} = 1\n"""',
        f"x = '''\n{LONG}' '' \\'''",
        f"# {LONG} = 1\nx = 1 # {LONG}",
        f"x = [{'1.5, -2.5e-3, ' * 100}]",
        f"x = [{'1979-05-27T07:32:00.999999-07:00, ' * 100}]",
        f'x = [\'{LONG}\', "\\"{LONG}"]',
        f"\"{LONG}\" = 1\n'b{LONG}'.'{LONG}' = 2",
        "\n".join(f"[t{i}.u]\nk.l = {i}.5" for i in range(100)),
    ],
)
def test_what_only_looks_like_such_a_key_is_read(text):
    assert toml_file.loads(text.encode()) == toml_file.loads(text) == tomllib.loads(text)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(
        st.sampled_from(["a", ".", '"', "'", '"""', "'''", "\\", "#", "\n", " ", "=", "[", "]", "{", "}", ",", "1"])
    )
)
def test_short_texts_are_read_as_the_standard_library_does(pieces):
    text = "".join(pieces)[:60]  # too short for such a key
    try:
        want = tomllib.loads(text)
    except ValueError:
        with pytest.raises(toml_file.TomlError):
            toml_file.loads(text)
    else:
        assert toml_file.loads(text) == want


@pytest.mark.parametrize("raw", [b"x = \xff", b"x = " + b"9" * 5000, b"x = " + b"[" * 100_000, b'x = "\x1b'])
def test_what_is_no_toml_is_one_kind_of_error_in_one_line(raw):
    with pytest.raises(toml_file.TomlError) as caught:
        toml_file.loads(raw)
    assert str(caught.value).isprintable()


def test_every_reader_refuses_the_80_kb_key_in_one_line(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text(".".join("a" * 40_000) + "=1")
    for read, kind in (
        (contacts.read, contacts.ContactError),
        (lambda path: experiment.find(str(path)), experiment.ExperimentError),
        (plan_fleet.read, PlacementError),
        (scenario.read, scenario.ScenarioError),
        (config.load, ConfigError),
    ):
        with pytest.raises(kind, match="is not TOML|not TOML") as caught:
            read(path)
        assert str(path) in str(caught.value) and str(caught.value).isprintable()


def member(header: str | None = None, array: np.ndarray | None = None) -> bytes:
    """One array of an .npz: of `array`, or with a header as it is given and 1 kB of zeros."""
    if header is None:
        file = io.BytesIO()
        np.lib.format.write_array(file, array)
        return file.getvalue()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(1024)


def claims(shape: str, descr: str = "'<f8'") -> bytes:
    return member(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n")


def bit(path: Path, offset: int, value: bytes) -> None:
    """Overwrites fields of the only member in its local header and in the directory (at `offset` of the first)."""
    content = bytearray(path.read_bytes())
    for at in (offset, content.index(b"PK\x01\x02") + offset + 2):  # the directory has "made by" before them
        content[at : at + len(value)] = value
    path.write_bytes(content)


MEMBERS = {
    "structured": member(array=np.zeros(4, [("a", "<f8")])),
    "void": claims("(4,)", "'|V0'"),
    "object": claims("(4,)", "'|O'"),
    "complex": member(array=np.zeros(4, complex)),
    "text": member(array=np.array(["a"] * 4)),
    "subarray": claims("(4,)", "('<f8', (1073741824,))"),
    "2^70": claims(f"({1 << 70},)"),
    "2^50": claims(f"({1 << 50},)"),
    "2^62 twice": claims(f"({1 << 62}, {1 << 62})"),
    "negative": claims("(-1,)"),
    "true": claims("(True, 4)"),
    "short": claims("(400,)"),
    "long": member(array=np.zeros(4)) + b"0",
    "garbage": member("garbage \x00 {[("),
    "nested": member("-" * 3000 + "1"),
    "no key": member("{'shape': 'x'}"),
    "descr": claims("(4,)", "[[]]"),
    "version": member(array=np.zeros(4)).replace(b"NUMPY\x01", b"NUMPY\x07", 1),
    "magic": b"nothing",
    "empty": b"",
    "too large": member(array=np.array([0, 1e300, 0, 0])),
    "infinite": member(array=np.array([0, np.inf, 0, 0])),
    "not a number": member(array=np.array([0, np.nan, 0, 0])),
}


@pytest.mark.parametrize("what", MEMBERS)
@pytest.mark.parametrize("shape", [(4,), (None,), (None, None)])
def test_an_array_that_is_not_what_was_asked_for_is_one_kind_of_error(tmp_path, what, shape):
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", MEMBERS[what])
    with pytest.raises(npz_file.NpzError) as caught:
        npz_file.read(path, {"x": shape})
    assert str(caught.value).isprintable()


def archives(path: Path):
    """(name) after writing each damaged archive with one array x [4]."""
    array = member(array=np.random.default_rng(0).normal(size=4))
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("x.npy", array)
        yield f"method {method}"
    for name, offset, value in (
        ("method 99", 8, struct.pack("<H", 99)),
        ("encrypted", 6, struct.pack("<H", 1)),
        ("checksum", 14, b"\x00\x00\x00\x00"),
    ):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x.npy", array)
        bit(path, offset, value)
        yield name
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", array)
    good = path.read_bytes()
    path.write_bytes(good[:40] + b"\xff" * 20 + good[60:])
    yield "deflate"
    path.write_bytes(good[:-30])
    yield "cut"
    path.write_bytes(array)
    yield "npy"
    path.write_bytes(b"")
    yield "empty"
    path.unlink()
    yield "missing"
    path.mkdir()
    yield "folder"


def test_damaged_archives_are_one_kind_of_error(tmp_path):
    path = tmp_path / "x.npz"
    for name in archives(path):
        with pytest.raises(npz_file.NpzError) as caught:
            npz_file.read(path, {"x": (4,)})
            pytest.fail(name)
        assert str(caught.value).isprintable()


def test_good_archives_are_read(tmp_path):
    path = tmp_path / "x.npz"
    arrays = {
        "f": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big": np.arange(4, dtype=">i2"),
        "n": np.array(7, np.uint64),
        "none": np.zeros((0, 3, 3), np.float32),
    }
    shapes = {"f": (2, None), "big": (4,), "n": (), "none": (0, 3, 3), "absent": (1,)}
    for save in (np.savez, np.savez_compressed):
        save(path, **arrays, other=np.zeros(3))
        found = npz_file.read(path, shapes, optional=["absent"])
        assert set(found) == set(arrays) and all(value.dtype == np.float64 for value in found.values())
        assert all((found[name] == value).all() and found[name].shape == value.shape for name, value in arrays.items())
    with pytest.raises(npz_file.NpzError, match="holds no absent"):
        npz_file.read(path, shapes)


@pytest.mark.parametrize("what", ["structured", "2^70", "2^50", "void", "garbage", "too large", "complex", "nested"])
def test_each_reader_of_a_calibration_keeps_its_own_error(tmp_path, monkeypatch, what):
    manifest = shard.read_manifest(BUNDLE)
    path = tmp_path / "calibration.npz"
    with zipfile.ZipFile(BUNDLE / "calibration.npz") as good, zipfile.ZipFile(path, "w") as archive:
        for item in good.infolist():
            spoilt = item.filename in ("output_norm.npy", "gate_mean.npy")
            archive.writestr(item.filename, MEMBERS[what] if spoilt else good.read(item))
    with pytest.raises(shard.BundleError, match="quantize again"):
        plan_fleet.calibration(tmp_path, manifest)
    with pytest.raises(CalibrationUnusable, match="make the bundle again"):
        Calibration.load(path, manifest.moe_layers, manifest.dims.experts)
    # the manifest says that it is this file: whoever made the bundle may have made it so
    entry = shard.FileEntry("calibration.npz", path.stat().st_size, shard.sha256_of(path))
    files = tuple(entry if item.path == entry.path else item for item in manifest.files)
    with pytest.raises(rates.RatesError, match="write the bundle again"):
        rates.Sensitivity.read(tmp_path, replace(manifest, files=files))


def test_an_error_that_quotes_a_file_moves_no_terminal(tmp_path, capsys):
    path = tmp_path / "x.toml"
    path.write_text('"\\u001b]0;owned\\u0007\\u009b2J\\u202e" = 1\ntokens_per_s = 1\n', encoding="utf-8")
    assert main(["plan", str(BUNDLE), "--nodes", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.endswith("\n") and error[:-1].isprintable() and "\\x1b]0;owned" in error


def test_what_a_board_says_of_itself_moves_no_terminal_and_fills_none():
    """As `up` and `generate` print it: escapes are spelled out, texts are cut, and printable text comes through as it is."""
    escape = "x\x1b]0;owned\x07\n\x9b2J\u202e"
    birth = wire.Birth("n1", 0, "1", escape + "b" * 250_000, 0.0, (), (), "", 1, "")
    event = wire.Event("n1", 0.0, "warning", escape, "t" * 250_000)
    status = wire.Status("n1", "online", 0)
    after = {"n1": NodeState("n1", birth, status, events=(event,), proven=True)}
    lines = up.changes({}, after)
    assert len(lines) == 2 and all(len(line) < 1000 for line in lines)
    for line in lines:
        text = cli_shared.wrapped(line)
        assert text.replace("\n", "").isprintable() and "\\x1b]0;owned\\x07" in text
    assert len(cli_shared.plain("z" * 250_000)) < cli_shared.MAX_CHARACTERS + 50
    assert cli_shared.wrapped("  25 °C, größer, 東京") == "  25 °C, größer, 東京"  # control


def test_generated_text_keeps_its_newlines_and_joiners_and_no_escapes(capsys):
    text_stream.show("a\n\x1b[2J\r\x9b\x07\tb\u202e")
    assert capsys.readouterr().out == "a\n\\x1b[2J\\r\\x9b\\x07 b\\u202e"
    text_stream.show(joined := "نمی\u200cخواهم 👩\u200d🚀\u00a0!\n")
    assert capsys.readouterr().out == joined  # control


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device: free space on the disk"),
        (
            OSError(errno.EROFS, os.strerror(errno.EROFS), "/x/y"),
            "/x/y: Read-only file system: choose a folder that may be",
        ),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/x/y"), "/x/y: Permission denied: choose a folder"),
        (
            OSError(errno.EACCES, "port 123 is for root: give --time-port 0"),
            "port 123 is for root: give --time-port 0\n",
        ),
    ],
)
def test_an_error_of_the_system_names_the_path_and_the_next_step(monkeypatch, capsys, error, says):
    def fails(args):
        raise error

    monkeypatch.setattr(cli_models, "_bundle_show", fails)
    assert main(["bundle", "show", str(BUNDLE)]) == 1
    assert says in capsys.readouterr().err


def test_a_full_disk_names_the_file_that_was_written(tmp_path):
    for code, named in ((errno.ENOSPC, str(tmp_path / "x")), (errno.ECONNRESET, None)):
        with pytest.raises(OSError) as caught, shard.atomic_file(tmp_path / "x"):
            raise OSError(code, os.strerror(code))  # as a write does
        assert caught.value.filename == named and not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", [["show"], ["verify"], ["sign", "--dir", "FLEET"]])
def test_a_bundle_with_a_pipe_in_it_is_refused_and_not_waited_for(tmp_path, capsys, part):
    FleetFolder.create(tmp_path / "fleet", "lab", ["ground.local"])
    part = [str(tmp_path / "fleet") if each == "FLEET" else each for each in part]
    root = tmp_path / "bundle"
    shutil.copytree(BUNDLE, root)
    assert main(["bundle", part[0], str(root), *part[1:]]) == 0  # control
    (root / shard.MANIFEST).unlink()
    os.mkfifo(root / shard.MANIFEST)
    capsys.readouterr()

    def late(*_: object) -> None:
        raise AssertionError("waited for a pipe")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(10)
    try:
        assert main(["bundle", part[0], str(root), *part[1:]]) == 2
        os.mkfifo(root / "pipe")
        with pytest.raises(shard.BundleError, match="no plain file"):
            shard.verify_file(root, shard.FileEntry("pipe", 0, "ab"))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    error = capsys.readouterr().err
    assert "manifest.json is no plain file" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('name = "budgeted"', 'name = "budgeted"\ncoverage = true'),
        ('name = "budgeted"', f'name = "budgeted"\nvalue = 1{"0" * 400}'),
        ('name = "budgeted"', f'name = "budgeted"\nvalue = 0x1{"0" * 9000}'),
        ('name = "budgeted"', 'name = "budgeted"\nvalue = nan'),
        ('name = "budgeted"', 'name = "budgeted"\nvalue = -1e13'),
        ('name = "budgeted"', 'name = "budgeted"\nlabel = "a\\u001b[2J"'),
        ("kl_nats = 0.1", f"kl_nats = 0x1{'0' * 9000}"),
    ],
)
def test_knobs_are_numbers_and_texts_are_printable(tmp_path, old, new):
    text = (experiment.SHIPPED / "hot-eclipse.toml").read_text()
    assert old in text
    path = tmp_path / "x.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(experiment.ExperimentError, match="; give ") as caught:
        experiment.find(str(path))
    assert len(str(caught.value)) < len(str(path)) + 200


@pytest.mark.parametrize("price", [-1.0, float("nan"), float("inf"), True, "1", None])
def test_the_price_of_a_millisecond_is_a_number_of_0_or_more(price):
    manifest = shard.read_manifest(BUNDLE)
    table = Table(round_robin(manifest, {"n1": 10**9}, "int8"))
    world = World.of(table, manifest.dims.experts, np.ones((1, 4)), np.ones((1, 4)), ms_price=0.5)
    assert world.changed(ms_price=np.float32(1)).ms_price == 1
    with pytest.raises(ValueError, match="ms_price"):
        world.changed(ms_price=price)
