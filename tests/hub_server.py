"""A Hub on this machine: repositories, commits and large files by the addresses the client uses, and their failures."""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKENS = {"hf_write_SECRET": "write", "hf_read_SECRET": "read"}
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
LARGE = 10_000
"""Bytes from which this Hub stores a file beside git."""


def blob_id(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    """Commits, each a name and all its files, and the branches that point to them."""

    private: bool = False
    commits: dict = field(default_factory=lambda: {"0" * 40: {".gitattributes": b""}})
    branches: dict = field(default_factory=lambda: {"main": "0" * 40})
    proposals: list = field(default_factory=list)
    messages: list = field(default_factory=list)

    def files(self, revision="main"):
        return self.commits[self.branches.get(revision, revision)]


class Hub(ThreadingHTTPServer):
    """`faults`: (method, pattern of the path) -> what happens, one for each request; then all is well again."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos = {"model": {}, "dataset": {}, "space": {}}
        self.large, self.faults, self.requests = {}, {}, []
        self.before_commit = self.on_fault = lambda: None
        self.lock = threading.Lock()

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.server_port}"

    def fail(self, method, pattern, *faults):
        self.faults[method, pattern] = list(faults)

    def uploads(self):
        """What was sent as large files."""
        return [path for method, path in self.requests if method == "PUT"]

    def handle_error(self, request, client_address):
        pass  # connections are cut here, on purpose


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def handle_any(self):
        parts = urlsplit(self.path)
        path, self.query = unquote(parts.path), parse_qs(parts.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.server.lock:
            self.server.requests.append((self.command, path))
            fault = next(
                (
                    waiting.pop(0)
                    for (method, pattern), waiting in self.server.faults.items()
                    if waiting and method == self.command and re.search(pattern, path)
                ),
                None,
            )
        self.silent = fault == "cut after"  # what was asked for is done, and nobody hears of it
        if fault is not None:
            self.server.on_fault()
        if isinstance(fault, int):
            return self.refuse(fault, "the server says no")
        if fault == "cut":
            return self.cut()
        for method, pattern, answer in ROUTES:
            if method in (self.command, "ANY") and (found := re.fullmatch(pattern, path)):
                return getattr(self, answer)(**found.groupdict())
        return self.refuse(404, "no such address")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def cut(self):
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def answer(self, content, status=200, **headers):
        if self.silent:
            self.cut()
            return
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, message, code=None):
        headers = {"X_Error_Message": message} | ({"X_Error_Code": code} if code else {})
        self.answer({"error": message}, status, **headers)

    @property
    def role(self):
        return TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def find(self, repo, kind="model", write=False):
        """A repository that the token may see; None after saying why not."""
        found = self.server.repos[kind].get(repo)
        if self.headers.get("Authorization") and self.role is None:
            self.refuse(401, "Invalid credentials in Authorization header")
        elif found is None or (found.private and self.role is None):
            self.refuse(401 if self.role is None else 404, "Repository not found", "RepoNotFound")
        elif write and (self.role != "write" or not repo.startswith("ada/")):
            self.refuse(403, "You don't have the rights")
        else:
            return found
        return None

    def whoami(self):
        if self.role is None:
            return self.refuse(401, "Invalid credentials in Authorization header")
        return self.answer({"name": "ada", "type": "user", "orgs": [], "auth": {"accessToken": {"role": self.role}}})

    def create(self):
        wish = json.loads(self.body)
        repo, repos = (
            f"{wish.get('organization') or 'ada'}/{wish['name']}",
            self.server.repos[wish.get("type", "model")],
        )
        if self.role != "write" or not repo.startswith("ada/"):
            return self.refuse(403, "You don't have the rights to create a model under this namespace")
        if repo in repos:
            return self.refuse(409, "You already created this repo")
        repos[repo] = Repo(private=wish.get("visibility") == "private" or wish.get("private", False))
        return self.answer({"url": f"{self.server.endpoint}/{repo}", "name": repo})

    def info(self, repo, kind, revision):
        revision = revision or "main"
        if (found := self.find(repo, kind)) is None:
            return None
        if revision not in (*found.branches, *found.commits):
            return self.refuse(404, "Invalid rev id", "RevisionNotFound")
        sha = found.branches.get(revision, revision)
        siblings = [{"rfilename": name} for name in found.commits[sha]]
        return self.answer({"id": repo, "sha": sha, "private": found.private, "siblings": siblings, "tags": []})

    def tree(self, repo, revision):
        if (found := self.find(repo)) is not None:
            listed = []
            for name, content in found.files(revision).items():
                entry = {"type": "file", "path": name, "size": len(content), "oid": blob_id(content)}
                if len(content) >= LARGE:
                    entry["lfs"] = {
                        "oid": hashlib.sha256(content).hexdigest(),
                        "size": len(content),
                        "pointerSize": 130,
                    }
                listed.append(entry)
            self.answer(listed)

    def branch(self, repo, branch):
        if (found := self.find(repo, write=True)) is not None:
            if branch in found.branches:
                return self.refuse(409, "Reference already exists")
            found.branches[branch] = found.branches["main"]
            return self.answer({})
        return None

    def validate(self):
        if "license: unheard-of" in json.loads(self.body)["content"]:
            return self.answer({"errors": [{"message": '"license" must be one of …'}]}, 400)
        return self.answer({"errors": [], "warnings": []})

    def preupload(self, repo, revision):
        if self.find(repo) is None:
            return
        files = json.loads(self.body)["files"]
        modes = [
            {"path": f["path"], "uploadMode": "lfs" if f["size"] >= LARGE else "regular", "shouldIgnore": False}
            for f in files
        ]
        self.answer({"files": modes})

    def batch(self, repo):
        if self.find(repo) is None:
            return
        objects = []
        for each in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.server.endpoint}/large/{each['oid']}?X-Amz-Signature=SECRET"}
            objects.append({**each} if each["oid"] in self.server.large else {**each, "actions": {"upload": upload}})
        self.answer({"transfer": "basic", "objects": objects})

    def store(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.refuse(400, "another content")
        self.server.large[oid] = self.body
        return self.answer({})

    def commit(self, repo, revision):
        proposes = bool(self.query.get("create_pr"))
        if (found := self.find(repo, write=not proposes)) is None:
            return None
        self.server.before_commit()
        lines = [json.loads(line) for line in self.body.splitlines()]
        header, head = lines[0]["value"], found.branches.get(revision)
        if header.get("parentCommit") not in (None, head):
            return self.refuse(412, "A commit has happened since. Please refresh and try again.")
        files = dict(found.commits[head])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            else:
                del files[value["path"]]
        sha = hashlib.sha1(self.body + head.encode()).hexdigest()
        found.commits[sha] = files
        found.messages.append(header["summary"])
        answer = {"commitUrl": f"{self.server.endpoint}/{repo}/commit/{sha}", "commitOid": sha}
        if proposes:
            found.proposals.append(sha)
            answer["pullRequestUrl"] = f"{self.server.endpoint}/{repo}/discussions/{len(found.proposals)}"
        else:
            found.branches[revision] = sha
        return self.answer(answer)

    def resolve(self, repo, revision, name):
        if (found := self.find(repo)) is None:
            return
        sha = found.branches.get(revision, revision)
        if sha not in found.commits:
            self.refuse(404, "Invalid rev id", "RevisionNotFound")
        elif (content := found.commits[sha].get(name)) is None:
            self.refuse(404, "Entry not found", "EntryNotFound")
        else:
            self.answer(content, ETag=f'"{blob_id(content)}"', X_Repo_Commit=sha)


ROUTES = [
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate"),
    ("POST", f"/api/models/{REPO}/preupload/(?P<revision>.+)", "preupload"),
    ("POST", f"/api/models/{REPO}/commit/(?P<revision>.+)", "commit"),
    ("POST", f"/api/models/{REPO}/branch/(?P<branch>.+)", "branch"),
    ("GET", f"/api/models/{REPO}/tree/(?P<revision>.+)", "tree"),
    ("GET", f"/api/(?P<kind>model|dataset|space)s/{REPO}(/revision/(?P<revision>.+))?", "info"),
    ("POST", f"/{REPO}\\.git/info/lfs/objects/batch", "batch"),
    ("PUT", "/large/(?P<oid>[0-9a-f]{64})", "store"),
    ("ANY", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", "resolve"),
]


@pytest.fixture
def hub():
    with Hub() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield running
        running.shutdown()
