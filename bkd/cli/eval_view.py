"""A measurement as tables."""

from __future__ import annotations

from typing import Any

from bkd.cli.console import console, short, table
from bkd.eval.drawing import Drawing
from bkd.eval.shown import NONE, SPLIT_TITLES, own_samplers, relative, share

COST = ("UNet calls", "MACs an image")
METRICS = {"fid": "FID", "kid": "KID", "inception_score": "IS", "clip_score": "CLIP score"}


def show(report: dict[str, Any]) -> None:
    """Print what a report says."""
    drawing = report["settings"]["drawing"]
    how = str(Drawing(**drawing))
    if report["settings"]["suite"] == "shapes":
        for split in report["settings"]["splits"]:
            _show_split(report, split, how)
    else:
        _show_metrics(report, how)
    if own := own_samplers(report):
        console.print(own)


def _show_split(report: dict[str, Any], split: str, how: str) -> None:
    rows = []
    for model in report["models"]:
        found = model["splits"][split]
        accuracy = found["accuracy"]
        rows.append(
            (
                model["name"],
                share(accuracy),
                f"{accuracy['low']:.1%} - {accuracy['high']:.1%}",
                relative(found["relative"]),
                _value(found["shapes_fid"]),
                short(model["unet_parameters"]),
                *_cost(model),
            )
        )
    title = f"{report['settings']['num_prompts']} prompts of {SPLIT_TITLES.get(split, split)} ({split}), {how}"
    header = (
        "model",
        "correct",
        "95 % interval",
        f"of {report['models'][0]['name']}",
        "shapes-FID",
        "params",
        *COST,
    )
    console.print(table(title, header, rows))
    if "skipped" in found["shapes_fid"]:
        console.print(f"shapes-FID skipped: {found['shapes_fid']['skipped']}")


def _show_metrics(report: dict[str, Any], how: str) -> None:
    rows: list[tuple[str, ...]] = []
    reasons: dict[tuple[str, str], list[str]] = {}
    for model in report["models"]:
        close = model["closeness"]
        psnr, ssim = (_value(close.get(name, close)) for name in ("psnr_db", "ssim"))
        rows.append(
            (
                model["name"],
                *(_value(model[name]) for name in METRICS),
                psnr,
                ssim,
                short(model["unet_parameters"]),
                *_cost(model),
            )
        )
        for name, label in {**METRICS, "closeness": "closeness"}.items():
            if "skipped" in model[name]:
                reasons.setdefault((label, model[name]["skipped"]), []).append(model["name"])
    title = f"{report['settings']['num_prompts']} prompts, {how}"
    header = ("model", *METRICS.values(), f"PSNR to {report['models'][0]['name']}", "SSIM", "params", *COST)
    console.print(table(title, header, rows))
    for (label, reason), names in reasons.items():
        whose = "" if len(names) == len(report["models"]) else f" of {', '.join(names)}"
        console.print(f"{label}{whose} skipped: {reason}")


def _cost(model: dict[str, Any]) -> tuple[str, str]:
    """Steps x passes, and what all of them compute."""
    steps, passes = model["num_inference_steps"], model["passes_a_step"]
    return f"{steps} x {passes}", short(model["unet_macs"] * steps * passes)


def _value(metric: dict[str, Any]) -> str:
    """`12.3 ± 0.4`, the half width of the 95 % interval; one image has none."""
    if "value" not in metric:
        return NONE
    if metric["low"] is None:
        return f"{metric['value']:.4g}"
    half = (metric["high"] - metric["low"]) / 2
    return f"{metric['value']:.4g} ± {half:.2g}"
