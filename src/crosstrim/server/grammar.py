"""Answers that meet a JSON schema, by llguidance: at each step only the tokens that can still lead to one."""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from crosstrim.errors import InputError, MissingExtraError

MAX_BYTES = 16 << 10
"""Of a schema, as JSON."""

_WAIT_SECONDS = 60.0  # for the schemas of others that are being read
_ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "$schema", "$comment", "deprecated", "readOnly", "writeOnly"}
)
_DEFINITIONS = frozenset({"$defs", "definitions"})
_ALONE = frozenset({"$ref", "anyOf"})
_CONSTRAINTS = frozenset(
    {
        *("type", "enum", "const", "properties", "required", "additionalProperties", "items", "prefixItems"),
        *("minItems", "maxItems", "pattern", "format", "minLength", "maxLength", "minimum", "maximum"),
        *("exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    }
)
_SPACE = " ?"  # between values; more of it, and a model could go on with it for ever


class GrammarFailedError(Exception):
    """A grammar became too costly, or met a token that it did not allow."""


class Grammar:
    """What may come next in one answer.

    Args:
        matcher: llguidance's `LLMatcher`.
    """

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def allowed(self, logits: torch.Tensor) -> torch.Tensor:
        """Which tokens may come next.

        Args:
            logits: (vocabulary,).

        Returns:
            (vocabulary,), bool, on the device of the logits.

        Raises:
            GrammarFailedError: that cannot be found out.
        """
        bias = bytearray(self._matcher.compute_logit_bias())  # a byte a token, 0 for what may not come
        self._check()
        # The tokenizer knows tokens that the model cannot say, such as the one for a picture.
        return (torch.frombuffer(bias, dtype=torch.uint8)[: len(logits)] != 0).to(logits.device)

    def take(self, token: int) -> None:
        """Go on behind a token.

        Raises:
            GrammarFailedError: it may not come.
        """
        self._matcher.consume_token(token)
        self._check()

    def begin_again(self) -> None:
        """Forget what was said."""
        self._matcher.reset()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarFailedError(self._matcher.stop_reason())  # its message would quote the answer in the log


class Grammars:
    """Makes grammars of JSON schemas, by any threads.

    Args:
        tokenizer: of a processor.
        ends: tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, ends: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._ends = sorted(ends)
        self._known: Any = None
        self._lock = threading.Lock()

    def grammar(self, schema: Mapping[str, Any], deadline: float | None = None) -> Grammar:
        """What may be said under a schema.

        Args:
            schema: a JSON schema.
            deadline: `time.monotonic` when nobody waits for it any more; None is never.

        Raises:
            MissingExtraError: llguidance is not installed.
            InputError: the schema is too large, or holds what cannot be held to.
            TimeoutError: others' schemas took until the deadline.
        """
        try:
            from llguidance import LLMatcher, LLParserLimits, hf
        except ImportError as error:
            raise MissingExtraError(
                "this server cannot hold answers to a schema, as llguidance is not installed there: "
                "pip install 'crosstrim[json]'."
            ) from error
        check(schema)
        wait = _WAIT_SECONDS if deadline is None else max(0.0, deadline - time.monotonic())
        if not self._lock.acquire(timeout=wait):  # one at a time: a costly schema takes one core and no more
            raise TimeoutError
        try:
            if self._known is None:
                self._known = hf.from_tokenizer(self._tokenizer, eos_token=self._ends)
            closed = json.dumps(_closed(schema))
            source = LLMatcher.grammar_from_json_schema(closed, overrides={"whitespace_pattern": _SPACE})
            limits = LLParserLimits(verbose_errors=False)
            matcher = LLMatcher(self._known, source, log_level=0, limits=limits)
        except ValueError as error:
            raise _refusal(error) from error
        finally:
            self._lock.release()
        if matcher.is_error():
            raise _refusal(matcher.get_error())
        return Grammar(matcher)


def _refusal(why: object) -> InputError:
    first = str(why).partition("\n")[0][:200].rstrip(".")
    return InputError(f"answers cannot be held to the JSON schema: {first}.")


def check(schema: Mapping[str, Any]) -> None:
    """Refuse a schema whose grammar could take for ever to make.

    That is so where several patterns must hold for one text, and each way to say that is refused: `allOf`, and `$ref`
    or `anyOf` beside a constraint.

    Raises:
        InputError: the schema is too large, or holds a keyword that is not supported.
    """
    size = len(json.dumps(schema))
    if size > MAX_BYTES:
        raise InputError(f"the JSON schema has {size} bytes; the limit is {MAX_BYTES}. Make it smaller.")
    for part in _schemas(schema):
        known = _ANNOTATIONS | _DEFINITIONS | _ALONE | _CONSTRAINTS
        unknown = next((name for name in part if name not in known), None)
        if unknown is not None:
            raise InputError(f"this server does not support {unknown!r} in a JSON schema; leave it out.")
        alone = next((name for name in part if name in _ALONE), None)
        beside = next((name for name in part if name != alone and name in _ALONE | _CONSTRAINTS), None)
        if alone is not None and beside is not None:
            raise InputError(f"the JSON schema has {beside!r} beside {alone!r}; put it into what {alone!r} leads to.")


def _closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with no properties beside those it names, unless it says so: a model might add for ever."""
    closed = copy.deepcopy(dict(schema))
    for part in _schemas(closed):
        if "properties" in part:
            part.setdefault("additionalProperties", False)
    return closed


def _schemas(schema: Any) -> Iterator[dict[str, Any]]:
    """A schema and those within it. Bodies are not deep, so this is not either."""
    if not isinstance(schema, dict):
        return
    yield schema
    for name, value in schema.items():
        if name in _DEFINITIONS or name == "properties":
            for one in value.values() if isinstance(value, Mapping) else ():
                yield from _schemas(one)
        elif name in ("anyOf", "prefixItems"):
            for one in value if isinstance(value, list) else ():
                yield from _schemas(one)
        elif name in ("items", "additionalProperties"):
            yield from _schemas(value)
