"""BibTeX of what a student stands on, by what its stages did."""

from __future__ import annotations

from collections.abc import Iterator

from bkd.recipe.schema import Recipe
from bkd.recipe.stages import Guided, Halving, Kd

ENTRIES = {
    "rombach2022": (
        'Rombach, Robin and Blattmann, Andreas and Lorenz, Dominik and Esser, Patrick and Ommer, Bj{\\"o}rn',
        "High-Resolution Image Synthesis with Latent Diffusion Models",
        2022,
        "2112.10752",
    ),
    "kim2023": (
        "Kim, Bo-Kyeong and Song, Hyoung-Kyu and Castells, Thibault and Choi, Shinkook",
        "{BK-SDM}: A Lightweight, Fast, and Cheap Version of Stable Diffusion",
        2023,
        "2305.15798",
    ),
    "meng2022": (
        "Meng, Chenlin and Rombach, Robin and Gao, Ruiqi and Kingma, Diederik P. and Ermon, Stefano and Ho, Jonathan "
        "and Salimans, Tim",
        "On Distillation of Guided Diffusion Models",
        2022,
        "2210.03142",
    ),
    "salimans2022": (
        "Salimans, Tim and Ho, Jonathan",
        "Progressive Distillation for Fast Sampling of Diffusion Models",
        2022,
        "2202.00512",
    ),
    "golnari2023": (
        "Golnari, Pareesa Ameneh",
        "{LoRA}-Enhanced Distillation on Guided Diffusion Models",
        2023,
        "2312.06899",
    ),
}
"""Key -> authors, title, year, arXiv."""


def citations(recipe: Recipe) -> str:
    """Entries of a recipe's methods, in the order of their use."""
    return "\n\n".join(_entry(key) for key in dict.fromkeys(_used(recipe)))


def _used(recipe: Recipe) -> Iterator[str]:
    yield "rombach2022"
    for stage in recipe.stages:
        if isinstance(stage.method, Kd):
            yield "kim2023"
        elif isinstance(stage.method, Guided):
            yield "meng2022"
            if stage.lora is not None:
                yield "golnari2023"
        elif isinstance(stage.method, Halving):
            yield from ("salimans2022", "meng2022")


def _entry(key: str) -> str:
    authors, title, year, arxiv = ENTRIES[key]
    return (
        f"@misc{{{key},\n  author = {{{authors}}},\n  title = {{{title}}},\n  year = {{{year}}},\n"
        f"  eprint = {{{arxiv}}},\n  archivePrefix = {{arXiv}}\n}}"
    )
