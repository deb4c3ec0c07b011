"""SGLang with the external model package gives the tokens of crosstrim on transformers."""

from __future__ import annotations

import pytest

import crosstrim
from crosstrim import mini
from tests.support import sglang_runs

pytestmark = pytest.mark.sglang

K = 0.1


@pytest.fixture(scope="module")
def processor():
    return sglang_runs.processor_of(mini.path())


@pytest.fixture(scope="module")
def model():
    return crosstrim.load("mini")[0]


@pytest.fixture(scope="module")
def short(processor):
    return sglang_runs.mixed(processor, count=4, tokens=12)


@pytest.fixture(scope="module")
def retracted(tmp_path_factory, short):
    """Every third step takes a running request's slots away; it is prefilled again later."""
    folder, environment = tmp_path_factory.mktemp("retracted"), {"SGLANG_TEST_RETRACT": "1"}
    return sglang_runs.run(folder, mini.path(), short, trim={"k": K}, environment=environment, max_total_tokens=1000)


@pytest.fixture(scope="module")
def unfreed(tmp_path_factory, short):
    """The same choice, with the slots held although nothing reads them."""
    folder = tmp_path_factory.mktemp("unfreed")
    trim = {"k": K, "free_slots": False}
    return sglang_runs.run(folder, mini.path(), short, trim=trim, max_total_tokens=1000)


@pytest.fixture(scope="module")
def spread(tmp_path_factory, short):
    """Two tensor-parallel ranks, which see half of the heads each, and a budget that all of them fill together."""
    folder = tmp_path_factory.mktemp("spread")
    environment = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    return sglang_runs.run(
        folder, mini.path(), short, trim={"keep": 0.3}, environment=environment, tp_size=2, max_total_tokens=4096
    )


@pytest.fixture(scope="module")
def spread_by_heads(tmp_path_factory, short):
    """Two ranks, each with half of the heads whose union stays."""
    folder = tmp_path_factory.mktemp("spread_by_heads")
    environment = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    return sglang_runs.run(
        folder, mini.path(), short, trim={"k": K}, environment=environment, tp_size=2, max_total_tokens=4096
    )


@pytest.fixture(scope="module")
def lossless(tmp_path_factory, short):
    return sglang_runs.run(tmp_path_factory.mktemp("lossless"), mini.path(), short, trim={}, max_total_tokens=4096)


def test_a_mixed_batch_gives_the_tokens_of_transformers(unfreed, model, processor, short):
    assert unfreed.tokens(0) == sglang_runs.reference(model, processor, short, k=K)


def test_freeing_slots_and_being_retracted_changes_no_token(retracted, unfreed):
    assert retracted.retracted > 0
    assert retracted.tokens(0) == unfreed.tokens(0)


def test_freed_slots_leave_the_request(retracted, unfreed):
    """SGLang counts the image slots among the prompt's tokens."""
    pairs = zip(retracted.prompt_tokens(0), unfreed.prompt_tokens(0), strict=True)
    assert [small < large for small, large in pairs] == [True, True, False] * 4 + [True]


def test_freed_slots_serve_other_requests(retracted, unfreed):
    assert retracted.most_in_flight >= 1.5 * unfreed.most_in_flight


def test_two_ranks_choose_alike(spread, model, processor, short):
    assert spread.tokens(0) == sglang_runs.reference(model, processor, short, keep=0.3)


def test_two_ranks_unite_their_heads(spread_by_heads, model, processor, short):
    assert spread_by_heads.tokens(0) == sglang_runs.reference(model, processor, short, k=K)


def test_lossless_gives_the_tokens_of_lossless_on_transformers(lossless, model, processor, short):
    assert lossless.tokens(0) == sglang_runs.reference(model, processor, short)


def test_the_pool_is_free_again(retracted, unfreed, spread, spread_by_heads, lossless):
    runs = (retracted, unfreed, spread, spread_by_heads, lossless)
    assert [run.slots_in_use_at_the_end for run in runs] == [0] * len(runs)
