"""The options that several verbs share, and what they mean together."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from crosstrim.memory import WEIGHT_BITS
from crosstrim.method.names import BUDGETED, KV_DTYPES, PAPER, POLICIES

if TYPE_CHECKING:
    from crosstrim.asking.escalation import Escalation
    from crosstrim.config import TrimConfig

Trim: TypeAlias = "TrimConfig"
"""What a verb `with_trim` gets."""

DEFAULT_K = 0.25


def parse_keep(text: str) -> float | int:
    """A share when it is written as one ("0.5", "1.0", "5e-1"), a number of features when it is whole ("2048")."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is neither a share such as 0.5 nor a number such as 2048.") from error


Model = Annotated[
    str,
    typer.Option(
        "--model", metavar="MODEL", envvar="CROSSTRIM_MODEL", help="mini, a folder, or a Hugging Face Hub id."
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="float32, bfloat16, float16 or auto (as stored). Default: auto; the mini runs in float32.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="cpu, cuda, cuda:1, ..., or auto to spread over all devices. Default: cuda if there is one, else cpu.",
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        metavar="|".join(WEIGHT_BITS),
        help="Hold the weights in four or eight bits. Default: as they are stored.",
    ),
]
K_HELP = (
    "Every head of the first cross-attention layer keeps this share of the image features, and the union over heads "
    f"stays. Default: {DEFAULT_K}"
)
K = Annotated[float | None, typer.Option("--k", metavar="SHARE", help=f"{K_HELP}.")]
KEEP_HELP = "Keep exactly this share (0.5, 1.0) or number (2048) of each image's visible features, in place of --k."
Keep = Annotated[
    Any,
    typer.Option(
        "--keep",
        metavar="SHARE|COUNT",
        parser=parse_keep,
        help=f"{KEEP_HELP} 1 is one feature, 1.0 all of them.",
    ),
]
Lossless = Annotated[
    bool, typer.Option("--lossless", help="Drop only what nothing can see (padding); the answer stays the same.")
]
POLICY_HELP = (
    f"Which features come first: {PAPER} is the paper's rule and the default with --k, {BUDGETED} the default with "
    f"--keep; there are also {', '.join(sorted(set(POLICIES) - {PAPER, BUDGETED}))}."
)
Policy = Annotated[str | None, typer.Option("--policy", metavar="NAME", help=POLICY_HELP)]
RatingRows = Annotated[
    str,
    typer.Option("--rating-rows", metavar="all|last_turn", help="Which text rates the features."),
]
KBase = Annotated[
    str,
    typer.Option(
        "--k-base", metavar="visible|all", help="What --k is a share of: visible features, or padding as well."
    ),
]
WholeFirstLayer = Annotated[
    bool, typer.Option("--whole-first-layer", help="Leave the first cross-attention layer's own cache untrimmed.")
]
MODEL_DTYPE = "model"


def parse_kv_dtype(text: str) -> str | None:
    """The format's name, or None for the model's own."""
    if text not in (MODEL_DTYPE, *KV_DTYPES):
        raise typer.BadParameter(f"{text!r} must be one of {MODEL_DTYPE}, {', '.join(KV_DTYPES)}.")
    return None if text == MODEL_DTYPE else text


KV_DTYPE_HELP = "How the cache holds what is kept: as the model computes it, or in eight bits."
KvDtype = Annotated[
    Any,
    typer.Option(
        "--kv-dtype",
        metavar="model|int8|fp8",
        parser=parse_kv_dtype,
        help=KV_DTYPE_HELP,
    ),
]
MERGE_HELP = "Fold what is dropped into what stays."
Merge = Annotated[bool, typer.Option("--merge", help=MERGE_HELP)]
Calibrated = Annotated[
    Path | None,
    typer.Option(
        "--calibrated",
        metavar="FILE.json",
        help="Trim as `crosstrim calibrate` found, and refuse another model, precision or repairs.",
    ),
]
TRIM: dict[str, tuple[Any, Any]] = {
    "k": (K, None),
    "keep": (Keep, None),
    "lossless": (Lossless, False),
    "policy": (Policy, None),
    "rating_rows": (RatingRows, "all"),
    "k_base": (KBase, "visible"),
    "whole_first_layer": (WholeFirstLayer, False),
    "kv_dtype": (KvDtype, None),
    "merge": (Merge, False),
    "calibrated": (Calibrated, None),
}
"""The options that say how to trim, each with its default."""

Escalate = Annotated[
    float | None,
    typer.Option(
        "--escalate",
        metavar="PROBABILITY",
        help="Make an answer again, from the same features, if one of its tokens had a lower probability; try 0.9.",
    ),
]
EscalateTo = Annotated[
    list[Any] | None,
    typer.Option(
        "--escalate-to",
        metavar="untrimmed|lossless|SHARE|COUNT",
        parser=lambda text: text if text in ("untrimmed", "lossless") else parse_keep(text),
        help="What --escalate answers again with. Repeat it to try more in turn. Default: untrimmed.",
    ),
]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def with_trim(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with the options `TRIM` in the place of its parameter `trim`, which gets the trimming they ask for."""
    signature, parameters = inspect.signature(verb, eval_str=True), []
    for parameter in signature.parameters.values():
        if parameter.name == "trim":
            parameters += [
                inspect.Parameter(name, parameter.kind, default=default, annotation=annotation)
                for name, (annotation, default) in TRIM.items()
            ]
        else:
            parameters.append(parameter)

    def run(**values: Any) -> None:
        trim = trim_config(**{name: values.pop(name) for name in TRIM})
        verb(trim=trim, **values)

    # What Typer looks at.
    run.__doc__ = verb.__doc__
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def trim_config(
    *,
    k: float | None,
    keep: float | int | None,
    lossless: bool,
    policy: str | None,
    rating_rows: str,
    k_base: str,
    whole_first_layer: bool,
    kv_dtype: str | None,
    merge: bool,
    calibrated: Path | None = None,
) -> TrimConfig:
    """The trimming that the options ask for; without --k, --keep and --lossless, the paper's rule at k=0.25."""
    from crosstrim.config import TrimConfig

    if calibrated is not None:
        beside = {
            "--k": k is not None,
            "--keep": keep is not None,
            "--lossless": lossless,
            "--policy": policy is not None,
            "--rating-rows": rating_rows != "all",
            "--k-base": k_base != "visible",
            "--whole-first-layer": whole_first_layer,
            "--kv-dtype": kv_dtype is not None,
            "--merge": merge,
        }
        for name, is_given in beside.items():
            if is_given:
                raise typer.BadParameter(f"{name} has no effect with --calibrated, which says it all; leave it out.")
        return TrimConfig.from_calibration(calibrated)
    given = [
        name
        for name, is_given in (("--k", k is not None), ("--keep", keep is not None), ("--lossless", lossless))
        if is_given
    ]
    if len(given) > 1:
        raise typer.BadParameter(f"{' and '.join(given)} are two ways to say how much stays; give one of them.")
    without_effect = {
        "--policy": lossless and policy is not None,
        "--rating-rows": lossless and rating_rows != "all",
        "--merge": lossless and merge,
        "--k-base": (lossless or keep is not None) and k_base != "visible",
    }
    for name, is_without in without_effect.items():
        if is_without:
            raise typer.BadParameter(f"{name} has no effect with {given[0]}; leave one of them out.")
    return TrimConfig.from_dict(
        {
            "k": k if given else DEFAULT_K,
            "keep": keep,
            "policy": policy,
            "rating_rows": rating_rows,
            "k_base": k_base,
            "trim_first_layer": not whole_first_layer,
            "kv_dtype": kv_dtype,
            "merge": merge,
        }
    )


def attempts(
    trim: TrimConfig, escalate: float | None, escalate_to: list[Any] | None
) -> tuple[TrimConfig, Escalation | None]:
    """How the first attempt at an answer trims, and what follows where it is unsure; None where nothing does."""
    from crosstrim.asking.escalation import UNTRIMMED, attempts_of

    if escalate is None and escalate_to:
        raise typer.BadParameter("--escalate-to goes with --escalate.")
    return attempts_of(trim, escalate, escalate_to or UNTRIMMED)


def refuse_others(context: typer.Context, chosen: str, taken: Collection[str]) -> None:
    """Refuse what was typed beside an option that takes only a few others; the environment may say anything.

    Args:
        context: of the verb.
        chosen: the option, as it is typed.
        taken: names of the parameters that have an effect with it, its own included.
    """
    for typed, source in given_beside(context, taken):
        if source == "COMMANDLINE":
            raise typer.BadParameter(f"{typed} has no effect with {chosen}; leave one of them out.")


def given_beside(context: typer.Context, taken: Collection[str]) -> Iterator[tuple[str, str]]:
    """What was given beside the parameters `taken`: each option as it is typed, and where from, as click calls it."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name not in taken and source is not None and source.name != "DEFAULT":
            yield parameter.opts[0], source.name


def load_model(model: str, dtype: str | None, device: str | None, quantize: str | None) -> tuple[Any, Any]:
    """The model and its processor, where the options want them."""
    from crosstrim.asking import environment, loading

    place = device or environment.best_device()
    return loading.load(model, dtype=dtype, device_map=place, quantization=quantize)
