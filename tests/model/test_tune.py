import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from small import MODEL_CFG, RESNET_CFG

from clipft.capacity import full_length_batch
from clipft.config import LayerDecayConfig, LossConfig, OptimConfig, TuneConfig
from clipft.fit import towers_of
from clipft.learn.module import freeze_fixed, train_mode
from clipft.learn.optimizer import build_optimizer
from clipft.model.build import build
from clipft.model.groups import TOWERS, groups_of, tower_modules
from clipft.model.tune import freeze, lr_multipliers, tune_table

CONF = Path(__file__).parent.parent.parent / "conf" / "tune"
DEEP = MODEL_CFG | {
    "vision_cfg": MODEL_CFG["vision_cfg"] | {"layers": 3},
    "text_cfg": MODEL_CFG["text_cfg"] | {"layers": 2},
}


def make(model_cfg: dict[str, Any] = DEEP) -> Any:
    torch.manual_seed(0)
    return build("deep", model_cfg, {}).model


def preset(name: str, **changed: Any) -> TuneConfig:
    node = OmegaConf.merge(OmegaConf.structured(TuneConfig), OmegaConf.load(CONF / f"{name}.yaml"), changed)
    config = OmegaConf.to_object(node)
    assert isinstance(config, TuneConfig)
    return config


def rules(*pairs: tuple[str, float]) -> TuneConfig:
    return TuneConfig(rules=[{"match": match, "lr_mult": factor} for match, factor in pairs])


def trained(model: Any, config: TuneConfig) -> set[str]:
    freeze(model, lr_multipliers(model, config))
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("custom_text", [False, True])
def test_the_presets_train_what_they_say(custom_text):
    model = make(DEEP | {"custom_text": custom_text})
    names = {name for name, _ in model.named_parameters()}
    image = {name for name in names if name.startswith("visual.")}
    assert trained(model, preset("full")) == names
    assert trained(model, preset("lit")) == names - image
    left = {name for name in names if "resblocks" not in name} - {
        *(
            name
            for name in image
            if name.split(".")[1] in ("class_embedding", "positional_embedding", "conv1", "ln_pre")
        ),
        *(name for name in names - image if name.split(".")[-2:-1] == ["token_embedding"]),
        *(name for name in names - image if name.endswith("positional_embedding")),
    }
    for blocks, (of_image, of_text) in {1: ([2], [1]), 2: ([1, 2], [0, 1])}.items():
        last = {name for name in image if any(f"resblocks.{n}." in name for n in of_image)}
        last |= {name for name in names - image if any(f"resblocks.{n}." in name for n in of_text)}
        assert trained(model, preset("last_blocks", blocks=blocks)) == left | last


def test_the_first_rule_that_matches_decides_and_layer_decay_multiplies_it():
    config = rules(("visual.proj", 0.5), ("image.blocks.-1", 3), ("image.blocks", 2), ("*.bias", 0.0), ("*", 1.0))
    config.layer_decay = LayerDecayConfig(image=0.5)
    found = lr_multipliers(make(), config)
    expected = {
        "visual.proj": 0.5,  # head: no layer above it
        "visual.ln_post.weight": 1.0,
        "visual.transformer.resblocks.2.mlp.c_fc.bias": 3 * 0.5,
        "visual.transformer.resblocks.1.mlp.c_fc.weight": 2 * 0.5**2,
        "visual.transformer.resblocks.0.mlp.c_fc.weight": 2 * 0.5**3,
        "visual.conv1.weight": 0.5**4,
        "transformer.resblocks.0.mlp.c_fc.bias": 0.0,
        "transformer.resblocks.0.mlp.c_fc.weight": 1.0,
        "logit_scale": 1.0,
    }
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("custom_text", [False, True])
def test_layer_decay_is_lowest_at_the_embeddings(custom_text):
    config = TuneConfig(layer_decay=LayerDecayConfig(text=0.75))
    model = make(DEEP | {"custom_text": custom_text})
    found, groups = lr_multipliers(model, config), groups_of(model)
    by_depth = {
        "text.head": {1.0},
        "text.blocks": {0.75, 0.75**2},
        "text.embed": {0.75**3},
        "image.embed": {1.0},
    }
    for title, factors in by_depth.items():
        assert {found[name] for name, group in groups.items() if group.name == title} == factors


@pytest.mark.parametrize(
    "config, message",
    [
        (
            rules(("visual.transformer.resblock.*", 0), ("*", 1)),
            r"rule 1, 'visual.*', matches no parameter\. Did you mean visual\.transformer\.resblocks\.2",
        ),
        (rules(("imag", 0), ("*", 1)), r"rule 1, 'imag', .* Did you mean image,.* text\.head"),
        (rules(("image.blocks.3", 0), ("*", 1)), r"rule 1, 'image\.blocks\.3', matches no parameter"),
        (rules(("*", 1), ("text", 0)), r"rule 2, 'text', decides nothing: all that it matches is matched by a rule be"),
        (rules(("image", 1), ("scale", 1)), r'no rule matches positional_embedding, .* and \d+ more.*\{match: "\*"\}'),
        (preset("last_blocks", blocks=3), r"tune\.blocks=3: the text tower has 2 blocks"),
        (
            TuneConfig(rules=preset("lit").rules, layer_decay=LayerDecayConfig(image=0.5)),
            r"image=0\.5 would be ignored",
        ),
    ],
)
def test_rules_that_do_not_fit_the_model_are_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        lr_multipliers(make(), config)


def test_nothing_to_train_is_refused():
    model = make()
    with pytest.raises(ValueError, match=r"tune\.rules freezes every parameter"):
        freeze(model, lr_multipliers(model, rules(("*", 0))))
    freeze(model, lr_multipliers(model, rules(("scale", 1), ("*", 0))))
    freeze_fixed(model, LossConfig())
    with pytest.raises(ValueError, match="nothing is left to train"):
        freeze_fixed(model, LossConfig(temperature=0.1))


def test_the_table_counts_what_is_trained_and_shows_the_rates():
    model, config = make(), preset("last_blocks", blocks=2, layer_decay={"image": 0.5})
    multipliers = lr_multipliers(model, config)
    freeze(model, multipliers)
    lines = list(tune_table(model, multipliers, 1e-3))
    words = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert list(words) == [f"{t}.{p}" for t in ("image", "text") for p in ("embed", "blocks", "head")] + ["scale"]
    block = sum(parameter.numel() for parameter in model.visual.transformer.resblocks[0].parameters())
    assert words["image.embed"][1:] == ["0", "-"]
    assert words["image.blocks"][:2] == [f"{3 * block:,}", f"{2 * block:,}"]
    assert " ".join(words["image.blocks"][2:]) == "2.5e-04 to 5.0e-04, 2 of 3 blocks"
    assert words["scale"] == ["1", "1", "1.0e-03"]


def steps(model: Any, config: TuneConfig) -> torch.optim.Optimizer:
    """Three steps on noise."""
    multipliers = lr_multipliers(model, config)
    freeze(model, multipliers)
    train_mode(model, batch_norm=True)
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.5), 0.01, multipliers)
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * group["lr_mult"]
    for _ in range(3):
        optimizer.zero_grad()
        (model.encode_image(torch.randn(2, 3, 32, 32)) * model.encode_text(torch.ones(2, 12).long())).sum().backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", ["lit", "last_blocks"])
def test_what_is_frozen_costs_no_gradient_and_no_optimizer_memory_and_stays_as_it_is(name):
    model = make(RESNET_CFG | {"text_cfg": DEEP["text_cfg"]})
    before = copy.deepcopy(model.state_dict())
    optimizer = steps(model, preset(name))
    frozen = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    assert all(parameter.grad is None for key, parameter in model.named_parameters() if key in frozen)
    moments = sum(v.numel() for state in optimizer.state.values() for k, v in state.items() if k.startswith("exp_"))
    sizes = {key: parameter.numel() for key, parameter in model.named_parameters()}
    assert moments == 2 * sum(size for key, size in sizes.items() if key not in frozen and key != "logit_scale")
    after = model.state_dict()
    assert frozen and all(torch.equal(after[key], before[key]) for key in frozen)
    moved = {key for key in before if not torch.equal(after[key], before[key])}
    statistics = {key for key in moved if "running" in key or "num_batches" in key}
    last = {key for key in before if key.startswith("visual.layer4.0.") and ("running" in key or "num_bat" in key)}
    assert statistics == (set() if name == "lit" else last)
    assert any("transformer" in key for key in moved)


@pytest.mark.parametrize("locked", TOWERS)
@pytest.mark.parametrize("model_cfg", [DEEP, RESNET_CFG])
def test_a_locked_tower_keeps_no_activation_and_is_in_evaluation_mode(locked, model_cfg):
    """All its dropout and BatchNorm with it; the other tower trains."""
    clip = build("locked", model_cfg, {})
    freeze(clip.model, lr_multipliers(clip.model, rules((locked, 0.0), ("*", 1.0))))
    train_mode(clip.model, batch_norm=True)
    modes = {
        tower: {part.training for top in tower_modules(clip.model, tower) for part in top.modules()} for tower in TOWERS
    }
    assert modes == {tower: {tower != locked} for tower in TOWERS}
    towers, batch = towers_of(clip), full_length_batch(clip, 2)
    kept: dict[str, int] = {tower: 0 for tower in TOWERS}
    for tower in TOWERS:

        def keep(tensor: torch.Tensor, tower: str = tower) -> torch.Tensor:
            kept[tower] += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            features = getattr(towers, tower).features(batch, graph=True)
        assert features.requires_grad == (tower != locked)
    assert kept.pop(locked) == 0 and all(kept.values())


def test_no_backward_runs_below_the_lowest_trained_block():
    """Counted by the blocks whose output has a graph, and by what is kept for the backward."""
    model, with_graph = make(), []
    for block in [*model.visual.transformer.resblocks, *model.transformer.resblocks]:
        block.register_forward_hook(lambda _, __, output: with_graph.append(output.requires_grad))

    def kept(config: TuneConfig) -> int:
        with_graph.clear()
        freeze(model, lr_multipliers(model, config))
        seen: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            images = model.encode_image(torch.randn(64, 3, 16, 16))
            (images * model.encode_text(torch.ones(64, 12).long())).sum().backward()
        return sum(seen.values())

    everything = kept(preset("full"))
    assert with_graph == [True] * 5
    last = kept(preset("last_blocks", blocks=1))
    assert with_graph == [False, False, True, False, True]
    heads = kept(rules(("*.head", 1), ("*", 0)))
    assert with_graph == [False] * 5
    assert heads < 0.2 * last < 0.1 * everything
