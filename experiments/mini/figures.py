"""Plots of curves with their confidence intervals, and contact sheets, as PNG files."""

import io
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.mini.metrics import share

SIZE = 1.25  # side of an image in a contact sheet, in inches


def curves(
    x: Sequence[float],
    plots: Mapping[str, Mapping[str, Sequence[np.ndarray]]],
    label: str,
    y: str,
    bar: float | None = None,
) -> bytes:
    """A figure with a plot for each title, and in it a curve for each name.

    A curve has the fractions (P,) of P prompts for each x, and shows their mean in % with its interval. `bar`: the
    height of a dotted line.
    """
    width = 5.5 if len(plots) == 1 else 2.6 * len(plots)
    figure = Figure(figsize=(width, 3.4), layout="constrained")
    axes = list(figure.subplots(1, len(plots), sharey=True, squeeze=False)[0])
    for ax, (title, lines) in zip(axes, plots.items(), strict=True):
        ax.set(xlabel=label, ylim=(-2, 102))
        ax.set_title(title, fontsize=9)
        ax.grid(alpha=0.3)
        for name, values in lines.items():
            _curve(ax, x, values, name)
        if bar is not None:
            ax.axhline(100 * bar, color="grey", linestyle=":", linewidth=1)
    axes[0].set_ylabel(y)
    axes[0].legend(fontsize=8)
    return _png(figure)


def _curve(ax: Axes, x: Sequence[float], values: Sequence[np.ndarray], name: str) -> None:
    means, low, high = 100 * np.array([share(array) for array in values]).T
    (line,) = ax.plot(x, means, marker="o", markersize=3, label=name)
    ax.fill_between(x, low, high, alpha=0.2, color=line.get_color(), linewidth=0)


def sheet(columns: Mapping[str, np.ndarray], words: Sequence[str] | None = None) -> bytes:
    """A contact sheet of P lines. columns: by name, images (P, 64, 64, 3). words: the label of each line."""
    images = list(columns.values())
    count, side = images[0].shape[:2]
    size = (SIZE * len(columns) + 0.9 * (words is not None), SIZE * count + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    ax = figure.add_subplot()
    ax.imshow(np.concatenate([np.concatenate(list(column)) for column in images], axis=1), interpolation="nearest")
    ax.set_xticks(side * (np.arange(len(columns)) + 0.5), [textwrap.fill(name, 14) for name in columns], fontsize=7)
    ax.xaxis.tick_top()
    ax.set_yticks(side * (np.arange(count) + 0.5), words or [""] * count, fontsize=8)
    ax.tick_params(length=0)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    with io.BytesIO() as file:
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
        return file.getvalue()
