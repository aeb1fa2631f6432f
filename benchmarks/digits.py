"""Training on handwritten digits: examples/train.py on scikit-learn's 1797 images, as the example's small skresnet18 has it, fused and
unfused, with several seeds: loss of every update, and top-1 on the held-out sixth after every epoch."""

import contextlib
import io
import statistics
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

import torch

from examples import digits, train

from . import figures, harness
from .harness import Benchmark

FLAGS = {"timm": "--no-fused", "sk_fused": "--fused"}


def rows(arguments: Namespace) -> Iterator[dict]:
    # The maps are so small that a second thread only waits.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        digits.write(Path(folder) / "data", arguments.every)
        for seed in harness.progress(range(arguments.seeds), "seeds"):
            for side, flag in FLAGS.items():
                losses: list[float] = []
                command = [f"{folder}/data", "--output", f"{folder}/{side}{seed}", flag, "--seed", str(seed), "--device", str(arguments.device)]
                options = train.parser().parse_args([*command, *digits.OPTIONS])
                with contextlib.redirect_stdout(io.StringIO()):
                    history = train.train(options, lambda update, lr, loss, losses=losses: losses.append(loss.item()))
                yield {"seed": seed, "side": side, "losses": losses, "top1": [row["top1"] for row in history]}
    torch.set_num_threads(threads)


def table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    cells = []
    for side in FLAGS:
        of = [row for row in rows if row["side"] == side]
        ends = [row["top1"][-1] for row in of]
        loss = statistics.mean(statistics.mean(row["losses"][-len(row["losses"]) // len(row["top1"]) :]) for row in of)
        cells.append([side, ", ".join(f"{end:.2f}" for end in ends), f"{statistics.mean(ends):.2f}", f"{loss:.4f}"])
    return ["trained as", "top-1 on held-out digits, %, each seed", "mean", "loss of the last epoch, mean"], cells


def figure(result: dict, path: Path) -> None:
    """Losses, averaged over ten updates, and top-1: a line for each seed."""
    page, (losses, top1) = figures.page(columns=2, height=3.8)
    for row in result["rows"]:
        look = {"color": figures.STYLE[row["side"]][0], "linestyle": "-" if row["side"] == "timm" else "--", "linewidth": 1.4}
        label = row["side"] if row["seed"] == 0 else None
        smooth = [statistics.mean(row["losses"][i : i + 10]) for i in range(0, len(row["losses"]), 10)]
        losses.plot([10 * i + 5 for i in range(len(smooth))], smooth, label=label, **look)
        top1.plot(range(1, len(row["top1"]) + 1), row["top1"], **look)
    losses.set(xlabel="update", ylabel="loss", yscale="log")
    top1.set(xlabel="epoch", ylabel="top-1 on held-out digits, %")
    seeds = len({row["seed"] for row in result["rows"]})
    figures.finish(page, f"A small skresnet18 learns digits, fused and unfused, {seeds} seeds", harness.source(result), path, losses)


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=3, help="runs of each side (default: %(default)s)")
    parser.add_argument("--every", type=int, default=1, help="one image in this many (default: all)")
    # The recipe's.
    parser.set_defaults(batch=int(digits.OPTIONS[digits.OPTIONS.index("--batch-size") + 1]))


BENCHMARK = Benchmark("digits", __doc__, rows, table, figure, options, quick={"seeds": 1, "every": 6})

if __name__ == "__main__":
    harness.command(BENCHMARK)
