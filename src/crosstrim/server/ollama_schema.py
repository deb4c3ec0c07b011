"""What goes over the wire in Ollama's API: the part of it that makes sense here, and `crosstrim`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from crosstrim.server.asked import Asked, PictureAt, Turn
from crosstrim.server.wire import (
    ANY_OBJECT,
    InMessage,
    Kept,
    Stops,
    Strict,
    Text,
    TokenLogprob,
    TrimOptions,
    as_tuple,
    sampling_temperature,
    top_logprobs,
)

LATEST = ":latest"
"""The tag of a model that is named without one."""

_IGNORED = "Accepted and ignored."
_RANDOM = -1  # as a seed

_Images = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=1_000)]


class UnsupportedOptions(Strict):
    """Options that would change the answer and that this server has not, at the values that ask for nothing."""

    top_k: Literal[-1, 0] | None = None
    min_p: Literal[0] | None = None
    typical_p: Literal[1] | None = None
    tfs_z: Literal[1] | None = None
    repeat_penalty: Literal[1] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    mirostat: Literal[0] | None = None


class Options(UnsupportedOptions):
    """How to answer. Unlike Ollama's, answers are greedy unless `temperature` is above 0."""

    num_predict: int | None = Field(
        None, ge=-2, description="Below 1 the answer may be as long as the server gives and the model reads."
    )
    temperature: float | None = Field(None, ge=0, le=2, description="Below 0.001 it is 0: greedy.")
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="-1 draws one.")
    stop: Stops | None = None
    crosstrim: TrimOptions | None = None
    # How Ollama runs a model, and what only goes with options that are not supported.
    num_ctx: int | None = Field(None, description=_IGNORED)
    num_batch: int | None = Field(None, description=_IGNORED)
    num_gpu: int | None = Field(None, description=_IGNORED)
    main_gpu: int | None = Field(None, description=_IGNORED)
    num_thread: int | None = Field(None, description=_IGNORED)
    num_keep: int | None = Field(None, description=_IGNORED)
    numa: bool | None = Field(None, description=_IGNORED)
    low_vram: bool | None = Field(None, description=_IGNORED)
    f16_kv: bool | None = Field(None, description=_IGNORED)
    use_mmap: bool | None = Field(None, description=_IGNORED)
    use_mlock: bool | None = Field(None, description=_IGNORED)
    repeat_last_n: int | None = Field(None, description=_IGNORED)
    mirostat_tau: float | None = Field(None, description=_IGNORED)
    mirostat_eta: float | None = Field(None, description=_IGNORED)
    penalize_newline: bool | None = Field(None, description=_IGNORED)


class Unsupported(Strict):
    """What Ollama has and this server has not, at the values that ask for nothing."""

    think: Literal[False] | None = None
    tools: list[Any] | None = Field(None, max_length=0)
    suffix: Literal[""] | None = None
    template: Literal[""] | None = None
    context: list[Any] | None = Field(None, max_length=0, description="Send the conversation to /api/chat.")
    raw: Literal[False] | None = None
    truncate: Literal[False] | None = None
    shift: Literal[False] | None = None


class _Request(Unsupported):
    """What /api/chat and /api/generate share."""

    model: str
    stream: bool | None = Field(None, description="Unless it is false, the answer comes in lines of JSON.")
    options: Options = Field(default_factory=lambda: Options.model_validate({}))
    format: Literal["", "json"] | dict[str, Any] | None = Field(None, description='"json", or a JSON schema.')
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20, description="With `logprobs`.")
    keep_alive: str | float | None = Field(None, description="Accepted and ignored: the model stays loaded.")

    @property
    def streams(self) -> bool:
        """Whether the answer is wanted in pieces."""
        return self.stream is not False

    def _asked(self, *turns: Turn) -> Asked:
        options = self.options
        wanted = options.num_predict
        return Asked(
            turns=turns,
            new_tokens=wanted,
            length_field="options.num_predict",
            fills=wanted is not None and wanted < 1,
            trim=options.crosstrim,
            stops=as_tuple(options.stop),
            temperature=sampling_temperature(options.temperature),
            top_p=options.top_p or 1.0,
            seed=None if options.seed == _RANDOM else options.seed,
            top_logprobs=top_logprobs(self.logprobs, self.top_logprobs),
            json_schema=ANY_OBJECT if self.format == "json" else self.format or None,
            stream=self.streams,
        )


class Message(InMessage):
    """One turn; pictures are for users."""

    role: Literal["system", "user", "assistant"]
    content: Text = ""
    images: _Images | None = Field(None, description="Files in base64.")
    tool_calls: list[Any] | None = Field(None, max_length=0, description="There are no tools.")


class ChatRequest(_Request):
    """A conversation; without messages it only asks whether the model is loaded."""

    messages: list[Message] | None = Field(None, max_length=256)

    def asked(self) -> Asked | None:
        """The request as the model's side reads it; None where it asks nothing."""
        turns = [_turn(message.role, message.content, message.images) for message in self.messages or ()]
        return self._asked(*turns) if turns else None


class GenerateRequest(_Request):
    """A question; without one it only asks whether the model is loaded."""

    prompt: Text = ""
    system: Text = ""
    images: _Images | None = Field(None, description="Files in base64.")

    def asked(self) -> Asked | None:
        """The request as the model's side reads it; None where it asks nothing."""
        if not self.prompt and not self.images:
            return None
        system = [_turn("system", self.system)] if self.system else []
        return self._asked(*system, _turn("user", self.prompt, self.images))


def _turn(role: str, text: str, images: list[str] | None = None) -> Turn:
    # The type that is named says nothing: what a file is is told from its content.
    urls = (image if image.startswith("data:") else f"data:image/any;base64,{image}" for image in images or ())
    return Turn(role, (*map(PictureAt, urls), *([text] if text else ())))


class ShowRequest(Strict):
    """Which model to tell about."""

    model: str | None = None
    name: str | None = Field(None, description="What Ollama once called `model`.")
    verbose: bool | None = Field(None, description=_IGNORED)


class _Answer(BaseModel):
    model: str
    created_at: str
    done: bool
    done_reason: Literal["stop", "length", "load"] | None = None
    total_duration: int | None = Field(None, description="Nanoseconds, as all durations.")
    load_duration: int | None = Field(None, description="The model is loaded before requests are taken.")
    prompt_eval_count: int | None = Field(None, description="Tokens; a picture is one.")
    prompt_eval_duration: int | None = Field(None, description="Of the batch's prompts, pictures included.")
    eval_count: int | None = None
    eval_duration: int | None = None
    crosstrim: Kept | None = None
    logprobs: list[TokenLogprob] | None = None


class AnswerMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatAnswer(_Answer):
    """A whole answer of /api/chat, or a line of it."""

    message: AnswerMessage


class GenerateAnswer(_Answer):
    """A whole answer of /api/generate, or a line of it."""

    response: str


class Details(BaseModel):
    """What kind of model it is."""

    parent_model: str = ""
    format: Literal["safetensors"] = "safetensors"
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class ModelEntry(BaseModel):
    """The model, in a list."""

    name: str
    model: str
    modified_at: str = Field(description="When it was loaded.")
    size: int = Field(description="Bytes of its weights.")
    digest: str = Field(description="SHA-256 of its configuration; the weights are not read for it.")
    details: Details


class Tags(BaseModel):
    """The models, of which there is one."""

    models: list[ModelEntry]


class RunningModel(ModelEntry):
    """The model, which is always loaded."""

    expires_at: str = Field(description="Never: a date far away.")
    size_vram: int = Field(description="Bytes of its weights that are not on the CPU.")
    context_length: int


class Running(BaseModel):
    """The models that are loaded."""

    models: list[RunningModel]


class Show(BaseModel):
    """What is known of the model."""

    modified_at: str
    template: str = Field(description="The chat template, in Jinja.")
    details: Details
    model_info: dict[str, Any]
    capabilities: list[str]
    crosstrim: dict[str, Any] = Field(description="How requests are trimmed that do not say.")


class Version(BaseModel):
    """Of crosstrim."""

    version: str


class ErrorResponse(BaseModel):
    """An error in Ollama's shape."""

    error: str
