from __future__ import annotations

import threading
import time

import pytest

from crosstrim import TrimConfig
from crosstrim.errors import EngineError
from crosstrim.server.chat import Chat, DeviceLostError, Failed
from crosstrim.server.scheduler import Scheduler


class Model:
    """Takes note of batches, and answers when it may."""

    def __init__(self):
        self.batches = []
        self.may = threading.Semaphore(0)
        self.taken = threading.Semaphore(0)

    def answer(self, chats):
        self.batches.append([chat.prompt for chat in chats])
        self.taken.release()
        assert self.may.acquire(timeout=20)


def chat(prompt, config=None, told=None, **options):
    tell = (lambda event: None) if told is None else told.append
    return Chat(prompt, (), config or TrimConfig(k=0.25), 4, tell, **options)


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def begin(model):
    begun = []

    def make(max_batch=3, max_wait=0.0):
        begun.append(Scheduler(model.answer, max_batch, max_wait))
        return begun[-1]

    yield make
    for _ in range(50):
        model.may.release()
    for one in begun:
        one.close()


def busy(scheduler, model):
    """Keep the model occupied until it may go on."""
    scheduler.submit(chat("first"))
    assert model.taken.acquire(timeout=20)


def go_on(model, batches):
    for _ in range(batches):
        model.may.release()
        assert model.taken.acquire(timeout=20)


def test_those_of_a_group_run_together_up_to_the_limit_the_oldest_first(model, begin):
    scheduler = begin()
    busy(scheduler, model)
    other = TrimConfig(k=0.5)
    for name, config in [("a1", None), ("b1", other), ("a2", None), ("a3", None), ("a4", None), ("b2", other)]:
        scheduler.submit(chat(name, config))
    go_on(model, 3)
    assert model.batches[1:] == [["a1", "a2", "a3"], ["b1", "b2"], ["a4"]]


def test_sampled_requests_run_with_others(model, begin):
    scheduler = begin()
    busy(scheduler, model)
    for name, temperature in [("a", 0.0), ("s1", 1.0), ("s2", 1.0), ("b", 0.0)]:
        scheduler.submit(chat(name, temperature=temperature))
    go_on(model, 2)
    assert model.batches[1:] == [["a", "s1", "s2"], ["b"]]


def test_the_oldest_waits_for_others_until_the_batch_is_full(model, begin):
    scheduler = begin(max_batch=2, max_wait=30)
    scheduler.submit(chat("a"))
    time.sleep(0.1)
    assert model.batches == []
    scheduler.submit(chat("b"))
    assert model.taken.acquire(timeout=20)
    assert model.batches == [["a", "b"]]


def test_what_nobody_waits_for_is_not_run(model, begin):
    scheduler = begin()
    busy(scheduler, model)
    gone, here = chat("gone"), chat("here")
    scheduler.submit(gone)
    scheduler.submit(here)
    gone.cancelled.set()
    go_on(model, 1)
    assert model.batches[1:] == [["here"]]


def test_closing_refuses_what_waits(model, begin):
    scheduler, told = begin(), []
    busy(scheduler, model)
    scheduler.submit(chat("late", told=told))
    model.may.release()
    scheduler.close()
    assert len(told) == 1
    assert isinstance(told[0], Failed)
    assert "going down" in str(told[0].error)
    with pytest.raises(EngineError, match="going down"):
        scheduler.submit(chat("later"))


def test_an_error_of_a_batch_is_told_to_it_and_the_thread_goes_on():
    told, answered = [], threading.Event()

    def answer(chats):
        if chats[0].prompt == "bad":
            raise MemoryError
        answered.set()

    scheduler = Scheduler(answer, 1, 0.0)
    scheduler.submit(chat("bad", told=told))
    scheduler.submit(chat("good"))
    assert answered.wait(20)
    assert [type(event.error) for event in told] == [MemoryError]
    assert scheduler.failure is None
    scheduler.close()


@pytest.mark.parametrize("end", [SystemExit, DeviceLostError])
def test_a_thread_that_ends_tells_all_that_wait_and_takes_no_more(end):
    told, begun, may = [], threading.Event(), threading.Event()

    def answer(chats):
        begun.set()
        assert may.wait(20)
        raise end

    scheduler = Scheduler(answer, 1, 0.0)
    scheduler.submit(chat("running", told=told))
    assert begun.wait(20)
    scheduler.submit(chat("waiting", told=told))
    may.set()
    scheduler._thread.join(20)
    assert isinstance(scheduler.failure, end)
    assert [str(event.error) for event in told] == ["the thread that owns the model ended"] * 2
    with pytest.raises(EngineError, match="works no more"):
        scheduler.submit(chat("later"))
    scheduler.close()
