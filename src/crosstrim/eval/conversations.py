"""Answer and rate whole batches of conversations, with any number of pictures in each, trimmed or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from crosstrim.asking import answering
from crosstrim.config import TrimConfig
from crosstrim.errors import InputError
from crosstrim.models import continuation
from crosstrim.trimming.report import ImageReport, TrimReport

Conversation = Sequence[Mapping[str, Any]]
"""Messages as chat templates take them: `{"role", "content": [part, ...]}`.

A part is `{"type": "text", "text": ...}`, or `{"type": "image", "image": ...}` with an RGB picture of Pillow.
"""

Kept = tuple[ImageReport, ...] | None
"""What was kept of each picture of one conversation; None when the model ran untrimmed."""


@dataclass(frozen=True)
class Reply:
    """What the model said next.

    Attributes:
        text: without special tokens, and without the stop string and what follows it.
        prompt_tokens: of the conversation.
        tokens: that were generated, the end of text included.
        kept: of its pictures.
    """

    text: str
    prompt_tokens: int
    tokens: int
    kept: Kept


@dataclass(frozen=True)
class Likelihood:
    """How likely a continuation was.

    Attributes:
        log_probability: natural logarithm, summed over its tokens.
        greedy: whether each token was the likeliest.
        tokens: how many it has.
        kept: of the conversation's pictures.
    """

    log_probability: float
    greedy: bool
    tokens: int
    kept: Kept


def encode(processor: Any, conversations: Sequence[Conversation]) -> Any:
    """The model's inputs, padded on the left; conversations without pictures may stand beside others with many.

    Raises:
        InputError: a text names an image token.
    """
    pictures = [
        [part["image"] for message in one for part in message["content"] if part["type"] == "image"]
        for one in conversations
    ]
    return answering.encode_prompts(processor, pictures, [_prompt(processor, one) for one in conversations])


def _prompt(processor: Any, conversation: Conversation) -> str:
    parts = [part for message in conversation for part in message["content"]]
    if any(processor.image_token in part.get("text", "") for part in parts):
        raise InputError(f"a text contains {processor.image_token}, which stands for a picture.")
    if processor.chat_template is None:  # base models complete a text; the processor adds the rest
        return "".join(part.get("text", processor.image_token) for part in parts)
    messages = [{**message, "content": list(map(_without_picture, message["content"]))} for message in conversation]
    return cast(str, processor.apply_chat_template(messages, add_generation_prompt=True))


def _without_picture(part: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in part.items() if name != "image"}


def generate(
    model: Any,
    processor: Any,
    conversations: Sequence[Conversation],
    config: TrimConfig | None,
    *,
    max_new_tokens: int,
    until: Sequence[str] = (),
    **options: Any,
) -> list[Reply]:
    """Go on with each conversation.

    Args:
        model: of `crosstrim.load`, untrimmed.
        processor: of `crosstrim.load`.
        conversations: the batch.
        config: how to trim; None runs the model as it is.
        max_new_tokens: where to cut replies off.
        until: texts that end a reply. A conversation stops at its own; the others go on.
        **options: of `model.generate`, such as `do_sample` and `num_beams`. Greedy without.

    Raises:
        InputError: a text names an image token, or a conversation does not fit into the model with its reply.
    """
    from transformers import StoppingCriteriaList

    inputs = encode(processor, conversations).to(model.device)
    if until:
        stop = _Stop(processor.tokenizer, until, inputs["input_ids"].shape[1])
        options["stopping_criteria"] = StoppingCriteriaList([stop])
    found = answering.generate(model, processor, inputs, config=config, max_new_tokens=max_new_tokens, **options)
    texts = processor.batch_decode(found.tokens, skip_special_tokens=True)  # a stop string may be white space
    prompt_counts = inputs["attention_mask"].sum(1).tolist()
    counts = _lengths(found.tokens, processor.tokenizer.pad_token_id)
    kept = _kept(found.report, len(conversations), beams=options.get("num_beams", 1))
    return [
        Reply(_cut(text, until).strip(), prompt_count, count, one)
        for text, prompt_count, count, one in zip(texts, prompt_counts, counts, kept, strict=True)
    ]


@torch.no_grad()
def loglikelihood(
    model: Any,
    processor: Any,
    conversations: Sequence[Conversation],
    continuations: Sequence[str],
    config: TrimConfig | None,
) -> list[Likelihood]:
    """How likely each continuation is as the model's next words.

    The prompt alone decides what is kept. A continuation is split into tokens by itself, as generation would
    append them.

    Args:
        model: of `crosstrim.load`, untrimmed.
        processor: of `crosstrim.load`.
        conversations: the batch.
        continuations: one per conversation; an empty one has log-probability 0 and is greedy.
        config: how to trim; None runs the model as it is.

    Raises:
        InputError: a text names an image token, or a conversation does not fit into the model with its continuation.
    """
    ids = [processor.tokenizer.encode(text, add_special_tokens=False) for text in continuations]
    longest = max(1, *map(len, ids))
    gaps = [[0] * (longest - len(one)) for one in ids]
    tokens = torch.tensor([one + gap for one, gap in zip(ids, gaps, strict=True)], device=model.device)
    real = torch.tensor([[1] * len(one) + gap for one, gap in zip(ids, gaps, strict=True)], device=model.device)
    inputs = encode(processor, conversations).to(model.device)
    answering.check_inputs(model, inputs, longest)
    with answering.trimmed(model, processor, config) as handle:
        logits = continuation.logits(model, inputs, tokens, real).to(model.device)
        kept = _kept(None if handle is None else handle.report(), len(conversations))
    of_tokens = logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    sums = of_tokens.masked_fill(real == 0, 0).sum(1).tolist()
    greedy = ((logits.argmax(-1) == tokens) | (real == 0)).all(1).tolist()
    return [
        Likelihood(total, is_greedy, len(one), pictures)
        for total, is_greedy, one, pictures in zip(sums, greedy, ids, kept, strict=True)
    ]


def _kept(report: TrimReport | None, batch: int, beams: int = 1) -> list[Kept]:
    """What was kept of each conversation's pictures; beams of one conversation keep the same."""
    if report is None:
        return [None] * batch
    return list(report.samples[::beams]) or [()] * batch  # no sample is listed when none has a picture


def _lengths(tokens: torch.Tensor, padding: int) -> list[int]:
    """How many tokens stand before the padding at the end; a model may say that token as well."""
    return (tokens != padding).flip(1).cumsum(1).ne(0).sum(1).tolist()


class _Stop:
    """A stopping criterion of `generate`: which samples have said a stop string, in what they said themselves."""

    def __init__(self, tokenizer: Any, until: Sequence[str], prompt_length: int) -> None:
        self._tokenizer = tokenizer
        self._until = until
        self._prompt_length = prompt_length
        # A token holds a byte at least, so a stop string that has just been finished lies within so many tokens.
        self._tail = max((len(text.encode()) for text in until), default=0) + 1

    def __call__(self, tokens: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        tail = tokens[:, max(self._prompt_length, tokens.shape[1] - self._tail) :]
        texts = self._tokenizer.batch_decode(tail, skip_special_tokens=True)
        said = [any(stop in text for stop in self._until) for text in texts]
        return torch.tensor(said, device=tokens.device)


def _cut(text: str, until: Sequence[str]) -> str:
    """The text before the first stop string."""
    return text[: min((text.index(stop) for stop in until if stop in text), default=len(text))]
