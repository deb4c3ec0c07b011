"""The container's files, as far as they can be checked without a Docker engine."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from crosstrim.server import local
from tests.support.docs.pages import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())


def instruction(name):
    (found,) = re.findall(rf"^{name} (.*)$", DOCKERFILE, flags=re.MULTILINE)
    return found


@pytest.fixture
def served(monkeypatch):
    seen = []
    monkeypatch.setattr(local, "serve_here", lambda settings, host, port, ready: seen.append((settings, host, port)))
    return seen


@pytest.mark.parametrize("name", [None, *COMPOSE["services"]])
def test_the_command_is_one_that_serve_takes(run, served, monkeypatch, name):
    monkeypatch.delenv("CROSSTRIM_API_KEY", raising=False)
    command = json.loads(instruction("CMD")) if name is None else COMPOSE["services"][name]["command"]
    defaults = [re.sub(r"\$\{\w+:-(.*)\}", r"\1", word) for word in command]
    entry = json.loads(instruction("ENTRYPOINT"))
    assert run(*entry[1:], *defaults).code == 0
    ((settings, host, port),) = served
    assert (entry[0], host, str(port)) == ("crosstrim", "0.0.0.0", instruction("EXPOSE"))
    assert settings.model == ("meta-llama/Llama-3.2-11B-Vision-Instruct" if name == "server-cuda" else "mini")


def test_what_is_copied_exists_and_is_let_through():
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, flags=re.MULTILINE)
        for source in line.split()[:-1]
    }
    assert copied == let_through
    assert all((ROOT / name).exists() for name in copied)


def test_nobody_is_root_and_every_service_says_how_torch_is_built():
    assert not instruction("USER").startswith(("0", "root"))
    for name, service in COMPOSE["services"].items():
        assert service["build"]["args"]["DEVICE"] == ("cuda" if name == "server-cuda" else "cpu")
        assert service["read_only"] is True
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        # Longer than a request may take and the time that draining adds.
        assert int(service["stop_grace_period"].removesuffix("s")) > 120 + 5
