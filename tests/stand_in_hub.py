"""A stand-in for the Hugging Face hub on loopback, which huggingface_hub itself talks to: see `running`.

It serves what huggingface_hub needs of the real one: the list of a revision, HEAD and GET of files with ranges, ETags,
a redirect to another path for large files, and refusals with the hub's own headers. Every request is noted.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

_RESOLVE = re.compile(r"/(?P<repository>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_LIST = re.compile(r"/api/models/(?P<repository>[^/]+/[^/]+)/revision/(?P<revision>[^/]+)")
_STORED = re.compile(r"/stored/(?P<repository>[^/]+/[^/]+)/(?P<commit>[0-9a-f]{40})/(?P<file>.+)")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")
# Larger files are stored elsewhere, and the hub redirects to them.
_LARGE = 4096


@dataclass
class Request:
    """What was asked, and how much was sent."""

    method: str
    path: str
    range: str | None
    token: str | None
    sent: int = 0


@dataclass
class StandInHub:
    """What is on the stand-in, how it misbehaves, and what it was asked.

    Attributes:
        address: Where it listens, for HF_ENDPOINT.
        repositories: Commit -> the folder with its files, by the id of the repository; the last is `main`.
        gated: Repositories whose owners have to grant access.
        failures: Status codes with which the next requests are answered, one each, whatever they ask.
        cuts: How many of the next answers end after half of their bytes.
        requests: What was asked, in order.
    """

    address: str = ""
    repositories: dict[str, dict[str, Path]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    failures: list[int] = field(default_factory=list)
    cuts: int = 0
    requests: list[Request] = field(default_factory=list)
    ignores_ranges: bool = False

    def publish(self, repository: str, folder: Path) -> str:
        """Make the folder the `main` of the repository; return its commit."""
        commit = hashlib.sha1(f"{repository} {len(self.repositories.get(repository, {}))}".encode()).hexdigest()
        self.repositories.setdefault(repository, {})[commit] = folder
        return commit

    def asked(self, text: str = "") -> list[Request]:
        """The requests whose path holds the text."""
        return [request for request in self.requests if text in request.path]

    @property
    def sent(self) -> int:
        """How many bytes were sent in all."""
        return sum(request.sent for request in self.requests)

    def commit_of(self, repository: str, revision: str) -> str | None:
        commits = self.repositories[repository]
        return list(commits)[-1] if revision == "main" else revision if revision in commits else None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StandInHub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        request = Request(self.command, path, self.headers.get("Range"), self.headers.get("Authorization"))
        self.hub.requests.append(request)
        if self.hub.failures:
            status = self.hub.failures.pop(0)
            self._send(request, status, {"Retry-After": "0"} if status == 429 else {}, b"{}", body)
            return
        if stored := _STORED.fullmatch(path):
            file = self.hub.repositories[stored["repository"]][stored["commit"]] / stored["file"]
            self._send_file(request, file, stored["commit"], body)
            return
        match = _LIST.fullmatch(path) or _RESOLVE.fullmatch(path)
        if match is None:
            self._send(request, 404, {}, b"", body)
            return
        repository = match["repository"]
        if repository not in self.hub.repositories:
            self._refuse(request, 401, "RepoNotFound", "Repository not found")
            return
        if repository in self.hub.gated:
            self._refuse(request, 403, "GatedRepo", f"Access to model {repository} is restricted.")
            return
        commit = self.hub.commit_of(repository, match["revision"])
        if commit is None:
            self._refuse(request, 404, "RevisionNotFound", f"Invalid rev id: {match['revision']}")
            return
        folder = self.hub.repositories[repository][commit]
        if match.re is _LIST:
            files = sorted(p for p in folder.rglob("*") if p.is_file())
            siblings = [{"rfilename": p.relative_to(folder).as_posix(), "size": p.stat().st_size} for p in files]
            listed = {"id": repository, "sha": commit, "siblings": siblings, "lastModified": "2026-01-02T03:04:05.000Z"}
            self._send(request, 200, {"Content-Type": "application/json"}, json.dumps(listed).encode(), body)
            return
        file = folder / match["file"]
        if not file.is_file():
            self._refuse(request, 404, "EntryNotFound", "Entry not found")
        elif file.stat().st_size > _LARGE:
            size = str(file.stat().st_size)
            elsewhere = f"/stored/{repository}/{commit}/{match['file']}"
            headers = {"Location": elsewhere, "X-Linked-Size": size, "X-Linked-Etag": _etag(file)}
            self._send(request, 302, {**headers, "X-Repo-Commit": commit}, b"", body)
        else:
            self._send_file(request, file, commit, body)

    def _send_file(self, request: Request, file: Path, commit: str, body: bool) -> None:
        data = file.read_bytes()
        headers = {"ETag": _etag(file), "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        asked = _RANGE.fullmatch(request.range or "")
        if asked is None or self.hub.ignores_ranges:
            self._send(request, 200, headers, data, body)
            return
        start, stop = int(asked[1]), int(asked[2] or len(data) - 1) + 1
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        self._send(request, 206, headers, data[start:stop], body)

    def _refuse(self, request: Request, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self._send(request, status, headers, json.dumps({"error": message}).encode(), request.method == "GET")

    def _send(self, request: Request, status: int, headers: Mapping[str, str], data: bytes, body: bool) -> None:
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not body:
            return
        if self.hub.cuts and len(data) > 1 and status in (200, 206):
            self.hub.cuts -= 1
            data = data[: len(data) // 2]
            self.close_connection = True
        request.sent += len(data)
        self.wfile.write(data)


def _etag(file: Path) -> str:
    return f'"{hashlib.sha256(file.read_bytes()).hexdigest()}"'


@contextmanager
def running() -> Iterator[StandInHub]:
    """A stand-in that answers on loopback within."""
    hub = StandInHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
