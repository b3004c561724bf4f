"""open_clip's load_checkpoint is the oracle: the same file, read by it and by us."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from weight_files import OPENAI, OPENAI_RESNET, Payload, drawn

from clipft.model.build import build, build_model
from clipft.model.convert import converted, load_big_vision
from clipft.model.weights import first_differences, read_weights

SIGLIP = {
    "embed_dim": 64,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"},
    "text_cfg": {
        "context_length": 8,
        "vocab_size": 49408,
        "width": 64,
        "heads": 1,
        "layers": 2,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
    },
}


def resized(cfg, **text):
    return {**cfg, "vision_cfg": {**cfg["vision_cfg"], "image_size": 48}, "text_cfg": {**cfg["text_cfg"], **text}}


SOURCES = {
    "as it is": (OPENAI, OPENAI),
    "a tower of its own for the text": (OPENAI, {**OPENAI, "custom_text": True}),
    "other sizes": (OPENAI, resized(OPENAI, context_length=10)),
    "other sizes and a tower of its own": (OPENAI, {**resized(OPENAI, context_length=24), "custom_text": True}),
    "a scale that is a list": ({**OPENAI, "nonscalar_logit_scale": True}, OPENAI),
    "no bias": (OPENAI, {**OPENAI, "init_logit_bias": -10.0}),
    "a bias that is a list": (
        {**OPENAI, "init_logit_bias": -3.0, "nonscalar_logit_scale": True},
        {**OPENAI, "init_logit_bias": -10.0},
    ),
    "a ResNet": (OPENAI_RESNET, OPENAI_RESNET),
}


@pytest.mark.parametrize("what", SOURCES)
def test_weights_are_converted_as_open_clip_converts_them(tmp_path, what):
    from open_clip import load_checkpoint

    source, target = SOURCES[what]
    torch.save(drawn(source).model.state_dict(), tmp_path / "w.pt")
    theirs, ours = drawn(target, seed=4).model, drawn(target, seed=5).model
    load_checkpoint(theirs, str(tmp_path / "w.pt"), strict=True, weights_only=True)
    state, notes = converted(ours, read_weights(tmp_path / "w.pt").state)
    ours.load_state_dict(state)
    assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    assert bool(notes) == (what in ("other sizes", "other sizes and a tower of its own", "no bias"))


def test_constants_that_were_once_saved_are_left_out():
    clip = drawn(OPENAI)
    state = clip.model.state_dict() | {"attn_mask": torch.zeros(16, 16)}
    found, _ = converted(clip.model, state)
    assert found.keys() == clip.model.state_dict().keys()


def test_what_cannot_be_converted_stays_to_be_compared():
    model = drawn(OPENAI).model
    wider = build_model({**OPENAI, "text_cfg": {**OPENAI["text_cfg"], "width": 128, "context_length": 9}})
    state, notes = converted(model, wider.state_dict())
    assert not notes and "positional_embedding is (9, 128), not (16, 64)" in first_differences(model, state)


def save_big_vision(model, path: Path, root: str = "params/") -> None:
    """Arrays of the names and shapes that open_clip's reader asks for, drawn at random."""
    draw = np.random.default_rng(0)
    shapes = shapes_of(model)
    arrays = {root + name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    np.savez(path, **arrays)  # pyright: ignore[reportArgumentType]


def shapes_of(model) -> dict[str, tuple[int, ...]]:
    trunk, text = model.visual.trunk, model.text
    width, heads = trunk.embed_dim, trunk.blocks[0].attn.num_heads
    shapes: dict[str, tuple[int, ...]] = {"b": (1,), "t": (1,)}
    patch = trunk.patch_embed.proj.weight.shape
    shapes |= {"img/embedding/kernel": (*patch[2:], 3, width), "img/embedding/bias": (width,)}
    shapes["img/pos_embedding"] = tuple(trunk.pos_embed.shape)
    if trunk.cls_token is not None:
        shapes["img/cls"] = tuple(trunk.cls_token.shape)
    for i, part in enumerate(trunk.blocks):
        hidden = part.mlp.fc1.weight.shape[0]
        shapes |= block(f"img/Transformer/encoderblock_{i}/", width, heads, hidden)
    shapes |= norm("img/Transformer/encoder_norm/", width)
    pool = trunk.attn_pool
    head = "img/MAPHead_0/"
    shapes |= attention(f"{head}MultiHeadDotProductAttention_0/", width, pool.num_heads)
    shapes |= {f"{head}probe": tuple(pool.latent.shape)} | norm(f"{head}LayerNorm_0/", width)
    shapes |= mlp(f"{head}MlpBlock_0/", width, pool.mlp.fc1.weight.shape[0])
    wide = text.token_embedding.weight.shape[1]
    shapes |= {"txt/Embed_0/embedding": tuple(text.token_embedding.weight.shape)}
    shapes["txt/pos_embedding"] = (1, *text.positional_embedding.shape)
    for i in range(len(text.transformer.resblocks)):
        shapes |= block(f"txt/Encoder_0/encoderblock_{i}/", wide, 1, 4 * wide)
    shapes |= norm("txt/Encoder_0/encoder_norm/", wide)
    return shapes | {"txt/head/kernel": (wide, 64), "txt/head/bias": (64,)}


def norm(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}scale": (width,), f"{prefix}bias": (width,)}


def mlp(prefix: str, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    first, second = {f"{prefix}Dense_0/kernel": (width, hidden)}, {f"{prefix}Dense_1/kernel": (hidden, width)}
    return {**first, f"{prefix}Dense_0/bias": (hidden,), **second, f"{prefix}Dense_1/bias": (width,)}


def attention(prefix: str, width: int, heads: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name in ("query", "key", "value"):
        shapes |= {
            f"{prefix}{name}/kernel": (width, heads, width // heads),
            f"{prefix}{name}/bias": (heads, width // heads),
        }
    return shapes | {f"{prefix}out/kernel": (heads, width // heads, width), f"{prefix}out/bias": (width,)}


def block(prefix: str, width: int, heads: int, hidden: int) -> dict[str, tuple[int, ...]]:
    parts = attention(f"{prefix}MultiHeadDotProductAttention_0/", width, heads) | mlp(
        f"{prefix}MlpBlock_0/", width, hidden
    )
    return parts | norm(f"{prefix}LayerNorm_0/", width) | norm(f"{prefix}LayerNorm_1/", width)


@pytest.fixture(scope="module")
def siglip():
    return build("siglip", SIGLIP, {})


@pytest.mark.parametrize("root", ["params/", ""])
def test_big_visions_weights_load_as_open_clip_loads_them(tmp_path, siglip, root):
    from open_clip import load_checkpoint

    save_big_vision(siglip.model, tmp_path / "w.npz", root)
    theirs, ours = deepcopy(siglip.model), deepcopy(siglip.model)
    load_checkpoint(theirs, str(tmp_path / "w.npz"))
    load_big_vision(ours, tmp_path / "w.npz")
    assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    assert not torch.equal(ours.text.positional_embedding, siglip.model.text.positional_embedding)


def test_layers_that_the_model_does_not_have_are_not_left_out_of_big_visions_weights(tmp_path, siglip):
    deeper = deepcopy(siglip.model)
    deeper.text.transformer.resblocks.append(deepcopy(deeper.text.transformer.resblocks[0]))
    save_big_vision(deeper, tmp_path / "w.npz")
    with pytest.raises(ValueError, match=r"w\.npz does not hold this model's weights.*numbers, the model"):
        load_big_vision(siglip.model, tmp_path / "w.npz")


def test_a_pickled_object_among_big_visions_arrays_is_refused_and_never_run(tmp_path, siglip, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "w.npz").open("wb") as file:
        np.savez(file, **{"params/b": np.array([Payload()], dtype=object)})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"w\.npz does not hold this model's weights.*allow_pickle"):
        load_big_vision(siglip.model, tmp_path / "w.npz")
    assert not Path("payload-ran").exists()


def test_one_flipped_bit_in_big_visions_weights_is_found(tmp_path, siglip):
    save_big_vision(siglip.model, tmp_path / "w.npz")
    raw = bytearray((tmp_path / "w.npz").read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "w.npz").write_bytes(raw)
    with pytest.raises(ValueError, match=r"w\.npz is damaged: the bytes of"):
        load_big_vision(siglip.model, tmp_path / "w.npz")
