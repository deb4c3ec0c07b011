"""Addresses that a server of ours listens on."""

from __future__ import annotations

import socket

from crosstrim.errors import EngineError


def listen(host: str, port: int) -> socket.socket:
    """A socket on the address.

    Args:
        host: a name, or an address of IPv4 or IPv6.
        port: 0 takes a free one.

    Raises:
        EngineError: it cannot be listened on, for example because somebody does.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise EngineError(
            f"{host}:{port} cannot be listened on ({error}); choose another --host or --port."
        ) from error


def url(host: str, port: int) -> str:
    """Where a browser or a client finds it."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"
