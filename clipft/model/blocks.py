"""open_clip's transformer blocks, computed no further than their output is used; exact up to rounding.

A CLIP feature is the output at one position. What the last block makes at the others is thrown away, so there only
keys and values are needed: of a tower of L blocks this saves about 0.8 / L.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

Transformer = Any  # open_clip's; naming it here would import open_clip


def is_plain(transformer: Transformer) -> bool:
    """Whether all blocks are open_clip's usual ones, as they were built: not wrapped, not recomputed backwards."""
    from open_clip.transformer import ResidualAttentionBlock
    from open_clip.transformer import Transformer as Plain

    if type(transformer) is not Plain or transformer.grad_checkpointing or not transformer.batch_first:
        return False
    return all(
        type(block) is ResidualAttentionBlock
        and type(block.attn) is nn.MultiheadAttention
        and not hasattr(block, "ln_1_kv")
        for block in transformer.resblocks
    )


def outputs_at(
    transformer: Transformer,
    x: Float[Tensor, "b n width"],
    position: Int64[Tensor, " b"],
    mask: Float[Tensor, "n n"] | None,
) -> Float[Tensor, "b width"]:
    """The transformer's output at one position of each sequence; `mask` is causal attention's, or none."""
    *blocks, last = transformer.resblocks
    for block in blocks:
        y = block.ln_1(x)
        # Told that it is causal, attention needs no mask in memory and takes its quicker kernels.
        y = block.attn(y, y, y, need_weights=False, attn_mask=mask, is_causal=mask is not None)[0]
        x = after_attention(block, x, y)
    y, rows = last.ln_1(x), torch.arange(len(x), device=x.device)
    seen = None if mask is None else mask[position][:, None].repeat_interleave(last.attn.num_heads, dim=0)
    attended = last.attn(y[rows, position][:, None], y, y, need_weights=False, attn_mask=seen)[0]
    return after_attention(last, x[rows, position], attended[:, 0])


def after_attention(
    block: nn.Module, x: Float[Tensor, "*n width"], attended: Float[Tensor, "*n width"]
) -> Float[Tensor, "*n width"]:
    """The rest of a block: both residual sums and the MLP."""
    parts: Any = block
    x = x + parts.ls_1(attended)
    return x + parts.ls_2(parts.mlp(parts.ln_2(x)))
