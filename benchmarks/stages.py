"""What `cold_start` runs in a process of its own; nothing is imported before it is timed."""

import time


def stages(side: str, compiled: bool) -> dict[str, float]:
    """Seconds of each stage from a fresh interpreter to the second call of a unit, one after the other."""
    seconds: dict[str, float] = {}
    start = time.perf_counter()

    def done(stage: str) -> None:
        nonlocal start
        seconds[stage] = time.perf_counter() - start
        start = time.perf_counter()

    import torch

    done("import torch")
    if side == "timm":
        from .harness import let_timm_import

        let_timm_import()
        start = time.perf_counter()
        from timm.layers import SelectiveKernel as Unit
    else:
        from sk_fused import FusedSelectiveKernel as Unit
    done(f"import {side}")
    unit = Unit(64).eval()
    x = torch.randn(8, 64, 56, 56)
    call = torch.compile(unit) if compiled else unit
    done("make")
    with torch.inference_mode():
        call(x)
        done("first call")
        call(x)
        done("second call")
    return seconds
