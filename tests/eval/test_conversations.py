"""Whole conversations in batches: each is answered and rated as if it were alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import crosstrim
from crosstrim.errors import InputError
from crosstrim.eval import conversations
from tests.support.conversations import stock, text, user

# Not of Image.effect_noise, which draws on from whatever the process drew before.
PICTURES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))
    for seed, size in enumerate(((28, 28), (28, 56), (56, 56)))
]
CONFIGS = [None, crosstrim.TrimConfig(), crosstrim.TrimConfig(k=0.2), crosstrim.TrimConfig(keep=0.3)]
SAYINGS = ["a", "yes, it is.", " no", "", "7 7"]


BATCH = [
    user(PICTURES[0], "what is it?"),
    user("no picture at all, and a long text instead"),
    user(PICTURES[1], PICTURES[2], "which?"),
    user(PICTURES[2], "first", PICTURES[0], "then", PICTURES[1]),
    [*user(PICTURES[1], "hm"), {"role": "assistant", "content": [text("yes")]}, *user("really?")],
]


def reading(processor, batch):
    """The prompts of a batch as the model reads them, without padding."""
    inputs = conversations.encode(processor, batch)
    return [
        processor.decode(ids[mask > 0])
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]


def test_pictures_stay_with_their_conversation(loaded):
    _, processor = loaded
    inputs = conversations.encode(processor, BATCH)
    assert reading(processor, BATCH)[3].count("<|image|>") == 2 + 1
    assert [text.count("<|image|>") for text in reading(processor, BATCH)] == [1, 0, 2, 3, 1]
    alone = conversations.encode(processor, BATCH[2:3])
    assert torch.equal(inputs["pixel_values"][2, :2], alone["pixel_values"][0])
    assert (inputs["attention_mask"][:, -1] == 1).all()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("beams", [1, 3])
def test_batches_answer_as_one_by_one(loaded, config, beams):
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
    together = conversations.generate(*loaded, BATCH, config, **options)
    alone = [conversations.generate(*loaded, [one], config, **options)[0] for one in BATCH]
    assert together == alone
    if config is None:
        assert {reply.kept for reply in together} == {None}
    else:
        assert [len(reply.kept) for reply in together] == [1, 0, 2, 3, 1]


def test_text_alone_has_nothing_to_trim(loaded):
    batch = [user("what?"), user("and what else?")]
    trimmed, untrimmed = (
        conversations.generate(*loaded, batch, config, max_new_tokens=6, do_sample=False)
        for config in (CONFIGS[2], None)
    )
    assert [one.kept for one in trimmed] == [(), ()]
    assert [one.text for one in trimmed] == [one.text for one in untrimmed]


def test_what_lossless_says_is_what_the_untrimmed_model_says(loaded):
    untrimmed, lossless = (
        conversations.generate(*loaded, BATCH, config, max_new_tokens=8, do_sample=False) for config in CONFIGS[:2]
    )
    assert [one.text for one in untrimmed] == [one.text for one in lossless]


def test_replies_end_before_a_stop_string_and_stop_there(loaded):
    whole = conversations.generate(*loaded, BATCH, None, max_new_tokens=24, do_sample=False)
    assert [one.tokens for one in whole] == [24] * len(BATCH)
    stop = whole[0].text[5:7]
    cut = conversations.generate(*loaded, BATCH, None, until=[stop, "never said"], max_new_tokens=24, do_sample=False)
    assert [one.text for one in cut] == [one.text.split(stop)[0].strip() for one in whole]
    one = BATCH[:1]
    first = conversations.generate(*loaded, one, None, until=[stop], max_new_tokens=24, do_sample=False)[0]
    before, after = (
        conversations.generate(*loaded, one, None, max_new_tokens=count, do_sample=False)[0].text
        for count in (first.tokens - 1, first.tokens)
    )
    assert stop not in before, "it was to stop earlier"
    assert after.endswith(stop)


def test_padding_that_the_model_says_itself_counts(loaded):
    model, processor = loaded
    padding, calls = processor.tokenizer.pad_token_id, []

    def say_padding(module, args, logits):
        calls.append(logits)
        if len(calls) == 2:
            return torch.zeros_like(logits).index_fill(-1, torch.tensor([padding]), 1.0)
        return logits.index_fill(-1, torch.tensor([padding]), -torch.inf)

    hook = model.lm_head.register_forward_hook(say_padding)
    try:
        said = conversations.generate(*loaded, BATCH, None, max_new_tokens=4, do_sample=False)
    finally:
        hook.remove()
    assert [one.tokens for one in said] == [4] * len(BATCH)


def test_a_stop_string_of_the_prompt_stops_nothing(loaded):
    said = conversations.generate(*loaded, BATCH[:1], None, max_new_tokens=6, do_sample=False)[0]
    spanning = "\n" + said.text[0]  # the prompt ends in a line break
    again = conversations.generate(*loaded, BATCH[:1], None, until=[spanning], max_new_tokens=6, do_sample=False)[0]
    assert again == said


@pytest.mark.parametrize("config", CONFIGS[:2], ids=str)
def test_likelihoods_are_those_of_a_plain_forward_pass(loaded, config):
    found = conversations.loglikelihood(*loaded, BATCH, SAYINGS, config)
    expected = [stock(*loaded, one, saying) for one, saying in zip(BATCH, SAYINGS, strict=True)]
    assert [one.log_probability for one in found] == pytest.approx([total for total, _ in expected], abs=1e-4)
    assert [one.greedy for one in found] == [greedy for _, greedy in expected]


def teacher_forced(model, processor, conversation, saying, config):
    """The same from `generate`, made to say the continuation: what a trimmed model would have said, word by word."""
    inputs = conversations.encode(processor, [conversation])
    ids = processor.tokenizer.encode(saying, add_special_tokens=False)
    length, total, greedy = inputs["input_ids"].shape[1], 0.0, True

    def force(tokens, scores):
        nonlocal total, greedy
        wanted = ids[tokens.shape[1] - length]
        total += scores[0].double().log_softmax(-1)[wanted].item()
        greedy &= scores[0].argmax().item() == wanted
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([wanted]), 0.0)

    if ids:
        with crosstrim.trim(model, config):
            model.generate(**inputs, max_new_tokens=len(ids), do_sample=False, logits_processor=[force])
    return total, greedy


@pytest.mark.parametrize("config", CONFIGS[2:], ids=str)
def test_trimmed_likelihoods_are_those_of_generation(loaded, config):
    found = conversations.loglikelihood(*loaded, BATCH, SAYINGS, config)
    expected = [teacher_forced(*loaded, *one, config) for one in zip(BATCH, SAYINGS, strict=True)]
    assert [one.log_probability for one in found] == pytest.approx([total for total, _ in expected], abs=1e-4)
    plain = conversations.loglikelihood(*loaded, BATCH, SAYINGS, None)
    assert [one.log_probability for one in found] != pytest.approx([one.log_probability for one in plain], abs=1e-3)
    replies = conversations.generate(*loaded, BATCH, config, max_new_tokens=2, do_sample=False)
    for one, reply in zip(found, replies, strict=True):
        assert one.kept == reply.kept, "the continuation must not rate"


def test_what_is_said_greedily_is_greedy(loaded):
    replies = conversations.generate(*loaded, BATCH, CONFIGS[2], max_new_tokens=5, do_sample=False)
    assert all(reply.text for reply in replies)
    sayings = [reply.text for reply in replies]
    found = conversations.loglikelihood(*loaded, BATCH, sayings, CONFIGS[2])
    assert [one.greedy for one in found] == [one.tokens == 5 for one in found]
    wrong = ["#" + text[1:] if text[0] != "#" else "a" + text[1:] for text in sayings]
    assert not any(one.greedy for one in conversations.loglikelihood(*loaded, BATCH, wrong, CONFIGS[2]))


def test_an_image_token_in_a_text_is_refused(loaded):
    with pytest.raises(InputError, match=r"<\|image\|>"):
        conversations.encode(loaded[1], [user(PICTURES[0], "a <|image|> b")])


def test_a_base_model_completes_the_text(checkpoint):
    _, processor = crosstrim.load(checkpoint)
    processor.chat_template = None
    assert reading(processor, [user(PICTURES[0], "it shows")]) == ["<|image|><|begin_of_text|>it shows"]


def test_a_conversation_that_does_not_fit_is_refused(loaded):
    with pytest.raises(InputError, match="the answer may have 512; together the model reads 512"):
        conversations.generate(*loaded, BATCH, None, max_new_tokens=512, do_sample=False)
    with pytest.raises(InputError, match="together the model reads 512"):
        conversations.loglikelihood(*loaded, BATCH[:1], ["a" * 512], None)
