"""What goes over the wire: the part of OpenAI's chat completions that makes sense here, and `crosstrim`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from crosstrim.errors import InputError
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
    one_or_list,
    sampling_temperature,
    top_logprobs,
)


def _kind_of_part(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"<{kind}>" if kind in ("text", "image_url") else None


class TextPart(InMessage):
    """A piece of text."""

    type: Literal["text"]
    text: Text


class ImageUrl(InMessage):
    """Where a picture is: a data: URI, or a web address where the server allows it."""

    url: str = Field(min_length=1)
    detail: Literal["auto", "low", "high"] = Field("auto", description="Accepted and ignored.")


class ImagePart(InMessage):
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


class Message(InMessage):
    """One turn; pictures are for users."""

    role: Literal["system", "developer", "user", "assistant"] = Field(description="`developer` is `system`.")
    content: Annotated[
        Annotated[Text, Tag("<one>")] | Annotated[list[_Part], Field(max_length=1_000), Tag("<list>")],
        Discriminator(one_or_list),
    ]
    name: str | None = Field(None, description="Accepted and ignored.")
    tool_calls: list[Any] | None = Field(None, max_length=0, description="There are no tools.")

    def turn(self) -> Turn:
        """What was said, by whom; `developer` is what OpenAI now calls `system`, and no chat template knows it."""
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return Turn(role, (self.content,))
        said = (part.text if isinstance(part, TextPart) else PictureAt(part.image_url.url) for part in self.content)
        return Turn(role, tuple(said))


class StreamOptions(Strict):
    """What a stream contains beside the answer."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class NamedSchema(Strict):
    """A JSON schema as OpenAI wraps it."""

    name: str = Field("answer", max_length=256, description="Accepted and ignored.")
    description: str | None = Field(None, description="Accepted and ignored.")
    json_schema: dict[str, Any] = Field(alias="schema", description="Of the keywords that docs/serving.md names.")
    strict: bool | None = Field(None, description="Accepted and ignored: answers always meet the schema.")


class Format(Strict):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    def schema_to_meet(self) -> dict[str, Any] | None:
        """What the answer must meet; None is nothing.

        Raises:
            InputError: the type and the schema do not go together.
        """
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise InputError("response_format.json_schema goes with the type 'json_schema', and that with it.")
        if self.json_schema is not None:
            return self.json_schema.json_schema
        return ANY_OBJECT if self.type == "json_object" else None


class Unsupported(Strict):
    """What OpenAI has and this server has not, at the values that ask for nothing: clients send them unasked."""

    n: Literal[1] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: dict[str, Any] | None = Field(None, max_length=0)
    top_k: Literal[-1, 0] | None = None
    min_p: Literal[0] | None = None
    repetition_penalty: Literal[1] | None = None
    length_penalty: Literal[1] | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: list[Literal["text"]] | None = None
    functions: list[Any] | None = Field(None, max_length=0)
    function_call: Literal["none", "auto"] | None = None
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
    stop: Stops | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20, description="With `logprobs`.")
    response_format: Format | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Accepted and ignored.")
    metadata: dict[str, Any] | None = Field(None, description="Accepted and ignored.")
    safety_identifier: str | None = Field(None, description="Accepted and ignored.")
    prompt_cache_key: str | None = Field(None, description="Accepted and ignored.")
    parallel_tool_calls: bool | None = Field(None, description="Accepted and ignored: there are no tools.")
    crosstrim: TrimOptions | None = None

    def asked(self) -> Asked:
        """The request as the model's side reads it."""
        named = "max_completion_tokens" if self.max_completion_tokens else "max_tokens"
        return Asked(
            turns=tuple(message.turn() for message in self.messages),
            new_tokens=self.max_completion_tokens or self.max_tokens,
            length_field=named,
            trim=self.crosstrim,
            stops=as_tuple(self.stop),
            temperature=sampling_temperature(self.temperature),
            top_p=self.top_p or 1.0,
            seed=self.seed,
            top_logprobs=top_logprobs(self.logprobs, self.top_logprobs),
            json_schema=None if self.response_format is None else self.response_format.schema_to_meet(),
            stream=bool(self.stream),
        )


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


class ChoiceLogprobs(BaseModel):
    """How likely the tokens of an answer were."""

    content: list[TokenLogprob]
    refusal: None = None


class Choice(BaseModel):
    """The only choice."""

    index: int = 0
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: ChoiceLogprobs | None = None


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
