"""Fetch a picture from the web without being led to addresses that only this machine can reach."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from urllib.parse import SplitResult, urljoin, urlsplit

from crosstrim.errors import InputError

MAX_REDIRECTS = 3
SECONDS = 10.0
"""For a fetch in all, redirects included."""

_REDIRECTS = (301, 302, 303, 307, 308)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def fetch(url: str, max_bytes: int, seconds: float = SECONDS) -> bytes:
    """The content at an http or https address.

    The host's every address is checked, the connection goes to an address that was checked and not to the name
    again, and each redirect is checked anew. Proxies of the environment are not used.

    Args:
        url: the address.
        max_bytes: of the content.
        seconds: that it may take in all, beside the name's resolution.

    Raises:
        InputError: the address is not public, or the content is too large, too slow, or not there.
    """
    deadline = time.monotonic() + seconds
    for _ in range(MAX_REDIRECTS + 1):
        content, url = _get(_parsed(url), url, max_bytes, max(0.001, deadline - time.monotonic()))
        if content is not None:
            return content
    raise InputError(f"the picture's address redirects more than {MAX_REDIRECTS} times; give the last one.")


def public_addresses(host: str, port: int) -> list[str]:
    """The addresses of a host, all of them public.

    Raises:
        InputError: it has none, or one that is not public.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise InputError(f"the host of the picture's address, {host}, cannot be found.") from error
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if not addresses or not all(map(_is_public, addresses)):
        raise InputError(f"the picture's address leads to {host}, which is not on the public internet.")
    return addresses


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return _is_public(str(ip.ipv4_mapped))
        if ip.sixtofour is not None or ip.teredo is not None or ip in _NAT64:
            return False  # these carry an IPv4 address, and could lead anywhere
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def _parsed(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        port_is_valid = parts.port != 0
    except ValueError:
        port_is_valid = False
    if not port_is_valid or parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise InputError("the picture's address must be http(s)://host/path, without a user name.")
    if any(ord(character) <= 32 or ord(character) >= 127 for character in url):
        raise InputError("the picture's address holds characters that must be percent-encoded.")
    return parts


def _get(parts: SplitResult, url: str, max_bytes: int, seconds: float) -> tuple[bytes | None, str]:
    """The content, or where it went."""
    host, port = str(parts.hostname), parts.port or (443 if parts.scheme == "https" else 80)
    connection = _Pinned(host, port, public_addresses(host, port)[0], parts.scheme == "https", seconds)
    # A timeout of the socket counts from the last byte; this one ends a server that drips.
    timer = threading.Timer(seconds, connection.abort)
    timer.daemon = True
    timer.start()
    try:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers={"Accept": "image/*", "User-Agent": "crosstrim"})
        response = connection.getresponse()
        if response.status in _REDIRECTS and response.headers["Location"]:
            return None, urljoin(url, response.headers["Location"])
        if response.status != 200:
            raise InputError(f"the picture's address answered {response.status}, where 200 was expected.")
        content = response.read(max_bytes + 1)
        if connection.aborted or (response.length and len(content) <= max_bytes):
            raise InputError("the picture's address broke off, or took too long.")
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"the picture's address could not be read in {SECONDS:g} seconds ({type(error).__name__})."
        ) from error
    finally:
        timer.cancel()
        connection.close()
    if len(content) > max_bytes:
        raise InputError(f"the picture's file has more than {max_bytes} bytes, which is the limit; make it smaller.")
    return content, url


class _Pinned(http.client.HTTPConnection):
    """A connection to an address that was checked; the name serves for the header and the certificate alone."""

    def __init__(self, host: str, port: int, address: str, secure: bool, seconds: float) -> None:
        super().__init__(host, port, timeout=seconds)
        self.default_port = 443 if secure else 80  # so that the Host header names no usual port
        self._address = address
        self._secure = secure
        self._open: socket.socket | None = None  # `sock` is gone as soon as an answer without a length is read
        self.aborted = False

    def connect(self) -> None:
        self.sock = self._open = socket.create_connection((self._address, self.port), self.timeout)
        if self._secure:
            # The handshake comes once `abort` can reach the socket that it goes over.
            secure = ssl.create_default_context().wrap_socket(
                self.sock, server_hostname=self.host, do_handshake_on_connect=False
            )
            self.sock = self._open = secure
            secure.do_handshake()
        if self.aborted:
            raise TimeoutError

    def abort(self) -> None:
        """Make whatever waits for this connection fail."""
        self.aborted = True
        if self._open is not None:
            with contextlib.suppress(OSError):
                self._open.shutdown(socket.SHUT_RDWR)
