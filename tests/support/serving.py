"""A directory served over HTTP, by a server that can break off, be slow, and lie."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any


@dataclass
class Served:
    """What the server was asked (`asked`: path and Range), and how it is to behave.

    Files whose path contains `cut` break off after `after` bytes; answers take `delay` seconds;
    `ranges` says whether a part of a file can be had. `listing` stands in for every directory's.
    """

    url: str = ""
    cut: str = ""
    after: int = 0
    delay: float = 0.0
    ranges: bool = True
    listing: str = ""
    user: str = ""
    asked: list[tuple[str, str]] = field(default_factory=list)


class _Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, *args: Any, served: Served, **kwargs: Any) -> None:
        self._served = served
        super().__init__(*args, **kwargs)

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        served, wanted = self._served, self.headers.get("Range", "")
        served.asked.append((self.path, wanted))
        time.sleep(served.delay)
        path = Path(self.translate_path(self.path))
        if served.user and "Authorization" not in self.headers:
            self.send_error(401)
        elif path.is_dir() and served.listing:
            self._send(200, served.listing.encode(), {"Content-Type": "text/html"})
        elif not path.is_file():
            super().do_GET()
        else:
            self._send_file(path, wanted if served.ranges else "")

    def _send_file(self, path: Path, wanted: str) -> None:
        data = path.read_bytes()
        if not wanted:
            self._send(200, data, {})
            return
        start = int(wanted.removeprefix("bytes=").partition("-")[0])
        if start >= len(data):
            self.send_error(416)
            return
        where = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._send(206, data[start:], {"Content-Range": where})

    def _send(self, code: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self._served.cut and self._served.cut in self.path:
            data = data[: self._served.after]
            self.close_connection = True
        self.wfile.write(data)


@contextmanager
def serving(directory: Path) -> Iterator[Served]:
    """Serves `directory` on a port of this machine while the block runs."""
    served = Served()
    handler = partial(_Handler, served=served, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        served.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()
