"""How measurements are written: in the terminal, on the page and in a model card alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bkd.eval.drawing import Drawing

NONE = "\N{EN DASH}"
"""In a cell of a table that has nothing to say."""
TIMES, MINUS = "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}"
SUITE_TITLES = {"shapes": "Captions of the embedded world", "prompts": "Given prompts", "coco30k": "Captions of COCO"}
SPLIT_TITLES = {"test": "unseen captions", "novel": "unseen combinations", "theme-test": "the theme"}
"""Of the embedded world's splits that are measured."""
METRIC_TITLES = {"fid": "FID", "kid": "KID", "inception_score": "IS", "clip_score": "CLIP score"}
"""Of the suites that take any prompts."""
DIGITS = 12
"""Of a digest, enough to tell one from another."""


def share(proportion: Mapping[str, Any] | None) -> str:
    """What is right of all there is."""
    return f"{proportion['successes'] / proportion['total']:.1%}" if proportion else NONE


def relative(accuracy: float | None) -> str:
    """A share of the first model's accuracy; a factor where that one can next to nothing."""
    if accuracy is None:
        return NONE
    return f"{accuracy:.1%}" if accuracy < 10 else f"{accuracy:,.0f} {TIMES}"


def short(value: float) -> str:
    """With three digits that matter."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def large(number: float) -> str:
    """A count with a unit, such as `860 M`."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return short(number)


def calls_of(model: Mapping[str, Any]) -> str:
    """UNet calls of an image: steps times passes."""
    return f"{model['num_inference_steps']} {TIMES} {model['passes_a_step']}"


def device_and_versions(device: str, versions: Mapping[str, str]) -> str:
    """Where something was measured, and with what."""
    return f"{device} · torch {versions['torch']} · diffusers {versions['diffusers']}"


def own_samplers(report: Mapping[str, Any]) -> str | None:
    """Which models of an evaluation were not drawn as the others were."""
    own = [model["name"] for model in report["models"] if "few_steps" in model.get("sampler", {})]
    return f"with the steps and the sampler that they were trained for: {', '.join(own)}" if own else None


def conditions(report: Mapping[str, Any]) -> str:
    """How many images were drawn, and how."""
    settings = report["settings"]
    dtype = "" if settings["dtype"] == "float32" else f", {settings['dtype']}"
    return f"{settings['num_prompts']:,} prompts, {Drawing(**settings['drawing'])}{dtype}"


def measured_against(report: Mapping[str, Any]) -> str | None:
    """The reference and the networks that FID, KID, IS and CLIP score depend on; None where there are none."""
    fid, clip = (report["models"][0].get(key, {}) for key in ("fid", "clip_score"))
    said = [f"reference {fid['reference'][:DIGITS]}"] if fid.get("reference") else []
    said += [fid["extractor"]] if "extractor" in fid else []
    said += [f"CLIP {clip['extractor']} {clip['weights'][:DIGITS]}"] if "weights" in clip else []
    return "; ".join(said) or None


def speed_conditions(report: Mapping[str, Any]) -> str:
    """What measured times and memory hold under, besides the device."""
    settings, models = report["settings"], report["models"]
    said = [f"{settings['rounds']} rounds in turns"]
    if drawing := [part for part in ("step", "pipeline") if part in settings["parts"]]:
        said.append(f"{' and '.join(drawing)}: {_drawn(settings)}")
        said += [f"{model['name']}: {_drawn(model)}" for model in models if _drawn(model) != _drawn(settings)]
    if any("peak_bytes" in case.get("memory", {}) for model in models for case in model["cases"].values()):
        said.append(f"peak memory: {_whose_memory(report['device'])}")
    return "; ".join(said)


def _drawn(how: Mapping[str, Any]) -> str:
    return str(Drawing(how["num_inference_steps"], how["guidance_scale"]))


def _whose_memory(device: str) -> str:
    """As `bkd.eval.peak_memory` takes it."""
    resident = device.startswith(("cpu", "mps"))
    return "of the process, libraries included" if resident else "of the device, as torch allocates it"
