"""A server on this machine that behaves as well or as badly as its path says."""

import io
import struct
import threading
import time
import zlib
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image


def picture(kind: str = "PNG", colour: int = 0, size: tuple[int, int] = (8, 6)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (colour % 256, colour // 256, 77)).save(file, kind)
    return file.getvalue()


PNG = picture()
HEAD = b"HTTP/1.1 200 OK\r\nConnection: close\r\n"
LENGTH = b"Content-Length: %d\r\n\r\n" % len(PNG)
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def png_of_size(width: int, height: int) -> bytes:
    """A PNG file that says it has this size and has next to nothing in it."""
    header = b"IHDR" + struct.pack(">II", width, height) + PNG[24:29]
    return PNG[:12] + header + struct.pack(">I", zlib.crc32(header)) + PNG[33:]


def status(line: str, *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {line}", *headers, "Content-Length: 0", "", ""]).encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def typed(kind: str, body: bytes) -> bytes:
    return HEAD + f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


# Path -> the whole answer, after which the connection is closed.
ANSWERS = {
    "/good.png": HEAD + LENGTH + PNG,
    "/good.jpg": typed("image/jpeg", picture("JPEG")),
    "/wrong-type.png": typed("text/html", PNG),
    "/no-type": HEAD + LENGTH + PNG,
    "/no-length": HEAD + b"\r\n" + PNG,
    "/http-1.0": b"HTTP/1.0 200 OK\r\n\r\n" + PNG,
    "/chunked": CHUNKED + chunk(PNG[:20]) + chunk(PNG[20:]) + b"0\r\n\r\n",
    "/chunk-extension": CHUNKED + b"%x;a=b\r\n%s\r\n0;c\r\nTrailer: 1\r\n\r\n" % (len(PNG), PNG),
    "/continue": b"HTTP/1.1 100 Continue\r\n\r\n" * 3 + HEAD + LENGTH + PNG,
    "/identity": HEAD + b"Content-Encoding: identity\r\n" + LENGTH + PNG,
    "/negative-length": HEAD + b"Content-Length: -5\r\n\r\n" + PNG,
    "/no-number-length": HEAD + b"Content-Length: many\r\n\r\n" + PNG,
    "/a?b=1&c=%20": HEAD + LENGTH + PNG,
    "/%E5%9B%BE.png?%E9%97%AE": HEAD + LENGTH + PNG,
    # refused
    "/404": status("404 Not Found"),
    "/403": status("403 Forbidden"),
    "/410": status("410 Gone"),
    "/204": status("204 No Content"),
    "/206": b"HTTP/1.1 206 Partial Content\r\n" + LENGTH + PNG,
    "/300": status("300 Multiple Choices", "Location: /good.png"),
    "/302-nowhere": status("302 Found"),
    "/401": status("401 Unauthorized", 'WWW-Authenticate: Basic realm="x"'),
    "/407": status("407 Proxy Authentication Required"),
    "/429": status("429 Too Many Requests"),
    "/500": status("500 Internal Server Error"),
    "/503": status("503 Service Unavailable"),
    "/429-for-an-hour": status("429 Too Many Requests", "Retry-After: 3600"),
    "/gzip": HEAD + b"Content-Encoding: gzip\r\n" + LENGTH + PNG,
    "/brotli": HEAD + b"Content-Encoding: br\r\n" + LENGTH + PNG,
    "/deflate-chunked": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + chunk(PNG) + b"0\r\n\r\n",
    "/short": HEAD + LENGTH + PNG[:-9],
    "/short-chunk": CHUNKED + b"%x\r\n%s" % (len(PNG), PNG[:-9]),
    "/no-last-chunk": CHUNKED + chunk(PNG),
    "/lying-length": HEAD + b"Content-Length: 99999999999\r\n\r\n" + PNG,
    "/bad-chunk": CHUNKED + b"zz\r\n" + PNG,
    "/nothing": b"",
    "/half-a-head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "/long-header": HEAD + b"X: " + b"a" * 100_000 + b"\r\n" + LENGTH + PNG,
    "/many-headers": HEAD + b"X: a\r\n" * 1000 + LENGTH + PNG,
    "/long-status": b"HTTP/1.1 200 " + b"a" * 100_000 + b"\r\n" + LENGTH + PNG,
    "/ssh": b"SSH-2.0-OpenSSH_9.6\r\n",
    "/http-2": b"HTTP/2 200\r\n\r\n" + PNG,
    "/binary": bytes(range(256)) * 4,
    # what is in the answer
    "/empty": typed("image/png", b""),
    "/page": typed("image/png", b"\n<!DOCTYPE html><html><body>Not here</body></html>"),
    "/svg": typed("image/svg+xml", b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>'),
    "/json": typed("image/png", b'{"error": "no such picture"}'),
    "/bomb": typed("image/png", png_of_size(60_000, 60_000)),
    "/cut-header": typed("image/png", PNG[:20]),
    "/damaged": typed("image/jpeg", picture("JPEG", size=(64, 64))[:-60]),
}
# Path -> where it leads.
REDIRECTS = {
    "/to-good": "/good.png",
    "/to-to-good": "/to-good",
    "/to-relative": "good.png",
    "/to-self": "/to-self",
    "/to-private": "http://10.0.0.1/x.png",
    "/to-metadata": "http://169.254.169.254/latest/meta-data/",
    "/to-name-inside": "http://inside.test/x.png",
    "/to-file": "file:///etc/passwd",
    "/to-user": "http://user:secret@pictures.test/x.png",
    "/to-odd": "http://0x7f.1/x.png",
    "/to-tab": "ht\ttp://10.0.0.1/",
    "/to-backslash": "http://pictures.test\\@10.0.0.1/",
    "/to-no-host": "http:///x.png",
}


SLOW = {
    "head": b"X: " + b"a" * 999,
    "body": b"\r\n" + PNG * 9,
    "chunk": b"Transfer-Encoding: chunked\r\n\r\n" + b"1" * 999,
}
# How an answer starts, and what then comes for ever.
ENDLESS = {
    "body": (HEAD + b"\r\n", bytes(65536)),
    "chunks": (CHUNKED, chunk(bytes(65536))),
    "negative-chunk": (CHUNKED + b"-1\r\n", bytes(65536)),
    "continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 99),
    "trailer": (CHUNKED + b"0\r\n", b"X: a\r\n" * 999),
}


class PictureServer:
    """Serves on 127.0.0.1 until :meth:`close`.

    Attributes:
        asked: How often each path was asked for.
        heads: The header lines of each request.
        gate: Paths under /gated/ wait for it.
        most: Most requests that were answered at one time.
    """

    def __init__(self, context=None):
        self.asked: Counter[str] = Counter()
        self.heads: list[str] = []
        self.gate, self.stopped = threading.Event(), threading.Event()
        self.now = self.most = 0
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                with server.lock:
                    server.now += 1
                    server.most = max(server.most, server.now)
                    server.asked[self.path] += 1
                    server.heads.append(str(self.headers))
                with suppress(OSError):  # the client has had enough, as it should
                    server.answer(self.path, self.wfile.write)
                with server.lock:
                    server.now -= 1
                self.close_connection = True

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, client_address):
                pass  # handshakes that the client breaks off

        self.httpd = Server(("127.0.0.1", 0), Handler)
        if context is not None:
            self.httpd.socket = context.wrap_socket(
                self.httpd.socket, server_side=True, do_handshake_on_connect=False
            )
        self.port = self.httpd.server_port
        threading.Thread(target=self.httpd.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.stopped.set()
        self.gate.set()
        self.httpd.shutdown()
        self.httpd.server_close()

    def url(self, path: str, host: str = "127.0.0.1", scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}{path}"

    def answer(self, path: str, send) -> None:
        first, _, rest = path[1:].partition("/")
        if path in ANSWERS:
            send(ANSWERS[path])
        elif path in REDIRECTS:
            send(status("302 Found", f"Location: {REDIRECTS[path]}"))
        elif first == "colour":
            send(typed("image/png", picture(colour=int(rest))))
        elif first == "gated":
            self.gate.wait(60)
            send(typed("image/png", picture(colour=int(rest))))
        elif first == "then-good":  # /then-good/500/2: the answer /500 two times, then a picture
            name, times = rest.split("/")
            send(ANSWERS[f"/{name}" if self.asked[path] <= int(times) else "/good.png"])
        elif first == "slow":
            send(HEAD)
            for byte in SLOW[rest]:
                send(bytes([byte]))
                if self.stopped.wait(0.05):
                    break
        elif first == "silent":
            self.stopped.wait(20)
        elif first == "resting":
            time.sleep(0.03)
            send(typed("image/png", PNG))
        else:
            self.endless(rest, send)

    def endless(self, what: str, send) -> None:
        start, piece = ENDLESS[what]
        send(start)
        while not self.stopped.is_set():
            send(piece)
