"""What `cold_start` runs in a process of its own; nothing is imported before it is timed."""

import time


def stages(side: str, compiled: bool, device: str) -> dict[str, float]:
    """Seconds of each stage from a fresh interpreter to the second call of a unit, one after the other."""
    seconds: dict[str, float] = {}
    start = time.perf_counter()

    def done(stage: str) -> None:
        nonlocal start
        seconds[stage] = time.perf_counter() - start
        start = time.perf_counter()

    import torch

    if device == "cuda":
        # Its context is torch's to make.
        torch.zeros(1, device=device).item()
    done("import torch")
    if side == "timm":
        from .harness import let_timm_import

        let_timm_import()
        start = time.perf_counter()
        from timm.layers import SelectiveKernel as Unit
    else:
        from sk_fused import FusedSelectiveKernel as Unit
    done(f"import {side}")
    unit = Unit(64).to(device).eval()
    x = torch.randn(8, 64, 56, 56).to(device)
    call = torch.compile(unit) if compiled else unit
    done("make")
    with torch.inference_mode():
        for number in ("first", "second"):
            call(x)
            if device == "cuda":
                torch.cuda.synchronize()
            done(f"{number} call")
    return seconds
