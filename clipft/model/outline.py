"""The sizes of a CLIP that show in the shapes of its weights, from its config or from the weights."""

from typing import Any

from torch import Tensor

from clipft.model.convert import IMAGE_POSITIONS
from clipft.model.towers import ModelCfg

Outline = dict[str, Any]
State = dict[str, Tensor]


def outline_of(model_cfg: ModelCfg) -> Outline:
    """What of the architecture shows in shapes, as far as its config says it."""
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    outline: Outline = {"embed_dim": model_cfg["embed_dim"]}
    if vision.get("timm_model_name"):
        outline["image"] = "timm"
    elif isinstance(layers := vision.get("layers", 12), list):
        outline |= {"image": "ResNet", "image_width": vision.get("width", 768), "image_layers": tuple(layers)}
    else:
        patch = vision.get("patch_size", 16)
        grid = vision.get("image_size", 224) // patch
        outline |= {"image": "ViT", "image_width": vision.get("width", 768), "image_layers": layers}
        outline |= {"patch": patch, "positions": grid**2 + 1}
    if text.get("hf_model_name"):
        return outline | {"text": "transformers"}
    return outline | {
        "text": "open_clip",
        "text_width": text.get("width", 512),
        "text_layers": text.get("layers", 12),
        "vocabulary": text.get("vocab_size", 49408),
        "context": text.get("context_length", 77),
    }


def outline_of_state(state: State) -> Outline:
    """The same of weights under open_clip's names."""
    outline: Outline = {}
    shape = {name: tuple(value.shape) for name, value in state.items()}

    def axes(name: str) -> int:
        return len(shape.get(name, ()))

    if axes("visual.conv1.weight") == 4 and axes(IMAGE_POSITIONS) == 2:
        width, _, _, patch = shape["visual.conv1.weight"]
        layers = count(state, "visual.transformer.resblocks.")
        outline |= {"image": "ViT", "image_width": width, "image_layers": layers, "patch": patch}
        outline["positions"] = shape[IMAGE_POSITIONS][0]
    elif axes("visual.layer1.0.conv1.weight") == 4:
        layers = tuple(count(state, f"visual.layer{stage}.") for stage in (1, 2, 3, 4))
        outline |= {"image": "ResNet", "image_width": shape["visual.layer1.0.conv1.weight"][0], "image_layers": layers}
    elif count(state, "visual.trunk."):
        outline["image"] = "timm"
    text = "text." if any(name.startswith("text.") for name in state) else ""
    if axes(f"{text}token_embedding.weight") != 2 or axes(f"{text}positional_embedding") != 2:
        return outline | ({"text": "transformers", "embed_dim": embed_dim(shape, text)} if text else {})
    vocabulary, width = shape[f"{text}token_embedding.weight"]
    return outline | {
        "embed_dim": embed_dim(shape, text),
        "text": "open_clip",
        "text_width": width,
        "text_layers": count(state, f"{text}transformer.resblocks."),
        "vocabulary": vocabulary,
        "context": shape[f"{text}positional_embedding"][0],
    }


def embed_dim(shape: dict[str, tuple[int, ...]], text: str) -> int | None:
    """Width of the features, by the last matrix of either tower."""
    for name, axis in (
        (f"{text}text_projection", 1),
        (f"{text}text_projection.weight", 0),
        (f"{text}proj.weight", 0),
        (f"{text}proj.2.weight", 0),
        ("visual.proj", 1),
        (f"{text}ln_final.weight", 0),
    ):
        if len(shape.get(name, ())) > axis:
            return shape[name][axis]
    return None


def count(state: State, prefix: str) -> int:
    """How many different words follow the prefix."""
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})
