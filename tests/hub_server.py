"""As much of the Hugging Face hub's protocol as a download takes, over HTTP on this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "0123456789012345678901234567890123456789"


@dataclass
class Hub:
    """Folders by hub id, and what was asked for."""

    models: dict[str, Path]
    endpoint: str = ""
    downloaded: list[str] = field(default_factory=list)


@contextmanager
def hub(models: dict[str, Path]) -> Iterator[Hub]:
    """Serve folders as models while the context lasts; ``endpoint`` is for ``HF_ENDPOINT``."""
    served = Hub(models)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Nothing."""

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            parts = unquote(urlparse(self.path).path).strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                self.describe("/".join(parts[2:4]), is_tree=parts[4:5] == ["tree"])
            else:
                self.give(served.models.get("/".join(parts[:2])), "/".join(parts[4:]))

        def describe(self, hub_id: str, is_tree: bool) -> None:
            folder = served.models.get(hub_id)
            if folder is None:
                self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
                return
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            names = [str(path.relative_to(folder)) for path in files]
            tree = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": digest(path)}
                for name, path in zip(names, files, strict=True)
            ]
            info = {"id": hub_id, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            self.send(200, json.dumps(tree if is_tree else info).encode(), {"Content-Type": "application/json"})

        def give(self, folder: Path | None, name: str) -> None:
            if folder is None or not (folder / name).is_file():
                self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            if self.command == "GET":
                served.downloaded.append(name)
            headers = {"ETag": f'"{digest(folder / name)}"', "X-Repo-Commit": COMMIT}
            self.send(200, (folder / name).read_bytes(), headers)

        def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    served.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()


def digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
