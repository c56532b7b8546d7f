"""A corner of the web as LAION's lists know it: pictures of many kinds, and a server that is not always kind."""

import io
import random
import socket
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

from bkd.data.shapes import render, scene

TIMEOUT = 3
"""Seconds for which a client of this server should wait."""


# Pictures, as they lie about on the web.


def picture(index, size=(512, 512)):
    return Image.fromarray(render(scene("train", index))).resize(size, Image.Resampling.NEAREST)


def encoded(image, kind="JPEG", **how):
    stream = io.BytesIO()
    image.save(stream, kind, **({"quality": 92} if kind == "JPEG" else {}), **how)
    return stream.getvalue()


def half_transparent(index):
    """The left half shows the picture, the right half hides it."""
    image = picture(index).convert("RGBA")
    image.paste(0, (256, 0, 512, 512), Image.new("L", (256, 512), 255))
    return image


def on_white(index):
    image = picture(index)
    image.paste((255, 255, 255), (256, 0, 512, 512))
    return image


def turned(index):
    """Stored lying on its side; EXIF says how to hold it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(index, (640, 512)).transpose(Image.Transpose.ROTATE_90), exif=exif)


def sixteen_bits(index):
    return encoded(Image.fromarray(np.asarray(picture(index).convert("L")).astype(np.uint16) * 257), "PNG")


def bomb():
    """A PNG of 1.6 gigapixels in 200 kB."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    side = 40_000
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + side // 8)) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


# The server, and what it does to whom.


@dataclass(frozen=True)
class Reply:
    """What is sent for an address.

    Attributes:
        body: Bytes; only `sent` of them where the connection breaks.
        code: HTTP status.
        first_code: Status of the first request, where that is another one.
        headers: More of them.
        delay: Seconds before the answer.
        sent: Share of the body that is sent.
    """

    body: bytes
    code: int = 200
    first_code: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0
    sent: float = 1


@dataclass(frozen=True)
class Kind:
    """Addresses of one sort.

    Attributes:
        count: In the list.
        reply: Of the server, by the number of the row.
        status: That img2dataset should report.
        reason: What its error message should say.
        expected: The picture that should arrive, where that is certain.
    """

    count: int
    reply: Callable[[int], Reply]
    status: str = "success"
    reason: str = ""
    expected: Callable[[int], Image.Image] | None = None


def image_of(make):
    return lambda index: Reply(make(index))


def fails(count, reason, reply, *, status="failed_to_download"):
    return Kind(count, reply, status, reason)


def unusable(count, reason, body):
    return fails(count, reason, lambda index: Reply(body(index)), status="failed_to_resize")


def half(data):
    return data[: len(data) // 2]


def noise(index):
    return b"\xff\xd8\xff\xe0" + random.Random(index).randbytes(5000)


KINDS = {
    "plain": Kind(102, image_of(lambda i: encoded(picture(i))), expected=picture),
    "wide": Kind(30, image_of(lambda i: encoded(picture(i, (768, 512)))), expected=lambda i: picture(i, (768, 512))),
    "tall": Kind(20, image_of(lambda i: encoded(picture(i, (480, 720)))), expected=lambda i: picture(i, (480, 720))),
    "png": Kind(20, image_of(lambda i: encoded(picture(i), "PNG")), expected=picture),
    "palette": Kind(8, image_of(lambda i: encoded(picture(i).quantize(32), "PNG")), expected=picture),
    "rgba": Kind(8, image_of(lambda i: encoded(half_transparent(i), "PNG")), expected=on_white),
    "gray": Kind(8, image_of(lambda i: encoded(picture(i).convert("L"))), expected=lambda i: picture(i).convert("L")),
    "webp": Kind(12, image_of(lambda i: encoded(picture(i), "WEBP")), expected=picture),
    "webp-alpha": Kind(4, image_of(lambda i: encoded(half_transparent(i), "WEBP", lossless=True)), expected=on_white),
    "cmyk": Kind(8, image_of(lambda i: encoded(picture(i).convert("CMYK"))), expected=picture),
    "turned": Kind(8, image_of(turned)),
    "sixteen": Kind(2, image_of(sixteen_bits)),
    "slow": Kind(6, lambda i: Reply(encoded(picture(i)), delay=1.5), expected=picture),
    "flaky": Kind(4, lambda i: Reply(encoded(picture(i)), first_code=503), expected=picture),
    "moved": Kind(4, lambda i: Reply(b"", 302, headers={"Location": "/twin.jpg"}), expected=lambda i: picture(0)),
    "twin": Kind(4, lambda i: Reply(encoded(picture(0))), expected=lambda i: picture(0)),
    "gone": fails(12, "HTTP Error 404", lambda i: Reply(b"no", 404)),
    "broken": fails(6, "HTTP Error 500", lambda i: Reply(b"no", 500)),
    "cut": fails(4, "IncompleteRead", lambda i: Reply(encoded(picture(i)), sent=0.5)),
    "forbidden": fails(
        3, "disallowed by X-Robots-Tag", lambda i: Reply(encoded(picture(i)), headers={"X-Robots-Tag": "noai"})
    ),
    "hanging": fails(2, "timed out", lambda i: Reply(encoded(picture(i)), delay=5 * TIMEOUT)),
    "refused": fails(2, "Connection refused", lambda i: Reply(b"")),
    "spaced": fails(1, "URL can't contain control characters", lambda i: Reply(b"")),
    "null": fails(1, "", lambda i: Reply(b"")),
    "noise": unusable(6, "Image decoding error", noise),
    "half-jpeg": unusable(4, "Image decoding error", lambda i: half(encoded(picture(i)))),
    "half-png": unusable(2, "Image decoding error", lambda i: half(encoded(picture(i), "PNG"))),
    "page": unusable(3, "Image decoding error", lambda i: b"<!doctype html><html><p>This picture has moved.</html>"),
    "tiny": unusable(4, "image too small", lambda i: encoded(picture(i, (8, 8)), "PNG")),
    "bomb": unusable(1, "MAX_IMAGE_PIXELS", lambda i: bomb()),
    "empty": unusable(1, "buf.empty()", lambda i: b""),
}
NAMES = [name for name, kind in KINDS.items() for _ in range(kind.count)]
random.Random(0).shuffle(NAMES)
"""The kind of every row of the list."""
ARRIVING = {row for row, name in enumerate(NAMES) if KINDS[name].status == "success"}


class Server(ThreadingHTTPServer):
    """Answers on the loopback with `replies`, by path."""

    request_queue_size = 256
    daemon_threads = True
    block_on_close = False

    def __init__(self, replies):
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies, self.hits, self.closing = replies, Counter(), threading.Event()

    def handle_error(self, request, client_address):
        """Clients that hang up are a part of the test."""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        reply = self.server.replies[self.path]
        self.server.hits[self.path] += 1
        if self.server.closing.wait(reply.delay):
            return
        first = reply.first_code if self.server.hits[self.path] == 1 else None
        self.send_response(first or reply.code)
        for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply.body[: int(len(reply.body) * reply.sent)])

    def log_message(self, *arguments):
        """Nothing."""


@contextmanager
def serving(replies):
    server = Server(replies)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
