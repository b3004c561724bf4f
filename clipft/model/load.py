"""ModelConfig -> a CLIP of open_clip with its tokenizer and transform, on the CPU in fp32."""

import json
import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int64
from PIL import Image
from torch import Tensor, nn

from clipft.config import ModelConfig
from clipft.model.encode import OpenClip
from clipft.model.names import FOLDER_CONFIG, architecture_cfg, check_model, check_towers, clean_tag, kind_of
from clipft.model.weights import find_tag_weights, is_average, load_exactly, load_with_open_clip, read_checkpoint

SIGLIP_SCALE = 10.0
RUN_CONFIG = "model.json"  # of a run directory: the same content as open_clip_config.json


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


def description(clip: Clip) -> dict[str, Any]:
    """What open_clip_config.json and a run's model.json hold: enough to build the model without its name."""
    return {"model_cfg": clip.model_cfg, "preprocess_cfg": clip.preprocess_cfg}


def load_model(config: ModelConfig, seed: int) -> Clip:
    """The model that the config names; its random weights, where it has any, follow from the seed."""
    check_model(config)
    kind = kind_of(config.name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "run":
            return from_run(config.name, config.checkpoint)
        if kind == "folder":
            return from_folder(config.name)
        return from_architecture(config.name, config.pretrained, seed)


def add_bias(clip: Clip, batch_size: int, keep_scale: bool) -> bool:
    """Gives a model without logit_bias one for a sigmoid loss, now and when it is rebuilt; true when it did.

    The bias is the log odds of a pair drawn at random, one right text among batch_size. SigLIP starts from nearly the
    same bias, for batches of 32k, and from a scale of 10 (Zhai et al. 2023, sec. 3.2), which the model gets unless
    it is to keep its own.
    """
    if clip.model.logit_bias is not None:
        return False
    bias = -math.log(batch_size - 1)
    with torch.no_grad():
        if not keep_scale:
            clip.model.logit_scale.fill_(math.log(SIGLIP_SCALE))
    clip.model.logit_bias = nn.Parameter(torch.full_like(clip.model.logit_scale, bias))
    clip.model_cfg |= {"init_logit_scale": clip.model.logit_scale.item(), "init_logit_bias": bias}
    if not keep_scale:
        clip.notes.append(f"new logit_bias of {bias:.2f} and scale of {SIGLIP_SCALE:g}, for loss.name=siglip")
    return True


def set_temperature(clip: Clip, temperature: float | str | None) -> None:
    """Sets the scale to 1 / temperature, or leaves it as it is for keep (and None, which learns it)."""
    if isinstance(temperature, int | float):
        with torch.no_grad():
            clip.model.logit_scale.fill_(-math.log(temperature))
    if temperature is not None:
        clip.notes.append(
            f"the scale stays at {clip.model.logit_scale.exp().item():.4g} (loss.temperature={temperature})"
        )


def from_architecture(name: str, tag: str | None, seed: int) -> Clip:
    from open_clip import get_pretrained_cfg

    model_cfg = architecture_cfg(name)
    if tag is None:
        clip = build(name, model_cfg, {})
        clip.notes.append(f"{name} starts from random weights (seed {seed})")
        return clip
    tag_cfg = get_pretrained_cfg(name, clean_tag(tag))
    path = find_tag_weights(name, tag, tag_cfg)
    clip = build(name, follow_tag(model_cfg, tag_cfg), tag_cfg)
    load_with_open_clip(clip.model, path)
    clip.pretrained = tag
    clip.notes.append(f"{name} starts from the weights {tag}")
    if clip.model_cfg != model_cfg:
        clip.notes.append(f"QuickGELU switched on: {tag} was trained with it")
    return clip


def follow_tag(model_cfg: dict, tag_cfg: dict) -> dict:
    """The architecture with the activation that the tag's weights were trained with."""
    # Architectures may have QuickGELU where the tag is silent (roberta-ViT-B-32), so it is only ever added.
    if tag_cfg.get("quick_gelu") and not model_cfg.get("quick_gelu"):
        return {**model_cfg, "quick_gelu": True}
    return model_cfg


def from_run(name: str, checkpoint: str) -> Clip:
    stem = f"step-{int(checkpoint):08d}" if checkpoint.isdigit() else checkpoint
    path = Path(name) / "checkpoints" / f"{stem}.ckpt"
    state = read_checkpoint(path)
    model_cfg, preprocess_cfg = read_description(Path(name) / RUN_CONFIG)
    clip = build(name, model_cfg, preprocess_cfg)
    load_exactly(clip.model, state, path)
    average = ", the moving average of its weights" if is_average(path) else ""
    clip.notes.append(f"{name} starts from {checkpoint} of that run{average}")
    return clip


def from_folder(name: str) -> Clip:
    model_cfg, preprocess_cfg = read_description(Path(name) / FOLDER_CONFIG)
    path = folder_weights(Path(name))
    clip = build(name, model_cfg, preprocess_cfg, tokenizer_dir=Path(name))
    load_with_open_clip(clip.model, path)
    clip.notes.append(f"{name} starts from {path.name} of that folder")
    return clip


def folder_weights(folder: Path) -> Path:
    names = (
        "open_clip_model.safetensors",
        "open_clip_pytorch_model.safetensors",
        "open_clip_pytorch_model.bin",
    )
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(
        f"model.name={str(folder)!r} has no weights: put {names[0]} or {names[-1]} beside {FOLDER_CONFIG}."
    )


def read_description(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two halves of open_clip_config.json or model.json."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        missing = {"embed_dim", "vision_cfg", "text_cfg"} - content["model_cfg"].keys()
        model_cfg, preprocess_cfg = content["model_cfg"], content.get("preprocess_cfg", {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} must be JSON with "model_cfg" and "preprocess_cfg": {error!r}.') from error
    if missing:
        raise ValueError(f'{path} must be JSON with "model_cfg" of a CLIP: {", ".join(sorted(missing))} missing.')
    return model_cfg, preprocess_cfg


def build(name: str, model_cfg: dict, preprocess_cfg: dict, tokenizer_dir: Path | None = None) -> Clip:
    """A model of freshly drawn weights, as open_clip.create_model makes it from an open_clip_config.json.

    open_clip's own routes either add the config to a global registry or need a folder with weights.
    """
    from open_clip import CLIP, CustomTextCLIP
    from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

    check_towers(name, model_cfg)
    parts = deepcopy(model_cfg)
    # The CLIP weights hold both towers; those that timm or transformers would download are not wanted.
    if "timm_model_name" in parts["vision_cfg"]:
        parts["vision_cfg"]["timm_model_pretrained"] = False
    if "hf_model_name" in parts["text_cfg"]:
        parts["text_cfg"]["hf_model_pretrained"] = False
    custom_text = parts.pop("custom_text", False) or "hf_model_name" in parts["text_cfg"]
    try:
        model = (CustomTextCLIP if custom_text else CLIP)(**parts)
        tokenize = build_tokenizer(model_cfg["text_cfg"], tokenizer_dir)
    except Exception as error:  # from open_clip, timm or transformers: unknown keys, towers, missing files
        raise ValueError(f"model.name={name!r} cannot be built: {error}") from error
    merged = merge_preprocess_dict(PreprocessCfg(), preprocess_cfg)
    merged["size"] = getattr(model.visual, "image_size", merged["size"])
    return Clip(
        model=model,
        tokenize=tokenize,
        preprocess=cast(Any, image_transform_v2(PreprocessCfg(**merged), is_train=False)),
        model_cfg=deepcopy(model_cfg),
        preprocess_cfg=json.loads(json.dumps(merged)),  # lists for tuples, as a reload will have them
        name=name,
    )


def build_tokenizer(text_cfg: dict, tokenizer_dir: Path | None) -> Callable[[list[str]], Int64[Tensor, "n L"]]:
    """open_clip's tokenizer for the text tower; those of transformers are read from the folder, if given."""
    from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer, SimpleTokenizer

    length = text_cfg.get("context_length", DEFAULT_CONTEXT_LENGTH)
    options = text_cfg.get("tokenizer_kwargs") or {}
    if not text_cfg.get("hf_tokenizer_name"):
        return SimpleTokenizer(context_length=length, **options)
    source = str(tokenizer_dir or text_cfg["hf_tokenizer_name"])
    return HFTokenizer(source, context_length=length, tokenizer_mode=text_cfg.get("tokenizer_mode"), **options)
