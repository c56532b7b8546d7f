"""What `bkd data` shows."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING

from bkd.cli.console import console, counted, table
from bkd.data import check

if TYPE_CHECKING:
    from bkd.data.check import CheckReport
    from bkd.data.latent_set import LatentSet


def show_reasons(done: str, totals: Counter[str], things: str = "samples") -> None:
    """A row for what was taken, under the name `kept`, then one for each reason for which others were not."""
    total = max(1, totals.total())
    rows = [(done, f"{totals['kept']:,}", f"{totals['kept'] / total:.1%}")]
    rows += [(name, f"{n:,}", f"{n / total:.1%}") for name, n in totals.most_common() if name != "kept"]
    console.print(table(f"{totals.total():,} {things}", ("", things, "share"), rows))


def show_check(report: CheckReport, *, as_json: bool) -> None:
    """Everything that `bkd data check` found but the problems, which are errors."""
    if as_json:
        console.print_json(data=dict(check.as_json(report)), default=str)
        return
    members = ", ".join(f"{count:,} {name}" for name, count in report.members.most_common()) or "none"
    size = f"{report.num_bytes / 1e9:,.2f} GB" if report.num_bytes >= 1e8 else f"{report.num_bytes / 1e6:,.1f} MB"
    console.print(f"{counted(report.num_shards, 'shard')}, {size}, {report.num_samples:,} samples")
    console.print(f"members: {members}")
    if report.num_samples:
        _show_fields(report)
        show_reasons("training would use", Counter({"kept": report.kept, **report.reasons}))
    for note in report.notes:
        console.print(f"note: {note}")


def _show_fields(report: CheckReport) -> None:
    header = ("field", "samples", "share", *(f"{q} %" for q in check.QUANTILES))
    rows = []
    for name, count in report.coverage.items():
        values = [f"{value:,.4g}" for value in report.quantiles.get(name, ())]
        rows.append(
            (
                name,
                f"{count:,}",
                f"{count / report.num_samples:.1%}",
                *values,
                *[""] * (len(check.QUANTILES) - len(values)),
            )
        )
    console.print(table("values and their quantiles", header, rows))
    others = ", ".join(
        f"{name} {count / report.num_samples:.0%}" for name, count in report.metadata_fields.most_common()
    )
    console.print(f"fields of KEY.json: {others or 'none'}")


def show_latents(data: LatentSet, *, as_json: bool) -> None:
    """A cached data set in a few lines, or for programs."""
    settings = data.description.settings
    if as_json:
        counts = {"samples": len(data), "shards": len(data.shards), "left_out": data.left_out, "bad": data.bad}
        console.print_json(data={**counts, "settings": asdict(settings)}, default=str)
        return
    console.print(
        f"cached latents: {len(data):,} samples in {counted(len(data.shards), 'shard')}, {settings.resolution} px, "
        f"{settings.dtype}{', mirrored images too' if settings.mirrored else ''}"
    )
    console.print(f"captions: {settings.caption}; filters: {'; '.join(settings.filters) or 'none'}")
    if data.left_out or data.bad:
        show_reasons("cached", Counter({"kept": len(data)}) + data.left_out + data.bad)
