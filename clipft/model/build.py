"""The config of a model -> the model with its tokenizer and transform, of freshly drawn weights."""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int64
from PIL import Image
from torch import Tensor

from clipft.data.augment import square_side
from clipft.model.encode import OpenClip
from clipft.model.tokens import make_tokenizer
from clipft.model.towers import ModelCfg, check_towers


@dataclass
class Clip:
    """A model with all that is needed to feed, save and reload it."""

    model: OpenClip
    tokenize: Callable[[list[str]], Int64[Tensor, "n L"]]
    preprocess: Callable[[Image.Image], Float[Tensor, "3 S S"]]
    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]
    name: str
    pretrained: str | None = None
    notes: list[str] = field(default_factory=list)  # for the plan: what was chosen or corrected

    @property
    def side(self) -> int:
        """Of the square images that the model sees, in pixels."""
        return square_side(self.preprocess_cfg["size"])


def description(clip: Clip) -> dict[str, Any]:
    """What open_clip_config.json and a run's model.json hold: enough to build the model without its name."""
    return {"model_cfg": clip.model_cfg, "preprocess_cfg": clip.preprocess_cfg}


def build(name: str, model_cfg: ModelCfg, preprocess_cfg: dict[str, Any], tokenizer_dir: Path | None = None) -> Clip:
    """A model of freshly drawn weights, as open_clip.create_model makes it from an open_clip_config.json.

    open_clip's own routes either add the config to a global registry or need a folder with weights.
    """
    check_towers(name, model_cfg)
    try:
        model = build_model(model_cfg)
        tokenize = build_tokenizer(model_cfg["text_cfg"], tokenizer_dir)
    except Exception as error:  # from open_clip, timm or transformers: unknown keys, towers, missing files
        raise ValueError(f"model.name={name!r} cannot be built: {error}") from error
    transform, merged = preprocessing(model, preprocess_cfg)
    return Clip(model, tokenize, transform, deepcopy(model_cfg), merged, name)


def preprocessing(model: OpenClip, preprocess_cfg: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """open_clip's evaluation transform for the size of the image tower, and its whole config."""
    from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

    merged = merge_preprocess_dict(PreprocessCfg(), preprocess_cfg)
    merged["size"] = getattr(model.visual, "image_size", merged["size"])
    # Lists for tuples, as a reload will have them.
    return image_transform_v2(PreprocessCfg(**merged), is_train=False), json.loads(json.dumps(merged))


def build_model(model_cfg: ModelCfg) -> OpenClip:
    """The towers alone; under torch.device("meta") a matter of a tenth of a second."""
    from open_clip import CLIP, CustomTextCLIP

    parts = deepcopy(model_cfg)
    # The CLIP weights hold both towers; those that timm or transformers would download are not wanted.
    if "timm_model_name" in parts["vision_cfg"]:
        parts["vision_cfg"]["timm_model_pretrained"] = False
    if "hf_model_name" in parts["text_cfg"]:
        parts["text_cfg"]["hf_model_pretrained"] = False
    custom_text = parts.pop("custom_text", False) or "hf_model_name" in parts["text_cfg"]
    return (CustomTextCLIP if custom_text else CLIP)(**parts)


def build_tokenizer(text_cfg: dict, tokenizer_dir: Path | None) -> Callable[[list[str]], Int64[Tensor, "n L"]]:
    from open_clip import tokenizer

    return make_tokenizer(tokenizer, text_cfg, tokenizer_dir)
