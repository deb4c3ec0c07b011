"""Routes of OpenAI's and Ollama's APIs that make no sense here."""

from __future__ import annotations

import httpx2 as httpx
import pytest


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/v1/completions", "send the prompt as a user's message to /v1/chat/completions."),
        ("/v1/responses", "send the same messages to /v1/chat/completions."),
        ("/v1/embeddings", "makes no embeddings"),
        ("/api/embed", "makes no embeddings"),
        ("/api/embeddings", "makes no embeddings"),
        ("/api/pull", "neither fetches, changes nor deletes models"),
        ("/api/push", "start `crosstrim serve --model`"),
        ("/api/create", "start `crosstrim serve --model`"),
        ("/api/copy", "start `crosstrim serve --model`"),
        ("/api/delete", "start `crosstrim serve --model`"),
        ("/api/blobs/sha256:00", "start `crosstrim serve --model`"),
    ],
)
def test_what_is_not_served_is_refused_with_a_remedy(server, path, words):
    method = "DELETE" if path == "/api/delete" else "POST"
    reply = httpx.request(method, server.url + path, content=b"{" * 1000)
    error = reply.json()["error"]
    assert (reply.status_code, words in (error if path.startswith("/api") else error["message"])) == (404, True)
