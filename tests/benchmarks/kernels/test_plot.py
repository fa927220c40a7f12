"""The pictures of benchmarks.kernels can be drawn from any table."""

from __future__ import annotations

from pathlib import Path

from benchmarks.kernels.plot import plot_roofline, plot_times


def test_pictures_are_drawn_of_any_table(tmp_path: Path) -> None:
    """The tables have several models, the rates of GPUs and many providers, or only one kind of operation."""
    base = {"batch_size": 2, "copy_gb_per_s": 3e3, "matmul_tflop_per_s": 800.0, "share_of_bound": 0.5}
    base |= {"p20_ms": 1.0, "p50_ms": 2.0, "p80_ms": 9.0, "bytes": 10}
    attention = [
        {**base, "op": "block_attention", "part": part, "shape": f"{model} {place}", "provider": provider}
        | {"flops": 1000, "gb_per_s": 5.0, "tflop_per_s": 500.0}
        for model in ("S/16", "H/14")
        for place in ("target encoder", "predictor")
        for part in ("forward", "backward")
        for provider in [*(f"fastjepa {i}" for i in range(5)), *(f"rival {i}" for i in range(6))]
    ]
    moving = [
        {**base, "op": "adamw_ema", "part": "step", "shape": "S/16 8 M", "provider": "fastjepa triton"}
        | {"flops": 0, "gb_per_s": 2e3, "tflop_per_s": 0.0}
    ]
    for name, records in (("both", attention + moving), ("attention", attention), ("moving", moving)):
        for plot in (plot_times, plot_roofline):
            plot(records, {"device": "a GPU", "torch": "9.9"}, tmp_path / f"{name}.png")
            assert (tmp_path / f"{name}.png").stat().st_size > 10_000
