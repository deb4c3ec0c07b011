"""The server in this process."""

from __future__ import annotations

import socket
from collections.abc import Callable

from crosstrim.asking.loading import load
from crosstrim.errors import EngineError, MissingExtraError
from crosstrim.server.settings import Settings


def serve_here(settings: Settings, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Load the model and serve it until a signal ends the process.

    Args:
        settings: what to serve.
        host: the address to listen on.
        port: the port; 0 takes a free one.
        ready: called with the server's URL once it listens.

    Raises:
        MissingExtraError: FastAPI or uvicorn is not installed.
        EngineError: the address cannot be listened on.
        CrosstrimError: the model cannot be loaded.
    """
    try:
        import uvicorn

        from crosstrim.server.app import build
        from crosstrim.server.service import Service
    except ImportError as error:
        raise MissingExtraError(
            f"serving needs {error.name}, which is not installed: pip install 'crosstrim[serve]'."
        ) from error
    listening = _listen(host, port)
    with listening:
        service = Service(*load(settings.model, dtype=settings.dtype, device_map=settings.device), settings)
        config = uvicorn.Config(build(service, settings), log_level="warning", timeout_graceful_shutdown=5)
        ready(url(host, listening.getsockname()[1]))
        uvicorn.Server(config).run(sockets=[listening])


def url(host: str, port: int) -> str:
    """Where clients find the server."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise EngineError(
            f"{host}:{port} cannot be listened on ({error}); choose another --host or --port."
        ) from error
