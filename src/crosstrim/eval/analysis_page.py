"""An analysis as tables, as a page and as figures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from crosstrim.data import pages
from crosstrim.data.pages import Result, Table
from crosstrim.files import write_json
from crosstrim.trimming.report import format_bytes
from crosstrim.wording import percent, rounded

_MOST_NAMED = 10
"""Layers up to which a figure writes every number."""

_LINES = ("-", "--", "-.", ":")


def write(result: Result, folder: Path) -> list[Path]:
    """Write analysis.json, analysis.md and its figures into a folder, which is made if there is none.

    Args:
        result: of `analysis.run` or `analysis.of_shape`.
        folder: where to; files of these names are replaced.

    Returns:
        The files.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ResultError: a file cannot be written.
    """
    pages.prepare(folder)
    data = folder / "analysis.json"
    write_json(data, result)
    drawers = {"sparsity": draw_sparsity, "agreement": draw_agreement} if "layers" in result else {}
    figures = {f"{name}.png": partial(draw, result) for name, draw in {**drawers, "memory": draw_memory}.items()}
    return [data, *pages.write(folder / "analysis.md", markdown(result, figures), figures)]


def markdown(result: Result, figures: Iterable[str]) -> str:
    """The page: what was run, every table, every figure."""
    facts = {}
    if "layers" in result:
        model, dataset = result["model"], result["dataset"]
        facts["model"] = f"{model['name']}, {model['dtype']}"
        facts["questions"] = f"{dataset['questions']} of {dataset['name']}"
    title = "What the model attends to, and what its cache holds"
    return pages.markdown(title, {**facts, **pages.software(result)}, tables(result), figures)


def tables(result: Result) -> Iterator[Table]:
    """The result's numbers for people; shares in per cent."""
    if "layers" in result:
        yield _sparsity(result)
        if len(result["layers"]) > 1:
            yield _agreement(result)
            yield _first_layer(result)
    yield _memory(result["memory"])


def _sparsity(result: Result) -> Table:
    masses = list(result["sparsity"][0]["together"])
    rows = []
    for one in result["sparsity"]:
        together = [percent(one["together"][mass]) for mass in masses]
        heads = [one["heads"][mass] for mass in masses]
        spread = [f"{percent(mean(of))} ({percent(min(of))} to {percent(max(of))})" for of in heads]
        rows.append((str(one["layer"]), *together, *spread))
    names = [f"{percent(float(mass), 0)} %" for mass in masses]
    return Table(
        "Sparsity",
        ("layer", *names, *[f"{name}, one head" for name in names]),
        tuple(rows),
        f"The fewest visible features, in per cent of {result['visible_features']:.0f} on average, that hold this "
        "share of the layer's attention: all heads together, and one head alone (mean, lowest and highest head).",
    )


def _agreement(result: Result) -> Table:
    layers, agreement = result["layers"], result["agreement"]
    matrices = {f"top {percent(float(top), 0)} %": matrix for top, matrix in agreement["overlap"].items()}
    correlation, places = agreement["rank_correlation"], range(len(layers))
    rows = [
        (
            f"{layers[0]} and {layers[place]}",
            *[percent(one[0][place]) for one in matrices.values()],
            f"{correlation[0][place]:.2f}",
        )
        for place in places[1:]
    ]
    every = [
        mean(matrix[a][b] for a in places for b in places[a + 1 :]) for matrix in (*matrices.values(), correlation)
    ]
    rows.append(("all pairs, mean", *[percent(one) for one in every[:-1]], f"{every[-1]:.2f}"))
    rows.append(("chance", *[percent(one) for one in agreement["chance"].values()], "0.00"))
    return Table(
        "Agreement between layers",
        ("layers", *matrices, "rank correlation"),
        tuple(rows),
        "Overlap of the two layers' top sets, |A ∩ B| / size in per cent, and Spearman's rank correlation over all "
        "visible features; attention averaged over heads.",
    )


def _first_layer(result: Result) -> Table:
    settings = result["first_layer"]
    rows = []
    for place, one in enumerate(settings[0]["later"]):
        cells = [setting["later"][place] for setting in settings]
        rows.append((str(one["layer"]), *[f"{percent(cell['held'])} ({percent(cell['most'])})" for cell in cells]))
    rows.append(("chance", *[percent(setting["kept"]) for setting in settings]))
    return Table(
        "What the first layer's union holds of later attention",
        ("layer", *[f"k={setting['k']}, keeps {percent(setting['kept'])} %" for setting in settings]),
        tuple(rows),
        "Share of the later layer's attention, in per cent, on the features that the first layer's union keeps; in "
        "brackets the most that as many features could hold. A random set would hold its own share, the last row.",
    )


def _memory(memory: Mapping[str, Any]) -> Table:
    tiers = list(memory["features"])
    rows = [
        (
            str(row["batch"]),
            str(row["text_tokens"]),
            format_bytes(row["text_bytes"]),
            *[f"{format_bytes(row['image_bytes'][tier])} ({rounded(row['ratio'][tier], 3)}x)" for tier in tiers],
        )
        for row in memory["rows"]
    ]
    shape = memory["shape"]
    return Table(
        f"KV bytes of {shape['name']}, computed",
        ("batch", "text tokens", "text KV", *[f"image KV, {tier}" for tier in tiers]),
        tuple(rows),
        f"One image a sample, {shape['bytes_per_element']} bytes a number; in brackets image KV over text KV. Text "
        f"is cached by {shape['text_layers'] - shape['cross_layers']} of {shape['text_layers']} layers, the image by "
        f"the other {shape['cross_layers']}. keep is of an image that fills all {shape['tiles_per_image']} tiles.",
    )


def draw_sparsity(result: Result, plot: Any) -> Any:
    """Per layer the share of features that holds each mass: a bar for all heads together, a dot per head."""
    figure, ((axes,),) = pages.canvas(plot, (max(6, 0.5 * len(result["layers"]) + 3), 3.8))
    masses = list(result["sparsity"][0]["together"])
    for number, (mass, colour) in enumerate(zip(masses, plot.get_cmap("tab10").colors, strict=False)):
        for place, one in enumerate(result["sparsity"]):
            across = place + 0.25 * (number - (len(masses) - 1) / 2)
            label = f"{percent(float(mass), 0)} % of the attention" if place == 0 else None
            axes.bar(across, 100 * one["together"][mass], width=0.22, color=colour, alpha=0.35, label=label)
            heads = [100 * head for head in one["heads"][mass]]
            axes.plot([across] * len(heads), heads, ".", color=colour, markersize=4)
    axes.set_xticks(range(len(result["layers"])), result["layers"])
    axes.set(xlabel="cross-attention layer", ylabel="visible features (%)", ylim=(0, 100))
    axes.set_title("features that hold the attention: together (bars), one head (dots)", **pages.TITLE)
    pages.legend(figure, "outside lower center", ncols=len(masses), columnspacing=1)
    return figure


def draw_agreement(result: Result, plot: Any) -> Any:
    """Top-set overlap and rank correlation of every pair of layers, and what the first layer's union holds."""
    top = list(result["agreement"]["overlap"])[1]
    chance = percent(result["agreement"]["chance"][top])
    figure, (grid,) = pages.canvas(plot, (12, 3.8), across=3)
    titles = {
        f"overlap of the top {percent(float(top), 0)} % (chance: {chance} %)": result["agreement"]["overlap"][top],
        "rank correlation": result["agreement"]["rank_correlation"],
    }
    for axes, (title, matrix) in zip(grid, titles.items(), strict=False):
        _draw_matrix(axes, result["layers"], matrix)
        axes.set_title(title, **pages.TITLE)
    _draw_held(grid[2], result, plot)
    return figure


def _draw_matrix(axes: Any, layers: list[int], matrix: list[list[float]]) -> None:
    shown = axes.imshow(matrix, vmin=min(0, *map(min, matrix)), vmax=1, cmap="viridis")
    axes.set_xticks(range(len(layers)), layers)
    axes.set_yticks(range(len(layers)), layers)
    axes.set(xlabel="layer", ylabel="layer")
    axes.figure.colorbar(shown, ax=axes, shrink=0.8)
    if len(layers) <= _MOST_NAMED:
        for row, values in enumerate(matrix):
            for column, value in enumerate(values):
                colour = "black" if value > 0.6 else "white"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)


def _draw_held(axes: Any, result: Result, plot: Any) -> None:
    kept = [100 * setting["kept"] for setting in result["first_layer"]]
    later = result["layers"][1:]
    axes.plot([0, 100], [0, 100], color="0.5", linestyle=":", linewidth=1, label="chance")
    for place, layer in enumerate(later):
        cells = [setting["later"][place] for setting in result["first_layer"]]
        colour = plot.get_cmap("viridis")(place / len(later))
        held = [100 * cell["held"] for cell in cells]
        axes.plot(kept, held, color=colour, label=f"layer {layer}", **pages.POINTS)
        axes.plot(kept, [100 * cell["most"] for cell in cells], linestyle="--", linewidth=1, color=colour)
    axes.set(xlabel="kept by the first layer's union (%)", ylabel="later attention held (%)", xlim=(0, 100))
    axes.set_ylim(0, 100)
    axes.set_title("dashed: the most that as many features hold", **pages.TITLE)
    axes.grid(**pages.GRID)
    pages.legend(axes, "lower right", fontsize=8 if len(later) <= _MOST_NAMED else 5)


def draw_memory(result: Result, plot: Any) -> Any:
    """Image KV over text KV against the length of the text, one line for each tier."""
    memory = result["memory"]
    first_batch = memory["rows"][0]["batch"]
    rows = [row for row in memory["rows"] if row["batch"] == first_batch]
    figure, ((axes,),) = pages.canvas(plot, (5.6, 3.6))
    lengths = [row["text_tokens"] for row in rows]
    for number, tier in enumerate(memory["features"]):
        ratios = [row["ratio"][tier] for row in rows]
        # Tiers may hold the same number of features, and then their lines must show through each other.
        axes.plot(lengths, ratios, _LINES[number % len(_LINES)], label=tier, **pages.POINTS)
    pages.level(axes, 1)
    axes.set(xscale="log", yscale="log", xlabel="text tokens a sample", ylabel="image KV / text KV")
    axes.set_xticks(lengths, lengths)
    axes.minorticks_off()
    axes.set_title(f"{memory['shape']['name']}, one image a sample, any batch size, computed", **pages.TITLE)
    pages.legend(axes, "best")
    axes.grid(**pages.GRID)
    return figure
