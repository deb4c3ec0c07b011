"""Start SGLang's server with trimming, and refuse what trimming cannot work with."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from crosstrim import mini
from crosstrim.config import TrimConfig
from crosstrim.engines import process
from crosstrim.engines.settings import check_values, given
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


def command(
    model: str,
    config: TrimConfig,
    *,
    device: str | None = None,
    host: str = "127.0.0.1",
    port: int = 30000,
    tensor_parallel: int = 1,
    options: Sequence[str] = (),
) -> tuple[list[str], dict[str, str]]:
    """The command line that starts SGLang's OpenAI-compatible server with trimming, and its environment.

    Args:
        model: "mini", a folder, or a Hub id.
        config: what to trim.
        device: "cpu", "cuda" and so on; None lets SGLang choose.
        host: to listen on.
        port: to listen on.
        tensor_parallel: ranks to spread the model over.
        options: further options of `sglang.launch_server`, appended as they are.

    Returns:
        The arguments, the interpreter first, and what to add to the environment.

    Raises:
        ConfigError: SGLang cannot have that trimming.
    """
    values = given(config)
    Settings.read(values, {})
    arguments = [sys.executable, "-m", "sglang.launch_server"]
    arguments += ["--model-path", str(mini.path()) if model == "mini" else model]
    arguments += ["--served-model-name", model]
    arguments += ["--host", host, "--port", str(port), "--tp-size", str(tensor_parallel)]
    arguments += ["--json-model-override-args", json.dumps({"crosstrim": values})]
    arguments += ["--attention-backend", "torch_native", "--disable-radix-cache", "--page-size", "1"]
    arguments += ["--disable-overlap-schedule"]
    if model == "mini":
        arguments += ["--dtype", "float32"]
    environment = {"SGLANG_EXTERNAL_MODEL_PACKAGE": PACKAGE}
    if device is not None:
        arguments += ["--device", device]
        environment |= {"SGLANG_USE_CPU_ENGINE": "1"} if device == "cpu" else {}
    return [*arguments, *options], environment


def serve(model: str, config: TrimConfig, **options: Any) -> NoReturn:
    """Print the command and become SGLang's server. Takes what `command` takes, and does not return.

    Raises:
        MissingExtraError: SGLang is not installed.
        ConfigError: SGLang cannot have that trimming.
    """
    process.become("SGLang", *command(model, config, **options))
