"""The options of ModelConfig that change a model: image size, context length, patch dropout, gradient checkpointing."""

import re
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch

from clipft.config import ModelConfig
from clipft.model.build import Clip, build_model, preprocessing
from clipft.model.encode import OpenClip, text_tower
from clipft.model.sizes import no_patch_dropout
from clipft.model.towers import ModelCfg
from clipft.model.weights import first_differences

SAME_FEATURES = 1e-3  # of a resized tower and the one that its config builds, relative to the largest feature


def patch_dropout_note(clip: Clip) -> list[str]:
    """What of the model's config is not seen elsewhere: patch dropout also comes with a run that had it."""
    rate = clip.model_cfg["vision_cfg"].get("patch_dropout")
    return [f"patch dropout: a training step sees {1 - rate:.0%} of an image's patches"] if rate else []


def check_patch_dropout(clip: Clip) -> None:
    """Raises where the config asks for patch dropout and the tower has none."""
    rate = clip.model_cfg["vision_cfg"].get("patch_dropout")
    if rate and not any(type(part).__name__.startswith("PatchDropout") for part in clip.model.visual.modules()):
        raise no_patch_dropout(rate, clip.name)


def check_context(config: ModelConfig, clip: Clip) -> None:
    """Raises where captions would be longer than a text tower of transformers has positions."""
    most = clip.model.context_length if "hf_model_name" in clip.model_cfg["text_cfg"] else 0
    if config.context_length is not None and 0 < most < config.context_length:
        raise ValueError(f"model.context_length={config.context_length}: this text tower has {most} positions.")


def resized(clip: Clip, size: int) -> Clip:
    """The model of a timm image tower for images of another size, as open_clip's force_image_size makes it.

    timm interpolates the positions. What comes back is built from its own config, so that a run, a resume and plain
    open_clip build the same: under timm's name for this size, where the tower has positions.
    """
    visual, before = clip.model.visual, clip.model_cfg["vision_cfg"]
    if clip.preprocess_cfg["size"] in (size, [size, size]):
        return clip
    if hasattr(visual.trunk, "set_input_size"):
        try:
            visual.set_input_size(size)
        except Exception as error:  # of timm, whatever the tower cannot do
            raise ValueError(cannot_resize(clip, size)) from error
    state = clip.model.state_dict()
    for name in names_for_size(before["timm_model_name"], size):
        cfg = deepcopy(clip.model_cfg)
        cfg["vision_cfg"] |= {"timm_model_name": name, "image_size": size}
        if not fits_at(cfg, state, size):
            continue
        model = build_model(cfg)
        model.load_state_dict(state)
        if same_features(clip.model, model, size):
            renamed = f", now timm's {name}" if name != before["timm_model_name"] else ""
            preprocess, preprocess_cfg = preprocessing(model, clip.preprocess_cfg)
            return replace(
                clip,
                model=model,
                model_cfg=cfg,
                preprocess=preprocess,
                preprocess_cfg=preprocess_cfg,
                notes=[*clip.notes, f"image tower set to {size} pixels by timm{renamed}"],
            )
    raise ValueError(cannot_resize(clip, size))


def names_for_size(name: str, size: int) -> list[str]:
    """The tower's own name, and the one that timm has for this size."""
    return list(dict.fromkeys([name, re.sub(r"_[0-9]+$", f"_{size}", name)]))


def fits_at(model_cfg: ModelCfg, state: dict[str, Any], size: int) -> bool:
    """Whether a model of the config has these shapes and takes images of this size, tried without any numbers."""
    try:
        with torch.device("meta"), torch.no_grad():
            model = build_model(model_cfg).eval()
            if first_differences(model, state):
                return False
            model.encode_image(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError):  # timm does not know the name, or wants another size
        return False
    return True


@torch.no_grad()
def same_features(one: OpenClip, other: OpenClip, size: int) -> bool:
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    ours, theirs = (model.eval().encode_image(pixels) for model in (one, other))
    return bool((ours - theirs).abs().max() <= SAME_FEATURES * ours.abs().max())


def cannot_resize(clip: Clip, size: int) -> str:
    import timm

    name = clip.model_cfg["vision_cfg"]["timm_model_name"]
    stem = re.sub(r"_[0-9]+$", "", name)
    sizes = [
        other.rsplit("_", 1)[1] for other in timm.list_models(f"{stem}_*") if re.fullmatch(rf"{stem}_[0-9]+", other)
    ]
    known = f"timm has it for {', '.join(sorted(sizes, key=int))} pixels" if sizes else "it has one size"
    return (
        f"model.image_size={size} does not work with {name} of timm: its number of patches is fixed, and {known}. "
        "open_clip builds a tower by its name alone, so that an export at another size would not load."
    )


def keep_all_layers(clip: Clip) -> None:
    """Switches LayerDrop off: a layer that a step leaves out has no gradient, for which DDP waits."""
    for part in clip.model.modules():
        if isinstance(rate := getattr(part, "layerdrop", None), float) and rate > 0:
            part.layerdrop = 0.0
            clip.notes.append(f"LayerDrop of its text tower ({rate:g}) is off: every step trains all layers")


def recompute_activations(clip: Clip) -> None:
    """Switches gradient checkpointing on; raises where neither tower has it, and says which one has none."""
    able = set_checkpointing(clip.model, True)
    if not able:
        raise ValueError(f"model.grad_checkpointing=true would be ignored: no tower of {clip.name} can do it.")
    only = "" if len(able) == 2 else f" (the other tower of {clip.name} cannot)"
    clip.notes.append(f"activations of the {' and '.join(able)} tower are computed again in the backward pass{only}")


def set_checkpointing(model: OpenClip, on: bool) -> list[str]:
    """Switches it where there is such a switch; the sides that have one."""
    towers = {"image": checkpoint_image(model.visual, on), "text": checkpoint_text(text_tower(model), on)}
    return [side for side, able in towers.items() if able]


def checkpoint_image(visual: Any, on: bool) -> bool:
    trunk = getattr(visual, "trunk", visual)
    if not hasattr(trunk, "set_grad_checkpointing") or type(visual).__name__ == "ModifiedResNet":  # which does nothing
        return False
    try:
        trunk.set_grad_checkpointing(on)  # open_clip's wrapper would only log that it is not supported
    except (AssertionError, NotImplementedError, TypeError):  # as timm's towers refuse
        return False
    return True


def checkpoint_text(tower: Any, on: bool) -> bool:
    transformer = tower.transformer
    if not hasattr(transformer, "gradient_checkpointing_enable"):
        transformer.grad_checkpointing = on
        return True
    # Of transformers, which renamed this in version 5.
    new = "activation" if hasattr(transformer, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(transformer, f"{new}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(transformer, f"{new}_checkpointing_disable")()
    return True
