"""Bytes from the network, one picture at a time: the only file that opens a socket.

A name is resolved once, every address it has must be one that ``addresses.py`` lets pass, and the connection
goes to exactly the address that was checked: a name server that answers differently the second time is never
asked a second time. All of it has one deadline, and no answer is read beyond its cap. ``command.py`` is the
command on top.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import ipaddress
import queue
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urljoin

from unigen.commands.fetch.addresses import IP, FetchError, Network, Target, masked, parse_url, why_refused
from unigen.version import __version__

BACK_OFF = 1.0  # seconds before the first retry; doubled for each one after it
_FRAMING = 8 << 20  # bytes that headers and chunk marks may take besides the picture
_REDIRECTS = (301, 302, 303, 307, 308)


def lookup(host: str, port: int) -> list[str]:
    """The addresses of a name, in the system's order of preference. Raises OSError."""
    return list(
        dict.fromkeys(str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    )


@dataclass(frozen=True)
class Client:
    """Fetches pictures within limits, which ``FetchOptions`` explains; safe to share between threads.
    Proxies, cookies and passwords of the environment are not used. ``resolve`` gives the addresses of host
    and port."""

    max_bytes: int = 32 << 20
    timeout: float = 60.0
    connect_timeout: float = 10.0
    max_redirects: int = 0
    retries: int = 3
    allowed: tuple[Network, ...] = ()
    resolve: Callable[[str, int], list[str]] = lookup
    tls: ssl.SSLContext = field(default_factory=ssl.create_default_context)

    def get(self, url: str) -> bytes:
        """The bytes behind ``url``, whatever they are.

        Raises:
            FetchError: The address is refused, or there is no whole answer within the limits.
        """
        deadline, attempt = time.monotonic() + self.timeout, 0
        while True:
            try:
                return self._follow(parse_url(url), deadline)
            except FetchError as error:
                wait = BACK_OFF * 2**attempt * random.uniform(0.5, 1.5) if error.wait is None else error.wait
                if not error.retry or attempt == self.retries or time.monotonic() + wait >= deadline:
                    raise
            time.sleep(wait)
            attempt += 1

    def _follow(self, target: Target, deadline: float) -> bytes:
        for hop in range(self.max_redirects + 1):
            try:
                answer = self._ask(target, deadline)
            except FetchError as error:
                if hop:
                    error.problem = f"after a redirect to {masked(str(target))}: {error.problem}"
                raise
            if isinstance(answer, bytes):
                return answer
            target = answer
        problem = f"more than {self.max_redirects} redirects, the last one to {masked(str(target))}"
        if self.max_redirects == 0:
            problem = f"it is a redirect to {masked(str(target))}"
        fix = (
            "write the final address into the data, or allow more with --max_redirects"
            f" {self.max_redirects + 3}"
        )
        raise FetchError("redirect", problem, fix)

    def _ask(self, target: Target, deadline: float) -> bytes | Target:
        """The body, or the target of a redirect."""
        with self._explained(target), closing(self._connect(target, deadline)) as connection:
            request = (
                f"GET {target.path} HTTP/1.1\r\nHost: {target.authority}\r\nUser-Agent:"
                f" unigen/{__version__}\r\nAccept: image/*, */*;q=0.1\r\nAccept-Encoding:"
                " identity\r\nConnection: close\r\n\r\n"
            )
            connection.settimeout(_left(deadline))
            connection.sendall(request.encode("ascii"))
            wire: Any = _Wire(connection, deadline, self.max_bytes + _FRAMING)
            with http.client.HTTPResponse(wire, method="GET") as response:
                response.begin()
                if wire.ended:  # for http.client the end of the connection ends a head as well
                    raise http.client.IncompleteRead(b"")
                location = response.headers.get("Location")
                if response.status in _REDIRECTS and location is not None:
                    return _redirect(target, location)
                _check_head(response, self.max_bytes)
                return self._read(response)

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        parts, size = [], 0
        while part := response.read(1 << 16):
            size += len(part)
            if size > self.max_bytes:
                raise _too_large(f"it is longer than {self.max_bytes:,} bytes")
            parts.append(part)
        if response.length:
            raise _lost(f"the connection was closed {response.length:,} bytes before the end")
        return b"".join(parts)

    def _connect(self, target: Target, deadline: float) -> socket.socket:
        """A connection to the first of the checked addresses that accepts one."""
        last: OSError = OSError("the name has no address")
        for ip in self._addresses(target, deadline):
            left = _left(deadline)
            try:
                return self._open(ip, target, min(self.connect_timeout, left))
            except ssl.SSLError:
                raise
            except OSError as error:
                last = error
        problem = f"no connection to {target.host} port {target.port} ({last.strerror or last})"
        fix = "check the address; run the command again later"
        raise FetchError("no_connection", problem, fix, retry=True) from last

    def _open(self, ip: IP, target: Target, timeout: float) -> socket.socket:
        connection = socket.socket(socket.AF_INET6 if ip.version == 6 else socket.AF_INET, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout)
            connection.connect((str(ip), target.port))  # a literal address: nothing is resolved again
            secure = target.scheme == "https"
            return self.tls.wrap_socket(connection, server_hostname=target.host) if secure else connection
        except BaseException:
            connection.close()
            raise

    def _addresses(self, target: Target, deadline: float) -> list[IP]:
        """The addresses of the target's host, all of them checked: one that is refused spoils them all."""
        try:
            found = [ipaddress.ip_address(target.host)]
        except ValueError:
            found = [ipaddress.ip_address(text) for text in self._resolved(target, deadline)]
        for ip in found:
            if special := why_refused(ip, self.allowed):
                named = str(ip) != target.host
                where = f"{target.host} is {ip}, {special}" if named else f"{ip} is {special}"
                fix = f"for a server you trust, --allow_network {ip}/{ip.max_prefixlen}"
                raise FetchError("refused_address", where, fix)
        return found

    def _resolved(self, target: Target, deadline: float) -> list[str]:
        """``resolve`` in a thread of its own, as a name server that does not answer would outlast every
        deadline."""
        answers: queue.SimpleQueue[list[str] | Exception] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answers.put(self.resolve(target.host, target.port))
            except Exception as error:
                answers.put(error)

        threading.Thread(target=ask, daemon=True).start()
        try:
            answer = answers.get(timeout=_left(deadline))
        except queue.Empty:
            raise TimeoutError from None
        if isinstance(answer, list):
            return answer
        again = isinstance(answer, socket.gaierror) and answer.errno == socket.EAI_AGAIN
        problem = f"the name {target.host} cannot be resolved ({getattr(answer, 'strerror', None) or answer})"
        fix = "check the address, and that this machine is online"
        raise FetchError("unknown_host", problem, fix, retry=again) from answer

    @contextmanager
    def _explained(self, target: Target) -> Iterator[None]:
        """Turns what sockets, TLS and HTTP raise into a FetchError."""
        try:
            yield
        except TimeoutError:
            problem = f"{target.host} took longer than {self.timeout:g} s"
            raise FetchError("timeout", problem, "run the command again later, or raise --timeout") from None
        except ssl.SSLCertVerificationError as error:
            fix = "use a server whose certificate is valid; SSL_CERT_FILE names further authorities to trust"
            raise FetchError("bad_certificate", f"{target.host}: {error.verify_message}", fix) from None
        except ssl.SSLEOFError:
            raise _lost(f"{target.host} closed the connection") from None
        except ssl.SSLError as error:
            problem = f"TLS with {target.host} fails ({error.reason or error})"
            raise FetchError("bad_answer", problem, "check scheme and port") from None
        except _TooMuch as error:
            raise _too_large(f"it is longer than {error} bytes") from None
        except (http.client.IncompleteRead, ConnectionError) as error:
            raise _lost(f"{target.host} closed the connection early ({type(error).__name__})") from None
        except http.client.HTTPException as error:
            why = type(error).__name__
            problem = f"{target.host} does not answer in HTTP/1.x ({why}: {masked(str(error), 80)})"
            raise FetchError("bad_answer", problem, "check scheme and port") from None
        except OSError as error:
            raise _lost(f"{target.host}: {error.strerror or error}") from None


class _TooMuch(Exception):  # not a ValueError, which http.client would catch
    pass


class _Wire(io.RawIOBase):
    """What ``http.client`` reads from: every single read ends by the deadline, and all of them together at
    the cap.

    The cap lies below the HTTP parser on purpose: a chunk of length -1 makes it read without any limit of its
    own.
    """

    def __init__(self, connection: socket.socket, deadline: float, cap: int):
        self._connection, self._deadline, self._cap, self._seen = connection, deadline, cap, 0
        self.ended = False

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(self, 1 << 16)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connection.settimeout(_left(self._deadline))
        count = self._connection.recv_into(buffer)
        self._seen += count
        self.ended = count == 0
        if self._seen > self._cap:
            raise _TooMuch(f"{self._cap:,}")
        return count


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _redirect(target: Target, location: str) -> Target:
    """Where a redirect leads; its address is as little trusted as the first one."""
    with contextlib.suppress(UnicodeError):
        location = location.encode("latin-1").decode("utf-8")  # http.client reads headers as Latin-1
    try:
        # urljoin would drop some of these, and fill in a missing host
        if re.search(r"[\x00-\x20\x7f-\x9f\\]|^[^/?#]*:", location):
            return parse_url(location)
        return parse_url(urljoin(str(target), location))
    except (FetchError, ValueError) as error:
        why = getattr(error, "problem", error)
        problem = f"it is a redirect to {masked(location)}, which is refused ({why})"
        raise FetchError("redirect", problem, "write an address without redirects into the data") from None


def _check_head(response: http.client.HTTPResponse, max_bytes: int) -> None:
    """Raises FetchError unless the head promises a picture as it is, of a size that is allowed."""
    status = response.status
    if status != 200:
        again = status == 429 or 500 <= status <= 599
        fix = "run the command again later" if again else "check the address"
        wait = response.headers.get("Retry-After", "").strip()
        seconds = float(wait) if re.fullmatch(r"[0-9]{1,6}", wait) else None
        words = f"the server answers {status} {masked(response.reason, 60)}".rstrip()
        raise FetchError(f"http_{status}", words, fix, retry=again, wait=seconds)
    for name, plain in (
        ("Content-Encoding", ("", "identity")),
        ("Transfer-Encoding", ("", "identity", "chunked")),
    ):
        coding = response.headers.get(name, "").strip().lower()
        if coding not in plain:
            fix = "name a server that sends the picture as it is; it was asked not to compress"
            raise FetchError("encoded", f"the answer has {name} {masked(coding, 60)}", fix)
    if response.length is not None and response.length > max_bytes:
        raise _too_large(f"it has {response.length:,} bytes, more than {max_bytes:,}")


def _lost(problem: str) -> FetchError:
    return FetchError("connection_lost", problem, "run the command again later", retry=True)


def _too_large(problem: str) -> FetchError:
    return FetchError("too_large", problem, "scale the picture down, or raise --max_bytes")
