"""`crosstrim eval --out` and `--report`: options, streams, refusals."""

from __future__ import annotations

import json

import pytest

from crosstrim.eval import settings


@pytest.fixture
def data(questions, tmp_path):
    """The small benchmark as a file, with one row that cannot be asked."""
    names = ("id", "image", "question", "answers", "kind")
    rows = [{name: row[name] for name in names} for row in questions]
    rows.insert(1, {**rows[0], "id": "none", "image": "none.png"})
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture
def sweep(run, checkpoint, questions, tmp_path):
    def call(*arguments, out="run.json"):
        return run("eval", "--model", checkpoint, "--out", tmp_path / out, "--max-new-tokens", 2, *arguments)

    return call


@pytest.fixture
def nothing_loads(monkeypatch):
    monkeypatch.setattr("crosstrim.asking.loading.load", lambda *_args, **_options: pytest.fail("a model was loaded"))


def test_the_embedded_questions_are_swept(sweep, tmp_path):
    result = sweep("--keep", "0.5", "--keep", 3, "--policy", "union", "--policy", "random", "--seeds", 2, "--json")
    assert (result.code, result.stderr) == (0, f"crosstrim: wrote {tmp_path}/run.json\n")
    written = json.loads((tmp_path / "run.json").read_text())
    assert result.json == {name: value for name, value in written.items() if name not in ("items", "predictions")}
    assert [row["group"] for row in written["summary"]] == [
        *("untrimmed", "union keep=0.5", "union keep=3", "random keep=0.5", "random keep=3"),
    ]
    assert written["dataset"]["name"] == "mini-heldout"
    assert written["generation"]["max_new_tokens"] == 2
    assert [row["seeds"] for row in written["summary"]] == [1, 1, 1, 2, 2]


def test_people_read_a_table(sweep):
    lines = sweep("--policy", "grid", "--k", "0.25", "--first-layer", "both", "--lossless").stdout.splitlines()
    assert lines[0].split("   ")[0] == "setting"
    assert [line.split("   ")[0] for line in lines[1:]] == [
        *("untrimmed", "lossless", "grid k=0.25", "grid k=0.25, whole first layer"),
    ]
    assert lines[1].split()[1:3] == ["100.0%", "0.0%"]


def test_merged_is_compared_with_plain(sweep):
    result = sweep("--policy", "grid", "--keep", "0.5", "--merge", "--json").json
    rows = {row["group"]: row["overall"] for row in result["summary"]}
    plain, merged = rows["grid keep=0.5"], rows["grid keep=0.5, merged"]
    assert plain["cache_fraction"] == merged["cache_fraction"]
    assert plain["kl"] != merged["kl"]
    assert [one["config"]["merge"] for one in result["settings"]] == [False, True]


def test_the_caches_format_is_compared(sweep):
    result = sweep("--policy", "grid", "--keep", "0.5", "--kv-dtype", "model", "--kv-dtype", "int8", "--json").json
    rows = {row["group"]: row["overall"] for row in result["summary"]}
    full, packed = rows["grid keep=0.5"], rows["grid keep=0.5, int8 cache"]
    assert packed["kept_fraction"] == full["kept_fraction"] == full["cache_fraction"]
    head_size = result["model"]["head_size"]
    assert head_size == 8
    expected = full["cache_fraction"] * (head_size + 2) / (head_size * 4)
    assert packed["cache_fraction"] == pytest.approx(expected, abs=1e-5)


def test_the_same_command_again_only_reads(sweep, tmp_path, monkeypatch):
    first = sweep("--policy", "grid", "--keep", "0.5", "--json")
    before = (tmp_path / "run.json").read_bytes()
    monkeypatch.setattr(
        "crosstrim.asking.answering.generate", lambda *_args, **_options: pytest.fail("answered again")
    )
    again = sweep("--policy", "grid", "--keep", "0.5", "--json")
    assert again.json == first.json
    assert again.stderr == f"crosstrim: {tmp_path}/run.json is complete already; nothing was run.\n"
    assert (tmp_path / "run.json").read_bytes() == before
    other = sweep("--policy", "grid", "--keep", "0.25")
    assert (other.code, other.stdout) == (1, "")
    difference = "only there: grid keep=0.5; only here: grid keep=0.25"
    assert f"run.json is a run with other settings ({difference}); run it as it was begun" in other.stderr
    turned = sweep("--policy", "grid", "--keep", "0.5", "--rating-rows", "last_turn")
    assert "other settings grid keep=0.5.config.rating_rows (all there, last_turn here)" in turned.stderr


def test_an_interruption_says_how_to_go_on(sweep, tmp_path, monkeypatch):
    def interrupted(*_arguments, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("crosstrim.asking.answering.generate", interrupted)
        result = sweep("--policy", "grid", "--keep", "0.5")
    assert (result.code, result.stdout) == (130, "")
    assert result.stderr == "crosstrim: interrupted; what is done is kept, and the same command goes on.\n"
    assert sweep("--policy", "grid", "--keep", "0.5").code == 0
    assert not (tmp_path / "run.json.journal").exists()


def test_skipping_names_the_rows_and_goes_on(sweep, data, tmp_path):
    result = sweep("--data", data, "--policy", "grid", "--keep", "0.5", "--on-error", "skip", "--json")
    first, second = result.stderr.splitlines()
    complaint = f"{data}, line 2: there is no picture {tmp_path}/none.png; check the path."
    assert (first, second) == (f"crosstrim: {complaint}", f"crosstrim: wrote {tmp_path}/run.json")
    assert result.json["dataset"]["left_out"] == [complaint]
    assert result.json["dataset"]["questions"] == 18
    assert result.json["dataset"]["name"] == str(data)


@pytest.mark.usefixtures("nothing_loads")
def test_stopping_names_the_rows_and_does_nothing(sweep, data, tmp_path):
    result = sweep("--data", data)
    assert (result.code, result.stdout) == (1, "")
    first, second = result.stderr.splitlines()
    assert first.startswith(f"crosstrim: {data}, line 2: there is no picture")
    assert second.startswith(f"crosstrim: 1 of 19 rows of {data} cannot be asked (line 2); repair them")
    assert not list(tmp_path.glob("run*"))


def test_a_page_is_drawn_from_a_finished_run(sweep, run, tmp_path):
    sweep("--policy", "grid", "--keep", "0.5")
    files = [f"{tmp_path}/run/{name}" for name in ("report.md", "accuracy.png", "unchanged.png")]
    assert run("eval", "--report", tmp_path / "run.json").stdout.splitlines() == files
    files = [f"{tmp_path}/page/{name}" for name in ("report.md", "accuracy.png", "unchanged.png")]
    result = run("eval", "--report", tmp_path / "run.json", "--to", tmp_path / "page", "--json")
    assert result.json == {"files": files}


@pytest.mark.usefixtures("nothing_loads", "questions")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--k", "0.1", "--k", "0.2"], ("several --k ", "--out")),
        (["--policy", "grid", "--policy", "union"], ("several --policy", "--out")),
        (["--policy", "oracle", "--keep", "0.5"], ("--policy oracle", "--out")),
        (["--kv-dtype", "int8", "--kv-dtype", "fp8"], ("several --kv-dtype", "--out")),
        (["--data", "a.jsonl"], ("--data", "--out")),
        (["--first-layer", "both"], ("--first-layer", "--out")),
        (["--seeds", "5"], ("--seeds", "--out")),
        (["--to", "page"], ("--to", "--report")),
        (["--report", "run.json", "--k", "0.5"], ("--k has no effect", "--report", "leave one")),
        (["--report", "run.json", "--quick"], ("--quick has no effect", "--report")),
        (["--report", "run.json", "--out", "o.json"], ("--out has no effect", "--report")),
        (["--out", "run.json", "--k-base", "all"], ("--k-base", "--k.")),
        (
            ["--out", "run.json", "--first-layer", "both", "--whole-first-layer"],
            ("--first-layer and --whole-first-layer", "give one"),
        ),
        (["--out", "run.json", "--to", "page"], ("--to", "--report")),
        (["--out", "run.json", "--policy", "onion"], ("policy='onion'",)),
        (["--out", "run.json", "--first-layer", "half"], ("first_layer='half'",)),
        (["--out", "run.json", "--on-error", "ask"], ("--on-error ask", "stop, skip")),
    ],
)
def test_wrong_usage_ends_with_two(run, arguments, words):
    result = run("eval", *arguments)
    assert (result.code, result.stdout) == (2, "")
    told = " ".join(result.stderr.replace("│", " ").split())
    assert all(one in told for one in words)


@pytest.mark.usefixtures("nothing_loads", "questions")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "run.txt"], ("run.txt", ".json")),
        (["--out", "no/run.json"], ("no/run.json", "create no")),
        (["--out", "run.json", "--data", "no.jsonl"], ("no.jsonl", "No such file")),
        (["--report", "no.json"], ("no.json", "No such file")),
    ],
)
def test_refusals_take_one_line_and_no_work(run, arguments, words):
    result = run("eval", *arguments)
    assert (result.code, result.stdout) == (1, "")
    assert all(one in result.stderr for one in words)
    assert result.stderr.count("\n") == 1


def test_the_defaults_are_those_that_help_names(run):
    text = " ".join(run("eval", "--help").stdout.split())
    assert ", ".join(settings.POLICIES) in text
    assert ", ".join(map(str, settings.KEEPS)) in text
