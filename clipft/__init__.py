"""Fine-tune CLIP on your own image-text pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line must answer before torch is imported
    from pathlib import Path

    import torch

    from clipft.encoder import Encoder

__version__ = "0.1.0"


def load(
    name: str | Path,
    pretrained: str | None = "default",
    *,
    checkpoint: str = "best",
    device: str | torch.device | None = None,
) -> Encoder:
    """A model in evaluation mode, to encode, score and classify with.

    `name` and `pretrained` are what model= and model.pretrained= are on the command line: a run directory, an export
    folder, a weight file, or an architecture of open_clip with the weights of a tag or file ("default": the tag in
    conf/model/, None: random).
    `checkpoint` picks weights of a run: best, last or a step. `device` is a GPU where there is one, else the CPU.
    ValueError names what cannot be loaded.
    """
    from clipft.encoder import load_encoder

    return load_encoder(name, pretrained, checkpoint, device)
