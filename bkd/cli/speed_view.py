"""Measured speed as tables."""

from __future__ import annotations

from typing import Any

from bkd.cli.console import console, short, table
from bkd.eval.shown import speed_conditions


def show_speed(report: dict[str, Any]) -> None:
    """Print sizes, then times and memory by kind of call."""
    console.print(f"device: {report['device']}")
    sizes = [
        (
            model["name"],
            f"{model['unet_parameters']:,}",
            short(model["unet_macs"]),
            short(model["unet_macs_without_attention"]),
            _mib(model["unet_bytes"]),
            _mib(model["pipeline_bytes"]),
        )
        for model in report["models"]
    ]
    header = ("model", "UNet parameters", "MACs", "without attention", "UNet MiB", "pipeline MiB")
    console.print(table("Size; MACs of one UNet pass, with attention's matmuls and without", header, sizes))
    rows = [
        (
            model["name"] if not place else "",
            name,
            _seconds(case, "median_s"),
            _seconds(case, "p90_s"),
            f"{case['speed_up']:.2f}" if "speed_up" in case else "-",
            _memory(case),
        )
        for model in report["models"]
        for place, (name, case) in enumerate(model["cases"].items())
    ]
    header = ("model", "call", "median s", "90 % s", "speed-up", "peak MiB")
    console.print(table(speed_conditions(report), header, rows, left=(0, 1)))
    for model in report["models"]:
        for name, case in model["cases"].items():
            if "skipped" in case.get("memory", {}):
                console.print(f"peak memory of {model['name']}, {name}, skipped: {case['memory']['skipped']}")


def _seconds(case: dict[str, Any], name: str) -> str:
    return f"{case[name]:.4g}" if name in case else "-"


def _memory(case: dict[str, Any]) -> str:
    return _mib(case["memory"]["peak_bytes"]) if "peak_bytes" in case.get("memory", {}) else "-"


def _mib(number: int) -> str:
    return f"{number / 2**20:,.0f}"
