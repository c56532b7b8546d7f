"""What the Hub answers when it refuses, and what a broken connection means, in words that say what to do.

Messages of the client quote addresses, and those of uploads are signed: whoever has one can use it. None is passed on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from bkd.errors import HubError

BUSY = (408, 429, 500, 502, 503, 504)
"""Answers that may be others a moment later."""
CONFLICT, OUTDATED = 409, 412
ADDRESS = re.compile(r"\S+://\S+")
LOGIN = "`hf auth login`, or set HF_TOKEN"
AGAIN = "the same command again: what has arrived is kept, and the repository shows nothing until all of it is there"


def answer_of(error: BaseException) -> Any:
    """The Hub's answer that an error stands for, or an earlier one that led to it; None when there was none."""
    return next(filter(None.__ne__, (getattr(each, "response", None) for each in _chain(error))), None)


def status_of(error: BaseException) -> int | None:
    """The answer's status; None when the connection broke before there was one."""
    answer = answer_of(error)
    return None if answer is None else int(answer.status_code)


def is_connection_trouble(error: BaseException) -> bool:
    """Whether the network failed, rather than somebody refusing."""
    names = {kind.__name__ for each in _chain(error) for kind in type(each).__mro__}
    return status_of(error) is None and bool(names & {"TransportError", "ConnectionError", "TimeoutError"})


def is_local(error: BaseException) -> bool:
    """Whether a file of this machine is at fault, which the system's own words say best."""
    return (
        isinstance(error, OSError)
        and type(error).__module__ == "builtins"
        and error.filename is not None
        and not is_connection_trouble(error)
    )


def _is_refused_by_storage(error: BaseException) -> bool:
    """Whether the storage of large files (`hf_xet`, which answers without a status) does not take the token."""
    return any(type(each).__name__ == "XetAuthenticationError" for each in _chain(error))


def explained(error: BaseException, *, repo: str, doing: str, token: str) -> HubError:
    """An error of the client as one for the user.

    Args:
        error: As raised.
        repo: `namespace/name`.
        doing: What was going on, such as "uploading".
        token: Never to be shown.
    """
    status = status_of(error)
    got = _said(error, token)
    if status is None and _is_refused_by_storage(error):
        status = 403
    if status == 401:
        return HubError("the Hub does not know this token", where=repo, got=got, remedy=f"a new token: {LOGIN}")
    if status == 403:
        return HubError(
            f"this token may not write there ({doing})",
            where=repo,
            got=got,
            allowed="a token with write access to that name, or --pr for a repository of others",
            remedy=f"a token with the role 'write': {LOGIN}",
        )
    if status == 404:
        return HubError(
            "the Hub has no such repository or revision, or this token may not see it",
            where=repo,
            got=got,
            remedy="check --repo and --revision, and on the Hub what the token gives access to",
        )
    if status in (CONFLICT, OUTDATED):
        return changed_meanwhile(repo, got)
    if status == 429:
        return HubError(f"the Hub limits requests ({doing})", where=repo, got=got, remedy=f"later, {AGAIN}")
    if status is not None and status >= 500:
        return HubError(f"the Hub is in trouble ({doing})", where=repo, got=got, remedy=f"later, {AGAIN}")
    if status is None and is_connection_trouble(error):
        return HubError(f"the connection to the Hub broke ({doing})", where=repo, got=got, remedy=AGAIN)
    return HubError(f"{doing} failed", where=repo, got=got, remedy=AGAIN if status is None else None)


def changed_meanwhile(repo: str, got: str) -> HubError:
    """Somebody else's commit is not to be written over."""
    return HubError(
        "somebody else changed the repository meanwhile",
        where=repo,
        got=got,
        remedy="look at what changed, then the same command again",
    )


def _said(error: BaseException, token: str) -> str:
    """What the Hub said, or the kind of failure, without addresses and without the token."""
    answer = answer_of(error)
    if type(error) is ValueError:  # what the client makes of a card that the Hub does not take
        said = str(error)
    elif answer is None:
        deepest = list(_chain(error))[-1]
        said = f"{type(deepest).__name__}: {str(deepest).strip() or 'no further words'}"
    else:
        said = f"HTTP {answer.status_code}" + (f": {words}" if (words := _words(error, answer)) else "")
    return ADDRESS.sub("…", " ".join(said.split())).replace(token, "…")[:300]


def _words(error: BaseException, answer: Any) -> str:
    told = next(filter(None, (getattr(each, "server_message", None) for each in _chain(error))), None)
    return str(told or answer.headers.get("X-Error-Message") or "")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and what it was raised from."""
    here: BaseException | None = error
    while here is not None:
        yield here
        here = here.__cause__ or here.__context__
