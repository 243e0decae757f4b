"""Which addresses a picture may be fetched from: addresses parsed strictly, and the networks that nothing is
fetched from.

An address in a data set was written by somebody else. Whatever two parsers could read differently is refused
here, so that the host that is checked is the host that is asked.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Any, NamedTuple
from urllib.parse import quote

import idna

from unigen.config import UserError
from unigen.printing import printable

IP = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

MAX_LENGTH = 8192  # characters of an address

# The special-purpose registries of IANA, spelt out: what Python's `is_private` and `is_global` mean has
# changed between versions.
_SPECIAL_4 = {
    "169.254.169.254/32": "the metadata service of a cloud",
    "0.0.0.0/8": "an unspecified address",
    "10.0.0.0/8": "a private address",
    "100.64.0.0/10": "a carrier-grade NAT address",
    "127.0.0.0/8": "a loopback address",
    "169.254.0.0/16": "a link-local address",
    "172.16.0.0/12": "a private address",
    "192.0.0.0/24": "a protocol assignment",
    "192.0.2.0/24": "an address for documentation",
    "192.88.99.0/24": "a 6to4 relay",
    "192.168.0.0/16": "a private address",
    "198.18.0.0/15": "an address for benchmarks",
    "198.51.100.0/24": "an address for documentation",
    "203.0.113.0/24": "an address for documentation",
    "224.0.0.0/4": "a multicast address",
    "240.0.0.0/4": "a reserved address",
}
_SPECIAL_6 = {
    "::/128": "an unspecified address",
    "::1/128": "a loopback address",
    "::/96": "an IPv4-compatible address",
    "64:ff9b::/96": "a NAT64 address",
    "64:ff9b:1::/48": "a NAT64 address",
    "100::/64": "a discard address",
    "2001::/32": "a Teredo address",
    "2001::/23": "a protocol assignment",
    "2001:db8::/32": "an address for documentation",
    "2002::/16": "a 6to4 address",
    "3fff::/20": "an address for documentation",
    "fd00:ec2::254/128": "the metadata service of a cloud",
    "fc00::/7": "a unique local address",
    "fe80::/10": "a link-local address",
    "fec0::/10": "a site-local address",
    "ff00::/8": "a multicast address",
}
_SPECIAL: list[tuple[Network, str]] = [
    (ipaddress.ip_network(net), name) for net, name in (_SPECIAL_4 | _SPECIAL_6).items()
]
_GLOBAL_6 = ipaddress.IPv6Network("2000::/3")


class FetchError(UserError):
    """A picture that could not be fetched: a stable ``reason`` (the table in ``docs/fetch.md``), the problem,
    and the fix.

    ``retry`` says that another attempt may succeed, after ``wait`` seconds where the server named a time.
    """

    def __init__(self, reason: str, problem: str, fix: str, retry: bool = False, wait: float | None = None):
        self.reason, self.problem, self.fix, self.retry, self.wait = reason, problem, fix, retry, wait
        super().__init__(reason)

    def __str__(self) -> str:
        return f"{self.reason}: {self.problem}. Fix: {self.fix}"


class Target(NamedTuple):
    """A parsed address. ``host`` is lower-case ASCII (a name or an IP address, without brackets), ``path``
    includes the query."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """Host and port as the ``Host`` header has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.scheme == "https" else 80) else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.path}"


# ---- addresses


def masked(url: str, most: int = 200) -> str:
    """``url`` for messages: user information hidden, nothing unprintable, at most ``most`` characters."""
    url = re.sub(r"^([\x00-\x20]*[a-zA-Z][\w+.-]*:[/\\]{0,9})[^/?#]*@", r"\1***@", url)
    url = printable(url[: most + 1])
    return url if len(url) <= most else url[: most - 3] + "..."


def parse_url(text: str) -> Target:
    """The parts of an ``http`` or ``https`` address; whatever two parsers could read differently is refused.

    Raises:
        FetchError: ``bad_address``, ``refused_scheme`` or ``credentials``.
    """
    scheme, colon, rest = text.partition(":")
    scheme = scheme.lower()
    if colon and scheme not in ("http", "https") and re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme):
        fix = "only http and https are fetched; save the picture as a file and name that file"
        raise FetchError("refused_scheme", f"the scheme is {masked(scheme, 20)}:", fix)
    if len(text) > MAX_LENGTH:
        raise _bad(f"it has {len(text):,} characters, more than {MAX_LENGTH:,}")
    if control := re.search(r"[\x00-\x20\x7f-\x9f\\]", text):
        code = ord(control[0])
        fix = f"write it as %{code:02X} if it belongs there" if code < 0x80 else "take it out"
        raise _bad(f"it holds the character U+{code:04X} at position {control.start() + 1}", fix)
    if scheme not in ("http", "https"):
        raise _bad("it does not start with http:// or https://")
    match = re.fullmatch(r"//([^/?#]*)([^?#]*)(\?[^#]*)?(?:#.*)?", rest, re.DOTALL)
    if match is None:
        raise _bad(f"after {scheme}: there must be two slashes and a host")
    authority, path, query = match[1], match[2] or "/", match[3] or ""
    if "@" in authority:
        fix = "take the part before the @ out; files that need a password must be downloaded by hand"
        raise FetchError("credentials", "it carries a user name or password", fix)
    host, port = _host_and_port(authority)
    try:
        path = quote(path, safe="/%:@!$&'()*+,;=~") + quote(query, safe="/%:@!$&'()*+,;=~?")
    except UnicodeEncodeError:
        raise _bad("it holds half of a surrogate pair", "write the character itself") from None
    return Target(scheme, host, int(port) if port else (443 if scheme == "https" else 80), path)


def _host_and_port(authority: str) -> tuple[str, str]:
    match = re.fullmatch(r"(\[[^\]]*\]|[^:\[\]]*)(?::([0-9]{0,5}))?", authority)
    if match is None:
        raise _bad(f"{masked(authority)!r} is not a host with an optional port")
    host, port = match[1], match[2] or ""
    if port and not 1 <= int(port) <= 65535:
        raise _bad(f"the port {port} is not between 1 and 65535")
    if not host:
        raise _bad("it names no host")
    if host.startswith("["):
        try:
            ip = ipaddress.IPv6Address(host[1:-1])
        except ValueError:
            raise _bad(f"{masked(host)} is not an IPv6 address") from None
        if "%" in host:
            problem = f"{masked(host)} names a zone, which means something on one machine only"
            raise _bad(problem, "take the zone out")
        return str(ip), port
    return _name(host), port


def _name(host: str) -> str:
    """A host name in lower-case ASCII. A spelling of an IPv4 address that is not four plain decimal numbers
    is refused."""
    if not host.isascii():
        try:
            host = idna.encode(host, uts46=True, std3_rules=True).decode()
        except (idna.IDNAError, UnicodeError) as error:
            raise _bad(f"{masked(host)!r} is not a valid international name ({error})") from None
    host = host.lower().removesuffix(".")
    if len(host) > 253 or not all(re.fullmatch(r"[a-z0-9_-]{1,63}", label) for label in host.split(".")):
        raise _bad(f"{masked(host)!r} is not a host name")
    # then resolvers take it for a number, not for a name
    if re.fullmatch(r"[0-9]+|0x[0-9a-f]*", host.rpartition(".")[2]):
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError:
            fix = "write the name, or the address as four decimal numbers"
            raise _bad(f"{host} is an odd spelling of an IPv4 address", fix) from None
    return host


def _bad(problem: str, fix: str = "correct the address") -> FetchError:
    return FetchError("bad_address", problem, fix)


def why_refused(ip: IP, allowed: tuple[Network, ...] = ()) -> str | None:
    """What is wrong with connecting to ``ip``, in words; None for a public address and for one inside
    ``allowed``.

    An IPv4 address inside an IPv6 one (mapped, NAT64, 6to4, Teredo) must pass as well, also when the outer
    one is allowed.
    """
    for one in _meant(ip):
        if any(one in net for net in allowed):
            continue
        special = next((name for net, name in _SPECIAL if one in net), None)
        if special is None and one.version == 6 and one not in _GLOBAL_6:
            special = "a reserved address"
        if special is not None:
            return special if one == ip else f"{special} ({one}) inside it"
    return None


def _meant(ip: IP) -> list[IP]:
    """``ip`` and the IPv4 addresses that a packet to it may end at. A mapped one is nothing but its IPv4
    address."""
    if isinstance(ip, ipaddress.IPv4Address):
        return [ip]
    if ip.ipv4_mapped is not None:
        return [ip.ipv4_mapped]
    inner: list[Any] = [ip.sixtofour, *(ip.teredo or ())]
    if any(ip in ipaddress.IPv6Network(net) for net in ("64:ff9b::/96", "64:ff9b:1::/96")):
        inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
    return [ip, *(one for one in inner if one is not None)]
