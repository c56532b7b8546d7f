"""The figures of an evaluation as tables of words, and which of them there are none of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bkd.eval.shown import METRIC_TITLES, NONE, calls_of, large, relative, share

Model = Mapping[str, Any]
"""A model's figures, as a report has them."""
Metric = Mapping[str, Any]
COST_COLUMNS = ("UNet params", "UNet calls", "MACs an image")
CLOSENESS = "closeness"


@dataclass(frozen=True)
class Table:
    """Cells as words, a row for each model.

    Attributes:
        title: What it shows.
        columns: Their heads, the first that of the model.
        rows: The cells.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def without(self, columns: Collection[str]) -> Table:
        """The same, narrower."""
        kept = [number for number, name in enumerate(self.columns) if name not in columns]
        heads, *rows = (tuple(cells[number] for number in kept) for cells in (self.columns, *self.rows))
        return Table(self.title, heads, tuple(rows))


def interval(metric: Metric) -> str:
    """`12.3 (11.9 to 12.8)`; one image has no interval, and `skipped` says why there is no value."""
    if "skipped" in metric:
        return NONE
    if metric["low"] is None:
        return f"{metric['value']:.4g}"
    return f"{metric['value']:.4g} ({metric['low']:.4g} to {metric['high']:.4g})"


def half_width(metric: Metric) -> str:
    """`12.3 ± 0.4`, half of the interval: where there is no room for both its ends."""
    if "skipped" in metric or metric["low"] is None:
        return interval(metric)
    return f"{metric['value']:.4g} ± {(metric['high'] - metric['low']) / 2:.2g}"


def shapes_table(models: Sequence[Model], split: str, estimate: Callable[[Metric], str] = interval) -> Table:
    """Of suite `shapes` on one split.

    Args:
        models: The first is what the others are compared with.
        split: Its name.
        estimate: How a figure is written with its interval.
    """
    first = models[0]["name"]
    columns = ("model", "right", "95 % interval", f"of {first}", "p", "one object", "two objects", "shapes-FID", "bias")
    rows = []
    for number, model in enumerate(models):
        found = model["splits"][split]
        accuracy = found["accuracy"]
        cells = (
            model["name"],
            share(accuracy),
            f"{accuracy['low']:.1%} to {accuracy['high']:.1%}",
            relative(found["relative"]),
            f"{found['mcnemar_p']:.2g}" if number else NONE,
            share(found["by_objects"]["one"]),
            share(found["by_objects"]["two"]),
            estimate(found["shapes_fid"]),
            _bias(found["shapes_fid"]),
        )
        rows.append((*cells, *_cost(model)))
    return Table("All figures", (*columns, *COST_COLUMNS), tuple(rows))


def attributes_table(models: Sequence[Model], split: str) -> Table:
    """What of the captions is right, by attribute."""
    names = tuple(models[0]["splits"][split]["attributes"])
    rows = ((m["name"], *(share(m["splits"][split]["attributes"].get(name)) for name in names)) for m in models)
    return Table("Agrees with the caption in", ("model", *names), tuple(rows))


def prompts_table(models: Sequence[Model], estimate: Callable[[Metric], str] = interval) -> Table:
    """Of the suites that take any prompts; arguments as for `shapes_table`."""
    columns = ("model", *METRIC_TITLES.values(), "bias of FID", f"PSNR to {models[0]['name']}", "SSIM")
    rows = []
    for model in models:
        close = model["closeness"]
        metrics = [estimate(model[key]) for key in METRIC_TITLES]
        pairs = [estimate(close.get(key, close)) for key in ("psnr_db", "ssim")]
        rows.append((model["name"], *metrics, _bias(model["fid"]), *pairs, *_cost(model)))
    return Table("All figures", (*columns, *COST_COLUMNS), tuple(rows))


def skipped(models: Sequence[Model], split: str | None = None) -> list[tuple[str, str]]:
    """Each metric that could not be measured, and whose where it is not everybody's; and why.

    Args:
        models: As for the tables.
        split: Of suite `shapes`.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for number, model in enumerate(models):
        for title, metric in _metrics(model, split).items():
            if "skipped" in metric and (number or title != CLOSENESS):  # the first has none to itself
                found.setdefault((title, metric["skipped"]), []).append(model["name"])
    return [
        (title if len(names) == len(models) else f"{title} of {', '.join(names)}", reason)
        for (title, reason), names in found.items()
    ]


def _metrics(model: Model, split: str | None) -> dict[str, Metric]:
    if split is not None:
        return {"shapes-FID": model["splits"][split]["shapes_fid"]}
    return {**{title: model[key] for key, title in METRIC_TITLES.items()}, CLOSENESS: model["closeness"]}


def _cost(model: Model) -> tuple[str, str, str]:
    macs = model["unet_macs"] * model["num_inference_steps"] * model["passes_a_step"]
    return large(model["unet_parameters"]), calls_of(model), large(macs)


def _bias(metric: Metric) -> str:
    return f"{metric['bias']:.3g}" if isinstance(metric.get("bias"), float) else NONE
