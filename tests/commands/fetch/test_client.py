"""One picture from a real server: whole or refused with a reason, within its limits, from the address that
was checked."""

import ipaddress
import shutil
import socket
import ssl
import subprocess
import time
import tracemalloc

import pytest
from picture_server import ANSWERS, PNG, PictureServer

from unigen.commands.fetch import client as fetch
from unigen.commands.fetch.addresses import FetchError
from unigen.commands.fetch.client import Client
from unigen.commands.fetch.store import picture_kind

TLS = ssl.create_default_context()
LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"),)
GOOD = [
    "/good.png",
    "/good.jpg",
    "/wrong-type.png",
    "/no-type",
    "/no-length",
    "/http-1.0",
    "/chunked",
    "/chunk-extension",
    "/continue",
    "/identity",
]
GOOD += [
    "/negative-length",
    "/no-number-length",
    "/a?b=1&c=%20",
    "/图.png?问",
    "/then-good/429/1",
    "/then-good/500/2",
    "/then-good/503/1",
]
GOOD += ["/then-good/short/1", "/then-good/nothing/2", "/then-good/short-chunk/1", "/resting/1"]
# Path -> the reason, a word of the problem, and how often the server is asked.
BAD = {
    "/404": ("http_404", "404 Not Found", 1),
    "/403": ("http_403", "403", 1),
    "/410": ("http_410", "410", 1),
    "/401": ("http_401", "401", 1),
    "/407": ("http_407", "407", 1),
    "/204": ("http_204", "204", 1),
    "/206": ("http_206", "206", 1),
    "/300": ("http_300", "300", 1),
    "/302-nowhere": ("http_302", "302", 1),
    "/429": ("http_429", "429", 3),
    "/500": ("http_500", "500", 3),
    "/503": ("http_503", "503", 3),
    "/then-good/500/9": ("http_500", "500", 3),
    "/429-for-an-hour": ("http_429", "429", 1),
    "/gzip": ("encoded", "Content-Encoding gzip", 1),
    "/brotli": ("encoded", "br", 1),
    "/deflate-chunked": ("encoded", "Transfer-Encoding gzip, chunked", 1),
    "/short": ("connection_lost", "9 bytes before the end", 3),
    "/short-chunk": ("connection_lost", "early", 3),
    "/no-last-chunk": ("connection_lost", "early", 3),
    "/bad-chunk": ("connection_lost", "early", 3),
    "/nothing": ("connection_lost", "early", 3),
    "/half-a-head": ("connection_lost", "early", 3),
    "/lying-length": ("too_large", "99,999,999,999 bytes", 1),
    "/endless/body": ("too_large", "300,000", 1),
    "/endless/chunks": ("too_large", "300,000", 1),
    "/endless/negative-chunk": ("too_large", "bytes", 1),
    "/endless/trailer": ("too_large", "bytes", 1),
    "/endless/continue": ("too_large", "bytes", 1),
    "/long-header": ("bad_answer", "LineTooLong", 1),
    "/many-headers": ("bad_answer", "headers", 1),
    "/long-status": ("bad_answer", "LineTooLong", 1),
    "/ssh": ("bad_answer", "BadStatusLine", 1),
    "/http-2": ("bad_answer", "HTTP/2", 1),
    "/binary": ("bad_answer", "BadStatusLine", 1),
    "/to-good": ("redirect", "/good.png", 1),
    "/to-private": ("redirect", "http://10.0.0.1/x.png", 1),
    "/to-file": ("redirect", "file:///etc/passwd", 1),
}
CONTENT = {
    "/empty": "empty",
    "/page": "html",
    "/svg": "not_a_picture",
    "/json": "not_a_picture",
    "/bomb": "huge_picture",
    "/cut-header": "broken_picture",
}


@pytest.fixture(autouse=True)
def small_frames(monkeypatch):
    monkeypatch.setattr(fetch, "_FRAMING", 1 << 20)


def client(**options) -> Client:
    return Client(
        **{"max_bytes": 300_000, "timeout": 10.0, "retries": 2, "allowed": LOOPBACK, "tls": TLS, **options}
    )


def refusal(client: Client, url: str) -> FetchError:
    with pytest.raises(FetchError) as caught:
        client.get(url)
    error = caught.value
    assert error.problem and error.fix and len(error.problem) < 700 and str(error).isprintable()
    return error


@pytest.mark.parametrize("path", GOOD)
def test_a_good_answer_gives_the_whole_picture(server, path):
    data = client().get(server.url(path))
    assert picture_kind(data, deep=True) == ("jpg" if path.endswith("jpg") else "png")
    assert data == PNG or path.endswith("jpg")


@pytest.mark.parametrize("path", BAD)
def test_a_bad_answer_is_refused_with_its_reason(server, path):
    reason, word, times = BAD[path]
    before = server.asked[path]
    error = refusal(client(), server.url(path))
    assert (error.reason, server.asked[path] - before) == (reason, times) and word in error.problem


@pytest.mark.parametrize("path", CONTENT)
def test_what_is_no_picture_is_told_by_its_bytes(server, path):
    with pytest.raises(FetchError) as caught:
        picture_kind(client().get(server.url(path)))
    assert caught.value.reason == CONTENT[path]


def test_every_answer_of_the_server_is_in_a_test():
    named = {*GOOD, *BAD, *CONTENT, "/damaged", "/%E5%9B%BE.png?%E9%97%AE"}
    assert sorted(set(ANSWERS) - named) == [] and len(named) >= 60


@pytest.mark.parametrize("path", ["/slow/head", "/slow/body", "/slow/chunk", "/silent"])
def test_a_slow_server_is_left_at_the_deadline(server, path):
    start = time.monotonic()
    assert refusal(client(timeout=0.4), server.url(path)).reason == "timeout"
    assert time.monotonic() - start < 2


@pytest.mark.slow
def test_waits_and_retries_end_by_the_deadline_as_well(server, monkeypatch):
    monkeypatch.setattr(fetch, "BACK_OFF", 0.2)
    start = time.monotonic()
    assert refusal(client(timeout=1.0, retries=1000), server.url("/500")).reason == "http_500"
    assert time.monotonic() - start < 2


def test_an_endless_answer_is_not_kept_in_memory(server):
    tracemalloc.start()
    try:
        for path in ("/endless/body", "/endless/negative-chunk", "/lying-length"):
            refusal(client(max_bytes=1_000_000), server.url(path))
        assert tracemalloc.get_traced_memory()[1] < 40e6
    finally:
        tracemalloc.stop()


def test_the_largest_picture_allowed_passes_and_a_byte_more_does_not(server):
    for path in ("/good.png", "/chunked", "/no-length"):
        assert client(max_bytes=len(PNG)).get(server.url(path)) == PNG
        assert refusal(client(max_bytes=len(PNG) - 1), server.url(path)).reason == "too_large"


def test_the_request_says_the_host_and_no_secrets(server, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/")
    client(resolve=lambda host, port: ["127.0.0.1"]).get(server.url("/good.png", "PICTURES.test"))
    head = server.heads[-1].lower()
    assert f"host: pictures.test:{server.port}\n" in head and "accept-encoding: identity" in head
    assert not any(word in head for word in ("cookie", "authorization", "referer", "proxy"))


# Redirects


@pytest.mark.parametrize(
    ("path", "most", "reason", "word"),
    [
        ("/to-to-good", 1, "redirect", "more than 1 redirects"),
        ("/to-self", 5, "redirect", "more than 5 redirects"),
        (
            "/to-private",
            5,
            "refused_address",
            "after a redirect to http://10.0.0.1/x.png: 10.0.0.1 is a private address",
        ),
        ("/to-metadata", 5, "refused_address", "metadata"),
        ("/to-name-inside", 5, "refused_address", "inside.test is 10.1.2.3"),
        ("/to-file", 5, "redirect", "the scheme is file:"),
        ("/to-user", 5, "redirect", "http://***@pictures.test/x.png"),
        ("/to-odd", 5, "redirect", "odd spelling"),
        ("/to-tab", 5, "redirect", "U+0009"),
        ("/to-backslash", 5, "redirect", "U+005C"),
        ("/to-no-host", 5, "redirect", "no host"),
    ],
)
def test_every_hop_is_checked_as_the_first_address_was(server, path, most, reason, word):
    error = refusal(client(max_redirects=most, resolve=lambda host, port: ["10.1.2.3"]), server.url(path))
    assert error.reason == reason and word in error.problem and "secret" not in str(error)


def test_redirects_are_followed_where_allowed(server):
    for path in ("/to-good", "/to-relative", "/to-to-good"):
        assert client(max_redirects=2).get(server.url(path)) == PNG


def test_a_refused_redirect_names_target_and_cure(server):
    error = refusal(client(), server.url("/to-good"))
    assert server.url("/good.png") in error.problem and "--max_redirects 3" in error.fix


# Names and addresses


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "[::ffff:127.0.0.1]",
        "10.0.0.1",
        "169.254.169.254",
        "[::1]",
        "[fe80::1]",
        "[64:ff9b::7f00:1]",
        "0.0.0.0",
    ],
)
def test_without_leave_nothing_inside_is_connected_to(server, monkeypatch, host):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("connected"))
    assert refusal(client(allowed=()), server.url("/good.png", host)).reason == "refused_address"


@pytest.mark.parametrize(
    "addresses",
    [["10.0.0.1"], ["1.1.1.1", "127.0.0.1"], ["2606:4700::1111", "::1"], ["fe80::1%lo"], ["::ffff:10.0.0.1"]],
)
def test_a_name_with_one_address_inside_is_refused_whole(monkeypatch, addresses):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("connected"))
    error = refusal(client(allowed=(), resolve=lambda host, port: addresses), "http://pictures.test/x.png")
    assert (
        error.reason == "refused_address"
        and f"pictures.test is {ipaddress.ip_address(addresses[-1])}" in error.problem
    )


def test_the_connection_goes_to_the_address_that_was_checked(server, monkeypatch):
    """A name server that answers with another address the second time is not asked a second time."""
    answers, connected = [["127.0.0.1"], ["10.0.0.1"], ["10.0.0.1"]], []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("resolved again"))
    connect = socket.socket.connect

    def seen(self, address):
        connected.append(address)
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", seen)
    assert (
        client(resolve=lambda host, port: answers.pop(0)).get(server.url("/good.png", "rebinding.test"))
        == PNG
    )
    assert len(answers) == 2 and connected == [("127.0.0.1", server.port)]


def test_a_retry_checks_again(server):
    """The second answer of the name server is an address inside, and the picture is refused: it is never
    asked for there."""
    answers = [["127.0.0.1"], ["10.0.0.1"]]
    error = refusal(client(resolve=lambda host, port: answers.pop(0)), server.url("/500", "rebinding.test"))
    assert error.reason == "refused_address" and answers == []


def test_the_next_address_is_tried_when_one_does_not_answer(server):
    # the server listens on the second alone
    found = client(resolve=lambda host, port: ["127.255.255.254", "127.0.0.1"])
    assert found.get(server.url("/good.png", "pictures.test")) == PNG


def test_a_name_that_does_not_resolve_and_a_port_without_server():
    def unknown(host, port):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    assert (
        "nowhere.test cannot be resolved (Name or service"
        in refusal(client(resolve=unknown), "http://nowhere.test/x").problem
    )
    assert refusal(client(resolve=lambda host, port: []), "http://nowhere.test/x").reason == "no_connection"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert refusal(client(), f"http://127.0.0.1:{port}/x").reason == "no_connection"


def test_a_name_server_that_never_answers_is_left_at_the_deadline():
    start = time.monotonic()
    assert (
        refusal(
            client(timeout=0.3, resolve=lambda host, port: time.sleep(5) or []), "http://slow.test/x"
        ).reason
        == "timeout"
    )
    assert time.monotonic() - start < 2


def test_the_systems_resolver_gives_plain_addresses():
    assert "127.0.0.1" in fetch.lookup("localhost", 80)


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl program to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    words = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj"
        " /CN=good.test"
    )
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    command = [*words.split(), "-addext", "subjectAltName=DNS:good.test", *files]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def secure(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    names = []
    context.sni_callback = lambda _, name, __: names.append(name)
    server = PictureServer(context)
    server.names = names
    yield server
    server.close()


@pytest.fixture
def trusting(certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert.pem"))
    return client(resolve=lambda host, port: ["127.0.0.1"], tls=ssl.create_default_context())


def test_tls_asks_for_the_name_and_checks_its_certificate(secure, trusting):
    assert trusting.get(secure.url("/good.png", "good.test", "https")) == PNG
    assert secure.names[-1] == "good.test"
    for host in ("other.test", "127.0.0.1"):
        error = refusal(trusting, secure.url("/good.png", host, "https"))
        assert error.reason == "bad_certificate" and "mismatch" in error.problem


def test_a_certificate_of_nobody_known_is_refused(secure):
    error = refusal(
        client(resolve=lambda host, port: ["127.0.0.1"]), secure.url("/good.png", "good.test", "https")
    )
    assert error.reason == "bad_certificate" and "self" in error.problem


def test_the_limits_hold_inside_tls(secure, trusting, server):
    for path in ("/short", "/endless/body", "/404"):
        assert refusal(trusting, secure.url(path, "good.test", "https")).reason == BAD[path][0]
    assert refusal(trusting, server.url("/good.png", "good.test", "https")).reason == "bad_answer"
    assert refusal(trusting, secure.url("/good.png", "good.test", "http")).reason in (
        "connection_lost",
        "bad_answer",
    )


def test_a_handshake_that_never_ends_is_left_at_the_deadline(certificate):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        start = time.monotonic()
        error = refusal(
            client(timeout=0.3, connect_timeout=0.2), f"https://127.0.0.1:{mute.getsockname()[1]}/x"
        )
        assert error.reason in ("timeout", "no_connection") and time.monotonic() - start < 2
