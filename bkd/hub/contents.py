"""What of a student's folder goes to the Hub: the model, its card, and nothing else that may lie there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from bkd.card.files import CARD_FILE, CARD_FOLDER, REPO_PLACEHOLDER, SHOWN, read_card
from bkd.card.privacy import public_plan
from bkd.files import file_digest
from bkd.models.folder import ORIGINS, parts_of, read_json
from bkd.surgery.plan import PLAN_FILE

PART_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*config.json",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
)
"""Configurations, vocabularies and safe weights of a part; pickled ones are never uploaded."""
LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")


@dataclass(frozen=True)
class RepoFile:
    """One file as it will be in the repository.

    Attributes:
        name: Path there, with slashes.
        content: Where its bytes lie, or the bytes themselves where they differ from the file's.
    """

    name: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    @cached_property
    def sha256(self) -> str:
        """How the Hub knows a large file; read once, however often a commit is repeated."""
        return (
            hashlib.sha256(self.content).hexdigest() if isinstance(self.content, bytes) else file_digest(self.content)
        )

    @cached_property
    def blob_id(self) -> str:
        """How git knows a small one."""
        content = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def repo_files(student: Path, home: Path, repo: str) -> list[RepoFile]:
    """All files that make the repository, the weights last.

    Args:
        student: A whole pipeline folder.
        home: Of its card: a run's folder, or the same.
        repo: `namespace/name`, which the card's example names.

    Raises:
        BkdError: If the card, or a configuration, cannot be read.
    """
    found = {path.relative_to(student): path for path in _model(student)}
    found |= {path.relative_to(home): path for path in _card(home)}
    files = [RepoFile(name.as_posix(), _as_public(path, repo)) for name, path in found.items()]
    return sorted(files, key=lambda file: (file.name.endswith(".safetensors"), file.name))


def left_behind(folder: Path, files: list[RepoFile]) -> list[str]:
    """Names of what lies in the folder and does not go up."""
    taken = {file.name for file in files}
    there = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in there if name not in taken)


def is_of_a_student(name: str) -> bool:
    """Whether a file of a repository is of a student, and would be half of another one if it stayed."""
    path = PurePosixPath(name)
    if path.parent == PurePosixPath(CARD_FOLDER):
        return path.name in SHOWN
    return len(path.parts) == 2 and any(map(path.match, (*PART_FILES, "*.bin")))


def _model(folder: Path) -> Iterator[Path]:
    yield from filter(Path.is_file, (folder / name for name in ("model_index.json", PLAN_FILE, *LICENSES)))
    for part in parts_of(folder):
        yield from (path for path in (folder / part).iterdir() if any(map(path.match, PART_FILES)))


def _card(home: Path) -> Iterator[Path]:
    yield from filter(Path.is_file, (home / name for name in (CARD_FILE, *LICENSES)))
    yield from filter(Path.is_file, (home / CARD_FOLDER / name for name in SHOWN))


def _as_public(path: Path, repo: str) -> Path | bytes:
    """The file, or what of it others may read."""
    if path.name == CARD_FILE:
        return read_card(path).replace(REPO_PLACEHOLDER, repo).encode()
    if path.suffix != ".json" or path.parent.name == CARD_FOLDER:
        return path
    facts = read_json(path)
    public = public_plan(facts) if path.name == PLAN_FILE else {k: v for k, v in facts.items() if k not in ORIGINS}
    return path if public == facts else (json.dumps(public, indent=2) + "\n").encode()
