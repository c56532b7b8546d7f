"""Draw docs/images/PRESET.svg: what each preset removes from Stable Diffusion 1.x or SDXL.

python tools/draw_presets.py
"""

from __future__ import annotations

from pathlib import Path

from architectures import SD1, SDXL

from bkd.surgery.anatomy import read_anatomy
from bkd.surgery.build import build_empty
from bkd.surgery.diagram import diagram
from bkd.surgery.presets import ALIASES, PRESETS, preset_layout
from bkd.surgery.unet import plan_removal

IMAGES = Path(__file__).parent.parent / "docs" / "images"


def main() -> None:
    for name, preset in PRESETS.items():
        if name == "none":
            continue
        family, config = ("SDXL", SDXL) if name.startswith("koala") else ("Stable Diffusion 1.x", SD1)
        anatomy = read_anatomy(config)
        before, after = (
            sum(p.numel() for p in build_empty(config, plan).parameters())
            for plan in (None, plan_removal(config, name))
        )
        known = ", ".join([name, *(alias for alias, preset in ALIASES.items() if preset == name)])
        drawing = diagram(
            anatomy,
            preset_layout(anatomy, name),
            f"{known}: {preset.summary}",
            subtitle=f"{family}: {before:,} → {after:,} UNet parameters",
        )
        (IMAGES / f"{name}.svg").write_text(drawing.svg())


if __name__ == "__main__":
    main()
