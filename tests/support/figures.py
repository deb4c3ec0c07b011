"""What holds for every figure."""

from __future__ import annotations


def legends_within(figure) -> bool:
    """Whether every legend lies inside the canvas; there must be one."""
    figure.draw_without_rendering()
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    boxes = [legend.get_window_extent() for legend in legends]
    page = figure.bbox
    return bool(boxes) and all(
        page.x0 <= box.x0 and page.y0 <= box.y0 and box.x1 <= page.x1 and box.y1 <= page.y1 for box in boxes
    )
