"""The server in this process."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable

from crosstrim import addresses
from crosstrim.asking.loading import load
from crosstrim.errors import EngineError, MissingExtraError
from crosstrim.server.settings import Settings


def serve_here(settings: Settings, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Load the model and serve it until a signal ends the process.

    A signal lets the requests in flight end before, while new ones get 503.

    Args:
        settings: what to serve.
        host: the address to listen on.
        port: the port; 0 takes a free one.
        ready: called with the server's URL once the model is loaded, by a thread.

    Raises:
        MissingExtraError: FastAPI or uvicorn is not installed.
        EngineError: the address cannot be listened on, or the thread that owns the model ended.
        CrosstrimError: the model cannot be loaded.
    """
    try:
        importlib.import_module("uvicorn")  # the modules below may be there from before
        from crosstrim.server.app import build
        from crosstrim.server.front import Front
        from crosstrim.server.listening import Server
        from crosstrim.server.log import lines
        from crosstrim.server.service import Service
    except ImportError as error:
        raise MissingExtraError(
            f"serving needs {error.name}, which is not installed: pip install 'crosstrim[serve]'."
        ) from error
    listening = addresses.listen(host, port)
    with listening, lines(settings.log):
        address = url(host, listening.getsockname()[1])
        front = Front()

        def begin() -> None:
            try:
                loaded = load(
                    settings.model,
                    dtype=settings.dtype,
                    device_map=settings.device,
                    quantization=settings.quantization,
                )
                service = Service(*loaded, settings)
                front.hand_on(build(service, settings), service)
                ready(address)
            except BaseException as error:  # of a thread, which nobody would see; it is raised below
                front.failure = error

        threading.Thread(target=begin, name="crosstrim-load", daemon=True).start()
        Server(front, settings).run(sockets=[listening])
    if front.failure is not None:
        raise front.failure
    if front.service is not None and front.service.failure is not None:
        raise EngineError(
            "the thread that owns the model ended, as the log says; start the server again."
        ) from front.service.failure


def url(host: str, port: int) -> str:
    """Where clients find the server."""
    return f"{addresses.url(host, port)}v1"
