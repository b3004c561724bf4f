"""Pixels and tokens -> unit-norm features in fp32, with captions cut to what they need."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from clipft.model.blocks import AS_THEY_ARE, Blocks, is_plain, outputs_at

OpenClip = Any  # open_clip's CLIP or CustomTextCLIP; naming them here would import open_clip

POOLED_BY_TOKEN = ("argmax", "eos", "first")
PROBES = ["a", "a dog", "two brown dogs run over wet grass", "word " * 12, "word " * 200]
GROUP_ROWS, MOST_GROUPS = 8, 8  # captions that are cut together at least, and groups of them at most
TRIM_TOLERANCE = 1e-4  # right cuts differ by 2e-7, cuts one token early by 0.07 and more (tiny, ViT-B-32, fp32)


def to_float(
    pixels: UInt8[Tensor, "b 3 S1 S2"], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "b 3 S1 S2"]:
    """Pixels as torchvision's ToTensor and Normalize leave them, computed where the pixels are."""
    shift, width = (per_channel(tuple(values), pixels.device) for values in (mean, std))
    return (pixels.float() / 255 - shift) / width


@cache  # a number that is sent to a GPU is waited for
def per_channel(values: tuple[float, ...], device: torch.device) -> Float[Tensor, "3 1 1"]:
    return torch.tensor(values, device=device).view(3, 1, 1)


def unit(features: Float[Tensor, "b D"]) -> Float[Tensor, "b D"]:
    """The features at length 1, in fp32 whatever the autocast; fp64 stays fp64."""
    with torch.autocast(features.device.type, enabled=False):
        wide = features if features.dtype == torch.float64 else features.float()
        return F.normalize(wide, dim=-1)


def encode_image(
    model: OpenClip, pixels: Float[Tensor, "b 3 S1 S2"], blocks: Blocks = AS_THEY_ARE
) -> Float[Tensor, "b D"]:
    visual = model.visual
    pixels = pixels.to(next(visual.parameters()).dtype)  # of bf16-true and 64-true; autocast leaves it fp32
    if not pools_class_token(visual):
        return unit(model.encode_image(pixels))
    x = visual._embeds(pixels)
    first = torch.zeros(len(x), dtype=torch.long, device=x.device)
    x = visual.ln_post(outputs_at(visual.transformer, x, first, False, blocks))
    return unit(x if visual.proj is None else x @ visual.proj)


def pools_class_token(visual: nn.Module) -> bool:
    """Whether the image feature is the class token's output of open_clip's own ViT, and of nothing else."""
    from open_clip.transformer import VisionTransformer

    if type(visual) is not VisionTransformer:
        return False
    alone = visual.pool_type == "tok" and visual.attn_pool is None and not visual.output_tokens
    return alone and is_plain(visual.transformer)


def encode_text(
    model: OpenClip, tokens: Int64[Tensor, "b L"], trim: bool, blocks: Blocks = AS_THEY_ARE
) -> Float[Tensor, "b D"]:
    """Text features; tokens that were cut before, on the host and so without a device sync, are welcome."""
    if trim:
        tokens = trim_tokens(model, tokens)
    return unit(encode_short(model, tokens, blocks) if has_causal_tower(model) else model.encode_text(tokens))


def text_tower(model: OpenClip) -> Any:
    """The module with the text tower's parts: `model.text` of CustomTextCLIP, CLIP itself."""
    return getattr(model, "text", model)


def text_pool(model: OpenClip) -> str:
    """open_clip's name for how the text feature is taken from the tower's outputs."""
    tower = text_tower(model)
    return tower.text_pool_type if tower is model else tower.pool_type


def pooled_index(model: OpenClip, tokens: Int64[Tensor, "b L"]) -> Int64[Tensor, " b"]:
    """The position whose output becomes the text feature, as open_clip's text_global_pool picks it."""
    tower, pool = text_tower(model), text_pool(model)
    if pool == "first":
        return torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
    if pool == "eos":
        eos = tower.text_eos_id if tower is model else tower.eos_id
        return (tokens == eos).int().argmax(dim=-1)
    return tokens.argmax(dim=-1)


def trim_tokens(model: OpenClip, tokens: Int64[Tensor, "b L"], multiple: int = 1) -> Int64[Tensor, "b n"]:
    """Tokens without the positions after every caption's pooled one, but for those up to a multiple of so many.

    Cut at the pooled index and not at padding: the pad id 0 is also the token of "!".
    """
    longest = int(pooled_index(model, tokens).max()) + 1
    return tokens[:, : -(-longest // multiple) * multiple]


def encode_short(model: OpenClip, tokens: Int64[Tensor, "b n"], blocks: Blocks = AS_THEY_ARE) -> Float[Tensor, "b D"]:
    """open_clip's encode_text of a causal tower for n tokens, at most its context length."""
    tower, n = text_tower(model), tokens.shape[1]
    dtype = tower.transformer.get_cast_dtype()
    x = tower.token_embedding(tokens).to(dtype) + tower.positional_embedding[:n].to(dtype)
    end = pooled_index(model, tokens)
    if is_plain(tower.transformer):
        x = grouped_outputs_at(tower.transformer, x, end, blocks)
    else:
        mask = tower.attn_mask[:n, :n].to(dtype)
        x = tower.transformer(x, attn_mask=mask)[torch.arange(len(tokens), device=tokens.device), end]
    x = tower.ln_final(x)
    if isinstance(tower.text_projection, nn.Linear):
        return tower.text_projection(x)
    return x if tower.text_projection is None else x @ tower.text_projection


def grouped_outputs_at(
    transformer: Any, x: Float[Tensor, "b n width"], end: Int64[Tensor, " b"], blocks: Blocks
) -> Float[Tensor, "b width"]:
    """A causal transformer's output at position `end` of each sequence.

    On a CPU sequences go together by length, each group cut after its own longest. On a GPU, asking how long they are
    would wait for it.
    """
    num_groups = min(MOST_GROUPS, len(x) // GROUP_ROWS)
    if num_groups < 2 or x.device.type != "cpu" or blocks is not AS_THEY_ARE:
        return outputs_at(transformer, x, end, True, blocks)
    order = end.argsort(stable=True)
    parts = [
        outputs_at(transformer, x[rows, : int(end[rows[-1]]) + 1], end[rows], True, blocks)
        for rows in order.tensor_split(num_groups)
    ]
    return torch.cat(parts)[order.argsort()]


def token_states(model: OpenClip, tokens: Int64[Tensor, "b L"], pad: str) -> Float[Tensor, "b L width"]:
    """Outputs of a causal tower at all positions, after its final norm; `pad` (zero or eot) stands behind the texts."""
    if not has_causal_tower(model) or text_pool(model) == "first":
        raise ValueError("This model's text tower is not causal or has no end token: it has no CLIP token embeddings.")
    tower = text_tower(model)
    end = pooled_index(model, tokens)[:, None]
    filler = tokens.gather(1, end) if pad == "eot" else 0
    tokens = torch.where(torch.arange(tokens.shape[1], device=tokens.device) > end, filler, tokens)
    dtype = tower.transformer.get_cast_dtype()
    x = tower.token_embedding(tokens).to(dtype) + tower.positional_embedding.to(dtype)
    return tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask))


def has_causal_tower(model: OpenClip) -> bool:
    """Whether the text tower is built so that nothing after the pooled position can matter."""
    from open_clip import CLIP
    from open_clip.transformer import TextTransformer

    tower = text_tower(model)
    if not isinstance(tower, CLIP | TextTransformer):
        return False
    appended = getattr(tower, "cls_emb", None) is not None or getattr(tower, "output_tokens", False)
    return text_pool(model) in POOLED_BY_TOKEN and tower.attn_mask is not None and not appended


@torch.no_grad()
def can_trim(model: OpenClip, tokenize: Callable[[list[str]], Tensor]) -> bool:
    """Whether captions may be cut: tried on the loaded model with captions of several lengths."""
    if not has_causal_tower(model):
        return False
    tokens = tokenize(PROBES).to(next(model.parameters()).device)
    full = encode_text(model, tokens, trim=False)
    cut = [encode_text(model, tokens[i : i + 1], trim=True)[0] for i in range(len(tokens))]
    return bool((torch.stack(cut) - full).abs().max() <= TRIM_TOLERANCE)
