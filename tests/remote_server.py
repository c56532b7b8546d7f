"""A web server on this machine that fails as real ones do."""

import socket
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

TOKEN = "?X-Amz-Signature=secret"
BODY = bytes(range(256)) * 4096  # 1 MiB
HALF = len(BODY) // 2
LIMIT_SECONDS = 20


class Server(ThreadingHTTPServer):
    """Files, and what goes wrong with them: for each path a list of faults, one for each GET, the last one forever."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.headers, self.head_status = {}, {}, {}, {}
        self.gets, self.heads, self.order, self.raw = Counter(), Counter(), [], []
        self.lock, self.ended, self.gate = threading.Lock(), threading.Event(), threading.Event()
        self.gate.set()

    def url(self, path, query=""):
        return f"http://127.0.0.1:{self.server_port}/{path}{query}"

    def add(self, path, body=BODY, faults=(), **headers):
        self.files[path], self.faults[path], self.headers[path] = body, list(faults), headers
        return self.url(path)

    def handle_error(self, request, client_address):
        pass  # clients hang up here, on purpose


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        path = urlsplit(self.path).path[1:]
        with self.server.lock:
            self.server.heads[path] += 1
        self.begin(path, status=self.server.head_status.get(path, 200))

    def do_GET(self):
        path = urlsplit(self.path).path[1:]
        with self.server.lock:
            self.server.gets[path] += 1
            self.server.order.append(path)
            self.server.raw.append(self.path)
            faults = self.server.faults.get(path, [])
            fault = faults.pop(0) if len(faults) > 1 else next(iter(faults), None)
        self.server.gate.wait(LIMIT_SECONDS)
        if isinstance(fault, int):
            self.begin(path, status=fault)
        else:
            getattr(self, fault or "send_all")(path, self.server.files.get(path, b""))

    def begin(self, path, status=200, extra=0):
        body = self.server.files.get(path)
        status = 404 if body is None else status
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) + extra if status == 200 else 0))
        for name, value in self.server.headers.get(path, {}).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def send_all(self, path, body):
        self.begin(path)
        if path in self.server.files:
            self.wfile.write(body)

    def cut(self, path, body):
        self.begin(path)
        self.wfile.write(body[: len(body) // 2])

    def reset(self, path, body):
        self.cut(path, body)
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def stall(self, path, body):
        self.cut(path, body)
        self.wfile.flush()
        self.server.ended.wait(LIMIT_SECONDS)

    def slow(self, path, body):
        self.begin(path)
        for start in range(0, len(body), len(body) // 8):
            self.wfile.write(body[start : start + len(body) // 8])
            self.wfile.flush()
            time.sleep(0.15)

    def too_long(self, path, body):
        self.begin(path, extra=100)
        self.wfile.write(body)


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield running
        running.ended.set()
        running.gate.set()
        running.shutdown()
