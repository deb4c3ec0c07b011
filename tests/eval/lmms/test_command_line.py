"""lmms-eval's own command line runs crosstrim on local tasks, offline.

The tasks have the shape of the paper's four benchmarks: their fields, pairing, generation options, metrics and
aggregation. Their questions are mini's own, since it understands no others: a letter, or yes or no, is read off its
answer by the task. So this tests the plugin and not how well a real model does on the benchmarks.
"""

from __future__ import annotations

import json

import pytest

import crosstrim
from crosstrim.asking.images import open_image
from tests.eval.lmms.tasks import utils
from tests.support.conversations import stock, user
from tests.support.lmms_documents import DOCUMENTS, NAMES
from tests.support.questions import write_rows

TRIMS = {"k=0.05": ("union", "--k", "0.05"), "keep=0.1": ("contribution", "--keep", "0.1")}
BATCHED = ("--batch_size", "4", "--use_cache", "CACHE")


@pytest.fixture(scope="session")
def crosstrim_eval(forked, tmp_path_factory):
    """What `crosstrim eval --data` says of every document with one picture: answer, kept and visible by question."""

    def run(trim):
        rows = {}
        for document in (one for documents in DOCUMENTS.values() for one in documents):
            if len(document["images"]) == 1:
                key = document["images"][0], document["question"]
                rows[key] = {"image": key[0], "question": key[1], "answers": "?", "id": json.dumps(key)}
        folder = tmp_path_factory.mktemp("eval")
        data, out = write_rows(folder, list(rows.values())), folder / "out.json"
        policy, *knob = TRIMS[trim]
        arguments = ["eval", "--data", str(data), "--out", str(out), *knob]
        arguments += ["--policy", policy, "--max-new-tokens", "64", "--batch-size", "8", "--device", "cpu"]
        forked("crosstrim", arguments, log=folder / "log.txt")
        result = json.loads(out.read_text(encoding="utf-8"))
        found = result["predictions"][f"{policy} {trim}"]
        return {
            tuple(json.loads(item["id"])): (answer, kept, item["visible"])
            for item, answer, kept in zip(result["items"], found["answer"], found["kept"], strict=True)
        }

    return run


@pytest.mark.parametrize("trim", TRIMS)
def test_answers_and_kept_features_are_those_of_crosstrim_eval(lmms_eval, crosstrim_eval, trim):
    run, expected = lmms_eval(trim, *BATCHED), crosstrim_eval(trim)
    compared = 0
    for name, documents in DOCUMENTS.items():
        for document, answer, account in zip(documents, run.answers(name), run.accounts(name), strict=True):
            if len(document["images"]) == 1:
                text, kept, visible = expected[document["images"][0], document["question"]]
                assert answer == text
                assert [(one["kept"], one["visible"]) for one in account["images"]] == [(kept, visible)]
                assert account["kept_fraction"] == pytest.approx(kept / visible)
                compared += 1
    assert compared > 50


def test_answers_do_not_depend_on_batches(lmms_eval):
    batched, single = lmms_eval("k=0.05", *BATCHED), lmms_eval("k=0.05")
    for name in DOCUMENTS:
        assert batched.answers(name) == single.answers(name)
        assert batched.accounts(name) == single.accounts(name)
    numbers = [len(one["images"]) for one in batched.accounts("llava_like")]
    assert numbers == [len(one["images"]) for one in DOCUMENTS["llava_like"]]
    assert {0, 1, 3} == set(numbers)


def test_metrics_are_those_of_the_answers(lmms_eval):
    run = lmms_eval("k=0.05", *BATCHED)
    for name, process, metrics in [
        ("seed_like", utils.seed_process_results, {"seed_image": utils.share_right, "seed_all": utils.share_right}),
        ("mme_like", utils.mme_process_results, {"mme_perception_score": utils.mme_score}),
        (
            "mmvp_like",
            utils.mmvp_process_results,
            {"mmvp_accuracy": utils.mmvp_accuracy, "mmvp_pair_accuracy": utils.mmvp_pair_accuracy},
        ),
        ("llava_like", utils.llava_process_results, {"gpt_eval_llava_all": utils.llava_all}),
    ]:
        scored = [process(*one) for one in zip(DOCUMENTS[name], ([one] for one in run.answers(name)), strict=True)]
        for metric, aggregate in metrics.items():
            expected = aggregate([one[metric] for one in scored])
            assert run.results["results"][name][f"{metric},none"] == pytest.approx(expected)
    right = [
        [
            said == document["options"]["AB".index(document["answer"])]
            for said, document in zip(said, pair, strict=True)
        ]
        for said, pair in zip(in_pairs(run.answers("mmvp_like")), in_pairs(DOCUMENTS["mmvp_like"]), strict=True)
    ]
    pair_accuracy = run.results["results"]["mmvp_like"]["mmvp_pair_accuracy,none"]
    assert pair_accuracy == pytest.approx(sum(map(all, right)) / len(right))


def in_pairs(values):
    return list(zip(values[::2], values[1::2], strict=True))


def test_lossless_says_what_the_untrimmed_model_says(lmms_eval):
    lossless, untrimmed = lmms_eval("pretrained=mini", "--batch_size", "4"), lmms_eval("trim=False,batch_size=4")
    for name in DOCUMENTS:
        assert lossless.answers(name) == untrimmed.answers(name)
        assert {one["kept_fraction"] for one in lossless.accounts(name)} <= {1.0, None}
        assert [one["config"] for one in untrimmed.accounts(name)] == [None] * len(DOCUMENTS[name])
        assert [one["images"] for one in untrimmed.accounts(name)] == [[]] * len(DOCUMENTS[name])
    for name, metric, least in [
        ("seed_like", "seed_all", 0.9),
        ("mme_like", "mme_perception_score", 360),
        ("mmvp_like", "mmvp_pair_accuracy", 0.9),
        ("llava_like", "gpt_eval_llava_all", 0.6),
    ]:
        assert lossless.results["results"][name][f"{metric},none"] >= least, "mini knows these"
    trimmed = lmms_eval("k=0.05", *BATCHED)
    assert any(trimmed.answers(name) != lossless.answers(name) for name in DOCUMENTS), "trimming must show"


def test_what_numbers_depend_on_is_written_beside_them(lmms_eval):
    run = lmms_eval("k=0.05", *BATCHED)
    accounts = [one for name in NAMES for one in run.accounts(name)]
    for account in accounts:
        assert account["config"] == crosstrim.TrimConfig(k=0.05).to_dict()
        assert account["versions"]["crosstrim"] == crosstrim.__version__
        assert account["versions"]["device"] == "cpu"
        assert account["compat"]["vision_features"] is True
    fractions = [one["kept_fraction"] for one in accounts if one["images"]]
    assert all(one["kept_fraction"] is None for one in accounts if not one["images"])
    mean = run.results["throughput"]["avg_kept_fraction"]
    assert mean == pytest.approx(sum(fractions) / len(fractions))
    assert 0.05 < mean < 0.6


def test_replies_end_at_stop_strings(lmms_eval):
    run = lmms_eval("k=0.05", *BATCHED)
    assert run.answers("stop_like") == [text.split(" ")[0] for text in run.answers("llava_like")]
    short, long = (
        [sample["token_counts"][0]["output_tokens"] for sample in run.samples[name]]
        for name in ("stop_like", "llava_like")
    )
    assert all(few <= many for few, many in zip(short, long, strict=True))
    assert sum(short) < sum(long)


def test_log_likelihoods(lmms_eval):
    model, processor = crosstrim.load("mini")
    run = lmms_eval("batch_size=3", "--force_simple", names=("choice_like",))
    documents = DOCUMENTS["seed_like"]
    for document, found in zip(documents, run.answers("choice_like"), strict=True):
        asked = user(open_image(document["images"][0]), document["question"])
        for choice, (total, greedy) in zip(utils.choices(document), found, strict=True):
            expected, expected_greedy = stock(model, processor, asked, choice)
            assert float(total) == pytest.approx(expected, abs=1e-3)
            assert greedy == str(expected_greedy)
    assert run.results["results"]["choice_like"]["acc,none"] > 0.9, "mini knows these"
    trimmed = lmms_eval("k=0.05", "--batch_size", "4", "--force_simple", names=(*NAMES, "choice_like"))
    assert trimmed.answers("choice_like") != run.answers("choice_like")
    assert len(trimmed.accounts("choice_like")) == 4 * len(documents)
    assert all(0 < one["kept_fraction"] < 1 for one in trimmed.accounts("choice_like"))


def test_simple_and_chat_say_the_same(lmms_eval):
    chat = lmms_eval("k=0.05", *BATCHED)
    simple = lmms_eval("k=0.05", "--batch_size", "4", "--force_simple", names=(*NAMES, "choice_like"))
    for name in NAMES:
        assert simple.answers(name) == chat.answers(name)
        assert simple.accounts(name) == chat.accounts(name)


def test_two_processes_share_the_work(lmms_eval):
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1")
    both = lmms_eval("k=0.05,batch_size=4", names=("seed_like", "llava_like"), launcher=launcher)
    single = lmms_eval("k=0.05", *BATCHED)
    for name in ("seed_like", "llava_like"):
        assert both.answers(name) == single.answers(name)
        assert both.accounts(name) == single.accounts(name)


def test_answers_that_lmms_eval_kept_are_those_of_the_same_trim(lmms_eval):
    first, other = (lmms_eval(trim, *BATCHED) for trim in TRIMS)
    again = lmms_eval("k=0.05", *BATCHED, names=("seed_like",))
    assert again.answers("seed_like") == first.answers("seed_like")
    assert [one["token_counts"] for one in again.samples["seed_like"]] == [[None]] * 16, "they came from the cache"
    assert all(one["config"]["keep"] == 0.1 for one in other.accounts("seed_like"))
