"""Upload a student as one commit: all of it appears at once, or nothing does."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from bkd import __version__
from bkd.errors import HubError
from bkd.hub.contents import RepoFile, is_of_a_student
from bkd.hub.trouble import (
    BUSY,
    CONFLICT,
    LOGIN,
    changed_meanwhile,
    explained,
    is_connection_trouble,
    is_local,
    status_of,
)
from bkd.progress import Phase

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")
NAME = r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?"
REPO = re.compile(f"{NAME}/{NAME}")
TRIES, FIRST_WAIT_SECONDS = 5, 1.0
SHA256_DIGITS = 64


@dataclass(frozen=True)
class Target:
    """Where a student goes.

    Attributes:
        repo: `namespace/name`.
        private: Whether a new repository is hidden from others.
        revision: Branch; None for the main one.
        pull_request: Propose the commit rather than make it.
    """

    repo: str
    private: bool = False
    revision: str | None = None
    pull_request: bool = False

    def __post_init__(self) -> None:
        if self.repo.count("/") != 1 or not REPO.fullmatch(self.repo) or re.search(r"--|\.\.|\.git$", self.repo):
            raise HubError(
                "not the name of a repository on the Hub",
                where="--repo",
                got=self.repo,
                allowed="NAMESPACE/NAME of a model: letters, digits, '-', '_' and '.', such as ada/sd-small",
                remedy="put your user name or organisation before the name" if "/" not in self.repo else None,
            )


@dataclass(frozen=True)
class Pushed:
    """What became of it.

    Attributes:
        url: Of the commit, or of the pull request.
        changed: Files that went up.
        removed: Files of an earlier student that went away.
        unchanged: How many were there already.
    """

    url: str
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    unchanged: int


def find_token() -> str:
    """The Hub's own login, or the environment's.

    Raises:
        HubError: If there is none, or the Hub is switched off.
    """
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise HubError("the Hub is switched off", where="HF_HUB_OFFLINE", got="1", remedy="unset it, or add --dry-run")
    token = get_token()
    if token is None:
        raise HubError("no token to write to the Hub with", remedy=LOGIN)
    return token


class Push:
    """One upload.

    Args:
        target: Where to.
        phase: Told what begins.

    Raises:
        HubError: If there is no token, or the Hub is switched off.
    """

    def __init__(self, target: Target, phase: Phase) -> None:
        from huggingface_hub import HfApi

        self._target, self._phase = target, phase
        self._token = find_token()
        self._api: HfApi = HfApi(token=self._token, library_name="bkd", library_version=__version__)

    def run(self, files: Sequence[RepoFile], message: str) -> Pushed:
        """Make the repository where it is missing, and one commit with what differs from it.

        Args:
            files: What the repository is to hold.
            message: Of the commit.

        Raises:
            HubError: If the Hub refuses, the connection breaks, or somebody else writes to the repository. Nothing of
                an unfinished upload is visible, and the same command continues it.
        """
        logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # its warnings quote signed addresses
        target = self._target
        self._phase(f"asking the Hub for {target.repo}")
        self._ask("signing in", self._require_write_access)
        self._ask("looking for the repository", self._make_repo)
        if target.revision and not target.pull_request and not target.revision.startswith("refs/"):
            self._ask(
                "making the branch",
                lambda: self._api.create_branch(target.repo, branch=str(target.revision), exist_ok=True),
            )
        return self._commit(files, message)

    def _require_write_access(self) -> None:
        who = self._api.whoami()
        role = who.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise HubError(
                "this token may only read",
                where=self._target.repo,
                got=f"a token of {who.get('name')} with the role 'read'",
                remedy=f"a token with the role 'write': {LOGIN}",
            )

    def _make_repo(self) -> None:
        target = self._target
        if self._api.repo_exists(target.repo):
            known = self._api.model_info(target.repo)
            if target.private and not known.private:
                raise HubError(
                    "this repository is there already, and public",
                    where=target.repo,
                    remedy="leave --private out, choose another --repo, or hide it in its settings on the Hub",
                )
            return
        for kind in ("dataset", "space"):
            if self._api.repo_exists(target.repo, repo_type=kind):
                raise HubError(f"that name is a {kind}, not a model", where=target.repo, remedy="choose another --repo")
        if target.pull_request:
            raise HubError(
                "there is no such repository to propose a change to", where=target.repo, remedy="leave --pr out"
            )
        self._api.create_repo(target.repo, private=target.private, exist_ok=True)

    def _commit(self, files: Sequence[RepoFile], message: str) -> Pushed:
        """Send what differs until the Hub has it, and never twice."""
        sent, first = _Difference((), ()), None
        for attempt in range(TRIES):
            head, there = self._ask("reading what is there", self._head)
            found = differences(files, there)
            if not found:  # also when an earlier attempt arrived, and its answer did not
                url = f"{self._api.endpoint}/{self._target.repo}/tree/{self._target.revision or 'main'}"
                return _pushed(url, files, sent)
            if first not in (None, head):
                raise changed_meanwhile(self._target.repo, "another commit since this push began")
            sent, first = found, head
            try:
                return _pushed(self._send(found, message, head), files, found)
            except Exception as error:  # the client raises a dozen kinds
                if is_local(error):
                    raise
                if attempt == TRIES - 1 or not self._may_repeat(error):
                    raise self._explained(error, "uploading") from error
                self._wait(attempt, error)
        raise AssertionError("the last attempt returns or raises")

    def _send(self, found: _Difference, message: str, head: str) -> str:
        """One commit on top of another; where to see it."""
        from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

        size = sum(file.size for file in found.changed) / 2**20
        self._phase(f"uploading {len(found.changed)} files, {size:,.1f} MiB")
        operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
            *(CommitOperationAdd(file.name, file.content) for file in found.changed),
            *(CommitOperationDelete(name) for name in found.removed),
        ]
        made = self._api.create_commit(
            self._target.repo,
            operations,
            commit_message=message,
            revision=self._target.revision,
            create_pr=self._target.pull_request,
            parent_commit=head,
        )
        return str(made.pr_url if self._target.pull_request else made.commit_url)

    def _head(self) -> tuple[str, dict[str, str]]:
        """The newest commit, and for each of its files how it is known: SHA-256, or git's number of a small one."""
        from huggingface_hub.hf_api import RepoFile as Listed

        target = self._target
        head = self._api.repo_info(target.repo, revision=target.revision).sha
        listed = self._api.list_repo_tree(target.repo, recursive=True, revision=head)
        files = {
            each.path: each.lfs.sha256 if each.lfs else each.blob_id for each in listed if isinstance(each, Listed)
        }
        return str(head), files

    def _may_repeat(self, error: Exception) -> bool:
        """A commit that did land is found by looking again; a pull request would be made twice."""
        status = status_of(error)
        if self._target.pull_request:
            return status == 429
        return status in (*BUSY, CONFLICT) or is_connection_trouble(error)

    def _ask(self, doing: str, question: Callable[[], T]) -> T:
        """Ask the Hub, a few times where that may help."""
        for attempt in range(TRIES):
            try:
                return question()
            except HubError:
                raise
            except Exception as error:  # the client raises a dozen kinds
                if attempt == TRIES - 1 or not (status_of(error) in BUSY or is_connection_trouble(error)):
                    raise self._explained(error, doing) from error
                self._wait(attempt, error)
        raise AssertionError("the last attempt returns or raises")

    def _wait(self, attempt: int, error: Exception) -> None:
        seconds = FIRST_WAIT_SECONDS * 2**attempt
        status = status_of(error)
        self._phase(f"{f'HTTP {status}' if status else 'the connection broke'}; again in {seconds:.0f} s")
        time.sleep(seconds)

    def _explained(self, error: Exception, doing: str) -> HubError:
        found = explained(error, repo=self._target.repo, doing=doing, token=self._token)
        status = status_of(error)
        if self._target.pull_request and doing == "uploading" and (status is None or status >= 500):
            found = HubError(
                "the pull request was sent, and may have arrived: its answer is missing",
                where=self._target.repo,
                got=found.got,
                remedy="look at the repository's pull requests before the same command again",
            )
        return found


@dataclass(frozen=True)
class _Difference:
    """What must be sent, and what must go."""

    changed: tuple[RepoFile, ...]
    removed: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.changed or self.removed)


def _pushed(url: str, files: Sequence[RepoFile], sent: _Difference) -> Pushed:
    names = tuple(file.name for file in sent.changed)
    return Pushed(url, names, sent.removed, len(files) - len(names))


def differences(files: Sequence[RepoFile], there: Mapping[str, str]) -> _Difference:
    """What a repository lacks, and which files of an earlier student must go, so that nobody loads half of each.

    Args:
        files: What it is to hold.
        there: Its files, each with its SHA-256 or git's number.

    Returns:
        Files to send; and names to remove, of weights and configurations in the folders of parts that are sent.
    """
    ours = {file.name for file in files}
    folders = {name.partition("/")[0] for name in ours if "/" in name}
    removed = (n for n in there if n not in ours and n.partition("/")[0] in folders and is_of_a_student(n))
    return _Difference(tuple(file for file in files if not _is_there(file, there)), tuple(sorted(removed)))


def _is_there(file: RepoFile, there: Mapping[str, str]) -> bool:
    """Whether the repository has the same bytes under the same name; nothing is read of a file that it lacks."""
    known = there.get(file.name)
    return known is not None and known == (file.sha256 if len(known) == SHA256_DIGITS else file.blob_id)
