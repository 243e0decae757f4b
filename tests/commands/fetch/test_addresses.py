"""Addresses: read one way only, and no way to a network that is not public."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unigen.commands.fetch.addresses import FetchError, masked, parse_url, why_refused

READ = {
    "http://example.org": "http://example.org/",
    "HTTP://EXAMPLE.org/A?b=C#d": "http://example.org/A?b=C",
    "https://example.org:443/a": "https://example.org/a",
    "https://example.org:8443/a": "https://example.org:8443/a",
    "http://example.org:/a": "http://example.org/a",
    "http://example.org./a": "http://example.org/a",
    "http://example.org?a": "http://example.org/?a",
    "http://example.org/图 片.png".replace(" ", "%20"): "http://example.org/%E5%9B%BE%20%E7%89%87.png",
    "http://bücher.example/a": "http://xn--bcher-kva.example/a",
    "http://faß.example/a": "http://xn--fa-hia.example/a",
    "http://ｅｘａｍｐｌｅ。org/a": "http://example.org/a",
    "http://93.184.216.34/a": "http://93.184.216.34/a",
    "http://[2606:2800:220:1:0:0:0:1]:81/a": "http://[2606:2800:220:1::1]:81/a",
    "http://my_bucket.example.org/@a/b@c;d,e+f/(g)": "http://my_bucket.example.org/@a/b@c;d,e+f/(g)",
    "http://example.org/a|b<c>": "http://example.org/a%7Cb%3Cc%3E",
    "http://example.org/100%": "http://example.org/100%",
}
REFUSED = {
    "bad_address": [
        "http:///x.png", "http://", "http:/x.png", "http:x.png", "http://:80/x", "http://?x", "http://.",
        "http://a..b/x", "http://.a/x",
        "http://a.b:0/", "http://a.b:65536/", "http://a.b:8o/", "http://a.b:1:2/", "http://a.b:+80/", "http://a.b:٨٠/",
        "http://2130706433/", "http://0x7f000001/", "http://0x7f.1/", "http://0177.0.0.1/", "http://127.1/",
        "http://127.0.1/", "http://0/",
        "http://127.0.0.1.1/", "http://256.0.0.1/", "http://127.0.0.0x1/", "http://00000177.0.0.1/",
        "http://１２７.1/", "http://0x/", "http://1e3.1/",
        "http://%31%32%37.0.0.1/", "http://127.0.0.1%2fa/", "http://loc%61lhost/", "http://a%00.b/",
        "http://[::1", "http://::1/", "http://[::1]x/", "http://[fe80::1%eth0]/", "http://[fe80::1%25eth0]/",
        "http://[1.2.3.4]/", "http://[v1.a]/",
        "http://a.b\\@127.0.0.1/", "http:\\\\127.0.0.1\\x", "http://a.b/x\\y", "http://a b/x",
        "http://a.b/x y",
        " http://a.b/", "http://a.b/ ",
        "http://a\tb/", "ht\ntp://a.b/", "http://a.b/\r\nHost: c", "http://a.b/\x00", "http://a.b/\x7f",
        "\thttp://a.b/", "http://a.b/\u0085",
        "http://a.b/\ud800", "http://\ud800.b/", "http://" + "a" * 64 + ".b/", "http://" + "a." * 127 + "b/",
        "http://a.b/" + "x" * 8192,
        "http://a!b/", "http://a,b/", "http://exa\u200bmple.org\u2044x/", "http://*.b/", "http://<a>/",
         "//a.b/x", "x.png", "",
    ],
    "refused_scheme": [
        "file:///etc/passwd", "FILE:///etc/passwd", "ftp://a.b/x", "data:image/png;base64,AAAA",
        "gopher://a.b/", "s3://bucket/x", "gs://b/x",
        "javascript:alert(1)", "httpx://a.b/", "ws://a.b/", "unix:/run/x.sock", "dict://a.b:11211/",
        "data:" + "A" * 20_000, "view-source:http://a.b",
    ],
    "credentials": ["http://a@127.0.0.1/", "http://u:p@a.b/", "http://@a.b/", "http://a.b@c.d@e.f/",
    "http://a.b:80@127.0.0.1:80/", "http://u%40@a.b/"],
}  # fmt: skip


@pytest.mark.parametrize(("text", "target"), READ.items(), ids=lambda text: ascii(text)[:40])
def test_a_plain_address_is_read(text, target):
    assert str(parse_url(text)) == target
    assert parse_url(target) == parse_url(text), "the written form must read as the same target"


@pytest.mark.parametrize(
    ("reason", "text"),
    [(reason, text) for reason, texts in REFUSED.items() for text in texts],
    ids=lambda text: ascii(text)[:40],
)
def test_an_odd_address_is_refused_by_name(reason, text):
    with pytest.raises(FetchError) as caught:
        parse_url(text)
    assert caught.value.reason == reason
    assert (
        caught.value.problem
        and caught.value.fix
        and len(str(caught.value)) < 500
        and str(caught.value).isprintable()
    )


@pytest.mark.slow
@given(
    st.text(max_size=30)
    | st.text("htp:/\\@[]%.0123456789xa\t\n#?", max_size=30).map(lambda text: "http://" + text)
)
def test_whatever_is_read_is_ascii_without_controls_and_reads_again_as_itself(text):
    try:
        target = parse_url(text)
    except FetchError:
        return
    assert str(target).isascii() and str(target).isprintable() and " " not in str(target)
    assert not set(target.host) & set("@/\\?#%[]") and target.path.startswith("/")
    assert parse_url(str(target)) == target


PUBLIC = [
    "1.1.1.1",
    "93.184.216.34",
    "172.15.255.255",
    "172.32.0.0",
    "100.63.255.255",
    "100.128.0.0",
    "169.253.1.1",
    "192.0.3.1",
    "223.255.255.255",
]
PUBLIC += ["2606:4700::1111", "2a00:1450:4001::1", "::ffff:1.1.1.1", "2400::1"]
SPECIAL = {
    "loopback": ["127.0.0.1", "127.255.255.254", "::1", "::ffff:127.0.0.1"],
    "private": [
        "10.0.0.1",
        "10.255.255.255",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.1.1",
        "::ffff:10.0.0.1",
    ],
    "link-local": ["169.254.0.1", "fe80::1", "febf::1", "fe80::1%eth0"],
    "metadata": ["169.254.169.254", "fd00:ec2::254", "::ffff:169.254.169.254"],
    "unspecified": ["0.0.0.0", "0.1.2.3", "::"],
    "carrier-grade": ["100.64.0.1", "100.127.255.255"],
    "multicast": ["224.0.0.1", "239.255.255.255", "ff02::1"],
    "reserved": ["240.0.0.1", "255.255.255.255", "4000::1", "5f00::1", "200::1", "1::1"],
    "documentation": ["192.0.2.1", "198.51.100.1", "203.0.113.1", "2001:db8::1", "3fff::1"],
    "benchmarks": ["198.18.0.1", "198.19.255.255"],
    "protocol": ["192.0.0.8", "2001:2::1", "2001:10::1"],
    "NAT64": ["64:ff9b::7f00:1", "64:ff9b::a00:1", "64:ff9b::1.1.1.1", "64:ff9b:1::a00:1"],
    "6to4": ["2002:7f00:1::", "2002:a00:1::1", "2002:101:101::", "192.88.99.1"],
    "Teredo": ["2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:0:7f00:1::"],
    "IPv4-compatible": ["::127.0.0.1", "::10.0.0.1", "::1.1.1.1"],
    "unique local": ["fc00::1", "fdff::1"],
    "site-local": ["fec0::1"],
    "discard": ["100::1"],
}


@pytest.mark.parametrize("text", PUBLIC)
def test_a_public_address_passes(text):
    assert why_refused(ipaddress.ip_address(text)) is None


@pytest.mark.parametrize(
    ("word", "text"), [(word, text) for word, texts in SPECIAL.items() for text in texts]
)
def test_a_special_address_is_refused_in_words(word, text):
    assert word in why_refused(ipaddress.ip_address(text))


@given(st.ip_addresses())
def test_nothing_passes_that_python_knows_to_be_special(ip):
    if why_refused(ip) is None:
        judged = getattr(ip, "ipv4_mapped", None) or ip
        assert judged.is_global and not (
            judged.is_private
            or judged.is_loopback
            or judged.is_link_local
            or judged.is_multicast
            or judged.is_reserved
        )


def test_an_allowed_network_lets_its_own_addresses_pass_and_no_others():
    def refused(text, *networks):
        return why_refused(
            ipaddress.ip_address(text), tuple(ipaddress.ip_network(network) for network in networks)
        )

    assert refused("10.1.2.3", "10.1.0.0/16") is None and refused("10.2.0.1", "10.1.0.0/16")
    assert refused("::ffff:10.1.2.3", "10.1.0.0/16") is None
    assert refused("64:ff9b::1.1.1.1", "64:ff9b::/96") is None
    assert "loopback address (127.0.0.1) inside" in refused("64:ff9b::127.0.0.1", "64:ff9b::/96")
    assert "private address (10.0.0.1) inside" in refused("2002:a00:1::1", "2002::/16")
    assert refused("64:ff9b::10.1.2.3", "64:ff9b::/96", "10.1.0.0/16") is None
    assert refused("127.0.0.1", "::/0") and refused("::1", "0.0.0.0/0")


def test_messages_hide_passwords_and_escape_what_cannot_be_printed():
    assert masked("http://user:secret@a.b/x@y?z=1") == "http://***@a.b/x@y?z=1"
    assert masked("http:\\\\user:secret@a.b") == "http:\\\\***@a.b" and "secret" not in masked(
        "\thttp:user:secret@a.b/"
    )
    assert masked("http://a.b/@x/1@2") == "http://a.b/@x/1@2"
    assert masked("http://a/\n\x1b[31m\u202e\ud800") == "http://a/\\n\\x1b[31m\\u202e\\ud800"
    assert len(masked("http://a/" + "x" * 1000)) == 200 and len(masked("http://a/" + "\n" * 1000)) == 200
    assert masked("http:" + "\\" * 1_000_000).endswith("...")
