"""The table of what works, in clipft/model/towers.py, against what open_clip builds."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from weight_files import OPENAI, model

from clipft.model.build import Clip, build, build_model
from clipft.model.check import check_model
from clipft.model.encode import encode_image, encode_text, text_tower
from clipft.model.names import architecture_cfg, architecture_names
from clipft.model.options import checkpoint_image, checkpoint_text
from clipft.model.towers import NOT_SUPPORTED, TRANSFORMERS, check_towers, of_transformers, status, unsupported

NO_LOGITS = ("logit_scale", "logit_bias")


def changed(**parts: Any) -> dict[str, Any]:
    cfg = {**OPENAI, "vision_cfg": dict(OPENAI["vision_cfg"]), "text_cfg": dict(OPENAI["text_cfg"])}
    for key, value in parts.items():
        cfg[key] = {**cfg[key], **value} if key in ("vision_cfg", "text_cfg") else value
    return cfg


REFUSED = [
    (changed(multimodal_cfg={}), "CoCa"),
    (changed(audio_cfg={}), "sound"),
    (changed(naflex=True), "NaFlex"),
    (changed(vision_cfg={"timm_model_name": "naflexvit_base_patch16_gap"}), "NaFlex"),
    (changed(text_cfg={"output_tokens": True}), "output_tokens"),
    (changed(vision_cfg={"output_tokens": True}), "output_tokens"),
    (changed(vision_cfg={"attentional_pool": "parallel"}), "several features"),
    (changed(vision_cfg={"image_size": [32, 64]}), "not square"),
    (changed(text_cfg={"vocab_size": 32000}), "names no tokenizer"),
    (changed(text_cfg={"hf_model_name": "roberta-base"}), "names no tokenizer"),
    (changed(text_cfg={"hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": True}}), "tokenizer_kwargs"),
]


@pytest.mark.parametrize("cfg, why", REFUSED, ids=[why for _, why in REFUSED])
def test_models_that_the_step_does_not_handle_are_refused_by_name_and_reason(cfg, why):
    with pytest.raises(ValueError, match=rf"model\.name='x' is not supported: .*{why}.*`clipft models`"):
        build("x", cfg, {})


def test_every_rule_refuses_something_here_and_none_refuses_a_plain_clip():
    assert all(any(rule.found(cfg) for cfg, _ in REFUSED) for rule in NOT_SUPPORTED)
    assert unsupported(OPENAI) is None and status(OPENAI) == ""


def test_towers_of_transformers_are_answered_with_its_installation_where_it_is_missing():
    cfg = changed(text_cfg={"hf_model_name": "roberta-base", "hf_tokenizer_name": "roberta-base"})
    if find_spec("transformers") is None:
        assert status(cfg) == f"needs {TRANSFORMERS}"
        with pytest.raises(ValueError, match=r"uses roberta-base of transformers\. Run: pip install transformers"):
            check_towers("x", cfg)
    else:
        assert status(cfg) == ""


def test_keys_and_towers_that_nobody_knows_are_named():
    for part, said in (
        ({"colour": 1}, "colour"),
        ({"vision_cfg": {"timm_model_name": "no_such_tower"}}, "no_such_tower"),
    ):
        with pytest.raises(ValueError, match=rf"model\.name='x' cannot be built: .*{said}"):
            build("x", changed(**part), {})


COCA = {"coca_base", "coca_roberta-ViT-B-32", "coca_ViT-B-32", "coca_ViT-L-14"}


def test_of_open_clips_architectures_only_coca_is_not_supported():
    found = {name for name in architecture_names() if unsupported(architecture_cfg(name))}
    assert found == COCA
    for name in COCA:
        with pytest.raises(ValueError, match=f"model.name='{name}' is not supported: it is a CoCa model"):
            check_model(model(name))


def kept(forward: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass keeps for its backward pass."""
    seen: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        seen[id(tensor.untyped_storage())] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in architecture_names() if name not in COCA])
def test_every_architecture_works_or_needs_a_package_as_the_table_says(name):
    """Built without numbers: both encoders run on its inputs, gradients reach every parameter, memory can be saved."""
    cfg = architecture_cfg(name)
    if "hf_model_name" in cfg["text_cfg"]:  # built by transformers from files of the hub: a test of its own below
        assert of_transformers(cfg) and status(cfg) in ("", f"needs {TRANSFORMERS}")
        return
    with torch.device("meta"):
        tower = build_model(cfg).train()
        side = tower.visual.image_size
        height, width = (side, side) if isinstance(side, int) else side
        pixels, tokens = torch.zeros(2, 3, height, width), torch.zeros(2, tower.context_length, dtype=torch.long)
        encoders = (lambda: tower.encode_image(pixels)), (lambda: tower.encode_text(tokens))
        image, text = (encode() for encode in encoders)
        assert image.shape == text.shape == (2, cfg["embed_dim"]) and height == width
        (image.sum() + text.sum()).backward()
        parameters = {n: p for n, p in tower.named_parameters() if p.requires_grad and n not in NO_LOGITS}
        assert not [n for n, p in parameters.items() if p.grad is None]
        before = [kept(encode) for encode in encoders]
        able = checkpoint_image(tower.visual, True), checkpoint_text(text_tower(tower), True)
        after = [kept(encode) for encode in encoders]
    assert able == (not name.startswith("RN"), True)
    for can, now, then in zip(able, after, before, strict=True):
        assert now < then / 2 if can else now == then


FAMILIES = {
    "ViT": changed(),
    "ResNet": changed(vision_cfg={"layers": [1, 1, 1, 1], "patch_size": None}),
    "text tower of its own": changed(custom_text=True),
    "SigLIP": changed(
        custom_text=True,
        init_logit_bias=-10,
        vision_cfg={"timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none", "image_size": 160},
        embed_dim=64,
        text_cfg={"no_causal_mask": True, "pool_type": "last", "proj_bias": True},
    ),
    "CLIPA": changed(vision_cfg={"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}),
    "ConvNeXt": changed(vision_cfg={"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "mlp"}),
    "EfficientNet": changed(vision_cfg={"timm_model_name": "test_efficientnet_gn", "timm_proj": "linear"}),
    "attention pool": changed(embed_dim=64, vision_cfg={"attentional_pool": True, "attn_pooler_heads": 2}),
    "class token after the text": changed(custom_text=True, text_cfg={"embed_cls": True}),
    "custom blocks": changed(vision_cfg={"qk_norm": True, "scale_heads": True}, text_cfg={"scale_attn": True}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_both_encoders_of_a_family_give_unit_features_and_gradients_everywhere(family):
    torch.manual_seed(0)
    clip: Clip = build("x", FAMILIES[family], {})
    side = clip.preprocess_cfg["size"]
    side = side if isinstance(side, int) else side[0]
    image = encode_image(clip.model, torch.randn(3, 3, side, side))
    text = encode_text(clip.model, clip.tokenize(["a", "a red dog", "two"]), trim=False)
    for feature in (image, text):
        torch.testing.assert_close(feature.norm(dim=-1), torch.ones(3))
    (F.cosine_similarity(image, text) * torch.tensor([1.0, 2.0, -3.0])).sum().backward()
    parameters = {n: p for n, p in clip.model.named_parameters() if p.requires_grad and n not in NO_LOGITS}
    assert not [name for name, parameter in parameters.items() if parameter.grad is None]
