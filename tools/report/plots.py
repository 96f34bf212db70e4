"""Plots as SVG, drawn without a display.

Colours are those of Okabe and Ito (readable with any colour vision), and each series also has its own
marker. Text and axes are drawn in `currentColor`, so that they follow the page, light or dark.
"""

import io
import re

from paligemma_med.metrics import tables
from tools.report import figures

_INK = "#123456"  # stands for currentColor
STYLES = {
    "model": ("#0072B2", "o"),
    "majority": ("#E69F00", "s"),
    "majority_type": ("#CC79A7", "D"),
    "echo": ("#999999", "X"),
    "shuffled_images": ("#D55E00", "^"),
    "blank_image": ("#009E73", "v"),
    "noise_image": ("#56B4E9", "P"),
    "question_only": ("#F0E442", "X"),
    "true_history": ("#009E73", "D"),
    "single_turn": ("#E69F00", "v"),
}
_OTHER = ("#777777", "*")


def accuracies(name, metrics, who, rule="acc") -> str:
    """Accuracies with their 95 % intervals, a line for each group.

    Args:
      name: identifies this plot on the page.
      metrics: from `scoring.summarise`.
      who: "model" and controls.
      rule: the figure to draw, one of `figures.RULES`.

    Returns:
      str, an SVG.
    """
    groups = figures.groups_of(metrics)
    figure, (axes,) = _figure(7.2, 1.1 + len(groups) * (0.14 + 0.11 * len(who)))
    for i, column in enumerate(who):
        colour, marker = STYLES.get(column, _OTHER)
        found = [tables.value_of(metrics, column, group, rule) for group, *_ in groups]
        y = [row + 0.8 * ((i + 0.5) / len(who) - 0.5) for row in range(len(groups))]
        acc = [100 * value for value, *_ in found]
        # By rounding, an interval may end on the wrong side of the figure.
        error = [
            [max(0, a - 100 * low) for a, (_, _, low, _) in zip(acc, found)],
            [max(0, 100 * high - a) for a, (_, _, _, high) in zip(acc, found)],
        ]
        axes.errorbar(
            acc,
            y,
            xerr=error,
            fmt=marker,
            color=colour,
            markersize=4.5,
            capsize=1.5,
            linewidth=1.2,
            label=figures.title_of(column),
        )
    titles = [f"{value} ({n:,})" for _, _, value, n in groups]
    axes.set_yticks(range(len(groups)), titles, parse_math=False)
    axes.set_ylim(len(groups) - 0.45, -0.55)
    axes.set_xlim(-2, 102)
    axes.set_xlabel(f"{figures.RULES[rule]}, %")
    axes.grid(axis="x", color="#888888", alpha=0.3, linewidth=0.6)
    _legend(axes, min(3, len(who)))
    return _svg(figure, name)


def reliability(name, panels) -> str:
    """Confidence against accuracy, one panel each.

    Args:
      name: as above.
      panels: [(title, [(confidence, accuracy, low, high, n), …])], one tuple per bin.

    Returns:
      str, an SVG.
    """
    figure, all_axes = _figure(3.7 * len(panels), 3.6, len(panels))
    for axes, (title, bins) in zip(all_axes, panels):
        axes.plot([0, 100], [0, 100], color="#888888", linewidth=1, linestyle="--")
        x, y, low, high = ([100 * b[i] for b in bins] for i in range(4))
        error = [[a - end for a, end in zip(y, low)], [end - a for a, end in zip(y, high)]]
        colour, marker = STYLES["model"]
        axes.errorbar(x, y, yerr=error, fmt=marker, color=colour, capsize=2, linewidth=1.2)
        for a, b, (*_, n) in zip(x, y, bins):
            axes.annotate(
                f"{n:,}",
                (a, b),
                xytext=(5, -9),
                textcoords="offset points",
                fontsize=7,
                color=_INK,
            )
        axes.set_xlim(-3, 103)
        axes.set_ylim(-3, 103)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("confidence, %")
        axes.set_ylabel("right, %")
    return _svg(figure, name)


def losses(name, panels) -> str:
    """Losses over tokens seen, one panel each.

    Args:
      name: as above.
      panels: [(title, {run: [(tokens, loss, low or None, high or None), …]})].

    Returns:
      str, an SVG.
    """
    figure, all_axes = _figure(max(4.6, 3.3 * len(panels)), 3.6, len(panels))
    for axes, (title, curves) in zip(all_axes, panels):
        for i, (run, points) in enumerate(curves.items()):
            colour, marker = list(STYLES.values())[i % len(STYLES)]
            x, y, low, high = zip(*points)
            axes.plot(x, y, color=colour, marker=marker, markersize=4, linewidth=1.4, label=run)
            if all(end is not None for end in (*low, *high)):
                axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_title(title, fontsize=10, parse_math=False)
        axes.set_xlabel("tokens seen")
        axes.ticklabel_format(axis="x", style="sci", scilimits=(-3, 4), useMathText=True)
        axes.xaxis.get_offset_text().set_color(_INK)
        axes.grid(color="#888888", alpha=0.3, linewidth=0.6)
    all_axes[0].set_ylabel("loss, nats a token")
    lines, runs = all_axes[0].get_legend_handles_labels()
    figure.legend(lines, runs, loc="outside upper left", ncols=3, frameon=False, fontsize=9, labelcolor=_INK)
    return _svg(figure, name)


def _figure(width, height, columns=1):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    for ax in axes:
        ax.patch.set_visible(False)
        for spine in ax.spines.values():
            spine.set_color(_INK)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(colors=_INK, labelcolor=_INK, labelsize=9)
        ax.xaxis.label.set_color(_INK)
        ax.yaxis.label.set_color(_INK)
        ax.title.set_color(_INK)
    figure.patch.set_visible(False)
    return figure, axes


def _legend(axes, columns):
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=columns,
        frameon=False,
        fontsize=9,
        labelcolor=_INK,
        borderaxespad=0.2,
        columnspacing=1.2,
    )


def _svg(figure, name):
    import matplotlib

    out = io.StringIO()
    # The salt makes the ids that the file refers to: they must differ from other plots' on the page, and
    # not change from run to run. Nothing refers to other ids.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg[svg.index("<svg") :])
    return svg.replace(_INK, "currentColor")


def standalone(svg) -> str:
    """The same SVG as a separate file, readable on any page."""
    head = '<?xml version="1.0" encoding="utf-8"?>\n'
    return head + svg.replace("<svg ", '<svg style="color:#222;background:#fff" ', 1)
