"""open_clip's transformer blocks, computed no further than their output is used; exact up to rounding.

A CLIP feature is the output at one position. What the last block makes at the others is thrown away, so there only
keys and values are needed: of a tower of L blocks this saves about 0.8 / L.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, no_type_check

import torch
import torch.nn.functional as F
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
def block_output(block, x, causal):
    """The block's output [b, n, width] for x [b, n, width]; `causal`: no position sees a later one."""
    attn = block.attn
    projected = F.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias)
    # nn.MultiheadAttention takes them by index, whose backward fills and adds three tensors of this size.
    x = x + block.ls_1(attended(attn, *projected.chunk(3, dim=-1), causal=causal))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


@no_type_check
def block_output_at(block, x, position, causal):
    """The block's output [b, width] at one position [b] of each sequence."""
    y, rows, attn = block.ln_1(x), torch.arange(len(x), device=x.device), block.attn
    width = x.shape[-1]
    weights = attn.in_proj_weight.split([width, 2 * width])
    biases = (None, None) if attn.in_proj_bias is None else attn.in_proj_bias.split([width, 2 * width])
    query = F.linear(y[rows, position][:, None], weights[0], biases[0])
    keys, values = F.linear(y, weights[1], biases[1]).chunk(2, dim=-1)
    seen = torch.arange(x.shape[1], device=x.device) <= position[:, None] if causal else None
    mask = None if seen is None else seen[:, None, None]
    x = x[rows, position] + block.ls_1(attended(attn, query, keys, values, mask=mask)[:, 0])
    return x + block.ls_2(block.mlp(block.ln_2(x)))


@no_type_check
def attended(attn, queries, keys, values, mask=None, causal=False):
    """What nn.MultiheadAttention makes of projected queries [b, m, width], keys and values [b, n, width].

    Told that it is causal, attention needs no mask in memory and takes its quicker kernels.
    """
    b, m, width = queries.shape
    q, k, v = (part.view(b, -1, attn.num_heads, attn.head_dim).transpose(1, 2) for part in (queries, keys, values))
    dropped = attn.dropout if attn.training else 0.0
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropped, is_causal=causal)
    return attn.out_proj(found.transpose(1, 2).reshape(b, m, width))


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
    causal: bool,
    blocks: Blocks = AS_THEY_ARE,
) -> Float[Tensor, "b width"]:
    """The transformer's output at one position of each sequence; `causal`: no position sees a later one."""

    def run(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        if transformer.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)

    *first, last = transformer.resblocks
    for block in first:
        x = run(blocks.output, block, x, causal)
    return run(blocks.output_at, last, x, position, causal)
