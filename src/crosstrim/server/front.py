"""What answers while the model is being loaded, and hands on to the application afterwards."""

from __future__ import annotations

import asyncio

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from crosstrim.server.log import Access
from crosstrim.server.refusals import RETRY, Refusal
from crosstrim.server.service import Service

_LOADING = Refusal(503, "the model is being loaded; try again later.", "server_error", code="loading", headers=RETRY)


class Front:
    """ASGI application that is up before the model is.

    Attributes:
        service: the model at work, once it is.
        failure: why the model could not be loaded.
    """

    def __init__(self) -> None:
        self.service: Service | None = None
        self.failure: BaseException | None = None
        self._app: ASGIApp | None = None
        self._meanwhile = Access(_meanwhile)

    def hand_on(self, app: ASGIApp, service: Service) -> None:
        """Let `app` answer from now on; called by the thread that loads the model."""
        self._app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or hand on."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif self._app is not None:
            await self._app(scope, receive, send)
        else:
            await self._meanwhile(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        if self.service is not None:
            await asyncio.to_thread(self.service.close)  # it waits for the model's thread
        await send({"type": "lifespan.shutdown.complete"})


async def _meanwhile(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["path"] == "/health":
        await JSONResponse({"status": "ok"})(scope, receive, send)
        return
    await _LOADING.response(scope["path"])(scope, receive, send)
