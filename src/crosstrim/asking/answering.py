"""Ask a model about a picture, trimmed, and beside it untrimmed when wanted."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch

from crosstrim.asking.escalation import Attempt, Escalation, Settled, climb
from crosstrim.asking.inputs import Inputs
from crosstrim.asking.sureness import LowestProbability, Sureness, ends_of
from crosstrim.config import TrimConfig
from crosstrim.errors import ConfigError, ContextLengthError, InputError
from crosstrim.models import mllama, vision
from crosstrim.trimming.handle import TrimHandle, trim
from crosstrim.trimming.report import ImageReport, TrimReport

if TYPE_CHECKING:
    from PIL import Image

WARM_UP = 2
"""Tokens: one of prefill and one of decoding, which are slower the first time."""

_GREEDY = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False}
"""What `generate` is told whatever the model's own configuration of generation says."""


@dataclass(frozen=True)
class Answer:
    """What the model said of a picture.

    Attributes:
        answer: its text.
        tokens: how many tokens were generated.
        seconds: wall-clock time of `generate`, image encoding included, the processor's work not.
        report: what was kept; None when the model ran untrimmed.
        untrimmed: the answer of the untrimmed model to the same question, when it was asked as well.
        attempts: where unsure answers are made again, each in order; this is the last one's. `seconds` is of all.
    """

    answer: str
    tokens: int
    seconds: float
    report: TrimReport | None = None
    untrimmed: Answer | None = None
    attempts: tuple[Attempt, ...] = ()

    @property
    def escalated(self) -> bool:
        """Whether a trimmed answer was unsure, so that it was made again."""
        return len(self.attempts) > 1

    def to_dict(self) -> dict[str, Any]:
        """The answer as plain JSON types; `untrimmed` is there only when it was asked for."""
        values: dict[str, Any] = {"answer": self.answer, "tokens": self.tokens, "seconds": round(self.seconds, 4)}
        if self.report is not None:
            values["report"] = self.report.to_dict()
        if self.untrimmed is not None:
            values["untrimmed"] = self.untrimmed.to_dict()
        if self.attempts:
            values |= {"escalated": self.escalated, "attempts": [one.to_dict() for one in self.attempts]}
        return values


def ask(
    model: Any,
    processor: Any,
    picture: Image.Image,
    question: str,
    config: TrimConfig | None = None,
    *,
    compare: bool = False,
    max_new_tokens: int = 64,
    escalation: Escalation | None = None,
) -> Answer:
    """Ask one question about one picture, greedily decoded.

    Args:
        model: of `crosstrim.load`; untrimmed, and untrimmed again afterwards.
        processor: of `crosstrim.load`.
        picture: what to ask about.
        question: what to ask.
        config: how to trim; None runs the model as it is.
        compare: whether to run the untrimmed model as well. Each then comes after a warm-up, so that their times
            can be compared.
        max_new_tokens: where to cut the answer off.
        escalation: when to answer again, from the same features. It goes with a config.

    Returns:
        The answer and the report of the trim.

    Raises:
        InputError: the question is empty, names an image token, or does not fit into the model with its answer.
        ConfigError: `max_new_tokens` is below 1.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens!r} must be at least 1.")
    check_question(model, processor, question, max_new_tokens)
    inputs = encode(processor, [picture], [question]).to(model.device)
    if config is None or not compare:
        return answer(model, processor, inputs, config, max_new_tokens, escalation)
    found = []
    for one in (config, None):
        generate(model, processor, inputs, config=one, max_new_tokens=WARM_UP)
        found.append(answer(model, processor, inputs, one, max_new_tokens, escalation if one else None))
    return replace(found[0], untrimmed=found[1])


def for_tokenizer(config: TrimConfig, tokenizer: Any) -> TrimConfig:
    """The config with the token ids that open a user turn, where it goes by turns and they were not given."""
    if config.rating_rows != "last_turn" or config.user_turn_ids is not None:
        return config
    return replace(config, user_turn_ids=mllama.user_turn_ids(tokenizer))


def trimmed(
    model: Any, processor: Any, config: TrimConfig | None
) -> contextlib.AbstractContextManager[TrimHandle | None]:
    """The model trimmed as `config` says inside the `with` block; None leaves it as it is."""
    return contextlib.nullcontext() if config is None else trim(model, for_tokenizer(config, processor.tokenizer))


def encode(processor: Any, pictures: Sequence[Image.Image], questions: Sequence[str]) -> Any:
    """The model's inputs for one picture and question per sample, padded on the left.

    Raises:
        InputError: a question is empty, or names an image token.
    """
    prompts = [chat_prompt(processor, question) for question in questions]
    return encode_prompts(processor, [[picture] for picture in pictures], prompts)


def encode_prompts(processor: Any, pictures: Sequence[Sequence[Image.Image]], prompts: Sequence[str]) -> Any:
    """The model's inputs for prompts that the chat template has written, padded on the left.

    Args:
        processor: of `crosstrim.load`.
        pictures: per sample its pictures, as many as its prompt has image tokens; all have some, or none has.
        prompts: one per sample.
    """
    return processor(
        images=[list(sample) for sample in pictures] if any(pictures) else None,
        text=list(prompts),
        add_special_tokens=False,  # the template has written them
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )


def check_question(model: Any, processor: Any, question: str, max_new_tokens: int, images: int = 1) -> None:
    """Refuse a question that the model cannot read together with its answer, before any picture is prepared.

    Args:
        model: of `crosstrim.load`.
        processor: of `crosstrim.load`.
        question: what is asked.
        max_new_tokens: where the answer is cut off.
        images: how many pictures it is about.

    Raises:
        InputError: the question is empty, names an image token, or does not fit.
    """
    prompt = chat_prompt(processor, question, images)
    tokens = len(processor.tokenizer(prompt, add_special_tokens=False)["input_ids"])
    check_length(mllama.max_tokens(model), tokens, max_new_tokens)


def check_length(limit: int, tokens: int, max_new_tokens: int, option: str = "max_new_tokens") -> None:
    """Refuse a prompt that the model cannot read together with its answer: beyond its limit it talks nonsense.

    Args:
        limit: tokens that the model reads.
        tokens: of the prompt.
        max_new_tokens: where the answer is cut off.
        option: what the caller calls that.

    Raises:
        ContextLengthError: together they are more than the model reads.
    """
    if tokens + max_new_tokens > limit:
        raise ContextLengthError(
            f"the prompt has {tokens} tokens and the answer may have {max_new_tokens}; together the model reads "
            f"{limit}. Shorten the prompt, or lower {option}."
        )


def check_inputs(model: Any, inputs: Mapping[str, torch.Tensor], max_new_tokens: int) -> None:
    """`check_length` of the longest prompt in these inputs."""
    check_length(mllama.max_tokens(model), int(inputs["attention_mask"].sum(-1).max()), max_new_tokens)


Turn = tuple[str, str]
"""A question and its answer."""


def chat_prompt(processor: Any, question: str, images: int = 1, turns: Sequence[Turn] = ()) -> str:
    """The text of a conversation about `images` pictures that goes on with `question`.

    Args:
        processor: of `crosstrim.load`.
        question: what is asked now.
        images: how many pictures the conversation opens with.
        turns: what was asked and answered before.

    Raises:
        InputError: the question is no text, empty, or names an image token, or there are turns and no chat template.
    """
    if not isinstance(question, str):
        raise InputError(f"a question must be a str, not a {type(question).__name__}.")
    if not question.strip():
        raise InputError("the question is empty; ask something about the picture.")
    if processor.image_token in question:
        raise InputError(f"the question contains {processor.image_token}, which stands for the picture.")
    if processor.chat_template is None:
        if turns:
            raise InputError("this model has no chat template and cannot go on with a conversation; ask anew.")
        # Base models complete a text; the processor adds the rest.
        return f"{processor.image_token * images}{question}"
    said = [text for turn in turns for text in turn] + [question]
    messages = [
        {"role": ("user", "assistant")[place % 2], "content": [{"type": "text", "text": text}]}
        for place, text in enumerate(said)
    ]
    messages[0]["content"] = [{"type": "image"}] * images + [{"type": "text", "text": said[0]}]
    return cast(str, processor.apply_chat_template(messages, add_generation_prompt=True))


@dataclass(frozen=True)
class Generation:
    """What one call of `generate` gave.

    Attributes:
        texts: one per sample, without special tokens.
        tokens: [B, S] the generated tokens, end of text and padding included.
        logits: [B, V] float32, of the first of them.
        seconds: wall-clock time, with the device's work finished.
        report: what was kept; None when the model ran as it was.
        sureness: of each sample's answer; empty where nobody asked.
    """

    texts: list[str]
    tokens: torch.Tensor
    logits: torch.Tensor
    seconds: float
    report: TrimReport | None
    sureness: Sequence[Sureness] = ()

    @property
    def kept(self) -> tuple[tuple[ImageReport, ...], ...]:
        """Per sample, what was kept of its images; no sample at all where there was nothing to trim."""
        return () if self.report is None else self.report.samples


@torch.no_grad()
def generate(
    model: Any,
    processor: Any,
    inputs: Mapping[str, torch.Tensor],
    *,
    config: TrimConfig | None = None,
    max_new_tokens: int,
    how_sure: bool = False,
    **options: Any,
) -> Generation:
    """Answer a batch of prompts, greedily unless options say otherwise, and take the time.

    Args:
        model: of `crosstrim.load`.
        processor: of `crosstrim.load`.
        inputs: of the processor, padded on the left.
        config: how to trim, for this batch alone; None runs the model as it is.
        max_new_tokens: where to cut answers off.
        how_sure: whether to find out the `sureness`, which takes a softmax a token.
        **options: of `model.generate`.

    Raises:
        InputError: a prompt does not fit into the model with its answer.
        AlreadyTrimmedError: the model is trimmed, and `config` is given.
    """
    from transformers import LogitsProcessorList

    check_inputs(model, inputs, max_new_tokens)
    logits: list[torch.Tensor] = []

    def watch(_tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not logits:
            logits.append(scores)
        return scores

    lowest = LowestProbability(ends_of(model))
    options = {**_GREEDY, "logits_processor": LogitsProcessorList([watch, *[lowest] * how_sure]), **options}
    on_cuda = model.device.type == "cuda"
    with trimmed(model, processor, config) as handle:
        if on_cuda:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, **options)
        if on_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begun
        report = None if handle is None else handle.report()
    new = output[:, inputs["input_ids"].shape[1] :]
    texts = processor.batch_decode(new, skip_special_tokens=True)
    texts = [text.strip() for text in texts]
    return Generation(texts, new, logits[0], seconds, report, lowest.of(output) if how_sure else ())


def settle(
    model: Any,
    processor: Any,
    inputs: Inputs,
    config: TrimConfig | None,
    escalation: Escalation | None,
    max_new_tokens: int,
    **options: Any,
) -> list[Settled]:
    """Answer a batch greedily, and where there is an escalation make its unsure answers again.

    Args:
        model: of `crosstrim.load`.
        processor: of `crosstrim.load`.
        inputs: of `crosstrim.asking.batches.Encoder`, every sample with as many pictures.
        config: how the first attempt trims; None runs the model as it is.
        escalation: what follows it.
        max_new_tokens: where to cut answers off.
        **options: of `model.generate`.

    Returns:
        One per sample; what a sample comes to depends on no other.

    Raises:
        InputError: a prompt does not fit into the model with its answer.
        AlreadyTrimmedError: the model is trimmed, and `config` is given.
    """

    def attempt(batch: Inputs, trim: TrimConfig | None) -> Generation:
        given = {"max_new_tokens": max_new_tokens, "how_sure": escalation is not None, **options}
        with batch.given(model):
            return generate(model, processor, batch, config=trim, **given)

    return climb(attempt, inputs, config, escalation)


def answer(
    model: Any,
    processor: Any,
    inputs: Mapping[str, torch.Tensor],
    config: TrimConfig | None,
    max_new_tokens: int,
    escalation: Escalation | None = None,
    stop: Callable[[], bool] | None = None,
) -> Answer:
    """Answer the one prompt in `inputs` greedily, up to where `stop` says True after a token."""
    options: dict[str, Any] = {}
    if stop is not None:
        from transformers import StoppingCriteriaList

        def stops(tokens: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
            return tokens.new_full((len(tokens),), stop(), dtype=torch.bool)

        options["stopping_criteria"] = StoppingCriteriaList([stops])
    begun = time.perf_counter()
    if not isinstance(inputs, Inputs):
        inputs = Inputs(inputs, None if escalation is None else vision.encode(model, inputs))
    encoded = time.perf_counter() - begun
    (found,) = settle(model, processor, inputs, config, escalation, max_new_tokens, **options)
    return Answer(found.text, len(found.tokens), encoded + found.seconds, found.report, attempts=found.attempts)


def kept_fraction(images: Sequence[ImageReport]) -> float:
    """Of all the visible features of a sample's pictures, which are some, the share that was kept."""
    return sum(one.kept_fraction * one.visible for one in images) / sum(one.visible for one in images)
