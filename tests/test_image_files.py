"""Partition tables and ext4 file systems inside images, read and written without mounting; sfdisk, e2fsck and debugfs are the judges."""

from __future__ import annotations

import json
import os
import re
import struct
import zlib

import pytest
from vendor_images import MIB, need_programs, sh

from hardware import ext4_files, ext4_write, partitions


@pytest.fixture(scope="session", autouse=True)
def programs():
    need_programs()


def test_ext4_writes_follow_links_and_indexed_folders(tmp_path):
    root = tmp_path / "root"
    (root / "usr/lib").mkdir(parents=True)
    (root / "many").mkdir()
    (root / "lib").symlink_to("usr/lib")
    (root / "loop").symlink_to("loop")
    for index in range(500):
        (root / "many" / f"a_file_with_a_long_name_{index}").write_text("x")
    image = tmp_path / "root.img"
    sh("mke2fs", "-q", "-t", "ext4", "-b", "1024", "-d", str(root), "-E", "root_owner=0:0", str(image), "16M")
    sh("e2fsck", "-fyD", str(image), ok=(0, 1))  # indexes the large folder, as the kernel does
    assert "0x81000" in sh("debugfs", "-R", "stat /many", str(image))
    system = ext4_files.open_ext4(image, 0, 16 * MIB)
    source = tmp_path / "with a space"
    source.write_bytes(os.urandom(5000))
    items = [
        ext4_write.File("/lib/deep/er/file", source, 0o640, 7, 8),
        ext4_write.File("/many/a_file_with_a_long_name_7", source),
        ext4_write.Link("/many/a link", "../" + "long/" * 20),
        *(ext4_write.File(f"/many/another_name_{index}", source) for index in range(30)),
    ]
    written = ext4_write.write(system, items, 1_700_000_000)
    sh("e2fsck", "-fn", str(image))
    ext4_write.verify(system, written)
    assert "/usr/lib/deep/er/file" in {item.path for item in written}
    shown = sh("debugfs", "-R", "stat /usr/lib/deep/er/file", str(image))
    assert re.search(r"Mode: +0640", shown) and re.search(r"User: +7 +Group: +8 ", shown)
    assert "mtime: 0x6553f100" in shown
    # controls: what must fail does
    source.write_bytes(b"other")
    with pytest.raises(ext4_files.Ext4Error, match="another sha256"):
        ext4_write.verify(system, written)
    with pytest.raises(ext4_files.Ext4Error, match="no file"):
        ext4_write.write(system, [ext4_write.File("/many", source)], 1)
    with pytest.raises(ext4_files.Ext4Error, match="no folder"):
        ext4_write.write(system, [ext4_write.File("/many/another_name_1/x", source)], 1)
    with pytest.raises(ext4_files.Ext4Error, match="leads nowhere"):
        ext4_write.write(system, [ext4_write.File("/loop/x", source)], 1)
    with pytest.raises(ext4_files.Ext4Error, match="cannot be named"):
        ext4_write.write(system, [ext4_write.File('/a"b', source)], 1)
    with pytest.raises(ext4_files.Ext4Error, match="could not write"):
        ext4_write.write(system, [ext4_write.File("/x", tmp_path / "missing")], 1)


@pytest.mark.parametrize("label", ["dos", "gpt"])
def test_tables_are_read_as_sfdisk_reads_them(label, tmp_path):
    image = tmp_path / "disk"
    with open(image, "wb") as file:
        file.truncate(64 * MIB)
    rows = ["size=4MiB,bootable", "size=8MiB", "size=30MiB,type=5", "size=5MiB", "size=6MiB", "size=7MiB"]
    if label == "gpt":
        rows = ["size=4MiB,name=esp,type=U", "size=8MiB,name=APP", "size=3MiB"]
    sh("sfdisk", "-q", str(image), send=f"label: {label}\n".encode() + "\n".join(rows).encode() + b"\n")
    table = partitions.read_table(image)
    judge = json.loads(sh("sfdisk", "-J", str(image)))["partitiontable"]
    assert (table.label, table.id) == (judge["label"], judge["id"].lower().removeprefix("0x"))
    expected = [
        (row["start"] * 512, row["size"] * 512, row["type"].lower().zfill(2), row.get("name", ""))
        for row in judge["partitions"]
    ]
    assert [(part.start_bytes, part.size_bytes, part.type, part.name) for part in table.partitions] == expected
    if label == "gpt":
        return
    # a chain of logical partitions that turns back
    first = next(part for part in table.partitions if part.type == "05").start_bytes
    raw = bytearray(image.read_bytes())
    raw[first + 446 + 16 + 8 : first + 446 + 16 + 12] = struct.pack("<I", 0)
    image.write_bytes(raw)
    with pytest.raises(partitions.PartitionError, match="turns back"):
        partitions.read_table(image)


def test_tables_of_absurd_sizes_are_refused(tmp_path):
    image = tmp_path / "disk"
    with open(image, "wb") as file:
        file.truncate(4 * MIB)
    sh("sfdisk", "-q", str(image), send=b"label: gpt\nsize=1MiB\n")
    assert len(partitions.read_table(image).partitions) == 1  # control
    header = bytearray(image.read_bytes()[512:1024])
    header[80:84] = struct.pack("<I", 1 << 31)  # entries
    header[16:20] = bytes(4)
    header[16:20] = struct.pack("<I", zlib.crc32(header[:92]))
    with open(image, "r+b") as file:
        file.seek(512)
        file.write(header)
    with pytest.raises(partitions.PartitionError, match="cannot be"):
        partitions.read_table(image)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(partitions.PartitionError, match="no plain file"):
        partitions.read_table(tmp_path / "pipe")
