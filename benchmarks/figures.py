"""The figures' common look. A contender has one colour, one lightness and one hatch in all of them, so that they can be
told apart in grey print."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

# Face colour and hatch. Ours are warm, timm grey, other peers and the twins blue; what bounds them all is white.
STYLE: dict[str, tuple[str, str]] = {
    "timm": ("#595959", ""),
    "timm:compile": ("#8c8c8c", "///"),
    "timm:max-autotune": ("#a6a6a6", "\\\\\\"),
    "timm:freezing": ("#c4c4c4", "///"),
    "onnxruntime": ("#9ecae1", "..."),
    "openvino": ("#c6dbef", "xxx"),
    "sk_fused": ("#e6550d", ""),
    "sk_fused:compile": ("#fdae6b", "///"),
    "sk_fused:freezing": ("#fdd0a2", "..."),
    "plain": ("#3182bd", ""),
    "convolutions": ("#ffffff", "..."),
    # Of one contender, the quantities.
    "eval": ("#006d2c", ""),
    "training step": ("#74c476", "///"),
    "bytes kept for the backward": ("#e5f5e0", "ooo"),
}
MARKERS = "osD^vP*Xdp<>h8"
LINES = ("-", "--", ":", "-.")


def style(side: str) -> dict:
    face, hatch = STYLE.get(side, ("#dddddd", "++"))
    return {"facecolor": face, "hatch": hatch, "edgecolor": "black", "linewidth": 0.6}


def bars(axes, groups: Sequence[str], series: Mapping[str, Sequence[float | None]], fmt: str = "%.2f") -> None:
    """Bars side by side for every group, each with its value; a None leaves a gap."""
    width = 0.84 / len(series)
    for i, (label, values) in enumerate(series.items()):
        at = [j + (i - (len(series) - 1) / 2) * width for j in range(len(groups))]
        drawn = axes.bar(at, [value or 0 for value in values], width * 0.94, label=label, **style(label))
        # Upright, the white around a value is so wide that a dash of the line at 1 is not taken for a minus.
        rotation, pad = (0, 2.5) if len(series) <= 4 else (90, 0.4)
        texts = axes.bar_label(drawn, ["" if value is None else fmt % value for value in values], padding=pad + 1.5, fontsize=6.5)
        for text in texts:
            text.set(rotation=rotation, bbox={"facecolor": "white", "edgecolor": "none", "pad": pad})
    axes.set_xticks(range(len(groups)), groups, fontsize=8)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    top = max(value for values in series.values() for value in values if value is not None)
    axes.set_ylim(0, 1.2 * max(1.0, top))


def page(rows: int = 1, columns: int = 1, height: float = 4.2, width: float = 10, width_ratios: Sequence[float] | None = None):
    """A figure and its axes, at the width that a README shows."""
    figure, axes = pyplot.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False, width_ratios=width_ratios)
    for each in axes.flat:
        each.spines[["top", "right"]].set_visible(False)
    return figure, list(axes.flat)


def finish(figure, title: str, source: str, path: Path, legend_of=None) -> None:
    """Title, the line that says what was measured on, one legend below, and the file."""
    figure.suptitle(f"{title}\n", fontsize=11, x=0.01, ha="left")
    figure.text(0.01, 1 - 0.34 / figure.get_figheight(), source, fontsize=7.5, va="top", color="#333333")
    if legend_of is not None:
        handles, labels = legend_of.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def wrapped(name: str) -> str:
    """A unit's name, on the lines that a bar group's label has."""
    return name.replace(", ", "\n").replace(" ch ", " ch\n")
