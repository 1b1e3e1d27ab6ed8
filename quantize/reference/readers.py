"""Text out of unpacked packages: one reader per domain, (name, text) of each natural unit.

Leaves out: cleaning, duplicates, splitting (corpus).
"""

from __future__ import annotations

import gzip
import html
import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

from quantize.reference.sources import require

Documents = Iterator[tuple[str, str]]  # (id, raw text)


class TextExtractor(HTMLParser):
    """Text of an HTML page: code blocks as they stand, other white space collapsed, navigation and scripts dropped."""

    BLOCKS = {"p", "div", "section", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "dl", "table", "pre", "blockquote"}
    LINES = {"br", "li", "dt", "dd", "tr"}
    VOID = {"br", "hr", "img", "link", "meta", "input", "col", "wbr"}
    SKIPPED_TAGS = {"script", "style", "nav", "head", "button", "noscript"}
    SKIPPED_CLASSES = {"navheader", "navfooter", "toc", "boring", "indexterm", "buttons"}

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.open: list[tuple[str, bool]] = []  # (tag, starts a skipped part)
        self.skipped = 0
        self.in_pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            classes = set((dict(attrs).get("class") or "").split())
            skip = tag in self.SKIPPED_TAGS or bool(classes & self.SKIPPED_CLASSES)
            self.open.append((tag, skip))
            self.skipped += skip
        self.in_pre += tag == "pre"
        self._break(tag)
        if tag == "li":
            self.parts.append("- ")

    def handle_endtag(self, tag: str) -> None:
        if not any(tag == name for name, _ in self.open):
            return
        while True:  # an unclosed inner tag ends with its parent
            name, skip = self.open.pop()
            self.skipped -= skip
            self.in_pre -= name == "pre"
            if name == tag:
                break
        self._break(tag)
        if tag in {"td", "th"}:
            self.parts.append("  ")

    def _break(self, tag: str) -> None:
        if tag in self.BLOCKS:
            self.parts.append("\n\n")
        elif tag in self.LINES:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if self.skipped:
            return
        self.parts.append(data if self.in_pre else re.sub(r"\s+", " ", data))

    def text(self) -> str:
        text = "".join(self.parts)
        text = re.sub(r"(?m)^ (?=\S)", "", text)  # the space left from a line break inside a paragraph's markup
        return re.sub(r"- \s+(?=\S)", "- ", text)


def page_text(page: str) -> str:
    extractor = TextExtractor()
    extractor.feed(page)
    extractor.close()
    return extractor.text()


def read_sotu(folder: Path) -> Documents:
    for path in sorted((folder / "package/data").glob("[0-9]*.txt")):
        yield path.stem, path.read_text()


def read_moby_dick(folder: Path) -> Documents:
    for pattern in ("chapter_*.txt", "epilogue.txt", "etymology.txt", "extracts.txt"):
        for path in sorted((folder / "package/data").glob(pattern)):
            yield path.stem, path.read_text()


def read_treasury_david(folder: Path) -> Documents:
    environment = {**os.environ, "SWORD_PATH": str(folder / "usr/share/sword")}
    text = subprocess.run(
        [require("mod2imp", "libsword-utils"), "TDavid"], env=environment, check=True, capture_output=True
    ).stdout.decode("utf-8", "replace")
    psalms: dict[str, list[str]] = {}
    for entry in text.split("$$$")[1:]:
        key, _, body = entry.partition("\n")
        psalm = key.split(":")[0].strip()
        body = re.sub(r"\s+", " ", body)
        body = re.sub(r"<(div|p|lg|l)\b[^>]*>|</(p|lg|l)>|</?title\b[^>]*>", "\n\n", body)
        body = re.sub(r"<lb\b[^>]*>|</?item\b[^>]*>", "\n", body)
        body = html.unescape(re.sub(r"<[^>]*>", "", body))
        psalms.setdefault(psalm, []).append(re.sub(r"(?m)^ +", "", body))
    for psalm, bodies in psalms.items():
        yield psalm, "\n\n".join(bodies)


def read_bible_kjv(folder: Path) -> Documents:
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}  # which would wrap the lines
    lines = subprocess.run(
        [require("bible", "bible-kjv"), "-f", "-d", "./bible.data", "Gen1:1-Rev22:21"],
        cwd=folder / "usr/lib",  # bible does not open a file by a long path
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    chapters: dict[str, list[str]] = {}
    for line in lines:
        verse = re.match(r"([1-3]?[A-Za-z]+)(\d+):(\d+) (.*)", line)
        if verse:
            book, chapter, number, text = verse.groups()
            verses = chapters.setdefault(f"{book} {chapter}", [])
            verses.append(f"{number} {text}")
        elif line.strip():
            verses[-1] += " " + line
    for name, verses in chapters.items():
        yield name, name + "\n\n" + "\n".join(verses)


def read_wordnet(folder: Path, entries: int = 100) -> Documents:
    for part in ("noun", "verb", "adj", "adv"):
        lines = []
        for line in (folder / f"usr/share/wordnet/data.{part}").read_text().splitlines():
            if line.startswith("  "):  # the licence at the top
                continue
            fields, _, gloss = line.partition(" | ")
            fields = fields.split()
            count = int(fields[3], 16)
            words = [re.sub(r"\((a|p|ip)\)$", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * count : 2]]
            kind = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}[part]
            lines.append(f"{', '.join(words)} ({kind}): {gloss.strip()}")
        for start in range(0, len(lines), entries):
            yield f"{part}-{start // entries}", "\n".join(lines[start : start + entries])


def read_python_docs(folder: Path) -> Documents:
    root = folder / "usr/share/doc/python3.11/html/_sources"
    for path in sorted(root.rglob("*.rst.txt")):
        yield str(path.relative_to(root)), path.read_text()


def read_postgresql(folder: Path) -> Documents:
    for path in sorted((folder / "usr/share/doc/postgresql-doc-15/html").glob("*.html")):
        if path.stem not in {"bookindex", "biblio", "index", "legalnotice"} and not path.stem.startswith("release"):
            yield path.stem, page_text(path.read_text(errors="replace"))


def read_freebsd_man(folder: Path) -> Documents:
    mandoc = require("mandoc", "mandoc")
    pages = {path.read_bytes(): path for path in sorted((folder / "usr/share/man").rglob("*.gz"), reverse=True)}

    def render(path: Path) -> tuple[str, str]:
        source = re.sub(rb"(?m)^[.']\\\".*\n", b"", gzip.decompress(path.read_bytes()))  # comments: the licence
        # mandoc's exit status tells of style warnings too, so it is not checked
        text = subprocess.run(
            [mandoc, "-Tascii"], input=source, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ).stdout.decode("ascii", "replace")
        lines = re.sub(r".\x08", "", text).strip("\n").split("\n")
        return path.stem, "\n".join(lines[1:-1])  # the running head and foot

    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(render, sorted(pages.values()))


def read_rust_books(folder: Path) -> Documents:
    root = folder / "usr/share/doc/rust-doc/html"
    for path in sorted(root.rglob("*.html")):
        page = path.read_text(errors="replace")
        start, end = page.find("<main>"), page.find("</main>")
        if path.name not in {"print.html", "toc.html", "404.html"} and 0 <= start < end:
            yield str(path.relative_to(root)), page_text(page[start:end])


def strip_licence_comment(source: str) -> str:
    """Drop the leading comment of a Python file when it is about its copyright or licence."""
    comment = re.match(r"(?:[ \t]*#.*\n|[ \t]*\n)+", source)
    if comment and re.search(r"copyright|licen[sc]e", comment.group(), re.IGNORECASE):
        return source[comment.end() :]
    return source


def read_python_stdlib(folder: Path) -> Documents:
    excluded = {"test", "tests", "idlelib", "lib2to3", "__pycache__", "pydoc_data"}
    for root in (folder, folder.with_name("libpython3.11-stdlib")):
        root = root / "usr/lib/python3.11"
        for path in sorted(root.rglob("*.py")):
            name = path.relative_to(root)
            if excluded & set(name.parts) or path.name.startswith("_sysconfigdata"):
                continue
            source = path.read_text(encoding="utf-8", errors="replace")
            if name.parts[0] == "encodings" and ("gencodec" in source or "_table" in source):
                continue
            yield str(name), strip_licence_comment(source)


READERS = {
    "sotu": read_sotu,
    "bible_kjv": read_bible_kjv,
    "treasury_david": read_treasury_david,
    "wordnet": read_wordnet,
    "python_docs": read_python_docs,
    "postgresql": read_postgresql,
    "freebsd_man": read_freebsd_man,
    "rust_books": read_rust_books,
    "python_stdlib": read_python_stdlib,
    "moby_dick": read_moby_dick,
}
