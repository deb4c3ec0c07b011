"""Pictures from the web: no address that only this machine can reach, whoever asks in whatever way."""

from __future__ import annotations

import contextlib
import http.server
import socket
import threading
import time

import pytest

from crosstrim.errors import InputError
from crosstrim.server import fetch

PUBLIC = "93.184.215.14"
NOT_PUBLIC = [
    "127.0.0.1",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "0.0.0.0",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::1",
    "::",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "fe80::1%eth0",
    "fc00::1",
    "ff02::1",
    "64:ff9b::7f00:1",
    "2002:7f00:1::",
    "2001:0:7f00:1::",
    "2001:db8::1",
]


class Pages(http.server.BaseHTTPRequestHandler):
    """Answers by path."""

    seen: list[tuple[str, str]] = []  # noqa: RUF012
    dripped: list[bytes] = []  # noqa: RUF012

    def do_GET(self):
        self.seen.append((self.headers["Host"], self.path))
        kind, _, rest = self.path[1:].partition("/")
        if kind == "to":
            self.send_response(302)
            self.send_header("Location", rest)
            self.end_headers()
        elif kind == "bytes":
            self.send_response(200)
            self.send_header("Content-Length", rest)
            self.end_headers()
            self.wfile.write(b"x" * int(rest))
        elif kind == "chunks":  # no length is announced
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"x" * int(rest))
        elif kind == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"x" * 10)
        elif kind == "drip":
            self.send_response(200)
            self.end_headers()
            self.drip()
        elif kind == "drip-head":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
            self.drip()
        else:
            self.send_error(404)

    def drip(self):
        for _ in range(200):
            self.wfile.write(b"x")
            self.dripped.append(b"x")
            time.sleep(0.05)

    def log_message(self, *args):
        pass

    def handle(self):
        with contextlib.suppress(OSError):  # the client has had enough
            super().handle()


@pytest.fixture
def web(monkeypatch):
    """A web in which names resolve as told, and every public address leads to a server of this test."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    Pages.seen, Pages.dripped = [], []
    names = {"pictures.example": [[PUBLIC]]}
    connected = []

    def resolve(host, port, **options):
        if host not in names:
            raise socket.gaierror("no such name")
        answers = names[host]
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    def counted(address, timeout=None):
        connected.append(address)
        assert address[0] == PUBLIC, f"connected to {address}"
        made = socket.socket()
        made.settimeout(timeout)
        made.connect(server.server_address)
        return made

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "create_connection", counted)
    yield names, connected
    server.shutdown()
    server.server_close()


def test_a_public_picture_is_fetched(web):
    assert fetch.fetch("http://pictures.example/bytes/100", 100) == b"x" * 100
    assert fetch.fetch("http://pictures.example:81/chunks/100", 100) == b"x" * 100
    assert Pages.seen == [("pictures.example", "/bytes/100"), ("pictures.example:81", "/chunks/100")]
    assert web[1] == [(PUBLIC, 80), (PUBLIC, 81)]


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_a_name_of_an_address_that_is_not_public(web, address):
    names, connected = web
    names["evil.example"] = [[address]]
    names["mixed.example"] = [[PUBLIC, address]]
    for host in ("evil.example", "mixed.example"):
        with pytest.raises(InputError, match="not on the public internet"):
            fetch.fetch(f"http://{host}/", 100)
    assert connected == []


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_a_redirect_to_an_address_that_is_not_public(web, address):
    names, connected = web
    names["evil.example"] = [[address]]
    with pytest.raises(InputError, match="not on the public internet"):
        fetch.fetch("http://pictures.example/to/http://evil.example/", 100)
    assert len(connected) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "2130706433", "0x7f.1", "localhost"])
def test_an_address_in_the_place_of_a_name(host):
    """With the system's own resolver, which knows more ways to write an address than one thinks of."""
    with pytest.raises(InputError, match=r"not on the public internet|cannot be found"):
        fetch.fetch(f"http://{host}:9/", 100)


def test_a_name_that_changes_its_address_after_the_check_gains_nothing(web):
    names, connected = web
    names["rebind.example"] = [[PUBLIC], ["127.0.0.1"]]
    assert fetch.fetch("http://rebind.example/bytes/3", 100) == b"xxx"
    assert connected == [(PUBLIC, 80)]
    names["rebind.example"] = [[PUBLIC], ["127.0.0.1"]]
    with pytest.raises(InputError, match="not on the public internet"):
        fetch.fetch("http://rebind.example/to/http://rebind.example/", 100)


def test_redirects_are_followed_and_counted(web):
    hop = "http://pictures.example/to/"
    assert fetch.fetch(hop * 3 + "http://pictures.example/bytes/3", 100) == b"xxx"
    assert fetch.fetch(hop + "/bytes/4", 100) == b"xxxx"
    with pytest.raises(InputError, match="redirects more than 3 times"):
        fetch.fetch(hop * 4 + "http://pictures.example/bytes/3", 100)


@pytest.mark.parametrize("page", ["bytes/101", "chunks/101", "bytes/100000000"])
def test_a_picture_that_is_too_large_is_not_read_to_its_end(web, page):
    with pytest.raises(InputError, match="more than 100 bytes"):
        fetch.fetch(f"http://pictures.example/{page}", 100)


@pytest.mark.parametrize("page", ["drip/", "drip-head/"])
def test_a_server_that_drips_is_left(web, page):
    with pytest.raises(InputError, match=r"took too long|could not be read"):
        fetch.fetch(f"http://pictures.example/{page}", 100, seconds=0.3)
    assert 0 < len(Pages.dripped) < 100, "it was read to its end"


def test_an_answer_that_breaks_off_is_no_picture(web):
    with pytest.raises(InputError, match="broke off"):
        fetch.fetch("http://pictures.example/cut/", 1000)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("file:///etc/passwd", r"must be http\(s\)"),
        ("ftp://pictures.example/", r"must be http\(s\)"),
        ("http://user:word@pictures.example/", "without a user name"),
        ("http:///nothing", r"must be http\(s\)"),
        ("http://pictures.example:99999/", r"must be http\(s\)"),
        ("http://pictures.example/a b", "percent-encoded"),
        ("http://pictures.example/\r\nX: y", "percent-encoded"),
        ("http://nowhere.example/", "cannot be found"),
        ("http://pictures.example/nothing", "answered 404"),
        ("http://pictures.example/to/file:///etc/passwd", r"must be http\(s\)"),
    ],
)
def test_other_addresses_are_refused(web, url, words):
    with pytest.raises(InputError, match=words):
        fetch.fetch(url, 100)


def test_https_checks_the_certificate_against_the_name(web):
    with pytest.raises(InputError, match="SSL"):
        fetch.fetch("https://pictures.example/bytes/3", 100)
