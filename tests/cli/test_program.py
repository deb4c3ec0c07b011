"""The installed program, in a process of its own: streams, exit codes, interruption."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import crosstrim
from crosstrim.asking import loading

PROGRAM = Path(sys.executable).with_name("crosstrim")


def test_version(spawn):
    result = spawn("--version")
    assert (result.returncode, result.stdout, result.stderr) == (
        0,
        f"crosstrim {crosstrim.__version__}\n".encode(),
        b"",
    )


def test_stdout_holds_one_object_and_stderr_nothing(spawn, picture, checkpoint):
    result = spawn(
        *("ask", "-", "what?", "--model", checkpoint, "--max-new-tokens", 2, "--json", "--compare"),
        input=picture.read_bytes(),
    )
    assert result.stderr == b""
    assert set(json.loads(result.stdout)) == {"answer", "tokens", "seconds", "report", "untrimmed"}


def test_an_error_is_one_line_without_a_traceback(spawn, tmp_path):
    result = spawn("ask", "missing.png", "what?", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (1, b"")
    assert result.stderr == b"crosstrim: there is no picture missing.png; check the path.\n"


def test_a_reader_that_left_is_no_reason_to_complain(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = subprocess.run(
            [PROGRAM, "examples"], stdout=writer, stderr=subprocess.PIPE, timeout=120, check=False
        )
    finally:
        os.close(writer)
    assert result.stderr == b""
    assert result.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("arguments", [["examples"], ["examples", "--json"], ["--help"]], ids=lambda words: words[-1])
def test_a_full_disk_takes_one_line(arguments):
    with open("/dev/full", "w") as full:
        result = subprocess.run([PROGRAM, *arguments], stdout=full, stderr=subprocess.PIPE, timeout=120, check=False)
    assert result.stderr == b"crosstrim: the output cannot be written: No space left on device.\n"
    assert result.returncode == 1


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        ("examples >&-", 1, b"crosstrim: standard output is closed; send it to a file, or to /dev/null.\n"),
        ("ask - 'what?' <&-", 1, b"crosstrim: standard input is closed; pipe a picture into it.\n"),
        ("ask missing.png 'what?' 2>&-", 1, b""),
    ],
)
def test_a_closed_stream_takes_one_line(tmp_path, command, code, words):
    shell = subprocess.run(f"{PROGRAM} {command}", shell=True, capture_output=True, cwd=tmp_path, timeout=120)
    assert (shell.returncode, shell.stdout, shell.stderr) == (code, b"", words)


@pytest.mark.parametrize(
    ("program", "arguments", "imported"),
    [
        ([PROGRAM], ["ask", "cat", "what?"], "torch"),
        ([PROGRAM], ["serve"], "transformers"),
        ([PROGRAM], ["examples"], "rich"),
        ([PROGRAM], ["--help"], "typer"),
        ([sys.executable, "-m", "crosstrim"], ["ask", "cat", "what?"], "torch"),
        ([sys.executable, "-m", "crosstrim"], ["--help"], "typer"),
    ],
    ids=["ask", "serve", "examples", "help", "ask as a module", "help as a module"],
)
def test_an_interruption_while_importing_ends_with_130(tmp_path, program, arguments, imported):
    (tmp_path / f"{imported}.py").write_text("raise KeyboardInterrupt")
    paths = [str(tmp_path), str(Path(crosstrim.__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    result = subprocess.run([*program, *arguments], capture_output=True, env=environment, timeout=120, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (130, b"", b"")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_an_interruption_ends_with_130_and_no_file(tmp_path):
    picture, target = tmp_path / "picture.png", tmp_path / "overlay.png"
    os.mkfifo(picture)  # whose other end tells when the program has begun to read
    command = [PROGRAM, "ask", picture, "what?", "--overlay", target]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=listen_to_interruptions
    )
    writer = opened_for_writing(picture)
    try:
        printed, complained = interrupted(process)
    finally:
        os.close(writer)
        process.kill()
    assert process.returncode == 130
    assert (printed, complained) == (b"", b"")
    assert list(tmp_path.iterdir()) == [picture]


def listen_to_interruptions() -> None:
    """What a background job of a shell starts is deaf to Ctrl-C until it says otherwise."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def interrupted(process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
    """What a program prints on Ctrl-C, pressed again where it fell between Python's look at signals and its read."""
    for _ in range(5):
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=20)
    pytest.fail("the program did not stop")


def opened_for_writing(pipe: Path) -> int:
    """The writing end of a named pipe, as soon as somebody reads it."""
    for _ in range(1200):
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            time.sleep(0.1)
    pytest.fail("nobody opened the pipe")


def test_an_interruption_while_answering_leaves_no_file(run, picture, checkpoint, tmp_path, monkeypatch):
    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("crosstrim.asking.answering.generate", interrupted)
    result = run("ask", picture, "what?", "--model", checkpoint, "--overlay", tmp_path / "overlay.png")
    assert (result.code, result.stdout) == (130, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["ask", "batch", "serve"])
def test_the_oracle_is_refused_where_nothing_can_look_ahead(run, picture, tmp_path, monkeypatch, verb):
    monkeypatch.setattr(loading, "load", None)
    arguments = {"ask": [picture, "?"], "batch": [picture.parent, tmp_path / "out.jsonl"], "serve": ["--port", 0]}
    result = run(verb, *arguments[verb], "--policy", "oracle", "--keep", 0.5)
    assert (result.code, result.stdout) == (2, "")
    assert result.stderr.startswith("crosstrim: policy='oracle' looks ahead")
    assert "compare with it by `crosstrim eval --out FILE.json --policy oracle`" in result.stderr
    assert "unknown" not in result.stderr
