"""The model that lmms-eval runs: trimmed, in real batches, with what was kept in the samples it logs."""

from __future__ import annotations

import inspect
import io
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.utils import simple_parse_args_string
from PIL import Image
from tqdm import tqdm

from crosstrim.asking import environment
from crosstrim.asking.answering import kept_fraction
from crosstrim.asking.images import as_rgb, open_image
from crosstrim.asking.loading import load
from crosstrim.config import TrimConfig
from crosstrim.errors import ConfigError, CrosstrimWarning, InputError
from crosstrim.eval import conversations
from crosstrim.models import compat
from crosstrim.trimming.report import versions

MAX_NEW_TOKENS = 1024
"""Where a reply is cut off if the task does not say; lmms-eval's own adapter for this model takes the same."""

_HOW_TO_TRIM = tuple(one.name for one in fields(TrimConfig) if one.name != "user_turn_ids")
_SAMPLING = ("temperature", "top_p", "top_k")
_OBEYED = ("until", "max_new_tokens", "do_sample", "num_beams", "repetition_penalty", *_SAMPLING)


@dataclass
class _Counts(TokenCounts):  # type: ignore[misc]
    """Token counts of a sample, and beside them, where lmms-eval writes them, what was kept of its pictures."""

    crosstrim: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "crosstrim": self.crosstrim}


class Crosstrim(lmms):  # type: ignore[misc]
    """A cross-attention vision-language model, trimmed.

    Args:
        pretrained: "mini", a folder or a Hub id.
        trim: False runs the untrimmed model, to compare with.
        dtype: as `crosstrim.load` takes it.
        device: "cpu", "cuda", "cuda:1", ...; CUDA where there is one.
        device_map: how to spread the model over devices, such as "auto", in place of `device`.
        attn_implementation: as `crosstrim.load` takes it.
        quantization: likewise.
        revision: of the Hub repository.
        batch_size: how many requests are answered together.
        **options: `k`, `keep`, `policy` and the other fields of `TrimConfig`. None of them is the lossless tier.

    Raises:
        ConfigError: an argument is unknown or out of range.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "mini",
        *,
        trim: bool = True,
        dtype: str | None = None,
        device: str | None = None,
        device_map: str | None = None,
        attn_implementation: str | None = None,
        quantization: str | None = None,
        revision: str | None = None,
        batch_size: int | str = 1,
        **options: Any,
    ) -> None:
        super().__init__()
        self._config = _trim_config(trim, options)
        self.batch_size = _batch_size(batch_size)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self._model, self._processor = load(
            str(pretrained),
            dtype=dtype,
            device_map=_placement(self.accelerator, device, device_map),
            attn_implementation=attn_implementation,
            quantization=quantization,
            revision=None if revision is None else str(revision),
        )
        self.device = self._model.device
        self._circumstances = {
            "config": None if self._config is None else self._config.to_dict(),
            "versions": versions(str(self.device)),
            "compat": {finding.name: finding.repaired for finding in compat.check(self._model)},
        }

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> Self:
        """The model from `--model_args`, which go before lmms-eval's own `--batch_size` and `--device`."""
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**{**given, **simple_parse_args_string(arg_string)})

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Answer every request; those with the same generation options go together."""
        results: list[Any] = [None] * len(requests)
        begun, fractions = time.perf_counter(), []
        for batch in self._batches([repr(sorted(self._options(one).items())) for one in requests]):
            options = _generate_options(self._options(requests[batch[0]]))
            asked = [self._conversation(requests[index]) for index in batch]
            replies = conversations.generate(self._model, self._processor, asked, self._config, **options)
            for index, reply in zip(batch, replies, strict=True):
                fractions += [kept_fraction(reply.kept)] if reply.kept else []
                counts = _Counts(reply.prompt_tokens, reply.tokens, crosstrim=self._account(reply.kept))
                results[index] = GenerationResult(reply.text, counts)
        seconds = time.perf_counter() - begun
        tokens = sum(one.token_counts.output_tokens for one in results)
        mean = {"kept_fraction": sum(fractions) / len(fractions)} if fractions else None
        log_metrics(seconds, tokens, tokens / seconds, mean)
        return results

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Log-probability of every continuation, and whether greedy decoding would have said it."""
        warnings.warn(
            "these are log-probabilities, the likeliest the greatest; the accuracy that lmms-eval 0.7.3 computes for "
            "output_type multiple_choice takes the smallest, as if they were losses: score in process_results.",
            CrosstrimWarning,
            stacklevel=2,
        )
        results: list[Any] = [None] * len(requests)
        for batch in self._batches([""] * len(requests)):
            asked, said = zip(*(self._continued(*requests[index].args) for index in batch), strict=True)
            found = conversations.loglikelihood(self._model, self._processor, asked, said, self._config)
            for index, one in zip(batch, found, strict=True):
                # The pair itself would be turned into a text by lmms-eval 0.7.3; a GenerationResult's is left alone.
                pair = one.log_probability, one.greedy
                results[index] = GenerationResult(pair, _Counts(crosstrim=self._account(one.kept)))
        return results

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not supported."""
        raise NotImplementedError(
            "crosstrim does not run generate_until_multi_round; choose tasks whose output_type is generate_until."
        )

    def _batches(self, keys: Sequence[str]) -> Iterator[list[int]]:
        """Indices of requests with the same key, as many as fit a batch, in their order."""
        progress = tqdm(total=len(keys), disable=self.rank != 0, desc="crosstrim")
        for key in dict.fromkeys(keys):
            group = [index for index, one in enumerate(keys) if one == key]
            for start in range(0, len(group), self.batch_size):
                batch = group[start : start + self.batch_size]
                yield batch
                progress.update(len(batch))
        progress.close()

    def _options(self, request: Any) -> dict[str, Any]:
        options: dict[str, Any] = request.args[2]
        return options

    def _conversation(self, request: Any) -> conversations.Conversation:
        _, messages, _, *place = request.args
        return [
            {"role": message["role"], "content": _parts(message["content"])}
            for message in messages(self._document(*place))
        ]

    def _continued(
        self, context: str, said: Any, visuals: Any = None, *place: Any
    ) -> tuple[conversations.Conversation, str]:
        """A prompt and its continuation, as lmms-eval gives them for log-likelihoods, which it does in one form."""
        document = self._document(*place) if place else None
        said = said(document) if callable(said) else said
        return _asked(context, visuals(document) if visuals else None), said

    def _document(self, index: Any, task: str, split: str) -> Any:
        return self.task_dict[task][split][index]

    def _account(self, kept: conversations.Kept) -> dict[str, Any]:
        """What a logged sample is to say of trimming."""
        images = [{"visible": one.visible, "kept": one.kept, "layers": list(one.layers)} for one in kept or ()]
        fraction = kept_fraction(kept) if kept else None
        return {"kept_fraction": fraction, "images": images, **self._circumstances}


class CrosstrimSimple(Crosstrim):
    """The same in the form that lmms-eval calls simple (`--force_simple`), the only one with log-likelihoods."""

    is_simple = True

    def _options(self, request: Any) -> dict[str, Any]:
        options: dict[str, Any] = request.args[1]
        return options

    def _conversation(self, request: Any) -> conversations.Conversation:
        context, _, visuals, *place = request.args
        return _asked(context, visuals(self._document(*place)))


def _trim_config(trimmed: object, options: dict[str, Any]) -> TrimConfig | None:
    known = sorted({*_HOW_TO_TRIM, *inspect.signature(Crosstrim).parameters} - {"options"})
    unknown = sorted(options.keys() - set(_HOW_TO_TRIM))
    if unknown:
        raise ConfigError(f"unknown model argument {unknown[0]!r}; crosstrim takes {', '.join(known)}.")
    if not isinstance(trimmed, bool):
        raise ConfigError(f"trim={trimmed!r} must be True or False.")
    if not trimmed and options:
        raise ConfigError(f"trim=False runs the untrimmed model, which has no {min(options)}; leave out one of them.")
    return TrimConfig.from_dict(options) if trimmed else None


def _batch_size(value: object) -> int:
    try:
        size = int(str(value))
    except ValueError:
        size = 0
    if size < 1:
        raise ConfigError(f"batch_size={value!r} must be a whole number of at least 1; no other is tried out.")
    return size


def _placement(accelerator: Any, device: str | None, device_map: str | None) -> Any:
    if device is not None and device_map is not None:
        raise ConfigError(f"device={device!r} and device_map={device_map!r} both place the model; give one of them.")
    if accelerator.num_processes == 1:
        return device_map or device or environment.best_device()
    if device is not None or device_map is not None:
        raise ConfigError(
            f"device={device or device_map!r} cannot hold for {accelerator.num_processes} processes, of which each "
            "takes a device of its own; leave device and device_map out."
        )
    return accelerator.device


def _generate_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """A task's generation options as `conversations.generate` takes them."""
    ignored = sorted(options.keys() - set(_OBEYED))
    if ignored:
        said = f"these generation options do nothing here: {', '.join(ignored)}."
        warnings.warn(said, CrosstrimWarning, stacklevel=2)
    given = {name: options[name] for name in _OBEYED if options.get(name) is not None}
    until = given.pop("until", [])
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, list | tuple) or not all(isinstance(one, str) for one in until):
        raise ConfigError(f"until={until!r} must be a text or a list of texts.")
    temperature = given.get("temperature")
    sample = temperature != 0 and given.pop("do_sample", temperature is not None)
    if not sample:
        given = {name: value for name, value in given.items() if name not in _SAMPLING}
    given = {"max_new_tokens": MAX_NEW_TOKENS, **given, "do_sample": bool(sample)}
    return {**given, "until": [one for one in until if one]}


def _asked(context: str, visuals: Sequence[Any] | None) -> conversations.Conversation:
    """One user message: the pictures, then the text."""
    content = [{"type": "image", "url": one} for one in visuals or ()]
    return [{"role": "user", "content": _parts([*content, {"type": "text", "text": context}])}]


def _parts(content: Any) -> list[dict[str, Any]]:
    """A message's content as chat templates take it, its pictures opened."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [_part(one) for one in content]


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    if part["type"] == "image":
        return {"type": "image", "image": _opened(part["url"])}
    raise InputError(f"the task shows {part['type']!r}; Llama-3.2-Vision reads text and pictures only.")


def _opened(source: Any) -> Image.Image:
    if isinstance(source, Image.Image):
        return as_rgb(source)
    if isinstance(source, Mapping) and source.get("bytes"):
        source = source["bytes"]
    if isinstance(source, bytes):
        return open_image(io.BytesIO(source))
    if isinstance(source, str | Path):
        return open_image(source if "://" in str(source) else Path(source).absolute())
    raise InputError(f"the task shows a {type(source).__name__} where a picture was expected.")
