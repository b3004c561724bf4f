"""Blocks of a tower through torch.compile: one graph for all blocks of a tower and each shape that comes to them.

Shapes are static, so captions are cut to multiples of TEXT_BUCKET tokens: exact, as positions behind the end token
cannot matter where captions may be cut at all.
"""

import os
import shutil
from importlib.util import find_spec
from typing import Any

import torch

from clipft.model.blocks import AS_THEY_ARE, Blocks, is_plain
from clipft.model.build import Clip
from clipft.model.encode import has_causal_tower, pools_class_token, text_tower

TEXT_BUCKET = 16
# Of one function: text lengths and an image, with and without graph, two sizes of micro-batch, trained and frozen.
MOST_GRAPHS = 128
COMPILERS = ("g++", "clang++")


def compiled_blocks(backend: str = "inductor") -> Blocks:
    """The functions of a block, compiled when they first see a shape; nothing about the modules changes."""
    settings: Any = torch._dynamo.config
    settings.recompile_limit = MOST_GRAPHS
    settings.optimize_ddp = False  # which cuts graphs at DDP's buckets: here a graph is a block, and that small already
    output, output_at = (
        torch.compile(function, dynamic=False, fullgraph=True, backend=backend)
        for function in (AS_THEY_ARE.output, AS_THEY_ARE.output_at)
    )
    return Blocks(output, output_at)


def compiles(clip: Clip) -> list[str]:
    """The sides whose blocks are compiled: towers of open_clip's own blocks, pooled at the class or the end token."""
    image, text = pools_class_token(clip.model.visual), has_causal_tower(clip.model)
    text = text and is_plain(text_tower(clip.model).transformer)
    return [side for side, able in (("image", image), ("text", text)) if able]


def check_compile(clip: Clip, device: torch.device) -> None:
    """Raises where train.compile would be ignored or could not work; notes what it reaches."""
    sides = compiles(clip)
    if not sides:
        raise ValueError(
            f"train.compile=true would be ignored: neither tower of {clip.name} is made of open_clip's own transformer "
            "blocks and pooled at one token. Leave it out."
        )
    if lacks := lacking(device):
        raise ValueError(f"train.compile=true needs {lacks}. Install it, or leave the option out.")
    only = "" if len(sides) == 2 else f" (the other tower of {clip.name} cannot be)"
    clip.notes.append(
        f"blocks of the {' and '.join(sides)} tower are compiled{only}; each new shape waits for its graph"
    )


def lacking(device: torch.device) -> str:
    """What torch.compile wants on this device and does not find; empty where it has all."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), None)
    if compiler is None or shutil.which(compiler.split()[0]) is None:
        return f"a C++ compiler ({' or '.join(COMPILERS)}, or the one that CXX names)"
    if device.type == "cuda" and find_spec("triton") is None:
        return "triton"
    return ""
