"""A playground on mini, served by this process, and a headless browser that keeps an eye on what leaves it."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import crosstrim
from crosstrim.play.state import Playground
from tests.support import tower

# `make test-play` has Gradio and Playwright; the other environments have not.
collect_ignore = (
    []
    if importlib.util.find_spec("gradio") and importlib.util.find_spec("playwright")
    else ["test_browser.py", "test_page.py"]
)

CHROMIUM = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
CHROMIUM += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
PATIENCE = 60_000  # ms, on a machine that is busy


@dataclass
class Served:
    """What runs behind the page, counted."""

    url: str
    playground: Playground
    passes: list[int]
    generated: list[int] = field(default_factory=list)

    def forget_counts(self) -> None:
        self.passes.clear()
        self.generated.clear()


def is_local(address: Any) -> bool:
    """Whether an address that a socket is given stays on this machine."""
    host = address[0] if isinstance(address, tuple) else address
    return host in ("127.0.0.1", "::1", "localhost", None) or not isinstance(address, tuple)


@pytest.fixture(scope="session")
def reached() -> list[Any]:
    """Addresses elsewhere that this process, the server within, looked up or connected to."""
    found: list[Any] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.connect" and not is_local(arguments[1]):
            found.append(arguments[1])
        if event == "socket.getaddrinfo" and not is_local((arguments[0],)):
            found.append(arguments[0])

    sys.addaudithook(watch)
    return found


@pytest.fixture(scope="session")
def served(reached: list[Any]) -> Iterator[Served]:
    import uvicorn

    from crosstrim.play import serving

    model, processor = crosstrim.load("mini")
    playground = Playground(model, processor, max_new_tokens=16)
    limit, serving.MAX_FILE_BYTES = serving.MAX_FILE_BYTES, 1 << 20
    app = serving.build(playground, "mini")
    serving.MAX_FILE_BYTES = limit
    listening = socket.create_server(("127.0.0.1", 0))
    counting_passes = contextlib.ExitStack()
    passes = counting_passes.enter_context(tower.counted(model))
    running = Served(f"http://127.0.0.1:{listening.getsockname()[1]}/", playground, passes)
    generate = model.generate

    def counting(**options: Any) -> Any:
        running.generated.append(options["max_new_tokens"])
        return generate(**options)

    model.generate = counting
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield running
    server.should_exit = True
    thread.join(30)
    playground.close()
    counting_passes.close()
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=PATIENCE)
    program = shutil.which("chromium")
    assert program is not None, "there is no chromium; install Debian's: apt-get install chromium"
    with sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=program, args=CHROMIUM)
        yield running
        running.close()


@pytest.fixture
def visit(browser: Any, served: Served, reached: list[Any]) -> Iterator[Any]:
    """Open the page anew, once the example was answered; nothing may leave the machine, nor fail in the browser."""
    contexts, left, failed = [], [], []

    def visiting(**options: Any) -> Any:
        context = browser.new_context(**options)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        context.on("request", lambda request: None if is_ours(request.url) else left.append(request.url))
        page = context.new_page()
        page.on("response", lambda answer: failed.append(answer.url) if is_refusal(answer) else None)
        page.on("pageerror", lambda error: failed.append(str(error)))
        page.on("console", lambda message: failed.append(message.text) if is_failure(message) else None)
        page.goto(served.url)
        page.locator("#trimmed").wait_for()
        return page

    def is_ours(url: str) -> bool:
        return url.startswith((served.url, "data:", "blob:"))

    def is_refusal(answer: Any) -> bool:
        # On a busy machine Gradio's page may ask once more for a stream of which it was told everything.
        return answer.status >= 400 and not (answer.status == 404 and "/queue/data?" in answer.url)

    def is_failure(message: Any) -> bool:
        # Refusals are seen above, with their addresses.
        return message.type == "error" and not message.text.startswith(("Failed to load resource", "Response"))

    visiting.failed = failed
    yield visiting
    for context in contexts:
        context.close()
    assert (left, reached, failed) == ([], [], [])


@pytest.fixture
def page(visit: Any, served: Served) -> Any:
    """The page on a desk, with nothing counted yet."""
    opened = visit()
    served.forget_counts()
    return opened


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """One of mini's held-out pictures, as somebody's file."""
    from PIL import Image

    path = tmp_path / "my photo.png"
    Image.open(crosstrim.mini.heldout()[0]["image"]).save(path)
    return path
