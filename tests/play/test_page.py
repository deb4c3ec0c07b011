"""Requests that no page sends: what a stranger may write by hand."""

from __future__ import annotations

import json
from types import SimpleNamespace

import httpx
import pytest

from crosstrim.errors import InputError
from crosstrim.play.page import Page

pytestmark = pytest.mark.play

SOMEWHERE = "http://pictures.example/cat.png"


def answered(client, number, values):
    """What the page's server says to one event."""
    session = f"stranger-{number}"
    join = {"data": values, "fn_index": number, "session_hash": session}
    client.post("gradio_api/queue/join", json=join).raise_for_status()
    with client.stream("GET", "gradio_api/queue/data", params={"session_hash": session}) as told:
        for line in told.iter_lines():
            if line.startswith("data:") and "process_completed" in line:
                return json.loads(line[5:])["output"]
    return pytest.fail("the event was never completed")


@pytest.mark.parametrize("path", ["/etc/hostname", "../../etc/hostname", SOMEWHERE])
def test_only_what_was_uploaded_is_opened(served, path):
    page = Page(served.playground, "mini")
    with pytest.raises(InputError, match="this picture was not uploaded here"):
        page._upload(SimpleNamespace(session_hash="stranger"), {"path": path})


def test_no_event_fetches_what_it_is_given(served, reached):
    file = {"path": SOMEWHERE, "url": SOMEWHERE, "orig_name": "cat.png", "meta": {"_type": "gradio.FileData"}}
    with httpx.Client(base_url=served.url, timeout=60) as client:
        events = client.get("config").json()["dependencies"]
        said = [answered(client, event["id"], [file] * len(event["inputs"])) for event in events if event["inputs"]]
    assert len(said) >= 6
    assert "Traceback" not in json.dumps(said)
    assert reached == []


def test_the_watch_would_tell(reached):
    with pytest.raises(httpx.HTTPError):
        httpx.get(SOMEWHERE).raise_for_status()
    assert reached
    reached.clear()
