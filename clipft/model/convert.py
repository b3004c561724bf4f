"""Tensors under names -> the names and shapes of a model, by the conversions that open_clip's load_checkpoint makes."""

import math
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clipft.model.encode import OpenClip
from clipft.model.forms import check_archive

IMAGE_POSITIONS = "visual.positional_embedding"
POOL_POSITIONS = "visual.attnpool.positional_embedding"
TEXT_POSITIONS = ("positional_embedding", "text.positional_embedding")


def converted(model: OpenClip, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The weights as this model names and shapes them, where open_clip knows how, and what was changed, in words.

    What it has no conversion for stays as it is, for the comparison of names and shapes that follows.
    """
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    state = dict(state)
    if hasattr(model.visual, "trunk"):  # of Apple's MobileCLIP, the only one that has names of its own there
        with suppress(KeyError, AttributeError):  # another model than that: the names stay as they are
            state = convert_state_dict(model, state)
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    ours = model.state_dict()
    for name in [name for name in state if name not in ours]:
        if name.endswith(("attn_mask", "embeddings.position_ids")):  # constants that were once saved beside weights
            del state[name]
    for name in ("logit_scale", "logit_bias"):  # a number or a list of one, by the trainer's version
        if name in ours and name in state and state[name].numel() == 1:
            state[name] = state[name].reshape(ours[name].shape)
    notes = []
    if "logit_bias" in ours and "logit_bias" not in state and "logit_scale" in state:
        state["logit_bias"] = torch.zeros_like(state["logit_scale"])
        notes.append("logit_bias is new and 0: the weights have none")
    return state, notes + resize_positions(model, state)


def resize_positions(model: OpenClip, state: dict[str, Tensor]) -> list[str]:
    """Interpolates the position embeddings of open_clip's own towers, in place; what was done, in words."""
    from open_clip.model import resize_pos_embed, resize_text_pos_embed

    ours, notes = model.state_dict(), []
    if hasattr(model.visual, "grid_size") and differ(ours, state, IMAGE_POSITIONS):
        side = math.isqrt(len(state[IMAGE_POSITIONS]) - 1)
        if side**2 == len(state[IMAGE_POSITIONS]) - 1:
            resize_pos_embed(state, model)
            height, width = model.visual.grid_size
            notes.append(f"image positions interpolated from {side} x {side} to {height} x {width} patches (bicubic)")
    for name in TEXT_POSITIONS:
        if differ(ours, state, name):
            before = len(state[name])
            resize_text_pos_embed(state, model)
            notes.append(f"text positions stretched from {before} to {len(ours[name])} tokens (linear)")
    return notes


def differ(ours: dict[str, Tensor], state: dict[str, Tensor], name: str) -> bool:
    """Whether the two have other numbers of positions of one width."""
    if name not in ours or name not in state:
        return False
    theirs = state[name]
    return (
        theirs.ndim == 2
        and len(theirs) > 0
        and theirs.shape[1] == ours[name].shape[1]
        and len(theirs) != len(ours[name])
    )


def load_big_vision(model: OpenClip, path: Path) -> None:
    """Copies in SigLIP weights as big_vision publishes them (.npz), by open_clip's reader; it knows timm's towers only.

    numpy refuses pickled objects. open_clip's reader leaves out layers that the model does not have, so that the
    numbers are counted first.
    """
    from open_clip.convert import load_big_vision_weights

    check_archive(path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            root = "params/" if "params/b" in arrays else ""
            count = sum(arrays[name].size for name in arrays if name.startswith(root))
        here = sum(parameter.numel() for parameter in model.parameters())
        if count != here:
            raise ValueError(f"it holds {count:,} numbers, the model {here:,}")
        load_big_vision_weights(model, str(path))  # pyright: ignore[reportArgumentType]
    except (OSError, MemoryError):  # about this machine, now; not about the file
        raise
    except Exception as error:  # of numpy and of open_clip's reader, for arrays that are missing or of another shape
        raise ValueError(f"{path} does not hold this model's weights under big_vision's names: {error}.") from error
