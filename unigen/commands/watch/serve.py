"""The page of ``unigen watch``, kept live on this machine alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from unigen.config import UserError

HOST = "127.0.0.1"


class PageServer(ThreadingHTTPServer):
    """Answers ``GET /`` with what ``render`` gives, which it calls once at a time; the browser asks again by
    itself.

    Only this machine reaches it, and only under its own names: another site's page, whose name was pointed
    here, gets nothing. Port 0 is one that is free; the browser asks again after ``seconds``.

    Raises:
        UserError: the port cannot be had.
    """

    daemon_threads = True

    def __init__(self, port: int, seconds: float, render: Callable[[], bytes]):
        self.render, self.seconds, self.one = render, seconds, threading.Lock()
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"port {port} of {HOST} cannot be had ({reason}). Fix: --port 0 for one that is free"
            ) from None

    @property
    def address(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    server_version, sys_version = "unigen", ""
    timeout = 30  # of a request that does not come to its end

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        port = self.server.server_address[1]
        if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):
            self.send_error(403, "this page is for this machine alone")
            return
        if self.path.partition("?")[0] != "/":
            self.send_error(404)
            return
        with self.server.one:
            page = self.server.render()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Refresh", f"{self.server.seconds:g}")
        self.end_headers()
        if body:
            self.wfile.write(page)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: the page is asked for every few seconds."""
