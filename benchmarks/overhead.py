"""Host time: one unit on inputs so small that the work of Python and of PyTorch's dispatcher is most of it, eager, one thread.

    python -m benchmarks.overhead
"""

import argparse
import copy

import torch

from . import harness

harness.let_timm_import()

from timm.layers import SelectiveKernel  # noqa: E402

import sk_fused  # noqa: E402

UNITS = {
    "skresnet18, 64 channels": dict(in_channels=64, rd_ratio=1 / 8, rd_divisor=16),
    "skresnext50, 128 channels": dict(in_channels=128, groups=32, split_input=False, rd_divisor=32),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="for every row")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    rows = []
    for name, arguments in UNITS.items():
        for batch in (1, 2):
            units = {"timm": SelectiveKernel(**arguments)}
            units["sk_fused"] = copy.deepcopy(units["timm"])
            sk_fused.fuse(units["sk_fused"])
            x = torch.randn(batch, arguments["in_channels"], 7, 7)
            g = torch.randn_like(units["timm"].eval()(x))
            for mode in ("inference", "eval, forward and backward", "training, forward", "training, forward and backward"):
                # One image has no statistics for the attention's batch-norm.
                if mode.startswith("training") and batch == 1:
                    continue
                contenders = {}
                for contender, unit in units.items():
                    unit.train(mode.startswith("training"))
                    leaf = x.clone().requires_grad_()
                    contenders[contender] = {
                        "inference": harness.evaluation(unit, x),
                        "training, forward": lambda unit=unit, leaf=leaf: unit(leaf),
                    }.get(mode) or harness.training_step(unit, leaf, g)
                times = harness.interleaved(contenders, seconds, min_rounds=200)
                medians = [1e3 * harness.summary(times[contender])["median_ms"] for contender in ("timm", "sk_fused")]
                rows.append([name, str(batch), mode, *(f"{median:.0f}" for median in medians), f"{medians[1] / medians[0]:.2f}"])
    harness.show("Host time, µs", ["unit at 7 × 7", "images", "", "timm", "sk_fused", "ratio"], rows)


if __name__ == "__main__":
    main()
