"""A run from end to end on the tiny model, interrupted and not."""

from __future__ import annotations

import json

import pytest
import torch

from crosstrim import TrimConfig
from crosstrim.asking import answering
from crosstrim.asking.batches import Encoder
from crosstrim.data import dataset
from crosstrim.errors import InputError, ResultError
from crosstrim.eval import oracle, settings, sweep
from crosstrim.eval.items import asked
from crosstrim.method.policies import Given
from crosstrim.trimming.handle import trim
from tests.support.questions import with_answers, write_pictures, write_rows

TOKENS = 4
CHOSEN = settings.expand(["union", "random", "oracle"], keep=[0.3, 1.0], first_layer="both", seeds=2, lossless=True)
FEW = settings.expand(["union", "oracle"], keep=[0.3])


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    write_pictures(folder)
    return dataset.read(write_rows(folder, with_answers()))


@pytest.fixture(scope="module")
def result(loaded, questions, tmp_path_factory):
    """All settings, run once."""
    out = tmp_path_factory.mktemp("result") / "run.json"
    return sweep.run(*loaded, questions, CHOSEN, out, name="tiny", batch_size=5, max_new_tokens=TOKENS)


@pytest.fixture
def run(loaded, questions, tmp_path):
    """Run a few settings."""

    def call(out="run.json", chosen=FEW, **options):
        options = {"name": "tiny", "batch_size": 2, "max_new_tokens": TOKENS, **options}
        return sweep.run(*loaded, questions, chosen, tmp_path / out, **options)

    return call


@pytest.fixture
def computed(monkeypatch):
    """The batches that were computed, as tuples of ids."""
    batches = []
    answer = sweep.Answerer.answer

    def watched(self, batch):
        batches.append(tuple(item.id for item in batch))
        return answer(self, batch)

    monkeypatch.setattr(sweep.Answerer, "answer", watched)
    return batches


def timeless(result):
    return {name: value for name, value in result.items() if name != "seconds"}


def test_answers_are_those_of_asking_one_by_one(result, loaded, questions):
    assert [item["id"] for item in result["items"]] == [item.id for item in questions.items]
    asked = [setting for setting in CHOSEN if setting.policy in ("union", "random:1") and setting.config.keep == 0.3]
    for index in (0, 4, 11):  # in different batches
        item = questions.items[index]
        for label, config in [("untrimmed", None), *((one.label, one.config) for one in asked)]:
            answer = answering.ask(*loaded, item.open(), item.question, config, max_new_tokens=TOKENS)
            found = result["predictions"][label]
            assert found["answer"][index] == answer.answer
            if answer.report:
                assert found["kept"][index] == answer.report.kept
                assert result["items"][index]["visible"] == answer.report.visible


def test_the_file_holds_what_is_returned_and_all_it_depends_on(run, tmp_path):
    result = run()
    assert json.loads((tmp_path / "run.json").read_text()) == result == sweep.read(tmp_path / "run.json")
    assert [path.suffix for path in tmp_path.glob("run*")] == [".json"]
    assert result["dataset"]["questions_per_kind"] == {"count": 4, "read": 4, "where": 4}
    assert result["generation"] == {"max_new_tokens": TOKENS, "do_sample": False, "batch_size": 2}
    assert set(result["versions"]) == {"crosstrim", "transformers", "torch", "python", "device"}
    assert all(result["compat"].values())
    assert [one["label"] for one in result["settings"]] == [one.label for one in FEW]
    assert set(result["predictions"]) == {"untrimmed", *(one.label for one in FEW)}


def test_nothing_dropped_means_nothing_changed(result):
    rows = {row["group"]: row["overall"] for row in result["summary"]}
    for group in ("lossless", "union keep=1.0", "random keep=1.0", "oracle keep=1.0, whole first layer"):
        assert rows[group]["kl"] == pytest.approx(0, abs=1e-9)
        assert rows[group]["unchanged"]["mean"] == 1
        assert rows[group]["kept_fraction"] == rows[group]["cache_fraction"] == 1
    for group in ("union keep=0.3", "random keep=0.3", "oracle keep=0.3"):
        assert rows[group]["kl"] > 1e-4
    assert rows["untrimmed"]["accuracy_change"] == {"mean": 0, "low": 0, "high": 0}


def test_the_cache_counts_the_first_layer(result):
    rows = {row["group"]: row["overall"] for row in result["summary"]}
    kept = rows["union keep=0.3"]["kept_fraction"]
    assert 0.3 <= kept < 0.36
    assert rows["union keep=0.3"]["cache_fraction"] == kept
    whole = rows["union keep=0.3, whole first layer"]
    assert whole["kept_fraction"] == kept
    assert whole["cache_fraction"] == pytest.approx((1 + 2 * kept) / 3, abs=1e-5)


def test_the_cache_counts_what_later_layers_read_less(run):
    chosen = settings.expand(["pyramid:0.2", "union"], keep=[0.5], first_layer="both")
    found = run(chosen=chosen)
    rows = {row["group"]: row["overall"] for row in found["summary"]}
    label = "pyramid:0.2 keep=0.5"
    visible = [item["visible"] for item in found["items"]]
    layers = found["predictions"][label]["layers"]
    assert [one[0] for one in layers] == found["predictions"][label]["kept"]
    shares = [[count / seen for count in one] for one, seen in zip(layers, visible, strict=True)]
    mean = sum(sum(one) for one in shares) / 3 / len(shares)
    assert rows[label]["cache_fraction"] == pytest.approx(mean, rel=1e-5)
    assert rows[label]["kept_fraction"] == rows["union keep=0.5"]["kept_fraction"] > mean + 0.05
    whole = mean + (1 - rows[label]["kept_fraction"]) / 3
    assert rows[f"{label}, whole first layer"]["cache_fraction"] == pytest.approx(whole, rel=1e-5)
    assert "layers" not in found["predictions"]["union keep=0.5"]


def test_seeds_are_averaged_question_by_question(result):
    (row,) = (row for row in result["summary"] if row["group"] == "random keep=0.3")
    drawn = [result["predictions"][f"random:{seed} keep=0.3"] for seed in range(2)]
    untrimmed = result["predictions"]["untrimmed"]["answer"]
    same = [one == other for draw in drawn for one, other in zip(draw["answer"], untrimmed, strict=True)]
    assert row["seeds"] == 2
    assert row["overall"]["unchanged"]["mean"] == pytest.approx(sum(same) / len(same), abs=1e-5)
    assert row["overall"]["kl"] == pytest.approx(sum(sum(draw["kl"]) for draw in drawn) / len(same), rel=1e-4)


def test_pictures_are_encoded_once(loaded, run):
    encoded = []
    hook = loaded[0].model.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: encoded.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    try:
        run()
    finally:
        hook.remove()
    assert sum(encoded) == 4


class Stopped(Exception):
    pass


def stopping(after):
    """A progress that raises once so many settings have answered a batch."""
    calls = iter(range(after + 1))

    def progress(done, total):
        if next(calls) == after:
            raise Stopped

    return progress


def test_an_interrupted_run_goes_on_where_it_was(run, computed, tmp_path):
    expected = run("other.json")
    batches = list(computed)
    done = 0
    for after, whole in [(1, 0), (3, 0), (5, 1), (2, 0), (8, 2)]:  # a batch is answered three times
        computed.clear()
        with pytest.raises(Stopped):
            run(progress=stopping(after))
        assert computed == batches[done : done + whole + 1]
        done += whole
        assert len((tmp_path / "run.json.journal").read_bytes().splitlines()) == 1 + done
    computed.clear()
    assert timeless(run()) == timeless(expected)
    assert computed == batches[done:]


def test_a_finished_run_computes_nothing_again(run, computed):
    first = run()
    computed.clear()
    assert run() == first
    assert computed == []


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 4}, r"generation\.batch_size \(2 there, 4 here\)"),
        ({"chosen": FEW[:1]}, r"settings \(only there: oracle keep=0.3\)"),
        ({"name": "other"}, r"model\.name \(tiny there, other here\)"),
    ],
)
def test_a_run_of_something_else_is_not_continued(run, tmp_path, finished, options, words):
    if finished:
        run()
    else:
        with pytest.raises(Stopped):
            run(progress=stopping(4))
    before = {path: path.read_bytes() for path in tmp_path.glob("run*")}
    with pytest.raises(ResultError, match=words):
        run(**options)
    assert {path: path.read_bytes() for path in tmp_path.glob("run*")} == before


def test_other_weights_are_another_model(run, loaded):
    run()
    weight = loaded[0].lm_head.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight += 1
    try:
        with pytest.raises(ResultError, match=r"model\.sha256_of_samples"):
            run()
    finally:
        with torch.no_grad():
            weight.copy_(before)  # to subtract it again would round


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"summary": [], "format": 0}'])
def test_what_is_no_result(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ResultError, match=r"is no JSON|is no result|has format 0"):
        sweep.read(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["a.txt", "no/a.json", ""])
def test_where_no_result_can_go(tmp_path, name):
    with pytest.raises(ResultError, match=r"cannot hold a result|does not exist"):
        sweep.check_path(tmp_path / name)


def test_the_oracle_reads_attention_off_the_later_layers(loaded, questions):
    """Against the weights that transformers itself returns, for each sample alone."""
    model, processor = loaded
    batch = questions.items[:4]
    with asked(Encoder(model, processor), batch) as inputs:
        answers = answering.generate(model, processor, inputs, max_new_tokens=TOKENS).tokens
        votes = oracle.votes(model, inputs, answers)
    model.set_attn_implementation("eager")
    try:
        for index, item in enumerate(batch):
            alone = answering.encode(processor, [item.open()], [item.question])
            ids = torch.cat([alone["input_ids"], answers[index : index + 1]], dim=1)
            mask = alone["cross_attention_mask"]
            mask = torch.cat([mask, mask[:, -1:].expand(-1, TOKENS, -1, -1)], dim=1)
            with torch.no_grad():
                output = model(
                    **{
                        **alone,
                        "input_ids": ids,
                        "cross_attention_mask": mask,
                        "attention_mask": torch.ones_like(ids),
                    },
                    output_attentions=True,
                )
            image_row = alone["input_ids"][0].tolist().index(model.config.image_token_index)
            layers = model.config.text_config.cross_attention_layers[1:]
            attention = torch.stack([output.attentions[layer][0, :, image_row:].sum(1) for layer in layers])
            torch.testing.assert_close(votes[index, 0], attention.mean((0, 1)), atol=1e-4, rtol=1e-4)
    finally:
        model.set_attn_implementation("sdpa")


def test_the_oracle_forgets_what_comes_after_the_end(loaded, questions, monkeypatch):
    model, processor = loaded
    item = questions.items[0]
    with asked(Encoder(model, processor), [item]) as inputs:
        answers = answering.generate(model, processor, inputs, max_new_tokens=TOKENS).tokens
        short = oracle.votes(model, inputs, answers[:, :2])
        end = 2
        monkeypatch.setattr(model.generation_config, "eos_token_id", [end, 59])
        padded = torch.cat([answers[:, :2], torch.tensor([[end, 0, 0]])], dim=1)
        assert end not in answers
        torch.testing.assert_close(oracle.votes(model, inputs, padded), short)


def test_given_votes_decide(loaded, questions):
    model, processor = loaded
    item = questions.items[1]
    votes = torch.arange(68.0).flip(0)[None, None]
    report = answering.ask(
        model, processor, item.open(), item.question, TrimConfig(keep=5, policy=Given(votes)), max_new_tokens=1
    ).report
    assert report.samples[0][0].kept_indices == (0, 1, 2, 3, 4)
    with (
        pytest.raises(ValueError, match="do not fit 1 samples of 68 image features"),
        trim(model, TrimConfig(keep=5, policy=Given(votes[..., :3]))),
    ):
        answering.generate(model, processor, answering.encode(processor, [item.open()], ["?"]), max_new_tokens=1)


def test_a_question_that_does_not_fit_is_named_before_any_is_asked(loaded, write, computed, tmp_path):
    path = write([*with_answers()[:2], {**with_answers()[2], "question": "where? " * 100}])
    words = r"the question with the id '0-where' cannot be asked: the prompt has \d+ tokens .* the model reads 512"
    with pytest.raises(InputError, match=words):
        sweep.run(*loaded, dataset.read(path), FEW, tmp_path / "run.json", name="tiny", max_new_tokens=TOKENS)
    assert computed == []
    assert not list(tmp_path.glob("run.json*"))


@pytest.mark.parametrize("doubled", [1, 2])
def test_a_doubled_line_of_the_journal_counts_once(run, computed, questions, tmp_path, doubled):
    whole = run("whole.json")
    with pytest.raises(KeyboardInterrupt):
        run(progress=lambda done, total: stop_at(done, 12))
    journal = tmp_path / "run.json.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines, lines[doubled]]))
    computed.clear()
    steps = []
    assert timeless(run(progress=lambda *step: steps.append(step))) == timeless(whole)
    assert steps[0][0] == 2 * 3 * (len(lines) - 1)
    assert steps[-1] == (36, 36)
    assert len(computed) == 6 - (len(lines) - 1)


def stop_at(done, last):
    if done > last:
        raise KeyboardInterrupt
