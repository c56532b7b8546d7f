"""Shards at an address: which ones are meant, how large they are, and copies of them that are whole or are not there.

An address may carry a token or a password. Only `public_name` of it is shown or stored, and no error keeps a library's
error as its cause, since that would quote the address.
"""

from __future__ import annotations

import errno
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from bkd.data.remote_trouble import Trouble, Why, in_our_words
from bkd.errors import DataError
from bkd.files import replace_file
from bkd.progress import Progress, silent

PACKAGES = {"https": "aiohttp", "http": "aiohttp", "s3": "s3fs"}
"""The schemes that are read, and what each needs."""
ATTEMPTS = 5
MAX_PAUSE = 30.0
STALL_SECONDS = 60.0
PIECE = 4 << 20
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:@\[\]]*)(:[0-9]+)?|arn:[^@]*")
ENCODED = re.compile(r"[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]+")
"""What an address may consist of, by RFC 3986."""
ADDRESS = re.compile(r"\b[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"]+")
Sleep = Callable[[float], object]
T = TypeVar("T")


class RemoteError(DataError):
    """A file that cannot be had from its server, whose other files it would be no use to ask for."""


@dataclass(frozen=True)
class RemoteFile:
    """What a server says of a file.

    Attributes:
        size: In bytes.
        etag: Changes with the contents; empty where the server sends none.
        modified: Seconds since 1970; None where the server does not say.
    """

    size: int
    etag: str = ""
    modified: int | None = None

    def is_same(self, other: RemoteFile) -> bool:
        """Whether nothing says that these are different contents.

        Mirrors of one file often differ in ETag or date; a file that was replaced differs in both.
        """
        pairs = ((self.etag, other.etag), (self.modified, other.modified))
        equal = [ours == theirs for ours, theirs in pairs if ours and theirs]
        return self.size == other.size and (any(equal) or not equal)


def is_remote(spec: str) -> bool:
    """Whether SHARDS is an address; `check_scheme` says whether it is one that is read."""
    return "://" in spec


def check_scheme(url: str) -> str:
    """The scheme of an address, in lower case.

    Raises:
        DataError: If it is none of those that are read.
    """
    scheme, mark, _ = url.partition("://")
    if mark and scheme.lower() in PACKAGES:
        return scheme.lower()
    scheme = url.split(":", 1)[0]
    raise DataError(
        "shards are not read from such an address",
        got=f"{scheme}:…" if SCHEME.fullmatch(scheme) else "an address without a known scheme",
        allowed="https://, http:// and s3://, or files on this machine",
        remedy="copy the shards to where they can be read; commands in `pipe:` are never run",
    )


def public_name(url: str) -> str:
    """What of an address may be shown or stored: no user, password, query or fragment."""
    scheme, mark, rest = url.partition("://")
    if not mark or not SCHEME.fullmatch(scheme):
        return "…"
    authority, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    host = authority.rpartition("@")[2]
    return f"{scheme}://{host}{slash}{path}" if HOST.fullmatch(host) else f"{scheme}://…"


def shown(text: str) -> str:
    """A text with every address in it as it may be shown or stored."""
    return ADDRESS.sub(lambda found: public_name(found[0]), text)


def expand_remote(spec: str) -> list[str]:
    """The addresses that SHARDS means: a file, a brace pattern, or on S3 a folder or glob; sorted, without duplicates.

    Raises:
        DataError: If the scheme is not read, a folder cannot be listed, or nothing is in it.
    """
    from braceexpand import braceexpand

    check_scheme(spec)
    urls: list[str] | None = None
    with suppress(ValueError):  # braceexpand.UnbalancedBracesError, which quotes the address
        urls = list(braceexpand(spec))
    if urls is None:
        raise DataError(
            "a brace in the shard pattern has no partner",
            where=public_name(spec),
            remedy="quote it: 's3://x/{0..9}.tar'",
        )
    found: set[str] = set()
    for url in urls:
        scheme = check_scheme(url)
        plain = scheme + url[len(scheme) :]  # s3fs knows it in lower case only
        found.update(_expand_s3(plain) if scheme == "s3" else [_single(plain)])
    if not found:
        raise DataError(
            "no shards found",
            where=public_name(spec),
            allowed="a folder of .tar, or a glob",
            remedy="check the address",
        )
    return sorted(found)


def _single(url: str) -> str:
    path = public_name(url).partition("://")[2].partition("/")[2]
    if path and not path.endswith("/") and not any(c in path for c in "*["):
        return url
    raise DataError(
        "a web server's folders cannot be listed",
        where=public_name(url),
        allowed="https://HOST/FILE.tar, or a brace pattern",
        remedy="name the files: https://HOST/FOLDER/{00000..00099}.tar",
    )


def _expand_s3(url: str) -> list[str]:
    key = url.partition("://")[2].partition("/")[2]
    if key and not key.endswith("/"):
        return _with_attempts(url, lambda: _glob_s3(url)) if any(c in key for c in "*?[") else [url]
    return _with_attempts(url, lambda: _list_s3(url))


def _list_s3(url: str) -> list[str]:
    with in_our_words():
        entries = _filesystem(url, STALL_SECONDS).ls(url.rstrip("/") + "/", detail=True)
        return [f"s3://{e['name']}" for e in entries if e["type"] == "file" and e["name"].endswith(".tar")]


def _glob_s3(url: str) -> list[str]:
    with in_our_words():
        entries = _filesystem(url, STALL_SECONDS).glob(url, detail=True)
        return [f"s3://{name}" for name, entry in entries.items() if entry["type"] == "file"]


def describe(
    url: str, *, attempts: int = ATTEMPTS, sleep: Sleep = time.sleep, stall_seconds: float = STALL_SECONDS
) -> RemoteFile:
    """Ask for a file's size and version, without its contents.

    Args:
        url: https, http or s3.
        attempts: How often to try when the trouble may pass.
        sleep: Waits for that many seconds, between attempts.
        stall_seconds: How long a server may send nothing.

    Raises:
        DataError: If the file is missing, may not be read, or cannot be asked for.
    """
    check_scheme(url)
    return _with_attempts(url, lambda: _describe(_filesystem(url, stall_seconds), url), attempts, sleep)


def fetch(
    url: str,
    target: Path,
    *,
    progress: Progress = silent,
    attempts: int = ATTEMPTS,
    sleep: Sleep = time.sleep,
    stall_seconds: float = STALL_SECONDS,
) -> None:
    """Copy a whole file; `target` appears when the copy is complete, and there is no other trace of it before.

    A server may be as slow as it likes while it keeps sending.

    Args:
        url: https, http or s3. Credentials are what s3fs finds in the environment and its configuration files.
        target: Local file, replaced if present.
        progress: Called after each piece; what it raises ends the copy.
        attempts: How often to try when the trouble may pass: a cut connection, a stall, 429 or 5xx.
        sleep: Waits for that many seconds, between attempts: 1, 2, 4, …
        stall_seconds: How long a server may send nothing.

    Raises:
        DataError: If the file is missing, may not be read, cannot be copied whole, or there is no room for it.
    """
    check_scheme(url)
    _with_attempts(url, lambda: _copy(_filesystem(url, stall_seconds), url, target, progress), attempts, sleep)


def _copy(filesystem: Any, url: str, target: Path, progress: Progress) -> None:
    size = _describe(filesystem, url).size
    with in_our_words():
        # Block size 0 is one streamed response; s3 has none, so there each piece is a request.
        options = {"block_size": PIECE, "cache_type": "none"} if _is_s3(url) else {"block_size": 0, "size": size or 1}
        source = filesystem.open(url, "rb", **options)
    done = 0
    with closing(source), _local_trouble(target, size), replace_file(target) as stream:
        progress(done, size)
        while done <= size and (piece := _read(source)):
            stream.write(piece)
            done += len(piece)
            progress(done, size)
        if done != size:
            raise Trouble(Why(f"{done:,} bytes came, {size:,} were announced"))


def _read(source: Any) -> bytes:
    with in_our_words():
        piece: bytes = source.read(PIECE)
        return piece


def _describe(filesystem: Any, url: str) -> RemoteFile:
    with in_our_words():
        info = filesystem.info(url)
    if info["type"] == "directory":
        raise Trouble(Why("it is a folder", final=True, remedy="end its address with / to mean the .tar files in it"))
    if info["size"] is None:
        raise Trouble(Why("the server does not say how large it is", final=True, remedy="copy it here by other means"))
    date = info.get("LastModified") or info.get("Last-Modified")
    modified = None
    with suppress(ValueError, TypeError):  # TypeError: no date, or none that Python 3.10 can read
        modified = int((parsedate_to_datetime(date) if isinstance(date, str) else date).timestamp()) if date else None
    return RemoteFile(int(info["size"]), str(info.get("ETag") or ""), modified)


def _is_s3(url: str) -> bool:
    return check_scheme(url) == "s3"


def _filesystem(url: str, stall_seconds: float) -> Any:
    """fsspec's object for an address; equal ones share their connections."""
    scheme = check_scheme(url)
    fsspec: Any = import_module("fsspec")
    try:
        package: Any = import_module(PACKAGES[scheme])
    except ImportError:
        raise DataError(
            f"reading {scheme}:// needs the package {PACKAGES[scheme]}",
            where=public_name(url),
            remedy="pip install 'bkd[remote]'",
        ) from None
    if scheme == "s3":
        timeouts = {"connect_timeout": stall_seconds, "read_timeout": stall_seconds}
        filesystem = fsspec.filesystem(
            "s3", use_listings_cache=False, config_kwargs={**timeouts, "retries": {"max_attempts": 0}}
        )
        filesystem.retries = 1  # attempts are counted here; botocore's and s3fs's own would multiply them
        return filesystem
    session = {
        # aiohttp's own limit is five minutes for all of a response, however steadily it comes.
        "timeout": package.ClientTimeout(total=None, sock_connect=stall_seconds, sock_read=stall_seconds),
        "trust_env": True,  # proxies
        "headers": {"Accept-Encoding": "identity"},
        "auto_decompress": False,  # what is copied is what is stored, of the size that was announced
    }
    # Signatures are made over an address as it is written, so one that needs no quoting is sent untouched.
    return fsspec.filesystem(scheme, client_kwargs=session, encoded=ENCODED.fullmatch(url) is not None)


@contextmanager
def _local_trouble(target: Path, size: int) -> Iterator[None]:
    """What the disk raises becomes a `DataError`: trying again would not help."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise DataError(
                "a copy of a remote file cannot be written",
                where=target.parent,
                got=error.strerror,
                remedy="choose another folder for what can be made again: BKD_CACHE",
            ) from error
        free = shutil.disk_usage(target.parent).free
        raise DataError(
            "no room on the disk for a copy of a remote file",
            where=target.parent,
            got=f"{size:,} bytes needed, {free:,} free ({error.strerror})",
            remedy="free some space, or choose another disk: BKD_CACHE",
        ) from error


def _with_attempts(url: str, action: Callable[[], T], attempts: int = ATTEMPTS, sleep: Sleep = time.sleep) -> T:
    for attempt in range(1, attempts + 1):
        try:
            return action()
        except Trouble as error:
            why = error.why
        if why.final:
            break
        if attempt < attempts:
            sleep(min(2.0 ** (attempt - 1), MAX_PAUSE))
    # Outside of the handler, so that no error of a library hangs on to this one.
    raise RemoteError(
        "remote file cannot be read",
        where=public_name(url),
        got=why.reason if why.final else f"{why.reason}; tried {attempt} times",
        remedy=why.remedy,
    )
