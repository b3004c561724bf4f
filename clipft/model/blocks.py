"""open_clip's transformer blocks, computed no further than their output is used; exact up to rounding.

A CLIP feature is the output at one position. What the last block makes at the others is thrown away, so there only
keys and values are needed: of a tower of L blocks this saves about 0.8 / L.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, no_type_check

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Transformer = Any  # open_clip's; naming it here would import open_clip


def is_plain(transformer: Transformer) -> bool:
    """Whether all blocks are open_clip's usual ones, as they were built."""
    from open_clip.transformer import ResidualAttentionBlock
    from open_clip.transformer import Transformer as Plain

    if type(transformer) is not Plain or not transformer.batch_first:
        return False
    return all(
        type(block) is ResidualAttentionBlock
        and type(block.attn) is nn.MultiheadAttention
        and not hasattr(block, "ln_1_kv")
        for block in transformer.resblocks
    )


@no_type_check  # checks of shapes between these lines would be compiled with them
def block_output(block, x, mask):
    """The block's output [b, n, width] for x [b, n, width]; `mask` [n, n] is causal attention's, or none."""
    y = block.ln_1(x)
    # Told that it is causal, attention needs no mask in memory and takes its quicker kernels.
    x = x + block.ls_1(block.attn(y, y, y, need_weights=False, attn_mask=mask, is_causal=mask is not None)[0])
    return x + block.ls_2(block.mlp(block.ln_2(x)))


@no_type_check
def block_output_at(block, x, position, mask):
    """The block's output [b, width] at one position [b] of each sequence."""
    y, rows = block.ln_1(x), torch.arange(len(x), device=x.device)
    seen = None if mask is None else mask[position][:, None].repeat_interleave(block.attn.num_heads, dim=0)
    attended = block.attn(y[rows, position][:, None], y, y, need_weights=False, attn_mask=seen)[0]
    x = x[rows, position] + block.ls_1(attended[:, 0])
    return x + block.ls_2(block.mlp(block.ln_2(x)))


@dataclass(frozen=True)
class Blocks:
    """The functions that compute a block: as they stand here, or compiled (clipft.model.compiled)."""

    output: Callable[..., Tensor] = block_output
    output_at: Callable[..., Tensor] = block_output_at


AS_THEY_ARE = Blocks()


def outputs_at(
    transformer: Transformer,
    x: Float[Tensor, "b n width"],
    position: Int64[Tensor, " b"],
    mask: Float[Tensor, "n n"] | None,
    blocks: Blocks = AS_THEY_ARE,
) -> Float[Tensor, "b width"]:
    """The transformer's output at one position of each sequence; `mask` is causal attention's, or none."""

    def run(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        if transformer.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)

    *first, last = transformer.resblocks
    for block in first:
        x = run(blocks.output, block, x, mask)
    return run(blocks.output_at, last, x, position, mask)
