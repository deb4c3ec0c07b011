"""Ray Data and Ray Serve, on clusters that the tests start."""

from __future__ import annotations

import json

import pytest

from crosstrim import TrimConfig
from crosstrim.batch import run as batch
from crosstrim.batch.answerer import Job, answer_here
from crosstrim.batch.ray import answer_on_ray
from crosstrim.data.questions import open_questions
from crosstrim.errors import EngineError
from tests.support.questions import without_answers

pytestmark = pytest.mark.ray


@pytest.fixture(autouse=True, scope="module")
def quiet():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield


@pytest.fixture
def job(checkpoint, questions):
    rows = open_questions(questions([*without_answers(10), {"image": "missing.png", "question": "what?"}]))
    return lambda model=checkpoint: Job(rows, str(model), None, "cpu", TrimConfig(k=0.25), 6, batch_size=2)


@pytest.fixture(scope="module")
def address(quiet):
    """A cluster that runs already; `test_kill.py` has jobs start their own."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield cluster.address
    cluster.shutdown()


def test_two_actors_on_a_running_cluster_answer_as_one_process_does(job, tmp_path, address):
    def on_ray(job, pending):
        return answer_on_ray(job, pending, address=address, workers=2)

    batch.run(job(), tmp_path / "ray.jsonl", on_ray, source="rows")
    batch.run(job(), tmp_path / "local.jsonl", answer_here, source="rows")
    assert (tmp_path / "ray.jsonl").read_bytes() == (tmp_path / "local.jsonl").read_bytes()
    assert json.loads((tmp_path / "ray.jsonl.run.json").read_text())["failed"] == 1


def test_what_a_worker_refuses_is_told_in_its_words(job, tmp_path, address):
    def on_ray(job, pending):
        return answer_on_ray(job, pending, address=address)

    with pytest.raises(EngineError, match=r"refused: .* is neither 'mini' nor a folder"):
        batch.run(job(tmp_path / "nothing"), tmp_path / "out.jsonl", on_ray, source="rows")
    assert not list(tmp_path.glob("out*"))


def test_two_replicas_answer_as_ask_does(checkpoint, address):
    import ollama
    import openai

    from crosstrim import load
    from crosstrim.server.ray import serve_on_ray
    from crosstrim.server.settings import Settings
    from tests.server.conftest import asking, expected, png

    class EnoughError(Exception):
        """Ends the server, as Ctrl-C would."""

    urls, replies, unsure = [], [], []
    settings = Settings(model=str(checkpoint), device="cpu", api_keys=("secret",))

    def talk():
        client = openai.OpenAI(base_url=urls[0], api_key="secret", max_retries=0, timeout=60)
        for seed in range(6):
            options = {"model": str(checkpoint), "messages": asking("what is it?", png(seed)), "max_tokens": 8}
            replies.append(client.chat.completions.create(**options))
            pieces = list(client.chat.completions.create(**options, stream=True))
            streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces)
            assert streamed == replies[-1].choices[0].message.content
        again = {"crosstrim": {"keep": 3, "escalate": 1.0}}
        unsure.append(client.chat.completions.create(**options, extra_body=again))
        asker = ollama.Client(urls[0].removesuffix("/v1"), headers={"Authorization": "Bearer secret"})
        asked = {"role": "user", "content": "what is it?", "images": [png(5)]}
        same = asker.chat(str(checkpoint), [asked], options={"num_predict": 8})
        lines = asker.chat(str(checkpoint), [asked], options={"num_predict": 8}, stream=True)
        assert same.message.content == "".join(line.message.content for line in lines) == streamed
        with pytest.raises(openai.BadRequestError, match="does not support n=2; leave it out"):
            client.chat.completions.create(**options, n=2)
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=urls[0], api_key="wrong", max_retries=0).models.list()
        raise EnoughError

    with pytest.raises(EnoughError):
        serve_on_ray(settings, "127.0.0.1", 18765, urls.append, replicas=2, address=address, wait=talk)
    loaded = load(checkpoint)
    for seed, reply in enumerate(replies):
        alone = expected(loaded, "what is it?", png(seed), max_new_tokens=8)
        assert reply.choices[0].message.content == alone.answer
        assert reply.usage.crosstrim == {"visible": alone.report.visible, "kept": alone.report.kept}
    (reply,) = unsure
    untrimmed = expected(loaded, "what is it?", png(5), TrimConfig(), max_new_tokens=8)
    assert reply.choices[0].message.content == untrimmed.answer
    assert [one["budget"] for one in reply.usage.crosstrim["attempts"]] == ["keep=3", "untrimmed"]


def test_replicas_that_cannot_load_the_model_say_why(address, tmp_path):
    from crosstrim.server.ray import serve_on_ray
    from crosstrim.server.settings import Settings

    settings = Settings(model=str(tmp_path / "nothing"), device="cpu")
    with pytest.raises(EngineError, match=r"refused: .* is neither 'mini' nor a folder"):
        serve_on_ray(settings, "127.0.0.1", 18766, lambda url: pytest.fail("it serves"), address=address)
