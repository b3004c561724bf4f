from collections.abc import Callable
from typing import Any

import pytest
import torch

from clipft.model.build import build, build_model
from clipft.model.groups import by_name, groups_of, is_frozen, numbered, tower_modules
from clipft.model.names import architecture_cfg, architecture_names

ROBERTA = ["embeddings.word_embeddings.weight", "encoder.layer.0.output.dense.weight", "encoder.layer.11.x.bias"]
T5 = ["embed_tokens.weight", "block.0.layer.0.SelfAttention.q.weight", "block.1.layer.1.x", "final_layer_norm.weight"]
M2M = ["embed_tokens.weight", "layers.0.fc1.weight", "layers.1.fc1.weight", "layer_norm.weight"]


def empty(architecture: str) -> Any:
    """The architecture without memory for its weights."""
    with torch.device("meta"):
        return build(architecture, architecture_cfg(architecture), {}).model


def members(model: Any, word: str, last: int = 0) -> set[str]:
    return {name for name, group in groups_of(model).items() if word in group.words(last)}


def unlocked(model: Any, lock: Callable[[], None]) -> set[str]:
    """What open_clip's own way to lock a tower leaves trainable."""
    model.requires_grad_(False)
    lock()
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def custom_text() -> Any:
    """CustomTextCLIP around towers of open_clip."""
    with torch.device("meta"):
        return build("custom", architecture_cfg("ViT-B-32") | {"custom_text": True}, {}).model


@pytest.mark.parametrize("make", [lambda: empty("ViT-B-32"), custom_text])
@pytest.mark.parametrize("last", [1, 3])
def test_last_blocks_and_head_of_a_text_tower_are_what_open_clip_unlocks(make, last):
    """open_clip counts the projection as one group, and the final norm to the last block."""
    model = make()
    ours = members(model, "text.last_blocks", last) | members(model, "text.head")
    assert ours == unlocked(model, lambda: model.lock_text_tower(unlocked_layers=last + 1))


@pytest.mark.parametrize("last", [1, 3])
def test_last_blocks_and_head_of_a_vit_are_what_open_clip_unlocks(last):
    model = empty("ViT-B-32")
    ours = members(model, "image.last_blocks", last) | members(model, "image.head")
    assert ours == unlocked(model, lambda: model.lock_image_tower(unlocked_groups=last + 1))


def test_a_resnet_has_its_bottlenecks_for_blocks():
    model = empty("RN50")
    assert {group.num_blocks for group in groups_of(model).values() if group.tower == "image"} == {3 + 4 + 6 + 3}
    last = {f"visual.layer4.2.{name}" for name, _ in model.visual.layer4[2].named_parameters()}
    assert members(model, "image.last_blocks", 1) == members(model, "image.blocks.15") == last
    assert members(model, "image.head") == {f"visual.attnpool.{n}" for n, _ in model.visual.attnpool.named_parameters()}


def test_a_tower_of_timm_is_cut_as_timm_says_with_the_final_norm_in_its_head():
    model = empty("EVA02-B-16")
    last = {f"visual.trunk.blocks.11.{name}" for name, _ in model.visual.trunk.blocks[11].named_parameters()}
    assert members(model, "image.blocks.-1") == last
    assert members(model, "image.head") == {f"visual.trunk.{name}" for name in ("norm.weight", "norm.bias")} | {
        f"visual.trunk.head.{name}" for name in ("weight", "bias")
    }
    convnext = empty("convnext_tiny")
    assert {group.num_blocks for group in groups_of(convnext).values() if group.tower == "image"} == {3 + 3 + 9 + 3}
    assert "visual.head.proj.weight" in members(convnext, "image.head")
    assert "visual.trunk.stages.1.downsample.1.weight" in members(convnext, "image.blocks.3")


@pytest.mark.parametrize("names, head", [(ROBERTA, []), (T5, T5[3:]), (M2M, M2M[3:])])
def test_towers_of_transformers_are_cut_by_the_names_they_have(names, head):
    groups = numbered("text", by_name([f"text.transformer.{name}" for name in names] + ["text.proj.0.weight"]))
    by_part = {part: [name for name, group in groups.items() if group.part == part] for part in ("embed", "head")}
    assert by_part["embed"] == [f"text.transformer.{names[0]}"]
    assert by_part["head"] == [*(f"text.transformer.{name}" for name in head), "text.proj.0.weight"]
    assert [groups[f"text.transformer.{name}"].block for name in names[1:3]] == [0, 1]
    assert {group.num_blocks for group in groups.values()} == {2}


@pytest.mark.parametrize("make", [lambda: empty("tiny"), custom_text])
def test_each_parameter_is_in_one_tower_or_the_scale(make):
    model = make()
    names = [name for name, _ in model.named_parameters()]
    assert list(groups_of(model)) == names
    towers = [members(model, word) for word in ("image", "text", "scale")]
    assert sorted(name for tower in towers for name in tower) == sorted(names) and towers[2] == {"logit_scale"}
    inside = {id(parameter) for module in tower_modules(model, "image") for parameter in module.parameters()}
    assert inside == {id(parameter) for name, parameter in model.named_parameters() if name in towers[0]}
    model.visual.requires_grad_(False)
    assert is_frozen(model, "image") and not is_frozen(model, "text")


@pytest.mark.slow
def test_every_architecture_has_blocks_between_its_embeddings_and_its_heads():
    for name in architecture_names():
        cfg = architecture_cfg(name)
        if "multimodal_cfg" in cfg or "hf_model_name" in cfg["text_cfg"]:  # CoCa; towers that would be downloaded
            continue
        with torch.device("meta"):
            model = build_model(cfg)
        found: dict[str, set[int]] = {}
        for group in groups_of(model).values():
            found.setdefault(group.name, set()).add(group.block)
        parts = {f"{tower}.{part}" for tower in ("image", "text") for part in ("embed", "blocks", "head")}
        assert found.keys() == parts | {"scale"}, name
        assert len(found["text.blocks"]) == cfg["text_cfg"].get("layers", 12) and len(found["image.blocks"]) > 3, name
