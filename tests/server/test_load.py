"""The server as a program of its own: many clients at once, and memory that does not grow."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from crosstrim import TrimConfig
from tests.server.conftest import asking, expected, png

REQUESTS, CLIENTS = 200, 32
GROWTH_MIB = 30
PEAK_MIB = 1_500  # of two pictures of 32 million pixels, which take 20 bytes a pixel while they are decoded


@pytest.fixture(scope="module")
def program(checkpoint):
    """`crosstrim serve`, and its URL. The tests of one process share it."""
    command = [Path(sys.executable).with_name("crosstrim"), "serve", "--model", checkpoint, "--port", 0, "--json"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CROSSTRIM_API_KEY": "secret"}
    # A cache so small that it is full, and drops pictures, long before the end.
    command += ["--feature-cache-mib", 1, "--device", "cpu"]
    running = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, env=environment)
    line = running.stdout.readline()
    assert line, "the server ended before it listened"
    yield running, json.loads(line)["url"]
    running.terminate()
    assert running.wait(30) == 0 or running.returncode == -15
    running.stdout.close()


def resident_mib(process):
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def peak_mib(process):
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_two_hundred_requests_of_thirty_two_clients(program, checkpoint, loaded):
    import openai

    process, url = program
    client = openai.OpenAI(base_url=url, api_key="secret", max_retries=0, timeout=120)
    trims = [({}, TrimConfig(k=0.25)), ({"keep": 9}, TrimConfig(keep=9))]

    def ask(number):
        wanted, _ = trims[number % 2]
        reply = client.chat.completions.create(
            model=str(checkpoint),
            messages=asking(f"what about {number % 7}?", png(number % 80, tiles=1 + number % 2)),
            max_tokens=3 + number % 4,
            extra_body={"crosstrim": wanted},
        )
        return reply.choices[0].message.content, reply.usage.crosstrim

    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(ask, range(REQUESTS)))
        before = resident_mib(process)
        replies = list(clients.map(ask, range(REQUESTS)))
        after = resident_mib(process)
    for number in range(0, REQUESTS, 9):
        file = png(number % 80, tiles=1 + number % 2)
        alone = expected(loaded, f"what about {number % 7}?", file, trims[number % 2][1], 3 + number % 4)
        kept = {"visible": alone.report.visible, "kept": alone.report.kept}
        assert replies[number] == (alone.answer, kept), number
    assert len(replies) == REQUESTS
    assert after - before < GROWTH_MIB, f"{before:.0f} MiB before, {after:.0f} after"
    print(f"memory: {before:.1f} MiB after warm-up, {after:.1f} MiB at the end")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_the_memory_of_large_pictures_is_bounded_and_given_back(program, checkpoint):
    import openai

    process, url = program
    client = openai.OpenAI(base_url=url, api_key="secret", max_retries=0, timeout=600)

    file = io.BytesIO()
    Image.new("RGB", (6400, 5000)).save(file, "PNG")

    def ask(number):
        messages = asking(f"what about {number}?", file.getvalue())
        assert client.chat.completions.create(model=str(checkpoint), messages=messages, max_tokens=2).choices

    idle, after = peak_mib(process), []
    with ThreadPoolExecutor(4) as clients:
        for _ in range(3):
            list(clients.map(ask, range(4)))
            time.sleep(0.5)  # the last client has its answer before its pictures are let go
            after.append(resident_mib(process))
    peak = peak_mib(process) - idle
    print(f"memory: {after} MiB after each round, at peak {peak:.0f} MiB beside the model")
    assert after[-1] < 1.1 * after[0]
    assert after[-1] < idle + 6400 * 5000 * 3 / 2**20  # not even one picture was kept
    assert peak < PEAK_MIB
