"""What the options of ModelConfig change in a model's config; torch is not imported."""

from copy import deepcopy

from clipft.config import ModelConfig
from clipft.model.towers import ModelCfg


def with_options(config: ModelConfig, model_cfg: ModelCfg) -> ModelCfg:
    """The model's config with what the options change in it; the size of timm's towers is left to `resized`."""
    cfg = deepcopy(model_cfg)
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    if config.image_size is not None and not vision.get("timm_model_name"):
        check_multiple(config.image_size, 32 if is_resnet(model_cfg) else vision.get("patch_size", 16))
        vision["image_size"] = config.image_size
    if config.context_length is not None:
        text["context_length"] = config.context_length
    if config.patch_dropout and is_resnet(model_cfg):
        raise no_patch_dropout(config.patch_dropout, config.name)
    if config.patch_dropout is not None:
        vision.pop("patch_dropout", None)
        if config.patch_dropout > 0:
            vision["patch_dropout"] = config.patch_dropout
    return cfg


def is_resnet(model_cfg: ModelCfg) -> bool:
    return isinstance(model_cfg["vision_cfg"].get("layers"), list | tuple)


def check_multiple(size: int, patch: int | list[int]) -> None:
    patch = patch if isinstance(patch, int) else max(patch)
    if size % patch:
        near = sorted({max(1, size // patch) * patch, (size // patch + 1) * patch})
        raise ValueError(
            f"model.image_size={size} is no multiple of this tower's {patch} pixels: the rest would never be seen. "
            f"Use {' or '.join(map(str, near))}."
        )


def no_patch_dropout(rate: float, name: str) -> ValueError:
    return ValueError(
        f"model.patch_dropout={rate} would be ignored: the image tower of {name} has no patches to drop. Leave it out."
    )
