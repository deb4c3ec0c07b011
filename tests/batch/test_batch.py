from __future__ import annotations

import base64
import json
import os
from dataclasses import replace

import pytest
import torch
from pyarrow import parquet

import crosstrim
from crosstrim import TrimConfig
from crosstrim.asking import answering
from crosstrim.asking.escalation import Escalation
from crosstrim.asking.images import open_image
from crosstrim.batch import answerer as answerers
from crosstrim.batch import run as batch
from crosstrim.batch.answerer import Answerer, Job, answer_here
from crosstrim.data.questions import open_questions
from crosstrim.errors import ResultError
from crosstrim.models.memory import bytes_per_sample
from tests.support.questions import without_answers

CONFIG = TrimConfig(k=0.25)


@pytest.fixture
def job(checkpoint, questions):
    def make(rows=None, **options):
        options = {"max_new_tokens": 6, "batch_size": 5, **options}
        return Job(open_questions(questions(rows)), str(checkpoint), None, "cpu", CONFIG, **options)

    return make


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_answer_is_that_of_ask_in_the_input_s_order(job, loaded, pictures, tmp_path):
    out = tmp_path / "out.jsonl"
    summary = batch.run(job(), out, answer_here, source="rows")
    assert summary == {"rows": 12, "answered": 12, "failed": 0, "out": str(out)}
    for found, row in zip(read(out), without_answers(), strict=True):
        picture = open_image(pictures / row["image"])
        expected = answering.ask(*loaded, picture, row["question"], CONFIG, max_new_tokens=6)
        assert found == {
            "id": row["id"],
            "answer": expected.answer,
            "visible": expected.report.visible,
            "kept": expected.report.kept,
            "kept_fraction": round(expected.report.kept_fraction, 6),
            "error": None,
        }
        assert 0 < found["kept"] < found["visible"]


def test_rows_of_several_pictures_are_asked_as_a_session_asks(job, loaded, pictures, tmp_path):
    uri = "data:image/png;base64," + base64.b64encode((pictures / "3.png").read_bytes()).decode()
    rows = without_answers(6)
    rows[1]["image"], rows[3]["image"], rows[4]["image"] = ["0.png", "1.png"], ["2.png", uri], uri
    rows[5]["image"] = ["0.png", "missing.png"]
    out = tmp_path / "out.jsonl"
    assert batch.run(job(rows, batch_size=6), out, answer_here, source="rows")["failed"] == 1
    *answers, missing = read(out)
    assert missing["error"].startswith("picture 2 of 2: there is no picture ")
    shown = [["0.png"], ["0.png", "1.png"], ["2.png"], ["2.png", "3.png"], ["3.png"]]
    for found, row, names in zip(answers, rows, shown, strict=False):
        session = crosstrim.Session(*loaded, [pictures / name for name in names], CONFIG)
        expected = session.ask(row["question"], max_new_tokens=6)
        kept = expected.report
        assert (found["id"], found["answer"], found["error"]) == (row["id"], expected.answer, None)
        assert (found["visible"], found["kept"]) == (kept.visible, kept.kept)
        assert found["kept_fraction"] == round(kept.kept_fraction, 6)


def test_several_pictures_count_for_memory_and_no_more_are_open(job, monkeypatch):
    sizes, opened = [], []
    ask, open_source = answering.generate, answerers.sources.open_source

    def generate(model, processor, inputs, **options):
        sizes.append((len(inputs["input_ids"]), len(opened)))
        opened.clear()
        return ask(model, processor, inputs, **options)

    monkeypatch.setattr(answerers.answering, "generate", generate)
    monkeypatch.setattr(answerers.sources, "open_source", lambda source: opened.append(1) or open_source(source))
    rows = [{"image": ["0.png", "1.png"], "question": "what?"}] * 3 + without_answers(2)
    model = Answerer(job())._model
    per_sample = bytes_per_sample(model, answerers.PROMPT_TOKENS + 6)
    Answerer(job(rows, memory=4 * per_sample)).answer(0)
    assert sizes == [(2, 4), (1, 2), (2, 2)]


def test_unsure_rows_are_answered_again_and_alone(job, loaded, pictures, tmp_path):
    """The threshold lies between the first attempts of two rows that are asked together."""
    up = Escalation.of(CONFIG, 1.0, [0.5, "untrimmed"])
    first = [row["attempts"] for row in ask(job(escalation=up), tmp_path / "all.jsonl")]
    assert all(len(attempts) == 3 for attempts in first)
    below = sum(sorted(attempts[0]["lowest_probability"] for attempts in first[:5])[2:4]) / 2
    found = ask(job(escalation=replace(up, below=below)), tmp_path / "some.jsonl")
    assert {len(row["attempts"]) for row in found[:5]} > {1}
    for row, asked in zip(found, without_answers(), strict=True):
        budgets = ["k=0.25", "keep=0.5", "untrimmed"][: len(row["attempts"])]
        assert [tried["budget"] for tried in row["attempts"]] == budgets
        sure = [tried["lowest_probability"] >= below for tried in row["attempts"]]
        assert not any(sure[:-1])
        assert sure[-1] or len(sure) == 3
        config = [CONFIG, TrimConfig(keep=0.5), None][len(sure) - 1]
        expected = answering.ask(
            *loaded, open_image(pictures / asked["image"]), asked["question"], config, max_new_tokens=6
        )
        assert row["answer"] == expected.answer
        assert row["kept"] == (row["visible"] if config is None else expected.report.kept)
    batch.run(job(escalation=up), tmp_path / "all.parquet", answer_here, source="rows")
    assert parquet.read_table(tmp_path / "all.parquet").to_pylist() == read(tmp_path / "all.jsonl")
    with pytest.raises(ResultError, match="escalation"):
        batch.run(job(), tmp_path / "all.jsonl", answer_here, source="rows", resume=True)


def ask(job, out):
    batch.run(job, out, answer_here, source="rows")
    return read(out)


def test_parquet_holds_the_same(job, tmp_path):
    rows = [*without_answers(3), "broken"]
    batch.run(job(rows), tmp_path / "out.jsonl", answer_here, source="rows")
    batch.run(job(rows), tmp_path / "out.parquet", answer_here, source="rows")
    assert parquet.read_table(tmp_path / "out.parquet").to_pylist() == read(tmp_path / "out.jsonl")


def test_a_row_that_fails_has_an_error_and_the_others_go_on(job, pictures, tmp_path):
    (pictures / "broken.png").write_bytes((pictures / "0.png").read_bytes()[:-60])
    good = without_answers(2)
    bad = [{"image": "missing.png", "question": "what?"}, {"image": "broken.png", "question": "what?"}]
    bad += [{"image": "0.png", "question": ""}, "{"]
    summary = batch.run(job([good[0], *bad, good[1]]), tmp_path / "out.jsonl", answer_here, source="rows")
    assert (summary["answered"], summary["failed"]) == (2, 4)
    first, missing, broken, empty, no_json, last = read(tmp_path / "out.jsonl")
    assert "there is no picture" in missing["error"]
    assert "damaged" in broken["error"]
    assert "not empty" in empty["error"]
    assert "no JSON" in no_json["error"]
    assert missing["answer"] is None
    batch.run(job(good), tmp_path / "good.jsonl", answer_here, source="rows")
    assert [first, last] == read(tmp_path / "good.jsonl")


def test_a_question_that_does_not_fit_is_told_and_never_runs(job, monkeypatch):
    rows = without_answers(3)
    rows[1]["question"] = "what? " * 200
    answerer, seen = Answerer(job(rows)), []
    generate = answering.generate
    monkeypatch.setattr(
        answerers.answering,
        "generate",
        lambda model, processor, inputs, **options: (
            seen.append(len(inputs["input_ids"])) or generate(model, processor, inputs, **options)
        ),
    )
    first, long, last = answerer.answer(0)
    assert "tokens and the answer may have 6; together the model reads 512. Shorten the prompt" in long["error"]
    assert (first["error"], last["error"], seen) == (None, None, [2])


def test_names_that_are_not_utf_8_end_no_job(checkpoint, pictures, tmp_path):
    for name in (b"\xff.png", b"\xfe.png"):
        content = (pictures / "0.png").read_bytes() if name == b"\xff.png" else b"broken"
        (pictures / os.fsdecode(name)).write_bytes(content)
    job = Job(open_questions(pictures, "what?"), str(checkpoint), None, "cpu", CONFIG, max_new_tokens=2, batch_size=9)
    for ending in ("jsonl", "parquet"):
        out = tmp_path / f"out.{ending}"
        assert batch.run(job, out, answer_here, source="pictures")["failed"] == 1
    assert parquet.read_table(out).to_pylist() == read(tmp_path / "out.jsonl")
    broken, good = read(tmp_path / "out.jsonl")[-2:]
    assert (broken["id"], good["id"], good["error"]) == ("\\xfe.png", "\\xff.png", None)
    assert "no picture that crosstrim reads" in broken["error"]


def test_a_path_that_can_be_no_name_fails_its_row_alone(job, tmp_path):
    rows = [*without_answers(1), {"image": "half \ud800.png", "question": "what?"}]
    assert batch.run(job(rows), tmp_path / "out.jsonl", answer_here, source="rows")["failed"] == 1
    assert "cannot be the name of a file" in read(tmp_path / "out.jsonl")[1]["error"]


def test_what_fails_together_is_asked_apart(job, monkeypatch):
    ask = answering.generate

    def generate(model, processor, inputs, **options):
        if len(inputs["input_ids"]) > 1:
            raise torch.OutOfMemoryError("too many")
        if generate.calls == 2:
            raise RuntimeError("poison\nand its details")
        generate.calls += 1
        return ask(model, processor, inputs, **options)

    generate.calls = 0
    monkeypatch.setattr(answerers.answering, "generate", generate)
    answers = Answerer(job(without_answers(5))).answer(0)
    assert [one["error"] for one in answers] == [None, None, *["RuntimeError: poison"] * 3]


def test_a_batch_is_as_large_as_memory_allows(job, monkeypatch):
    sizes = []
    ask = answering.generate
    monkeypatch.setattr(
        answerers.answering,
        "generate",
        lambda model, processor, inputs, **options: (
            sizes.append(len(inputs["input_ids"])) or ask(model, processor, inputs, **options)
        ),
    )
    model = Answerer(job())._model
    per_sample = bytes_per_sample(model, answerers.PROMPT_TOKENS + 6)
    Answerer(job(memory=2 * per_sample)).answer(0)
    Answerer(job(memory=1)).answer(2)
    assert sizes == [2, 2, 1, 1, 1]


def test_the_estimate_covers_the_cache(loaded, job):
    """The cross-attention's part of the estimate is what the cache of an untrimmed model really holds."""
    model, _ = loaded
    located_bytes = 68 * 3 * 2 * 4 * 8 * 4  # features, layers, K and V, heads, head size, float32
    text = 100 * 5 * 2 * 4 * 8 * 4
    vision = (4 * 24 * (48 + 96 + 64) + 96 * 96) * 4  # 17 features a tile, padded to 24
    assert bytes_per_sample(model, 100) == located_bytes + text + vision


def test_an_interrupted_job_goes_on_and_repeats_nothing(job, tmp_path):
    out, asked = tmp_path / "out.jsonl", []

    def cut_off(job, pending):
        for batch_number, answers in answer_here(job, pending):
            if len(asked) == 2:
                raise KeyboardInterrupt
            asked.append(batch_number)
            yield batch_number, answers

    with pytest.raises(KeyboardInterrupt):
        batch.run(job(), out, cut_off, source="rows")
    assert not out.exists()
    with pytest.raises(ResultError, match="cut off; give --resume to go on"):
        batch.run(job(), out, answer_here, source="rows")
    with pytest.raises(ResultError, match=r"other generation\.max_new_tokens"):
        batch.run(job(max_new_tokens=7), out, answer_here, source="rows", resume=True)
    rest = []

    def backwards(job, pending):
        rest.extend(pending)
        yield from answer_here(job, pending[::-1])

    batch.run(job(), out, backwards, source="rows", resume=True)
    assert (asked, rest) == ([0, 1], [0])  # numbers are counted among what is left
    batch.run(job(), tmp_path / "other.jsonl", answer_here, source="rows")
    assert read(out) == read(tmp_path / "other.jsonl")


@pytest.mark.parametrize("sizes", [(5, 1), (1, 5), (5, 2)])
def test_what_was_cut_off_may_go_on_with_batches_of_another_size(job, tmp_path, sizes):
    first, then = sizes
    out = tmp_path / "out.jsonl"

    def cut_off(job, pending):
        yield 1, Answerer(job).answer(1)  # leaves rows before and after
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        batch.run(job(batch_size=first), out, cut_off, source="rows")
    batch.run(job(batch_size=then), out, answer_here, source="rows", resume=True)
    batch.run(job(), tmp_path / "other.jsonl", answer_here, source="rows")
    assert read(out) == read(tmp_path / "other.jsonl")
    notes = json.loads((tmp_path / "out.jsonl.run.json").read_text())
    assert notes["batch_sizes"] == sorted(sizes)
    assert batch.run(job(batch_size=7), out, None, source="rows", resume=True)["answered"] == 12


def test_a_doubled_line_of_the_journal_counts_once(job, tmp_path):
    out, steps = tmp_path / "out.jsonl", []

    def cut_off(job, pending):
        yield 1, Answerer(job).answer(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        batch.run(job(), out, cut_off, source="rows")
    journal = tmp_path / "out.jsonl.journal"
    header, record = journal.read_bytes().splitlines(keepends=True)
    overlapping = {**json.loads(record), "first": 7}
    journal.write_bytes(header + record + record + json.dumps(overlapping).encode() + b"\n")
    progress = lambda done, total: steps.append((done, total))  # noqa: E731
    summary = batch.run(job(), out, answer_here, source="rows", resume=True, progress=progress)
    assert summary["answered"] == 12
    assert steps == [(5, 12), (10, 12), (12, 12)]
    batch.run(job(), tmp_path / "other.jsonl", answer_here, source="rows")
    assert read(out) == read(tmp_path / "other.jsonl")


def test_a_job_that_never_began_leaves_nothing(job, tmp_path):
    def broken(job, pending):
        raise ResultError("no")
        yield

    with pytest.raises(ResultError, match="no"):
        batch.run(job(), tmp_path / "out.jsonl", broken, source="rows")
    assert not list(tmp_path.glob("out*"))


def test_a_finished_job_is_not_run_again(job, tmp_path):
    out = tmp_path / "out.jsonl"
    first = batch.run(job(), out, answer_here, source="rows")
    with pytest.raises(ResultError, match="exists; give --resume"):
        batch.run(job(), out, answer_here, source="rows")
    assert batch.run(job(), out, None, source="rows", resume=True) == first
    with pytest.raises(ResultError, match=r"other input"):
        batch.run(job(without_answers(3)), out, None, source="rows", resume=True)
    notes = json.loads((tmp_path / "out.jsonl.run.json").read_text())
    assert notes["trim"]["k"] == 0.25
    assert "torch" in notes["versions"]


@pytest.mark.parametrize(
    ("name", "words"),
    [("a.csv", ".jsonl or .parquet"), ("no/a.jsonl", "does not exist"), ("dangling.jsonl", "create .*no first")],
)
def test_where_nothing_can_be_written_nothing_is_asked(job, tmp_path, name, words):
    (tmp_path / "dangling.jsonl").symlink_to("no/a.jsonl")
    with pytest.raises(ResultError, match=words):
        batch.run(job(), tmp_path / name, None, source="rows")
