"""A model hub on this machine: the part of the protocol that making a repository, committing and reading back need.

It is strict: the token must be right, bytes must have the hash that was announced, a commit may name only large files that
arrived, and a request that the hub does not know is an error that `strays` keeps.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_right"
LARGE = (".safetensors", ".gguf")


def blob(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """One hub; its state is in class attributes, which `serving` makes anew."""

    protocol_version = "HTTP/1.1"
    repositories: ClassVar[dict[str, dict[str, Any]]]  # by name: private, files
    objects: ClassVar[dict[str, bytes]]  # large files by SHA-256
    received: ClassVar[list[str]]  # large files that were sent, in order
    strays: ClassVar[list[str]]
    fails: ClassVar[dict[str, int]]  # by a word of the path, the status that is answered
    corrupts: ClassVar[set[str]]  # files of which other bytes are kept than were sent

    def do_GET(self) -> None:
        self.route()

    def do_POST(self) -> None:
        self.route()

    def do_PUT(self) -> None:
        self.route()

    def route(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = self.chunks()
        path = unquote(urlsplit(self.path).path)
        for word, status in self.fails.items():
            if word in path:
                return self.answer(status, {"error": "as the test wants it"})
        if not path.startswith("/lfs/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid user token."})
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if parts[0] == "lfs":
            return self.take(parts[1], body)
        if parts[:2] == ["api", "models"] and "/".join(parts[2:4]) in self.repositories:
            return self.of_repository("/".join(parts[2:4]), parts[4:], body)
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(json.loads(body))
        self.strays.append(f"{self.command} {path}")
        return self.answer(404, {"error": "Repository not found"})

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] != "me":
            return self.answer(403, {"error": f"You don't have the rights to create a model under {wanted['organization']}"})
        if name in self.repositories:
            return self.answer(409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"})
        self.repositories[name] = {"private": wanted.get("visibility") == "private", "files": {}, "commits": []}
        return self.answer(200, {"url": f"{self.url}/{name}", "name": name})

    def of_repository(self, name: str, rest: list[str], body: bytes) -> None:
        repository = self.repositories[name]
        if not rest or rest[0] == "revision":
            files = [{"rfilename": path} for path in repository["files"]]
            return self.answer(200, {"id": name, "sha": "0" * 40, "private": repository["private"], "siblings": files})
        if rest[0] == "preupload":
            modes = []
            for file in json.loads(body)["files"]:
                mode = "lfs" if file["path"].endswith(LARGE) else "regular"
                held = repository["files"].get(file["path"])
                oid = None if held is None or mode == "lfs" else blob(held)
                modes.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            return self.answer(200, {"files": modes})
        if rest[0] == "commit":
            return self.commit(name, [json.loads(line) for line in body.splitlines()])
        if rest[0] == "paths-info":
            wanted = parse_qs(body.decode())["paths"]
            held = repository["files"]
            return self.answer(200, [self.entry(path, held[path]) for path in wanted if path in held])
        self.strays.append(f"{self.command} {name} {rest}")
        return self.answer(404, {"error": "unknown"})

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        header, *entries = lines
        assert header["key"] == "header" and header["value"]["summary"]
        found = {}
        for entry in entries:
            value = entry["value"]
            if entry["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    return self.answer(400, {"error": f"{value['path']} was never sent"})
                content = self.objects[value["oid"]]
            else:
                content = base64.b64decode(value["content"])
            found[value["path"]] = content[:-1] + b"?" if value["path"] in self.corrupts else content
        self.repositories[name]["files"] |= found
        oid = hashlib.sha1(json.dumps(sorted(found)).encode()).hexdigest()
        self.repositories[name]["commits"].append(oid)
        return self.answer(200, {"commitUrl": f"{self.url}/{name}/commit/{oid}", "commitOid": oid, "success": True})

    def batch(self, wanted: dict[str, Any]) -> None:
        found = []
        for one in wanted["objects"]:
            known = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.objects:
                known["actions"] = {"upload": {"href": f"{self.url}/lfs/{one['oid']}"}}
            found.append(known)
        return self.answer(200, {"transfer": "basic", "objects": found})

    def take(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(400, {"error": "another hash"})
        self.objects[oid] = body
        self.received.append(oid)
        return self.answer(200, {})

    def entry(self, path: str, content: bytes) -> dict[str, Any]:
        about: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": blob(content)}
        if path.endswith(LARGE):
            about["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return about

    @property
    def url(self) -> str:
        host, port = self.server.server_address[:2]
        return f"http://{host!s}:{port}"

    def chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, status: int, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if isinstance(value, dict) and "error" in value:
            self.send_header("X-Error-Message", value["error"])
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[tuple[str, type[Hub]]]:
    """The address of a new, empty hub, and the hub."""
    state = {"repositories": {}, "objects": {}, "received": [], "strays": [], "fails": {}, "corrupts": set()}
    hub = type("OneHub", (Hub,), state)
    server = ThreadingHTTPServer(("127.0.0.1", 0), hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
