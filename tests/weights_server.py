"""A local server of files that resumes, cuts connections and fails, for tests of downloads."""

from __future__ import annotations

import contextlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Serves `files` (path -> content); `ranges` are the Range headers of the requests so far.

    cut: a connection ends after so many bytes; None: never.
    knows_ranges: whether it sends parts of files.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.ranges: list[str | None] = []
        self.cut: int | None = None
        self.knows_ranges = True

    def address(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, given = self.server, self.headers.get("Range")
        server.ranges.append(given)
        content = server.files.get(self.path)
        if content is None:
            return self.send_error(404)
        start = int(given.removeprefix("bytes=").removesuffix("-")) if given else 0
        if given and server.knows_ranges:
            if start >= len(content):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            content = content[start:]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: server.cut])

    def log_message(self, *_args):
        pass


@contextlib.contextmanager
def serving():
    """Run a `Server` in a thread."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
