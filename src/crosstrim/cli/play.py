"""`crosstrim play`: a page in the browser on which the model is asked, trimmed and untrimmed."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from crosstrim.cli import console, options


def play(
    host: Annotated[str, typer.Option("--host", metavar="HOST", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="PORT", min=0, max=65535, help="0 is a free one.")] = 7860,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="COUNT", min=1, help="Where to cut answers off.")
    ] = 64,
    model: options.Model = "mini",
    dtype: options.Dtype = None,
    device: options.Device = None,
    quantize: options.Quantize = None,
    json: options.Json = False,
) -> None:
    """Try trimming in the browser: pick a picture, ask, move the budget, see what is kept.

    Prints the page's URL once it can be opened; Ctrl-C ends it. Nothing is sent anywhere, and nothing fetched from
    outside but a model of the Hub. Whoever can reach the address can use the page: there is no password.
    """
    from crosstrim.asking import environment
    from crosstrim.play import serving

    def ready(url: str) -> None:
        if json:
            console.print_json({"url": url, "model": model})
        else:
            typer.echo(url)

    how: dict[str, Any] = {"dtype": dtype, "device": device or environment.best_device(), "quantization": quantize}
    serving.serve(model, host=host, port=port, ready=ready, max_new_tokens=max_new_tokens, **how)
