"""A small Hugging Face hub on 127.0.0.1 for tests: the routes that from_pretrained and upload_folder really ask for."""
import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

TOKEN = "hf_good"


class Hub(ThreadingHTTPServer):
    """repos: {"user/name": {revision: {file: bytes}}}; `gated` names answer 403; uploads need TOKEN.

    cut: {file: bytes after which the connection of its first download breaks}; failing: {file: answers of 500 to come}.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.large: dict[str, bytes] = {}         # LFS objects by SHA-256
        self.asked: list[str] = []
        self.cut: dict[str, int] = {}
        self.failing: dict[str, int] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args) -> None:
        self.server.asked.append(f"{self.command} {self.path}")

    def do_HEAD(self) -> None:
        self.fetch()

    def do_GET(self) -> None:
        self.fetch()

    def fetch(self) -> None:
        """GET and HEAD: files, a repository's facts and its tree."""
        words = unquote(self.path.split("?")[0]).strip("/").split("/")
        api = words[:2] == ["api", "models"]
        name, rest = "/".join(words[2:4] if api else words[:2]), words[4:] if api else words[2:]
        if name not in self.server.repos:
            return self.answer(404, error="RepoNotFound", words="Repository not found")
        if name in self.server.gated:
            return self.answer(403, error="GatedRepo", words=f"Access to model {name} is restricted")
        asked = rest[1] if len(rest) > 1 else "main"
        revision = next((r for r in self.server.repos[name] if asked in (r, commit(r))), None)
        if revision is None:
            return self.answer(404, error="RevisionNotFound", words=f"Invalid rev id: {asked}")
        files = self.server.repos[name][revision]
        if api:
            return self.tree(files) if rest[:1] == ["tree"] else self.answer(200, {
                "id": name, "sha": commit(revision), "siblings": [{"rfilename": file} for file in files]})
        return self.file(files, "/".join(rest[2:]), revision)

    def tree(self, files: dict[str, bytes]) -> None:
        self.answer(200, [{"type": "file", "path": k, "size": len(v), "oid": digest(v)} for k, v in files.items()])

    def file(self, files: dict[str, bytes], path: str, revision: str) -> None:
        if path not in files:
            return self.answer(404, error="EntryNotFound", words="Entry not found")
        if self.command == "GET" and self.server.failing.get(path):
            self.server.failing[path] -= 1
            return self.answer(500, words="out of order")
        headers = {"ETag": f'"{digest(files[path])}"', "X-Repo-Commit": commit(revision)}
        if self.command == "GET" and path in self.server.cut:
            length = str(len(files[path]))
            self.close_connection = True
            return self.answer(200, files[path][:self.server.cut.pop(path)], headers | {"Content-Length": length})
        return self.answer(200, files[path], headers)

    def do_POST(self) -> None:
        """Uploads: create, preupload, LFS batch, commit."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, words="Invalid username or password.")
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            made = json.loads(body)
            name = f"{made['organization']}/{made['name']}"
            if made["organization"] == "stranger":
                return self.answer(403, words="You don't have the rights to create a model under the namespace")
            self.server.repos.setdefault(name, {"main": {}})
            return self.answer(200, {"url": f"{self.server.url}/{name}"})
        return self.upload(self.path, body)

    def upload(self, path: str, body: bytes) -> None:
        if "/preupload/" in path:
            return self.answer(200, {"files": [
                {"path": f["path"], "shouldIgnore": False, "oid": None,
                 "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in json.loads(body)["files"]]})
        if path.endswith("/info/lfs/objects/batch"):
            return self.answer(200, {"transfer": "basic", "objects": [
                {"oid": o["oid"], "size": o["size"], "authenticated": True,
                 "actions": {"upload": {"href": f"{self.server.url}/lfs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]]}, {"Content-Type": "application/vnd.git-lfs+json"})
        return self.commit(path, [json.loads(line) for line in body.splitlines()])

    def commit(self, path: str, lines: list[dict]) -> None:
        words = path.split("?")[0].strip("/").split("/")
        files = self.server.repos["/".join(words[2:4])].setdefault(words[5], {})
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
        url = f"{self.server.url}/{'/'.join(words[2:4])}/commit/{commit('main')}"
        self.answer(200, {"success": True, "commitUrl": url, "commitOid": commit("main")})

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.large[hashlib.sha256(body).hexdigest()] = body
        self.answer(200, b"")

    def answer(self, status: int, body: object = None, headers: dict[str, str] | None = None, *, error: str = "",
               words: str = "") -> None:
        """Send `body`: bytes as they are, anything else as JSON; refusals carry the hub's own headers."""
        content = body if isinstance(body, bytes) else json.dumps({"error": words} if words else body).encode()
        self.send_response(status)
        for key, value in ({"Content-Type": "application/json", "Content-Length": str(len(content))} | (headers or {})
                           | ({"X-Error-Code": error} if error else {}) | ({"X-Error-Message": words} if words else {})
                           ).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def commit(revision: str) -> str:
    """A revision's commit hash, 40 hex digits."""
    return digest(revision.encode())
