"""Names and shapes of weights -> the architecture that they belong to, or those that they are nearest to."""

import math
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from clipft.model.build import build_model
from clipft.model.convert import POOL_POSITIONS, converted
from clipft.model.names import architecture_cfg, architecture_names
from clipft.model.outline import Outline, State, outline_of, outline_of_state
from clipft.model.towers import ModelCfg, unsupported
from clipft.model.weights import Weights, first_differences

FREE = ("quick_gelu", "image_size")  # in what architectures of one family may differ: weights do not show it
NEAR = 0.6  # share of sizes that are alike where an architecture is worth naming
FOREIGN = {
    "vision_model.embeddings.": "transformers' names (CLIPModel); open_clip has most of those models as tags",
    "image_encoder.model.": "Apple's names: say which MobileCLIP it is",
    "blocks.0.": "the names of a timm image tower alone",
    "base_model.model.": "the names of a LoRA adapter, without the model that it belongs to",
}


def recognize(weights: Weights, path: Path) -> tuple[str, ModelCfg, list[str]]:
    """Name and config of the architecture that the weights fit, and how that was told; raises where it cannot be."""
    state = on_meta(weights.state)
    fitting = all_that_fit(state)
    exact = {name: cfg for name, cfg in fitting.items() if cfg == architecture_cfg(name)}
    fitting = exact or fitting
    if not fitting and (weights.openai or weights.mixed):
        if cfg := openai_cfg(state):
            return path.stem, cfg, [f"{path} holds a CLIP of OpenAI's layout, its sizes follow from the weights"]
    if not fitting or not is_family(list(fitting.values())):
        raise ValueError(
            f"model.name={str(path)!r}: the architecture cannot be told from the weights. {which(state, fitting, path)}"
        )
    names = sorted(fitting, key=lambda name: (len(name), name))
    quick = [name for name in names if fitting[name].get("quick_gelu")]
    plain = [name for name in names if name not in quick]
    name = ((quick + plain) if weights.openai or weights.mixed else (plain + quick))[0]
    note = f"{path} fits {name} by its shapes"
    if fitting[name] != architecture_cfg(name):
        sizes = outline_of(fitting[name])
        note += f", at {fitting[name]['vision_cfg'].get('image_size')} pixels and {sizes['context']} tokens"
    if others := [other for other in names if other != name]:
        note += f", and {' and '.join(others)} as well: model={others[0]} model.pretrained={path} takes that"
    return name, fitting[name], [note]


def suggestion(state: State, path: Path, asked: str) -> str:
    """Which architectures weights belong to that did not fit the one that was asked for."""
    state = on_meta(state)
    return which(state, all_that_fit(state), path, asked)


def all_that_fit(state: State) -> dict[str, ModelCfg]:
    return {name: cfg for name in by_likeness(state) if (cfg := config_that_fits(name, state))}


def on_meta(state: State) -> State:
    return {name: torch.empty_like(value, device="meta") for name, value in state.items()}


def config_that_fits(name: str, state: State) -> ModelCfg | None:
    """The architecture's config, at the image size and context length of the weights, if it then fits them."""
    cfg = at_sizes_of(architecture_cfg(name), state)
    if unsupported(cfg) or cfg["text_cfg"].get("hf_model_name"):  # which would need files of the hub to be built
        return None
    return cfg if fits(cfg, state) else None


def fits(model_cfg: ModelCfg, state: State) -> bool:
    with torch.device("meta"):
        model = build_model(with_bias(model_cfg, state)[0])
        return not first_differences(model, converted(model, state)[0])


def with_bias(model_cfg: ModelCfg, state: State) -> tuple[ModelCfg, list[str]]:
    """The config with a logit_bias where the weights bring one that the architecture lacks, and a note of that."""
    if "logit_bias" not in state or model_cfg.get("init_logit_bias") is not None:
        return model_cfg, []
    return {**model_cfg, "init_logit_bias": 0.0}, ["logit_bias comes with the weights; the architecture has none"]


def at_sizes_of(model_cfg: ModelCfg, state: State) -> ModelCfg:
    """The config with as many positions as the weights have, for the towers whose number of positions is free."""
    theirs, ours = outline_of_state(state), outline_of(model_cfg)
    cfg = deepcopy(model_cfg)
    if theirs.get("patch") == ours.get("patch") is not None and theirs["positions"] != ours["positions"]:
        cfg["vision_cfg"]["image_size"] = math.isqrt(theirs["positions"] - 1) * theirs["patch"]
    if theirs.get("context") and "context" in ours and theirs["context"] != ours["context"]:
        cfg["text_cfg"]["context_length"] = theirs["context"]
    return cfg


def is_family(configs: list[ModelCfg]) -> bool:
    """Whether they differ in nothing that the weights' shapes could show."""

    def core(cfg: ModelCfg) -> ModelCfg:
        parts = {**cfg, "vision_cfg": dict(cfg["vision_cfg"])}
        for key in FREE:
            parts.pop(key, None)
            parts["vision_cfg"].pop(key, None)
        return parts

    return all(core(cfg) == core(configs[0]) for cfg in configs)


def which(state: State, fitting: Iterable[str], path: Path, asked: str = "") -> str:
    """The architectures that the weights fit or come near, and how to say which one it is."""
    for start, what in FOREIGN.items():
        if any(name.startswith(start) for name in state):
            return f"Its tensors have {what}."
    if not {"image", "text"} <= outline_of_state(state).keys():
        return f"It holds no two towers of open_clip, but {', '.join(list(state)[:3])} and so on."
    names = list(fitting) or [name for name in nearest(state) if name != asked]
    if not names:
        return "No other architecture comes near its sizes. `clipft models` lists all."
    said = "Its shapes are those of" if fitting else "Its shapes are nearest to"
    one = "Use" if len(names) == 1 else "Use one of them, as in"
    return f"{said} {' or '.join(names)}. {one} model={names[0]} model.pretrained={path}."


def nearest(state: State) -> list[str]:
    """The few architectures whose sizes agree best with the weights', if any do."""
    theirs = outline_of_state(state)
    agreeing = {name: agreement(outline_of(architecture_cfg(name)), theirs) for name in architecture_names()}
    best = max(agreeing.values())
    return [name for name, share in agreeing.items() if share == best][:4] if best > NEAR else []


def by_likeness(state: State) -> list[str]:
    """The architectures that have no other sizes than the weights, but perhaps for the numbers of positions."""
    theirs = outline_of_state(state)
    found = []
    for name in architecture_names():
        ours = outline_of(architecture_cfg(name))
        if all(ours[key] == theirs.get(key) for key in ours if key not in ("positions", "context")):
            found.append(name)
    return found


def agreement(ours: Outline, theirs: Outline) -> float:
    """Share of the sizes that are alike."""
    return sum(ours[key] == theirs.get(key) for key in ours) / len(ours)


def openai_cfg(state: State) -> ModelCfg | None:
    """The config of a CLIP of these sizes with what all of OpenAI's share: heads of 64 channels and QuickGELU.

    As their own loader has it, and open_clip's build_model_from_openai_state_dict.
    """
    sizes = outline_of_state(state)
    if sizes.get("image") not in ("ViT", "ResNet") or sizes.get("text") != "open_clip":
        return None
    vision: dict[str, Any] = {"width": sizes["image_width"]}
    if sizes["image"] == "ViT":
        size = math.isqrt(sizes["positions"] - 1) * sizes["patch"]
        vision |= {"layers": sizes["image_layers"], "patch_size": sizes["patch"], "image_size": size}
    else:
        if POOL_POSITIONS not in state:
            return None
        side = math.isqrt(len(state[POOL_POSITIONS]) - 1)
        vision |= {"layers": list(sizes["image_layers"]), "patch_size": None, "image_size": 32 * side}
    cfg = {
        "embed_dim": sizes["embed_dim"],
        "vision_cfg": vision,
        "text_cfg": {
            "context_length": sizes["context"],
            "vocab_size": sizes["vocabulary"],
            "width": sizes["text_width"],
            "heads": sizes["text_width"] // 64,
            "layers": sizes["text_layers"],
        },
        "quick_gelu": True,
    }
    return cfg if not unsupported(cfg) and fits(cfg, state) else None
