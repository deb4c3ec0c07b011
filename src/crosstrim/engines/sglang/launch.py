"""Start SGLang's server with trimming, and refuse what trimming cannot work with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from crosstrim.config import TrimConfig
from crosstrim.engines.process import Server
from crosstrim.engines.settings import check_values
from crosstrim.engines.sglang.settings import Settings

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


def check_server(server_args: Any) -> None:
    """Refuse what trimming is not known to work with.

    Args:
        server_args: SGLang's `ServerArgs`, resolved.

    Raises:
        EngineError: an argument has another value than the one that was tested.
    """
    check_values("SGLang", server_args, _REQUIRED)


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
    model: str, config: TrimConfig, *, device: str | None = None, options: Sequence[str] = (), **where: Any
) -> tuple[list[str], dict[str, str]]:
    """The command line that starts SGLang's OpenAI-compatible server with trimming, and its environment.

    Args:
        model: "mini", a folder, or a Hub id.
        config: what to trim.
        device: "cpu", "cuda" and so on; None lets SGLang choose.
        options: further options of `sglang.launch_server`, appended as they are.
        where: host, port and tensor_parallel, as for `Server.command`.

    Returns:
        The arguments, the interpreter first, and what to add to the environment.

    Raises:
        ConfigError: SGLang cannot have that trimming.
    """
    placed = [] if device is None else ["--device", device]
    arguments, environment = _SERVER.command(model, config, options=[*placed, *options], **where)
    return arguments, environment | ({"SGLANG_USE_CPU_ENGINE": "1"} if device == "cpu" else {})


def serve(model: str, config: TrimConfig, **options: Any) -> NoReturn:
    """Print the command and become SGLang's server. Takes what `command` takes, and does not return.

    Raises:
        MissingExtraError: SGLang is not installed.
        ConfigError: SGLang cannot have that trimming.
    """
    _SERVER.become(*command(model, config, **options))
