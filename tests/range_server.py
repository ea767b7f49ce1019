"""HTTP server of a folder with range requests, slow, unreliable, or with files that change."""

from __future__ import annotations

import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


class RangeServer(ThreadingHTTPServer):
    """Serves the files below ``folder``.

    Attributes:
        url: address of the folder.
        requests: pairs of method and range, in order.
        sent_bytes: bytes of content sent.
        delay_s: wait before each answer.
        trouble: called with method, path and the number of earlier requests; returns None for a normal answer,
            ``drop`` to close the connection, ``cut`` to close it after half of the content, ``hang``, or an HTTP
            status.
        ignores_ranges: answer every request with the whole file.
    """

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = Path(folder)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.delay_s, self.ignores_ranges = 0.0, False
        self.trouble = lambda method, path, count: None
        self.lock = threading.Lock()
        self.reset()

    def reset(self):
        self.requests, self.sent_bytes = [], 0

    def handle_error(self, request, client_address):
        """Say nothing: clients are expected to go away."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(b"")

    def do_GET(self):
        self.answer(None)

    def answer(self, content):
        server = self.server
        path = unquote(self.path).lstrip("/")
        with server.lock:
            count = len(server.requests)
            server.requests.append((self.command, self.headers.get("Range")))
        time.sleep(server.delay_s)
        trouble = server.trouble(self.command, path, count)
        if trouble in ("drop", "hang"):
            time.sleep(60 if trouble == "hang" else 0)
            self.close_connection = True
            return
        file = server.folder / path
        if isinstance(trouble, int) or not file.is_file():
            self.send_response(trouble if isinstance(trouble, int) else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        found = file.stat()
        size = found.st_size
        begin, end, status = 0, size, 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if wanted and not server.ignores_ranges:
            begin, end, status = int(wanted[1]), min(size, int(wanted[2]) + 1), 206
            if begin >= size:
                self.send_response(416)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
        self.send_response(status)
        self.send_header("ETag", f'"{found.st_mtime_ns:x}-{size:x}"')
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        if content is None:
            with file.open("rb") as opened:
                opened.seek(begin)
                part = opened.read(end - begin)
            if trouble == "cut":
                part = part[: len(part) // 2]
                self.close_connection = True
            self.wfile.write(part)
            with server.lock:
                server.sent_bytes += len(part)


@contextmanager
def serving(folder):
    """Yield a server that runs in a thread."""
    server = RangeServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
