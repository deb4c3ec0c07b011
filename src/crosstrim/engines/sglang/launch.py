"""Start SGLang's server with trimming, and refuse what trimming cannot work with."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from crosstrim.config import TrimConfig
from crosstrim.engines.process import Server
from crosstrim.engines.settings import check_values
from crosstrim.engines.sglang.settings import Settings
from crosstrim.errors import CrosstrimWarning, EngineError

PACKAGE = "crosstrim.engines.sglang"

# What SGLang's server arguments must say, and the option that makes them say it.
_REQUIRED = {
    "attention_backend": ("torch_native", "--attention-backend torch_native"),
    "prefill_attention_backend": (None, "no --prefill-attention-backend"),
    "decode_attention_backend": (None, "no --decode-attention-backend"),
    "disable_radix_cache": (True, "--disable-radix-cache"),
    "page_size": (1, "--page-size 1"),
    "disable_overlap_schedule": (True, "--disable-overlap-schedule"),
    "chunked_prefill_size": (-1, "--chunked-prefill-size -1"),
    "enable_mixed_chunk": (False, "no --enable-mixed-chunk"),
    "speculative_algorithm": (None, "no --speculative-algorithm"),
    "enable_dp_attention": (False, "no --enable-dp-attention"),
    "pp_size": (1, "--pp-size 1"),
    "disaggregation_mode": ("null", "no --disaggregation-mode"),
    "enable_torch_compile": (False, "no --enable-torch-compile"),
}


# Backends that plan their reads ahead: fine where the number of slots is known from the start, but never tried.
_UNTESTED = ("fa3", "flashinfer")


def check_server(server_args: Any, settings: Settings) -> None:
    """Refuse what trimming is not known to work with; warn of what was allowed without being tested.

    Args:
        server_args: SGLang's `ServerArgs`, resolved.
        settings: what to trim.

    Raises:
        EngineError: an argument has another value than the one that was tested.
    """
    required, backend = dict(_REQUIRED), server_args.attention_backend
    if backend in _UNTESTED:
        if settings.config.count_depends_on_prompt:
            raise EngineError(
                f"attention_backend={backend!r} plans its reads before the prompt has decided how much stays; give "
                "keep= in place of k, or start SGLang with --attention-backend torch_native."
            )
        if settings.allow_untested_backend:
            del required["attention_backend"]
            warnings.warn(
                f"crosstrim in SGLang was tested with the attention backend torch_native alone, not with {backend}.",
                CrosstrimWarning,
                stacklevel=2,
            )
        else:
            value, remedy = required["attention_backend"]
            required["attention_backend"] = value, f"{remedy}, or try {backend} with --allow-untested-backend"
    check_values("SGLang", server_args, required)


_SERVER = Server(
    engine="SGLang",
    module="sglang.launch_server",
    model_option="--model-path",
    ranks_option="--tp-size",
    overrides_option="--json-model-override-args",
    check=lambda options: Settings.read(options, {}),
    options=(
        *("--attention-backend", "torch_native", "--disable-radix-cache"),
        *("--page-size", "1", "--disable-overlap-schedule"),
    ),
    environment={"SGLANG_EXTERNAL_MODEL_PACKAGE": PACKAGE},
)


def command(
    model: str,
    config: TrimConfig,
    *,
    device: str | None = None,
    allow_untested_backend: bool = False,
    options: Sequence[str] = (),
    **where: Any,
) -> tuple[list[str], dict[str, str]]:
    """The command line that starts SGLang's OpenAI-compatible server with trimming, and its environment.

    Args:
        model: "mini", a folder, or a Hub id.
        config: what to trim.
        device: "cpu", "cuda" and so on; None lets SGLang choose.
        allow_untested_backend: let SGLang run with `fa3` or `flashinfer`, which are named in `options`.
        options: further options of `sglang.launch_server`, appended as they are.
        where: host, port and tensor_parallel, as for `Server.command`.

    Returns:
        The arguments, the interpreter first, and what to add to the environment.

    Raises:
        ConfigError: SGLang cannot have that trimming.
    """
    placed = [] if device is None else ["--device", device]
    arguments, environment = _SERVER.command(model, config, options=[*placed, *options], **where)
    environment |= {"SGLANG_USE_CPU_ENGINE": "1"} if device == "cpu" else {}
    environment |= {"CROSSTRIM_ALLOW_UNTESTED_BACKEND": "true"} if allow_untested_backend else {}
    return arguments, environment


def serve(model: str, config: TrimConfig, **options: Any) -> NoReturn:
    """Print the command and become SGLang's server. Takes what `command` takes, and does not return.

    Raises:
        MissingExtraError: SGLang is not installed.
        ConfigError: SGLang cannot have that trimming.
    """
    _SERVER.become(*command(model, config, **options))
