"""`crosstrim serve`: a server for OpenAI's clients and for Ollama's."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal, cast

import typer

from crosstrim.cli import console, options
from crosstrim.server.settings import Settings

# Engines that bring a server of their own, and what of the options they take.
_BOTH_TAKE = {"engine", "host", "port", "tensor_parallel", "model", "engine_options", *options.TRIM} - {"calibrated"}
_ENGINES = {"sglang": ("SGLang", _BOTH_TAKE | {"device", "allow_untested_backend"}), "vllm": ("vLLM", _BOTH_TAKE)}


@options.with_trim
def serve(
    context: typer.Context,
    engine_options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- OPTION]...", help="Further options of the engine's server; with --engine sglang or vllm."
        ),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            metavar="local|ray|sglang|vllm",
            help="In this process, by Ray Serve, or as SGLang's or vLLM's server.",
        ),
    ] = "local",
    host: Annotated[str, typer.Option("--host", metavar="HOST", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", metavar="PORT", min=0, max=65535, help="0 is a free one, with --engine local.")
    ] = 8000,
    *,
    trim: options.Trim,
    escalate: options.Escalate = None,
    escalate_to: options.EscalateTo = None,
    max_batch: Annotated[
        int, typer.Option("--max-batch", metavar="COUNT", min=1, help="Requests that are answered together.")
    ] = Settings.max_batch,
    max_wait_ms: Annotated[
        float, typer.Option("--max-wait-ms", metavar="MS", min=0, help="How long a request waits for others.")
    ] = Settings.max_wait_ms,
    queue_limit: Annotated[
        int,
        typer.Option(
            "--queue-limit", metavar="COUNT", min=1, help="Requests that may be unfinished; others get 429."
        ),
    ] = Settings.queue_limit,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", min=0.001, help="What a request may take; then 504.")
    ] = Settings.timeout,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            "--max-new-tokens",
            metavar="COUNT",
            min=1,
            help="The most that a request may ask for; one that does not say gets 256, or this where it is less.",
        ),
    ] = Settings.max_new_tokens,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            metavar="KEY",
            envvar="CROSSTRIM_API_KEY",
            show_envvar=True,
            help="Ask every request for this key, or one of several with spaces between; other users may see it on a "
            "command line, so prefer the variable.",
        ),
    ] = None,
    allow_remote_images: Annotated[
        bool, typer.Option("--allow-remote-images", help="Fetch pictures from public web addresses too.")
    ] = False,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--cors-origin",
            metavar="ORIGIN",
            help="Where web pages come from that may talk to the server, such as https://app.example; * is any. Give "
            "it once for each.",
        ),
    ] = None,
    max_image_bytes: Annotated[
        int, typer.Option("--max-image-bytes", metavar="BYTES", min=1, help="Of a picture's file.")
    ] = Settings.max_image_bytes,
    max_pixels: Annotated[
        int, typer.Option("--max-pixels", metavar="COUNT", min=1, help="Of a request's pictures together.")
    ] = Settings.max_pixels,
    feature_cache_mib: Annotated[
        int,
        typer.Option(
            "--feature-cache-mib", metavar="MIB", min=0, help="Kept of pictures that may be asked about again."
        ),
    ] = Settings.feature_cache_bytes >> 20,
    log: Annotated[
        str, typer.Option("--log", metavar="text|json", help="How each request's line on stderr is written.")
    ] = Settings.log,
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="What clients call the model."),
    ] = None,
    replicas: Annotated[
        int, typer.Option("--replicas", metavar="COUNT", min=1, help="Models at work; with --engine ray.")
    ] = 1,
    address: Annotated[
        str | None, typer.Option("--address", metavar="ADDRESS", help="Of a running Ray cluster; with --engine ray.")
    ] = None,
    tensor_parallel: Annotated[
        int, typer.Option("--tensor-parallel", metavar="COUNT", min=1, help="Ranks; with --engine sglang or vllm.")
    ] = 1,
    allow_untested_backend: Annotated[
        bool,
        typer.Option("--allow-untested-backend", help="Let SGLang run with fa3 or flashinfer; not with --k."),
    ] = False,
    model: options.Model = "mini",
    dtype: options.Dtype = None,
    device: options.Device = None,
    quantize: options.Quantize = None,
    json: options.Json = False,
) -> None:
    """Serve the model to OpenAI's clients (/v1/chat/completions) and to Ollama's (/api/chat).

    The trim is that of requests which do not bring their own. Prints the server's URL once it listens.
    """
    from crosstrim.asking import environment
    from crosstrim.asking.escalation import UNTRIMMED
    from crosstrim.engines.sglang import launch as sglang
    from crosstrim.engines.vllm import launch as vllm
    from crosstrim.server import local, ray

    if engine not in ("local", "ray", *_ENGINES):
        raise typer.BadParameter(f"--engine {engine} must be one of local, ray, {', '.join(_ENGINES)}.")
    if engine in _ENGINES:
        _refuse_what_the_engine_does_not_take(context, engine)
        where: dict[str, Any] = {"host": host, "port": port, "tensor_parallel": tensor_parallel}
        where["options"] = engine_options or ()
        if engine == "sglang":
            sglang.serve(model, trim, device=device, allow_untested_backend=allow_untested_backend, **where)
        vllm.serve(model, trim, **where)
    if allow_untested_backend:
        raise typer.BadParameter("--allow-untested-backend goes with --engine sglang.")
    if engine_options or tensor_parallel != 1:
        raise typer.BadParameter("--tensor-parallel and options after -- go with --engine sglang or vllm.")
    if engine == "local" and (replicas != 1 or address is not None):
        raise typer.BadParameter("--replicas and --address go with --engine ray.")
    keys = tuple(api_key.split()) if api_key is not None else ()
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and " ".join(keys) == api_key != ""):
        raise typer.BadParameter(
            "--api-key must be of printable ASCII characters, with one space between two keys and none around them."
        )
    options.attempts(trim, escalate, escalate_to)  # refuses what does not go together
    if log not in ("text", "json"):
        raise typer.BadParameter(f"--log {log} must be one of text, json.")
    settings = Settings(
        model=model,
        name=name,
        dtype=dtype,
        quantization=quantize,
        device=device or (None if engine == "ray" else environment.best_device()),
        trim=trim,
        escalate=escalate,
        escalate_to=tuple(escalate_to or (UNTRIMMED,)),
        max_batch=max_batch,
        max_wait_ms=max_wait_ms,
        queue_limit=queue_limit,
        timeout=timeout,
        max_new_tokens=max_new_tokens,
        api_keys=keys,
        allow_remote_images=allow_remote_images,
        cors_origins=tuple(cors_origin or ()),
        max_image_bytes=max_image_bytes,
        max_pixels=max_pixels,
        feature_cache_bytes=feature_cache_mib << 20,
        log=cast(Literal["text", "json"], log),
    )
    on_ray = partial(ray.serve_on_ray, replicas=replicas, address=address)
    run = on_ray if engine == "ray" else local.serve_here

    listens = False

    def ready(url: str) -> None:
        nonlocal listens
        listens = True
        if json:
            console.print_json({"url": url, "model": model})
        else:
            typer.echo(url)

    try:
        run(settings, host, port, ready)
    except KeyboardInterrupt:
        if not listens:
            raise
        # Ctrl-C is how people stop a server: it did what it was told.


def _refuse_what_the_engine_does_not_take(context: typer.Context, engine: str) -> None:
    """It has a server of its own: what limits ours, a key above all, must not seem to limit that one."""
    name, taken = _ENGINES[engine]
    for typed, source in options.given_beside(context, taken):
        where = "CROSSTRIM_API_KEY" if source == "ENVIRONMENT" else typed
        raise typer.BadParameter(
            f"{where} does not go with --engine {engine}; unset it, and give {name}'s own options after --."
        )
