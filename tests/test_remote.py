"""Remote shards: a copy is whole or is not there, servers may fail as they do, and no token is shown or stored."""

import errno
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

import pytest

from bkd.data import remote
from bkd.data.copies import LocalCopies, local_name
from bkd.data.remote import RemoteFile, check_scheme, describe, expand_remote, fetch, is_remote, public_name, shown
from bkd.data.stats import stats_file
from bkd.errors import DataError
from bkd.recipe.load import dump_recipe, load_recipe, result_keys
from tests.remote_server import BODY, LIMIT_SECONDS, TOKEN

pytest.importorskip("aiohttp")


@pytest.fixture
def sleeps():
    return []


@contextmanager
def refused(match):
    """A DataError that nowhere, in no error behind it either, shows a token."""
    with pytest.raises(DataError, match=match) as caught:
        yield caught
    error, texts = caught.value, "".join(traceback.format_exception(caught.value))
    while error is not None:
        texts += f"{error!r} {error}"
        error = error.__cause__ or error.__context__
    assert "secret" not in texts and "Signature" not in texts


def left_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and ".state" not in path.parts)


def eventually(condition):
    until = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def together(*functions):
    """Call all at once; what each returned or raised."""
    found = [None] * len(functions)

    def call(number, function):
        try:
            found[number] = function()
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=call, args=item, daemon=True) for item in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_SECONDS)
        assert not thread.is_alive()
    return found


# Addresses.


def test_addresses_are_told_from_files():
    assert is_remote("https://h/x.tar") and is_remote("s3://b/{0..3}.tar") and not is_remote("shards/{0..3}.tar")
    assert check_scheme("HTTPS://h/x.tar") == "https"


@pytest.mark.parametrize(
    "url",
    ["pipe:curl https://u:secret@h/x.tar", "file:///etc/x.tar", "ftp://h/x", "gs://b/x.tar", "{s3,gs}://b/x.tar", "x"],
)
def test_other_schemes_are_refused(url):
    for refuse in (check_scheme, expand_remote, describe):
        with refused("shards are not read from such an address(.|\n)*allowed: https(.|\n)*`pipe:` are never run"):
            refuse(url)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:secret@h:8000/a/x.tar?sig=secret#secret", "https://h:8000/a/x.tar"),
        ("https://h?secret", "https://h"),
        ("s3://bucket/a@b/x.tar", "s3://bucket/a@b/x.tar"),
        ("http://[::1]:80/x.tar", "http://[::1]:80/x.tar"),
        ("https://user:se?cret@h/x.tar", "https://…"),
        ("https://user:se/cret@h/x.tar", "https://…"),
        ("a secret://h", "…"),
        ("secret", "…"),
    ],
)
def test_what_is_shown_of_an_address(url, shown):
    assert public_name(url) == shown


def test_brace_patterns_keep_the_token():
    found = expand_remote("https://h/{1,0}/{00..01}.tar" + TOKEN)
    assert found == [f"https://h/{a}/0{b}.tar{TOKEN}" for a in (0, 1) for b in (0, 1)]
    assert expand_remote("S3://b/{0..1}.tar") == ["s3://b/0.tar", "s3://b/1.tar"]
    assert expand_remote("http://[::1]:80/x.tar") == ["http://[::1]:80/x.tar"]


@pytest.mark.parametrize("url", ["https://h/a/", "https://h", "https://h/a/*.tar", "https://h/[ab].tar"])
def test_folders_of_web_servers_are_refused(url):
    with refused(r"cannot be listed(.|\n)*try: name the files: .*\{00000\.\.00099\}"):
        expand_remote(url + TOKEN)


def test_a_brace_without_partner_is_refused():
    with refused(r"https://h/\{0\.\.9\.tar: a brace in the shard pattern has no partner"):
        expand_remote("https://h/{0..9.tar" + TOKEN)


def test_same_files_are_told_from_replaced_ones():
    file = RemoteFile(5, "a", 1)
    assert file.is_same(RemoteFile(5, "b", 1)) and file.is_same(RemoteFile(5)) and file.is_same(RemoteFile(5, "a", 2))
    assert not file.is_same(RemoteFile(6, "a", 1)) and not file.is_same(RemoteFile(5, "b", 2))
    assert not file.is_same(RemoteFile(5, "b"))


# Copies over http.


def test_a_file_is_copied_whole(server, tmp_path):
    url = server.add("x.tar", ETag='"v1"', Last_Modified="Thu, 01 Jan 2026 00:00:00 GMT")
    seen = []
    fetch(url + TOKEN, tmp_path / "new" / "x.tar", progress=lambda done, total: seen.append((done, total)))
    assert (tmp_path / "new" / "x.tar").read_bytes() == BODY and left_in(tmp_path) == ["x.tar"]
    assert seen[0] == (0, len(BODY)) and seen[-1] == (len(BODY), len(BODY)) and server.gets["x.tar"] == 1
    assert describe(url) == RemoteFile(len(BODY), '"v1"', 1767225600)


def test_an_empty_file_is_copied(server, tmp_path):
    fetch(server.add("x.tar", b""), tmp_path / "x.tar")
    assert (tmp_path / "x.tar").read_bytes() == b""


@pytest.mark.parametrize("fault", ["cut", "reset", 503, 429, "too_long"])
def test_what_passes_is_tried_again(server, tmp_path, sleeps, fault):
    url = server.add("x.tar", faults=[fault, fault, None])
    fetch(url, tmp_path / "x.tar", sleep=sleeps.append)
    assert (tmp_path / "x.tar").read_bytes() == BODY and left_in(tmp_path) == ["x.tar"]
    assert server.gets["x.tar"] == 3 and sleeps == [1, 2]


@pytest.mark.parametrize(
    ("fault", "head", "reason"),
    [("cut", 200, "the connection was cut"), (503, 200, "HTTP 503"), (503, 503, "HTTP 503")],
)
def test_what_does_not_pass_is_an_error(server, tmp_path, sleeps, fault, head, reason):
    url = server.add("x.tar", faults=[fault])
    server.head_status["x.tar"] = head
    (tmp_path / "x.tar").write_bytes(b"old")
    with refused(rf"http://127.0.0.1:\d+/x\.tar: remote file cannot be read\n  got: {reason}; tried 5 times\n  try: "):
        fetch(url + TOKEN, tmp_path / "x.tar", sleep=sleeps.append)
    assert sleeps == [1, 2, 4, 8] and server.gets["x.tar"] == 5
    assert left_in(tmp_path) == ["x.tar"] and (tmp_path / "x.tar").read_bytes() == b"old"


@pytest.mark.parametrize(("status", "reason"), [(404, "no such file"), (403, "access denied"), (410, "HTTP 410")])
def test_refusals_are_final(server, tmp_path, sleeps, status, reason):
    url = server.add("x.tar", faults=[status])
    server.head_status["x.tar"] = status
    with refused(rf"x\.tar: remote file cannot be read\n  got: .*{reason}"):
        fetch(url + TOKEN, tmp_path / "x.tar", sleep=sleeps.append)
    assert not sleeps and left_in(tmp_path) == [] and server.gets["x.tar"] == 1


def test_an_address_that_is_signed_for_reading_only_is_read(server, tmp_path):
    url = server.add("x.tar")
    server.head_status["x.tar"] = 403
    fetch(url, tmp_path / "x.tar")
    assert (tmp_path / "x.tar").read_bytes() == BODY


def test_a_server_that_stops_sending_is_given_up(server, tmp_path, sleeps):
    url = server.add("x.tar", faults=["stall"])
    began = time.monotonic()
    with refused("the server stopped sending; tried 2 times"):
        fetch(url + TOKEN, tmp_path / "x.tar", attempts=2, sleep=sleeps.append, stall_seconds=0.3)
    assert time.monotonic() - began < 5 and left_in(tmp_path) == []


def test_a_slow_server_is_waited_for(server, tmp_path, sleeps):
    url = server.add("x.tar", faults=["slow"])  # 1.2 s in all
    fetch(url, tmp_path / "x.tar", sleep=sleeps.append, stall_seconds=1)
    assert (tmp_path / "x.tar").read_bytes() == BODY and not sleeps and server.gets["x.tar"] == 1


def test_a_server_that_is_not_there_is_an_error(tmp_path, sleeps):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/x.tar"
        with refused("connection refused; tried 2 times"):
            fetch(url + TOKEN, tmp_path / "x.tar", attempts=2, sleep=sleeps.append)


def test_an_impossible_address_is_an_error(tmp_path, sleeps):
    with refused("the address is not valid"):
        fetch("http://127.0.0.1:99999999/x.tar" + TOKEN, tmp_path / "x.tar", sleep=sleeps.append)
    assert not sleeps


def test_a_signed_address_is_sent_as_it_is_written(server, tmp_path):
    server.add("a%2Fb=%7E.tar")
    query = "?X-Amz-Credential=AK%2F2024%2Fus&sig=a%2Bb%3D%3D~&t=a+b"
    fetch(server.url("a%2Fb=%7E.tar", query), tmp_path / "x.tar")
    assert server.raw == ["/a%2Fb=%7E.tar" + query]
    server.add("gr%C3%BC%C3%9Fe%20.tar")
    fetch(server.url("grüße .tar"), tmp_path / "y.tar")
    assert (tmp_path / "y.tar").read_bytes() == BODY


def test_what_is_stored_compressed_is_copied_as_it_is(server, tmp_path):
    import gzip

    packed = gzip.compress(BODY)
    url = server.add("x.tar", packed, Content_Encoding="gzip")
    with refused("does not say how large"):  # of what is in it; fsspec does not trust the size of what is sent
        fetch(url, tmp_path / "x.tar")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_an_error_at_once(server, tmp_path, sleeps, monkeypatch, number):
    class Full:
        def __init__(self, stream):
            self.stream = stream

        def write(self, data):
            self.stream.write(data[:1000])
            raise OSError(number, os.strerror(number))

    @contextmanager
    def on_full_disk(path):
        with remote_replace_file(path) as stream:
            yield Full(stream)

    remote_replace_file = remote.replace_file
    monkeypatch.setattr(remote, "replace_file", on_full_disk)
    url = server.add("x.tar")
    with refused(r"no room on the disk(.|\n)*got: 1,048,576 bytes needed, [\d,]+ free"):
        fetch(url + TOKEN, tmp_path / "x.tar", sleep=sleeps.append)
    assert not sleeps and left_in(tmp_path) == []


def test_a_folder_that_cannot_be_written_to_is_an_error(server, tmp_path, sleeps):
    (tmp_path / "file").touch()
    with refused("a copy of a remote file cannot be written"):
        fetch(server.add("x.tar") + TOKEN, tmp_path / "file" / "x.tar", sleep=sleeps.append)
    assert not sleeps


def test_what_progress_raises_ends_the_copy(server, tmp_path, sleeps):
    def stop(done, total):
        if done:
            raise KeyError("stop")

    with pytest.raises(KeyError):
        fetch(server.add("x.tar"), tmp_path / "x.tar", progress=stop, sleep=sleeps.append)
    assert not sleeps and left_in(tmp_path) == []


@pytest.mark.parametrize(("url", "package"), [("https://h/x.tar", "aiohttp"), ("s3://b/x.tar", "s3fs")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, url, package):
    monkeypatch.setitem(sys.modules, package, None)
    with refused(rf"needs the package {package}\n  try: pip install 'bkd\[remote\]'"):
        fetch(url, tmp_path / "x.tar")


# Copies.


@pytest.fixture
def copies(server, tmp_path):
    """Room for three files."""
    opened = LocalCopies(tmp_path / "copies", max_bytes=3 * len(BODY))
    yield opened
    opened.close()


@pytest.fixture
def files(server):
    """Six addresses with tokens, of files that differ."""
    return [server.add(f"{n}.tar", bytes([n]) + BODY[1:]) + TOKEN for n in range(6)]


def use(copies, url):
    with copies.hold(url) as path:
        return path.read_bytes()


def there(folder):
    """Names of the copies, without their digests."""
    return sorted(path.name.rpartition("-")[2] for path in folder.glob("*.tar"))


def test_a_copy_is_fetched_once_and_kept(copies, server, files, tmp_path):
    assert use(copies, files[1]) == use(copies, files[1]) == b"\1" + BODY[1:]
    again = LocalCopies(tmp_path / "copies", max_bytes=3 * len(BODY))
    assert use(again, files[1])[0] == 1 and server.gets["1.tar"] == 1


def test_no_token_is_stored(copies, files, tmp_path):
    use(copies, files[0])
    for path in (tmp_path / "copies").rglob("*"):
        assert b"secret" not in path.name.encode() + path.read_bytes()


def test_the_bound_is_kept_and_the_least_recently_used_goes(copies, files, tmp_path):
    for number in (0, 1, 2, 0, 3):
        use(copies, files[number])
        time.sleep(0.02)
    assert there(tmp_path / "copies") == ["0.tar", "2.tar", "3.tar"]


def test_what_is_wanted_is_fetched_ahead_in_order_and_goes_last(copies, server, files, tmp_path):
    use(copies, files[5])
    copies.want(files[:4])
    eventually(lambda: there(tmp_path / "copies") == ["0.tar", "1.tar", "2.tar"])
    assert server.order[-3:] == ["0.tar", "1.tar", "2.tar"]
    copies.want(files[1:5])  # the first has been used
    eventually(lambda: there(tmp_path / "copies") == ["1.tar", "2.tar", "3.tar"])
    use(copies, files[0])  # needed all the same: of what is wanted, one goes
    assert "0.tar" in there(tmp_path / "copies") and len(there(tmp_path / "copies")) == 3


def test_what_is_held_stays(copies, files):
    with copies.hold(files[0]) as held:
        for number in range(1, 6):
            use(copies, files[number])
        assert held.read_bytes()[0] == 0


def test_holding_more_than_fits_is_an_error(copies, files, monkeypatch):
    monkeypatch.setattr("bkd.data.copies.WAIT_SECONDS", 0.3)
    too_small = refused(r"the cache for remote shards is too small\n(.*\n)*.*raise data\.remote_cache_gib")
    with copies.hold(files[0]), copies.hold(files[1]), copies.hold(files[2]), too_small:
        use(copies, files[3])
    assert use(copies, files[3])[0] == 3


def test_a_file_that_could_never_fit_is_an_error(server, tmp_path):
    with refused("0.00 GiB for this file alone"):
        use(LocalCopies(tmp_path, max_bytes=1000), server.add("big.tar") + TOKEN)
    assert server.gets["big.tar"] == 0


def test_equal_names_in_different_places_are_different_files(copies, server):
    one, other = server.add("a/00000.tar", b"a" * 600), server.add("b/00000.tar", b"b" * 600)
    assert use(copies, one) == b"a" * 600 and use(copies, other) == b"b" * 600
    assert local_name(one) != local_name(other) != local_name(other + TOKEN)


def test_a_shard_and_its_stats_lie_side_by_side():
    shard = local_name("https://h/x/00000.tar?t=1")
    assert stats_file(Path(shard)).name == local_name("https://h/x/00000_stats.json?t=1")


def test_many_threads_fetch_a_file_once(copies, server, files):
    server.faults["0.tar"] = ["slow"]
    assert together(*[lambda: use(copies, files[0])] * 8) == [bytes([0]) + BODY[1:]] * 8
    assert server.gets["0.tar"] == 1


def test_what_failed_in_the_background_is_raised_when_it_is_held(server, tmp_path, monkeypatch):
    failed = []

    def fail(url, target, progress):
        failed.append(threading.current_thread().name)
        raise DataError("remote file cannot be read")

    copies = LocalCopies(tmp_path, max_bytes=10**9, fetch=fail)
    url = server.add("0.tar")
    copies.want([url])
    eventually(lambda: failed == ["remote shards"])
    with refused("remote file cannot be read"):
        use(copies, url)


def test_a_replaced_file_is_fetched_again(server, files, tmp_path):
    assert use(LocalCopies(tmp_path, max_bytes=10**9), files[0])[0] == 0
    server.add("0.tar", b"x" * 700)
    assert use(LocalCopies(tmp_path, max_bytes=10**9), files[0]) == b"x" * 700


def test_an_older_version_that_somebody_reads_is_not_waited_for_forever(server, files, tmp_path, monkeypatch):
    monkeypatch.setattr("bkd.data.copies.WAIT_SECONDS", 0.3)
    with LocalCopies(tmp_path, max_bytes=10**9).hold(files[0]):
        server.add("0.tar", b"x" * 700)
        with refused("another process reads an older version"):
            use(LocalCopies(tmp_path, max_bytes=10**9), files[0])


def test_a_file_that_changes_while_it_is_copied_is_an_error(tmp_path):
    def fetch_more(url, target, progress):
        target.write_bytes(b"longer")

    copies = LocalCopies(tmp_path, max_bytes=100, fetch=fetch_more, describe=lambda url: RemoteFile(3))
    with refused("remote file changed while it was copied"):
        use(copies, "https://h/0.tar")
    assert there(tmp_path) == []


def test_closing_ends_a_copy_in_the_background(server, files, tmp_path):
    copies = LocalCopies(tmp_path, max_bytes=10**9)
    server.faults["0.tar"] = ["slow"]
    copies.want(files)
    eventually(lambda: server.order == ["0.tar"])
    copies.close()
    eventually(lambda: not list(tmp_path.glob(".*.unfinished")))
    assert there(tmp_path) == [] and server.order == ["0.tar"]


PROCESS = """
import sys
from pathlib import Path
from bkd.data.copies import LocalCopies
with LocalCopies(Path(sys.argv[1]), max_bytes=3 << 20).hold(sys.argv[2]) as path:
    print(path.stat().st_size, flush=True)
    sys.stdin.readline()
    print(path.is_file(), flush=True)
"""


@contextmanager
def process(folder, url):
    command = [sys.executable, "-c", PROCESS, str(folder), url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        try:
            yield running
        finally:
            running.kill()


def test_two_processes_fetch_a_file_once(server, files, tmp_path):
    server.faults["0.tar"] = ["slow"]
    with process(tmp_path, files[0]) as first, process(tmp_path, files[0]) as second:
        sizes = [running.stdout.readline() for running in (first, second)]
        for running in (first, second):
            running.communicate("\n", timeout=LIMIT_SECONDS)
    assert sizes == [f"{len(BODY)}\n"] * 2 and server.gets["0.tar"] == 1


def test_what_another_process_holds_stays_until_that_ends(copies, files, tmp_path):
    with process(tmp_path / "copies", files[0]) as other:
        other.stdout.readline()
        for url in files[1:]:
            use(copies, url)
        assert "0.tar" in there(tmp_path / "copies")
        other.kill()  # which ends its lock
        other.wait(LIMIT_SECONDS)
    for url in files[1:4]:
        use(copies, url)
    assert there(tmp_path / "copies") == ["1.tar", "2.tar", "3.tar"]


def test_a_killed_fetch_is_done_again(server, files, tmp_path):
    server.faults["0.tar"] = ["stall", None]
    with process(tmp_path, files[0]) as other:
        eventually(lambda: any(path.stat().st_size for path in tmp_path.glob(".*.unfinished")))
        other.kill()
        other.wait(LIMIT_SECONDS)
    assert use(LocalCopies(tmp_path, max_bytes=3 << 20), files[0])[1:] == BODY[1:]
    assert not list(tmp_path.glob(".*.unfinished"))


def test_busy_users_never_exceed_the_bound_nor_lose_what_they_hold(files, tmp_path):
    users = [LocalCopies(tmp_path, max_bytes=3 * len(BODY)) for _ in range(2)]

    def work(seed):
        for step in range(12):
            copies, number = users[(seed + step) % 2], (seed * 5 + step * step) % 6
            copies.want([files[(step + n) % 6] for n in range(4)])
            with copies.hold(files[number]) as path:
                assert path.read_bytes()[0] == number
                assert len(there(tmp_path)) <= 3
                time.sleep(0.01)
                assert path.is_file()
        return True

    try:
        assert together(lambda: work(0), lambda: work(1)) == [True, True]
    finally:
        for copies in users:
            copies.close()


def test_no_verb_prints_or_stores_a_token(server, bkd, tmp_path):
    server.add("there.tar", b"no tar" * 200)
    for address in (server.url("nosuch.tar"), server.url("there.tar")):
        code, printed = bkd("data", "check", address + TOKEN)
        assert code == 1 and "secret" not in printed and address in printed
    recipe = load_recipe("shapes/sd-small", [f"data.shards={server.url('x/') + TOKEN}"])
    assert "secret" not in dump_recipe(recipe) + str(result_keys(recipe))
    assert (
        shown("bkd train r data.shards=https://me:pass@h/x.tar?t=1 a=b")
        == "bkd train r data.shards=https://h/x.tar a=b"
    )


# S3.


@pytest.fixture
def no_s3_left():
    """fsspec keeps its connections to what was configured when they were made."""
    s3fs = pytest.importorskip("s3fs")
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def s3_environment(monkeypatch, tmp_path, no_s3_left):
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return monkeypatch


@pytest.fixture
def s3(s3_environment):
    """A bucket `shards`, with two folders."""
    pytest.importorskip("moto")
    pytest.importorskip("flask")
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        address = "http://{}:{}".format(*server.get_host_and_port())
        s3_environment.setenv("AWS_ENDPOINT_URL_S3", address)
        client = boto3.client("s3", endpoint_url=address)
        client.create_bucket(Bucket="shards")
        for key in ("a/1.tar", "a/0.tar", "a/0.txt", "a/deep/2.tar", "b/3.tar", "a/odd #?%.tar"):
            client.put_object(Bucket="shards", Key=key, Body=BODY * 5 + key.encode())
        yield client
    finally:
        server.stop()


def test_s3_folders_globs_and_patterns(s3):
    assert expand_remote("s3://shards/a/") == [f"s3://shards/a/{name}.tar" for name in ("0", "1", "odd #?%")]
    assert expand_remote("s3://shards/{b,a}/[0-9].tar") == [f"s3://shards/{n}.tar" for n in ("a/0", "a/1", "b/3")]
    assert expand_remote("s3://shards/?/?.tar") == [f"s3://shards/{n}.tar" for n in ("a/0", "a/1", "b/3")]
    assert expand_remote("s3://shards/a/{0..1}.tar") == ["s3://shards/a/0.tar", "s3://shards/a/1.tar"]
    for nothing in ("s3://shards/b/*.png", "s3://shards/"):
        with refused("no shards found"):
            expand_remote(nothing)
    for missing in ("s3://shards/none/", "s3://none/a/"):
        with refused("there is no such file"):
            expand_remote(missing)


def test_s3_files_are_copied(s3, tmp_path, sleeps):
    seen = []
    for key in ("a/0.tar", "a/odd #?%.tar"):
        fetch(f"s3://shards/{key}", tmp_path / "x.tar", progress=lambda done, total: seen.append(done), attempts=1)
        assert (tmp_path / "x.tar").read_bytes() == BODY * 5 + key.encode()
    assert 4 << 20 in seen  # in pieces
    found = describe("s3://shards/a/0.tar")
    assert found.size == 5 * len(BODY) + 7 and found.etag and abs(found.modified - time.time()) < 100
    assert use(LocalCopies(tmp_path, max_bytes=10**8), "s3://shards/b/3.tar") == BODY * 5 + b"b/3.tar"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("s3://shards/a/9.tar", "there is no such file"),
        ("s3://none/a/0.tar", "there is no such file"),
        ("s3://shards/a", "it is a folder"),
    ],
)
def test_s3_files_that_are_missing_are_named(s3, tmp_path, sleeps, url, reason):
    with refused(rf"{url}: remote file cannot be read\n  got: {reason}"):
        fetch(url, tmp_path / "x.tar", sleep=sleeps.append)
    assert not sleeps and left_in(tmp_path) == []


def test_s3_attempts_are_not_multiplied(s3_environment, server, tmp_path, sleeps):
    s3_environment.setenv("AWS_ENDPOINT_URL", server.url(""))
    server.add("shards/x.tar", faults=[503])
    with refused("got: HTTP 503.*; tried 5 times"):
        fetch("s3://shards/x.tar", tmp_path / "x.tar", sleep=sleeps.append)
    assert sleeps == [1, 2, 4, 8] and server.gets["shards/x.tar"] == 5


def test_a_silent_s3_server_is_given_up(s3_environment, server, tmp_path, sleeps):
    s3_environment.setenv("AWS_ENDPOINT_URL", server.url(""))
    server.add("shards/x.tar", faults=["stall"])
    began = time.monotonic()
    with refused("the server stopped sending; tried 2 times"):
        fetch("s3://shards/x.tar", tmp_path / "x.tar", attempts=2, sleep=sleeps.append, stall_seconds=0.3)
    assert time.monotonic() - began < 10 and left_in(tmp_path) == []


def test_missing_s3_credentials_are_an_error_at_once(s3_environment, server, tmp_path, sleeps):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        s3_environment.delenv(name)
    s3_environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3_environment.setenv("AWS_ENDPOINT_URL", server.url(""))
    with refused("there are no credentials(.|\n)*FSSPEC_S3_ANON=true"):
        fetch("s3://shards/x.tar", tmp_path / "x.tar", sleep=sleeps.append)
    assert not sleeps
