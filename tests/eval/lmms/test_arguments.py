"""What the plugin makes of arguments and requests, and what it refuses."""

from __future__ import annotations

import pytest
from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model
from PIL import Image

from crosstrim.errors import ConfigError, CrosstrimWarning, InputError
from crosstrim.eval.lmms import model as plugin

PICTURE = Image.new("RGB", (30, 20))


@pytest.fixture(scope="session")
def lossless():
    return plugin.Crosstrim.create_from_arg_string("device=cpu", {"batch_size": "2", "max_batch_size": None})


def test_lmms_eval_finds_both_classes():
    assert get_model("crosstrim") is plugin.Crosstrim
    assert get_model("crosstrim", True) is plugin.CrosstrimSimple


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("kept=0.5", r"unknown model argument 'kept'; crosstrim takes .*\bk\b.*\bpretrained\b"),
        ("user_turn_ids=5", "unknown model argument 'user_turn_ids'"),
        ("k=1.5", r"k=1\.5 must be a share"),
        ("k=0.5,keep=0.5", "two ways"),
        ("keep=half", "keep='half'"),
        ("policy=best", "policy='best'"),
        ("rating_rows=some", "rating_rows='some'"),
        ("trim_first_layer=maybe", "trim_first_layer='maybe'"),
        ("trim=maybe", "trim='maybe' must be True or False"),
        ("trim=False,k=0.5", "trim=False runs the untrimmed model, which has no k"),
        ("dtype=float8", "dtype='float8'"),
        ("device=nowhere", "'nowhere' is no device"),
        ("device=cpu,device_map=auto", "both place the model"),
        ("batch_size=auto", "batch_size='auto' must be a whole number"),
        ("batch_size=0", "batch_size=0 must be"),
    ],
)
def test_bad_arguments_are_refused_by_their_name(arguments, words):
    with pytest.raises(ConfigError, match=words):
        plugin.Crosstrim.create_from_arg_string(arguments, {"batch_size": "1"})


def test_arguments_arrive(lossless):
    assert (lossless.batch_size, lossless.rank, lossless.world_size, str(lossless.device)) == (2, 0, 1, "cpu")
    given = "k=0.25,policy=mean,rating_rows=last_turn,trim_first_layer=False,k_base=all,dtype=bfloat16,batch_size=3"
    model = plugin.Crosstrim.create_from_arg_string(given, {"batch_size": "1"})
    config = {"k": 0.25, "policy": "mean", "rating_rows": "last_turn", "trim_first_layer": False, "k_base": "all"}
    assert model._circumstances["config"].items() >= config.items()
    assert (str(model._model.dtype), model.batch_size) == ("torch.bfloat16", 3)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"max_new_tokens": 1024, "do_sample": False, "until": []}),
        ({"temperature": 0, "top_p": 1.0, "do_sample": True}, {"do_sample": False}),
        ({"temperature": 0.7, "top_p": 0.9}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}),
        ({"temperature": 0.7, "do_sample": False}, {"do_sample": False}),
        ({"do_sample": True, "top_k": 5}, {"do_sample": True, "top_k": 5}),
        (
            {"until": "\n", "num_beams": 3, "max_new_tokens": 5},
            {"until": ["\n"], "num_beams": 3, "max_new_tokens": 5},
        ),
        ({"until": ["", "A"], "temperature": None}, {"until": ["A"], "do_sample": False}),
    ],
)
def test_generation_options(given, expected):
    default = {"max_new_tokens": 1024, "do_sample": False, "until": []}
    assert plugin._generate_options(given) == {**default, **expected}


def test_generation_options_that_do_nothing_are_told():
    with pytest.warns(CrosstrimWarning, match="do nothing here: image_aspect_ratio"):
        plugin._generate_options({"image_aspect_ratio": "original"})
    with pytest.raises(ConfigError, match="until=5 must be"):
        plugin._generate_options({"until": 5})


def asked(lossless, *parts, options=None):
    """One request, as lmms-eval makes it."""
    lossless.task_dict = {"task": {"test": [{}]}}
    messages = [{"role": "user", "content": list(parts)}]
    arguments = ("", lambda document: messages, options or {"max_new_tokens": 2}, 0, "task", "test")
    metadata = {"task": "task", "doc_id": 0, "repeats": 1}
    return Instance(request_type="generate_until", arguments=arguments, idx=0, metadata=metadata)


def test_requests_with_other_options_are_answered_apart(lossless):
    text = {"type": "text", "text": "Read the digits."}
    requests = [asked(lossless, text, options={"max_new_tokens": 1 + number % 2}) for number in range(5)]
    found = [one.token_counts.output_tokens for one in lossless.generate_until(requests)]
    assert found == [1, 2, 1, 2, 1]


@pytest.mark.parametrize("source", ["path", "bytes", "dictionary"])
def test_pictures_may_be_undecoded(lossless, source, tmp_path):
    path = tmp_path / "picture.png"
    PICTURE.save(path)
    url = {"path": str(path), "bytes": path.read_bytes(), "dictionary": {"bytes": path.read_bytes(), "path": None}}
    text = {"type": "text", "text": "Read the digits."}
    decoded, other = (
        lossless.generate_until([asked(lossless, {"type": "image", "url": one}, text)])[0]
        for one in (PICTURE, url[source])
    )
    assert other == decoded


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "video", "url": "a.mp4"}, "shows 'video'; .* text and pictures only"),
        ({"type": "image", "url": 5}, "a int where a picture was expected"),
        ({"type": "image", "url": "missing.png"}, "no picture .*missing.png"),
        ({"type": "image", "url": "https://a.b/c.png"}, "web address"),
        ({"type": "text", "text": "<|image|>"}, r"<\|image\|>"),
    ],
)
def test_requests_that_cannot_be_asked_are_refused(lossless, part, words):
    with pytest.raises(InputError, match=words):
        lossless.generate_until([asked(lossless, part)])


def test_what_is_not_supported_says_so(lossless):
    with pytest.raises(NotImplementedError, match="generate_until_multi_round"):
        lossless.generate_until_multi_round([])


def test_log_likelihoods_warn_of_the_built_in_accuracy(lossless):
    metadata = {"task": "task", "doc_id": 0, "repeats": 1}
    request = Instance(request_type="loglikelihood", arguments=("", " a"), idx=0, metadata=metadata)
    with pytest.warns(CrosstrimWarning, match="process_results"):
        (found,) = lossless.loglikelihood([request])
    total, greedy = found.text
    assert total < 0
    assert greedy is False
