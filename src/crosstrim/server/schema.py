"""What goes over the wire: the part of OpenAI's chat completions that makes sense here, and `crosstrim`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

DEFAULT_NEW_TOKENS = 256
"""Where an answer is cut off if neither the request says so nor the server's limit is lower."""

_COLDEST = 0.001

BRANCHES = frozenset({"<one>", "<list>", "<text>", "<image_url>", "<whole>", "<share>"})
"""Of unions; pydantic puts them into the places of errors, where no client knows them."""

_Text = Annotated[str, Field(max_length=1_000_000)]
_Stop = Annotated[str, Field(min_length=1, max_length=256)]


def _one_or_list(value: Any) -> str:
    return "<list>" if isinstance(value, list) else "<one>"


def _kind_of_part(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"<{kind}>" if kind in ("text", "image_url") else None


def _whole_or_share(value: Any) -> str:
    return "<whole>" if type(value) is int else "<share>"


class _Strict(BaseModel):
    """Fields that are not known are refused: to ignore what was asked for would be a lie."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, given: Any) -> Any:
        """Some clients send every field they know; null asks for nothing."""
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None}


class _InMessage(_Strict):
    """Messages come from many hands, and are sent back with all that was in them; more than is known is ignored."""

    model_config = ConfigDict(extra="ignore", strict=True)


class TextPart(_InMessage):
    """A piece of text."""

    type: Literal["text"]
    text: _Text


class ImageUrl(_InMessage):
    """Where a picture is: a data: URI, or a web address where the server allows it."""

    url: str = Field(min_length=1)
    detail: Literal["auto", "low", "high"] = Field("auto", description="Accepted and ignored.")


class ImagePart(_InMessage):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageUrl


_Part = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[ImagePart, Tag("<image_url>")],
    Discriminator(
        _kind_of_part,
        custom_error_type="kind_of_part",
        custom_error_message="Input should be an object whose type is 'text' or 'image_url'",
    ),
]


class Message(_InMessage):
    """One turn; pictures are for users."""

    role: Literal["system", "developer", "user", "assistant"] = Field(description="`developer` is `system`.")
    content: Annotated[
        Annotated[_Text, Tag("<one>")] | Annotated[list[_Part], Field(max_length=1_000), Tag("<list>")],
        Discriminator(_one_or_list),
    ]
    name: str | None = Field(None, description="Accepted and ignored.")
    tool_calls: list[Any] | None = Field(None, max_length=0, description="There are no tools.")


class TrimOptions(_Strict):
    """How this request is trimmed, in place of the server's own way."""

    k: float | None = Field(None, gt=0, le=1, description="Share that every head of the first layer picks.")
    keep: (
        Annotated[
            Annotated[int, Field(gt=0), Tag("<whole>")] | Annotated[float, Field(gt=0), Tag("<share>")],
            Discriminator(_whole_or_share),
        ]
        | None
    ) = Field(None, description="Exact budget: a share, or a number of features.")
    lossless: bool = Field(False, description="Drop only padding.")
    policy: str | None = Field(None, max_length=64, description="Which features come first.")


class StreamOptions(_Strict):
    """What a stream contains beside the answer."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class TextFormat(_Strict):
    """The form of an answer."""

    type: Literal["text"]


class Unsupported(_Strict):
    """What OpenAI has and this server has not, at the values that ask for nothing: clients send them unasked."""

    n: Literal[1] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: dict[str, Any] | None = Field(None, max_length=0)
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    top_k: Literal[-1, 0] | None = None
    min_p: Literal[0] | None = None
    repetition_penalty: Literal[1] | None = None
    length_penalty: Literal[1] | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: list[Literal["text"]] | None = None
    functions: list[Any] | None = Field(None, max_length=0)
    function_call: Literal["none", "auto"] | None = None
    response_format: TextFormat | None = None
    store: Literal[False] | None = None
    tools: list[Any] | None = Field(None, max_length=0)
    tool_choice: Literal["none", "auto"] | None = None


class ChatRequest(Unsupported):
    """A question. Unlike OpenAI's, answers are greedy unless `temperature` is above 0."""

    model: str
    messages: list[Message] = Field(min_length=1, max_length=256)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, description="Below 0.001 it is 0: greedy.")
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: (
        Annotated[
            Annotated[_Stop, Tag("<one>")] | Annotated[list[_Stop], Field(max_length=16), Tag("<list>")],
            Discriminator(_one_or_list),
        ]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Accepted and ignored.")
    metadata: dict[str, Any] | None = Field(None, description="Accepted and ignored.")
    safety_identifier: str | None = Field(None, description="Accepted and ignored.")
    prompt_cache_key: str | None = Field(None, description="Accepted and ignored.")
    parallel_tool_calls: bool | None = Field(None, description="Accepted and ignored: there are no tools.")
    crosstrim: TrimOptions | None = None

    @property
    def new_tokens(self) -> int | None:
        """Where to cut the answer off, if the request says so."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def sampling_temperature(self) -> float:
        """0 for greedy answers; so are those whose temperature would make logits overflow."""
        return self.temperature if self.temperature is not None and self.temperature >= _COLDEST else 0.0

    @property
    def stops(self) -> tuple[str, ...]:
        """What ends the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class Kept(BaseModel):
    """Image features of a request: those that could be seen, and those that stayed."""

    visible: int
    kept: int


class Usage(BaseModel):
    """What a request took; a picture counts as one token of the prompt."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    crosstrim: Kept


class AnswerMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    """The only choice."""

    index: int = 0
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class ChatCompletion(BaseModel):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class ModelCard(BaseModel):
    """The model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "crosstrim"


class ModelList(BaseModel):
    """The models, of which there is one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Status(BaseModel):
    """How the server is."""

    status: Literal["ok", "ready"]


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """An error in OpenAI's shape."""

    error: ErrorBody


def error(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's shape, as plain JSON types."""
    return ErrorResponse(error=ErrorBody(message=message, type=kind, param=param, code=code)).model_dump()
