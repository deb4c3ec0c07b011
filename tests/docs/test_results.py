from __future__ import annotations

import json

import pytest
from recipes import calibration as recipe
from recipes.mini import card

import crosstrim
from crosstrim.data import dataset
from crosstrim.eval import provenance
from tests.support.docs import (
    calibration,
    merging,
    pages,
    per_request,
    policies,
    quantised,
    results,
    siblings,
    unseen,
)


@pytest.mark.parametrize("name", results.PAGES)
def test_what_is_shown_is_what_was_measured(name):
    assert pages.text(name) == results.written(name), "run `python -m tests.support.docs.results`"


def test_mini_reaches_the_promised_accuracy():
    measured = json.loads(pages.text(results.HELDOUT))["results"]
    kinds = measured["untrimmed"]["kinds"]
    assert all(value >= (80 if kind in ("count", "read") else 90) for kind, value in kinds.items())
    assert measured["blind"]["lookups"] < 40


def test_both_files_measured_the_same_model_on_the_same_questions():
    report = json.loads(pages.text(results.HELDOUT))
    kv_dtypes = json.loads(pages.text(results.KV_DTYPES))
    assert kv_dtypes["versions"]["crosstrim"] == report["versions"]["crosstrim"]
    assert all(kv_dtypes["compat"].values())
    for line in pages.text(results.SWEEP).splitlines():
        sweep = json.loads(line)
        assert sweep["questions_per_kind"] == report["questions"]
        assert sweep["versions"]["crosstrim"] == report["versions"]["crosstrim"] == crosstrim.__version__
        assert all(sweep["compat"].values())
        untrimmed = 100 * sweep["untrimmed"]["accuracy"]["overall"]
        assert untrimmed == pytest.approx(report["results"]["untrimmed"]["all"], abs=0.1)
        for name, accuracy in sweep["trimmed"]["accuracy"]["kinds"].items():
            twin = results.Row.of_sweep(sweep).name
            if twin in report["results"]:
                assert 100 * accuracy == pytest.approx(report["results"][twin]["kinds"][name], abs=0.5)


def test_the_analysis_is_of_the_embedded_model_and_agrees_with_the_sweep():
    found = json.loads(pages.text(results.ANALYSIS))
    assert found["dataset"]["sha256"] == dataset.embedded().sha256
    assert found["model"] == provenance.of_model(crosstrim.load("mini")[0], "mini")
    assert all(found["compat"].values())
    sweeps = [json.loads(line) for line in pages.text(results.SWEEP).splitlines()]
    kept = {one["config"]["k"]: one["trimmed"]["kept_fraction"]["overall"] for one in sweeps if one["config"]["k"]}
    unions = {one["k"]: one["kept"] for one in found["first_layer"]}
    assert unions == pytest.approx({k: kept[k] for k in unions}, abs=1e-3)


def test_the_comparison_of_policies_is_of_the_embedded_model_and_supports_the_default():
    """The bars: the paper's rule is free at half, and the rule that decides with `keep` beats it where it matters."""
    runs = policies.committed()
    for run in runs:
        assert run["dataset"]["sha256"] == dataset.embedded().sha256
        assert run["dataset"]["questions"] == 2048
        assert run["model"] == runs[0]["model"] == provenance.of_model(crosstrim.load("mini")[0], "mini")
        assert all(run["compat"].values())
    rows = {(row["policy"], row["keep"]): row for row in policies.rows(trim_first_layer=True)}
    assert rows["random", 0.2]["seeds"] >= 3
    assert rows["union", 0.5]["all"] >= -1
    default = crosstrim.TrimConfig(keep=0.2).decider
    assert all(rows[default, keep]["against"][1] > 0 for keep in (0.05, 0.1, 0.2))
    assert rows[default, 0.2]["lookups"] >= -2
    assert min(rows[default, 0.2]["count"], rows[default, 0.2]["read"]) >= -5


def test_in_three_training_runs_lossless_changes_nothing_and_the_rules_keep_their_order():
    for model in siblings.MODELS:
        runs = [siblings.committed(model, what) for what in ("policies", "k")]
        for run in runs:
            assert run["dataset"]["sha256"] == dataset.embedded().sha256
            assert run["dataset"]["questions"] == 2048
            assert all(run["compat"].values())
        untrimmed = [run["predictions"]["untrimmed"]["answer"] for run in runs]
        assert untrimmed[0] == untrimmed[1], "of the same weights"
        assert siblings.changed(model) == 0
        assert all(gain.low > 0 for gain in siblings.ahead(model).values())
        for keep in siblings.BUDGETS:
            rules = [siblings.right(model, f"{rule} keep={keep}").mean() for rule in ("union", "random")]
            assert rules[0] > rules[1] + 0.1
        assert siblings.lost("mini", 0.1) <= siblings.lost(model, 0.1)
        assert siblings.lost("mini", 0.2) <= siblings.lost(model, 0.2)
    answers = {
        tuple(siblings.committed(model, "k")["predictions"]["untrimmed"]["answer"]) for model in siblings.MODELS
    }
    assert len(answers) == len(siblings.MODELS), "each has weights of its own"


@pytest.mark.parametrize("model", siblings.MODELS[1:])
def test_a_siblings_card_shows_what_was_measured(model):
    text = pages.text(f"evaluation/cards/{model}.md")
    measured = json.loads(pages.text(siblings.path(model, "heldout")))["results"]
    assert card.kinds_table(measured) in text
    assert card.trims_table(measured) in text


@pytest.mark.parametrize("k", siblings.KS)
def test_the_share_that_k_keeps_follows_no_kind_of_question(k):
    kept = [siblings.kept_by_kind(model, k) for model in siblings.MODELS]
    assert len({max(one, key=one.__getitem__) for one in kept}) > 1


def test_merging_is_measured_on_the_embedded_model_and_gains():
    found = merging.committed()
    assert found["dataset"]["sha256"] == dataset.embedded().sha256
    assert found["dataset"]["questions"] == 2048
    model = {name: value for name, value in found["model"].items() if name != "head_size"}
    assert model == provenance.of_model(crosstrim.load("mini")[0], "mini")
    assert all(found["compat"].values())
    rows = {(row["policy"], row["keep"]): row for row in merging.gains()}
    assert set(rows) == {(policy, keep) for policy in ("contribution", "union") for keep in (0.05, 0.1, 0.2)}
    assert all(row["gain"][0] > 0 and row["changed"][1] < row["changed"][0] for row in rows.values())
    assert {pair for pair, row in rows.items() if row["gain"][1] <= 0} == {("contribution", 0.2)}, "as the page says"
    kept = {row["group"]: row["overall"]["cache_fraction"] for row in found["summary"]}
    assert all(kept[group] == kept[group.removesuffix(", merged")] for group in kept)


def test_lossless_changes_nothing_and_the_order_of_the_rules_stays_where_pictures_are_strange():
    found = unseen.committed()
    assert found["dataset"]["questions"] == 768
    model = {name: value for name, value in found["model"].items() if name != "head_size"}
    assert model == provenance.of_model(crosstrim.load("mini")[0], "mini")
    assert all(found["compat"].values())
    rows = unseen.rows()
    assert rows["lossless"]["overall"] == 0
    for keep in (0.05, 0.1, 0.2):
        merged, ours, papers, blind = (
            rows[f"{rule} keep={keep}{rest}"]["overall"]
            for rule, rest in [("contribution", ", merged"), ("contribution", ""), ("union", ""), ("random", "")]
        )
        assert merged < ours < papers < blind


def test_what_quantising_does_was_measured_on_the_embedded_model_and_is_as_the_page_says():
    found = quantised.committed()
    assert found["dataset"]["questions"] == 410
    assert found["model"] == provenance.of_model(crosstrim.load("mini")[0], "mini")
    assert all(found["compat"].values())
    for name in ("nf4", "int8", "fp8"):
        usual = quantised.overlap(name, "all but both")
        assert usual > quantised.overlap(name, "all but the vision tower") > quantised.overlap(name, "everything")
        assert usual > quantised.overlap(name, "all but the leader") > quantised.overlap(name, "everything")


def test_no_prompt_tells_which_budget_it_needs():
    found, source = per_request.committed(), json.loads(pages.text(policies.RESULTS[0]))
    assert found["source"]["dataset"] == source["dataset"]
    fixed = found["changed"]["0.1"]
    assert all(fixed + 2 * row["mixed_error"] < row["mixed"] < per_request.lots(found) for row in found["rows"])
    assert all(0.3 < row["auc_of_kinds"][kind] < 0.75 for row in found["rows"] for kind in ("read", "count"))
    rivals = {row["group"]: row["overall"] for row in json.loads(pages.text(policies.RESULTS[1]))["summary"]}
    assert rivals["mass:0.5"]["kept_fraction"] == pytest.approx(0.41, abs=0.005)
    assert 1 - rivals["mass:0.5"]["unchanged"]["mean"] == pytest.approx(fixed, abs=0.002)


def test_calibration_keeps_its_promise_on_minis_answers():
    """The bar: on a thousand splits the bound is broken in 5 % of them and three standard errors at most."""
    found = json.loads(pages.text(calibration.RESULT))
    splits, error = found["config"]["splits"], 1 - found["config"]["confidence"]
    assert (splits, found["config"]["confidence"]) == (1000, 0.95)
    most = splits * (error + 3 * (error * (1 - error) / splits) ** 0.5)
    rows = [row for policy in ("union", "contribution") for row in found["policies"][policy]["rows"]]
    assert sorted({(row["questions"], row["risk"]) for row in rows}) == [
        (count, risk) for count in (150, 300, 600) for risk in (0.01, 0.02, 0.05)
    ]
    assert len(rows) == 18
    for row in rows:
        assert sum(row["chosen"].values()) + row["refused"] == splits
        assert max(row["broken"].values()) <= most
        assert row["questions"] >= row["needed"] or row["refused"] == splits


def test_the_splits_are_those_of_the_committed_answers():
    found, again = json.loads(pages.text(calibration.RESULT)), json.loads(json.dumps(recipe.compute()))
    assert found["versions"]["crosstrim"] == again["versions"]["crosstrim"]
    for name in found.keys() - {"versions"}:
        assert found[name] == again[name], "run `python -m recipes.calibration`"
