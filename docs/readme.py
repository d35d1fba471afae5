"""Writes README's table and picture from the committed results: `python docs/readme.py`.

Numbers are from `results/mini/table1/table1.json`, images from `pictures.png` beside it, and the
scores below the images from its cells.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "mini" / "table1"
PICTURE = ROOT / "docs" / "pictures.png"
BLOCK = re.compile(r"(<!-- table -->\n).*?(<!-- end of table -->)", re.DOTALL)
OUT_OF_DOMAIN = ("clip", "pick_score", "attributes")
"""The rewards bounded by 1. ImageReward is unbounded and would dominate the mean."""
PROMPTS = 4
SIDE, GAP, TEXT = 96, 8, 150


def rows() -> list[dict[str, Any]]:
    """The base, and the rows that were trained on HPS alone."""
    table = json.loads((RESULTS / "table1.json").read_text("utf-8"))
    return [row for row in table["rows"] if row["trained_on"] in ([], ["hps"])]


def mean(row: dict[str, Any], *names: str) -> float:
    """The mean of a row's scores."""
    return float(sum(row["scores"][name]["mean"] for name in names)) / len(names)


def interval(number: dict[str, float]) -> str:
    """A mean with its interval."""
    return f"{number['mean']:.3f} [{number['low']:.3f}, {number['high']:.3f}]"


def markdown() -> str:
    """README's table."""
    base, *trained = rows()
    lines = [
        "| Method | HPS (trained on) | Share of headroom | Out-of-domain mean | Rollout NFE |",
        "|---|---:|---:|---:|---:|",
        f"| {base['label']} | {mean(base, 'hps'):.3f} | – | {mean(base, *OUT_OF_DOMAIN):.3f} | – |",
    ]
    for row in trained:
        hps, share = row["scores"]["hps"], row.get("headroom", {}).get("in_domain")
        lines.append(
            f"| {row['label']} | {interval(hps)} "
            f"| {'–' if share is None else interval(share)} | {mean(row, *OUT_OF_DOMAIN):.3f} "
            f"| {row['costs']['rollout_evaluations']:,.0f} |"
        )
    return "\n".join(lines) + "\n"


def scores(row: dict[str, Any]) -> pd.DataFrame:
    """The scores of a row's images in ``pictures.png``: by prompt, then reward."""
    name = row["key"].replace("/", "--") + ("__seed1" if row["seeds"] else "")
    frame = pd.read_parquet(RESULTS / "cells" / f"{name}.parquet")
    return frame.pivot_table(index="prompt_id", columns="reward", values="score").sort_index()


def picture() -> Image.Image:
    """The first held-out prompts under the base and every method, with their scores."""
    sheet = np.array(Image.open(RESULTS / "pictures.png").convert("RGB"))
    captions = (ROOT / "benchmarks/mini_world/assets/prompts/test.txt").read_text().splitlines()
    shown = rows()
    size = (TEXT + len(shown) * (SIDE + GAP), 40 + PROMPTS * (SIDE + 40))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 10)
    for number, caption in enumerate(captions[:PROMPTS]):
        draw.multiline_text((GAP, 60 + number * (SIDE + 40)), wrapped(caption), "black", font)
    for column, row in enumerate(shown):
        left, values = TEXT + column * (SIDE + GAP), scores(row)
        heading = row["label"].replace(" w/o", "\nw/o")
        draw.multiline_text((left + SIDE / 2, 34), heading, "black", font, "md", align="center")
        for number in range(PROMPTS):
            top = 40 + number * (SIDE + 40)
            tile = Image.fromarray(sheet[tile_at(number, column)])
            canvas.paste(tile.resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, top))
            one = values.iloc[number]
            text = f"HPS {one['hps']:.3f}\nattributes {one['attributes']:.2f}"
            draw.multiline_text((left + 2, top + SIDE + 1), text, "dimgray", font)
    return canvas


def tile_at(prompt: int, column: int) -> tuple[slice, slice]:
    """Where `reproduce.tables.picture_grid` puts an image, at its own resolution."""
    top, left = 44 + 136 * prompt, 170 + 136 * column
    return slice(top, top + 128, 4), slice(left, left + 128, 4)


def wrapped(text: str) -> str:
    """A caption in lines of at most 22 letters."""
    return re.sub(r"(.{1,22})(?: |$)", r"\1\n", text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    text = readme.read_text("utf-8")
    readme.write_text(BLOCK.sub(lambda old: old[1] + markdown() + old[2], text), encoding="utf-8")
    picture().save(PICTURE, optimize=True)
