"""Pulls a picture toward a text, by the gradient of Encoder.prompt_loss.

python -m clipft.examples.guide runs/tiny-toy "a large red disc on a white background"
"""

import argparse
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

import clipft
from clipft.encoder import Encoder

LR = 0.05
NOISE = 0.1
COARSEST = 8  # px; pictures are sums of grids of this size and twice, four times, ... of it
PRINTED = 10  # lines of progress


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m clipft.examples.guide", description="Pulls a picture, at first noise, toward a text."
    )
    parser.add_argument("model", help="run directory, export folder or architecture")
    parser.add_argument("text")
    parser.add_argument("--image", help="picture to start from; noise without")
    parser.add_argument("--out", default="guided.png")
    parser.add_argument("--side", type=int, default=64, help="pixels of the picture's sides (default 64)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--crops", type=int, default=8, help="views of the picture at each step (default 8)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    encoder = clipft.load(options.model)
    begin = torch.zeros(3, options.side, options.side)  # logits of grey
    if options.image:
        shown = Image.open(options.image).convert("RGB").resize((options.side, options.side))
        begin = (torch.from_numpy(np.array(shown)).permute(2, 0, 1) / 255).clamp(0.01, 0.99).logit()
    for step, (picture, loss) in enumerate(guided(encoder, options.text, begin, options.steps, options.crops)):
        if step % max(1, options.steps // PRINTED) == 0 or step == options.steps:
            cosine = float(encoder.score([as_image(picture)], [options.text]))
            print(f"step {step:4d}  loss {loss:.4f}  cosine of the whole picture {cosine:.3f}", flush=True)
            as_image(picture).save(options.out)
    print(f"{options.out}: {options.side} x {options.side} pixels")


def guided(
    encoder: Encoder, text: str, start: Float[Tensor, "3 H W"], steps: int, crops: int
) -> Iterator[tuple[Float[Tensor, "3 H W"], float]]:
    """The picture (0..1) before each step and after the last one, with its loss; `start` holds logits."""
    loss_of = encoder.prompt_loss(text, num_crops=crops)
    sides = [COARSEST * 2**k for k in range(32) if COARSEST * 2**k <= min(start.shape[1:])]
    grids = [(NOISE * torch.randn(1, 3, side, side)).requires_grad_() for side in sides]
    optimizer = torch.optim.Adam(grids, lr=LR)
    for step in range(steps + 1):
        layers = [F.interpolate(grid, size=start.shape[1:], mode="bilinear")[0] for grid in grids]
        picture = (start + torch.stack(layers).sum(dim=0)).sigmoid()
        loss = loss_of(picture)
        yield picture.detach(), float(loss.detach())
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def as_image(picture: Float[Tensor, "3 H W"]) -> Image.Image:
    return Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy())


if __name__ == "__main__":
    main()
