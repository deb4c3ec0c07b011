"""The page on an address, with a model behind it. Nothing leaves the machine, and nothing is fetched from outside."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosstrim import addresses
from crosstrim.asking.loading import load
from crosstrim.errors import MissingExtraError
from crosstrim.play.state import Playground

if TYPE_CHECKING:
    from fastapi import FastAPI

MAX_FILE_BYTES = 64 << 20
"""Of an uploaded picture's file. Its pixels are limited as in `crosstrim ask`."""

# A browser that obeys this fetches nothing from elsewhere, whatever a model writes into its answer. Gradio's page has
# scripts and styles of its own within its HTML.
_POLICY = (
    b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    b"img-src 'self' data: blob:; font-src 'self' data:; form-action 'self'; base-uri 'self'; object-src 'none'"
)
_HERE = Path(__file__).parent


def serve(
    model: str,
    *,
    host: str,
    port: int,
    ready: Callable[[str], None],
    max_new_tokens: int = 64,
    dtype: str | None = None,
    device: str | None = None,
    quantization: str | None = None,
) -> None:
    """Load a model and show the page until a signal ends the process.

    Args:
        model: as `crosstrim.load` takes it.
        host: the address to listen on.
        port: the port; 0 takes a free one.
        ready: called with the page's URL once the model is loaded.
        max_new_tokens: where answers are cut off.
        dtype: as `crosstrim.load` takes it.
        device: likewise, by the name `device_map`.
        quantization: likewise.

    Raises:
        MissingExtraError: Gradio is not installed.
        EngineError: the address cannot be listened on.
        CrosstrimError: the model cannot be loaded.
    """
    _check_installed()
    with addresses.listen(host, port) as listening:
        loaded = load(model, dtype=dtype, device_map=device, quantization=quantization)
        playground = Playground(*loaded, max_new_tokens=max_new_tokens)
        try:
            app = build(playground, model)
            ready(addresses.url(host, listening.getsockname()[1]))
            run(app, listening)
        finally:
            playground.close()


def build(playground: Playground, model: str) -> FastAPI:
    """The page as an application.

    Args:
        playground: what answers.
        model: what the model is called; of a folder the last part alone is shown.

    Raises:
        MissingExtraError: Gradio is not installed.
    """
    _check_installed()
    import fastapi
    import gradio as gr

    from crosstrim.play.page import Page

    name = Path(model).expanduser().resolve().name if Path(model).expanduser().is_dir() else model
    app: FastAPI = gr.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        Page(playground, name).blocks,
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=MAX_FILE_BYTES,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        theme=_theme(),
        css_paths=_HERE / "page.css",
        js=(_HERE / "page.js").read_text(encoding="utf-8"),
    )
    app.add_middleware(_Closed)
    return app


def _theme() -> Any:
    """Fonts that every system has, and colours that can be read."""
    import gradio as gr

    theme = gr.themes.Default(
        primary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    fill = {f"button_primary_background_fill{mode}": "*primary_700" for mode in ("", "_dark")}
    hover = {f"button_primary_background_fill_hover{mode}": "*primary_800" for mode in ("", "_dark")}
    return theme.set(body_text_color_subdued="*neutral_500", **fill, **hover)


def run(app: FastAPI, listening: socket.socket) -> None:
    """Serve on a socket until a signal comes, which is raised again at the end."""
    import uvicorn

    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listening])


class _Closed:
    """Tells the browser to fetch nothing from elsewhere."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_on(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY)]
            await send(message)

        await self._app(scope, receive, send_on)


def _check_installed() -> None:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"the playground needs {error.name}, which is not installed: pip install 'crosstrim[play]'."
        ) from error
