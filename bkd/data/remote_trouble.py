"""What went wrong with a remote file, in our words: libraries quote the address in theirs, and it may carry a token."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from bkd.errors import DataError

RETRIED_STATUSES = (408, 425, 429)
"""Refusals that pass, besides 5xx."""
LATER = "check the network and the server, then run the same command again"
ACCESS = (
    "check that a signed address has not expired; for s3, the credentials (AWS_PROFILE, AWS_ACCESS_KEY_ID, …), "
    "or FSSPEC_S3_ANON=true where none are needed"
)
ADDRESS = "check the address"
FINAL = {
    "SSLCertVerificationError": ("the server's certificate is not trusted", "check the address and the clock"),
    "NoCredentialsError": ("there are no credentials", ACCESS),
    "PartialCredentialsError": ("the credentials are incomplete", ACCESS),
    "ProfileNotFound": ("the AWS profile does not exist", ACCESS),
    "TokenRetrievalError": ("the AWS session has expired", ACCESS),
    "SSOTokenLoadError": ("the AWS session has expired", ACCESS),
    "UnauthorizedSSOTokenError": ("the AWS session has expired", ACCESS),
    "ParamValidationError": ("the address is not valid", ADDRESS),
    "InvalidURL": ("the address is not valid", ADDRESS),
    "ValueError": ("the address is not valid", ADDRESS),
}
"""Errors, by the name of their class, that another attempt would not mend."""
PASSING = {
    "gaierror": "the host is not known",
    "EndpointConnectionError": "the server cannot be reached",
    "ClientPayloadError": "the connection was cut",
    "ServerDisconnectedError": "the connection was cut",
    "ConnectionClosedError": "the connection was cut",
    "IncompleteRead": "the connection was cut",
    "IncompleteReadError": "the connection was cut",
}
"""Those that it may mend and that have no status or number."""


class Why(NamedTuple):
    """A reason, whether it will stay so, and what to do."""

    reason: str
    final: bool = False
    remedy: str = LATER


class Trouble(Exception):
    """An attempt that failed; it stays within `bkd.data.remote`."""

    def __init__(self, why: Why) -> None:
        super().__init__(why.reason)
        self.why = why


@contextmanager
def in_our_words() -> Iterator[None]:
    """What libraries raise here becomes `Trouble`."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise Trouble(_explain(error)) from None


def _explain(error: BaseException) -> Why:
    """What an error of fsspec, aiohttp or botocore means, and nothing of what it says."""
    errors = list(_causes(error))
    for each in errors:
        if (status := _status(each)) is not None:
            return _of_status(*status)
    names = {base.__name__ for each in errors for base in type(each).__mro__}
    for name, (reason, remedy) in FINAL.items():
        if name in names:
            return Why(reason, final=True, remedy=remedy)
    if any("Timeout" in name for name in names):
        return Why("the server stopped sending")
    for name, reason in PASSING.items():
        if name in names:
            return Why(reason)
    if (number := next((e.errno for e in reversed(errors) if isinstance(e, OSError) and e.errno), None)) is not None:
        return Why(os.strerror(number).lower())
    if "PermissionError" in names or "FileNotFoundError" in names:
        return _of_status(403 if "PermissionError" in names else 404)
    return Why(type(errors[-1]).__name__)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from: fsspec says "not found" of everything, and s3fs stumbles over timeouts."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _status(error: BaseException) -> tuple[int, str] | None:
    """The status of a response, and S3's word for it: aiohttp's and botocore's errors have them."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status, ""
    response = getattr(error, "response", None)
    if not isinstance(response, dict):
        return None
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    code = str(response.get("Error", {}).get("Code", ""))
    return (status, "" if code.isdigit() else code[:60]) if isinstance(status, int) else None


def _of_status(status: int, code: str = "") -> Why:
    reason = f"HTTP {status}" + (f" {code}" if code else "")
    if status == 404:
        return Why(f"there is no such file ({reason})", final=True, remedy=ADDRESS)
    if status in (401, 403):
        return Why(f"access denied ({reason})", final=True, remedy=ACCESS)
    final = 300 <= status < 500 and status not in RETRIED_STATUSES
    return Why(reason, final=final, remedy=ADDRESS if final else LATER)
