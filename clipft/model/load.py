"""ModelConfig -> a CLIP of open_clip with its tokenizer and transform, on the CPU in fp32."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clipft.config import ModelConfig
from clipft.model.build import Clip, build
from clipft.model.check import check_model, needed_parts
from clipft.model.convert import POOL_POSITIONS, converted, differ, load_big_vision
from clipft.model.forms import NUMPY, form_of
from clipft.model.hub import CONFIG_NAMES, WEIGHT_NAMES, check_reach, find_file, hub_files
from clipft.model.names import architecture_cfg, architecture_files, clean_tag, pretrained_tags, tags_of
from clipft.model.options import (
    check_context,
    check_patch_dropout,
    keep_all_layers,
    patch_dropout_note,
    recompute_activations,
    resized,
)
from clipft.model.patches import draw_patches_on_device
from clipft.model.recognize import recognize, suggestion, with_bias
from clipft.model.sizes import no_patch_dropout, with_options
from clipft.model.sources import FOLDER_CONFIG, is_tag, kind_of, local, read_description, repo_of
from clipft.model.towers import ModelCfg
from clipft.model.weights import Weights, first_differences, read_weights

SIGLIP_SCALE = 10.0
PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")


@dataclass(frozen=True)
class Source:
    """Where the weights of a model come from, and what is said of it there."""

    path: Path
    said: str
    model_cfg: ModelCfg | None = None
    preprocess_cfg: dict[str, Any] | None = None
    quick_gelu: bool | None = None
    """Whether the weights were trained with QuickGELU; None: not said."""
    tokenizer_dir: Path | None = None


def load_model(config: ModelConfig, seed: int) -> Clip:
    """The model that the config names; its random weights, where it has any, follow from the seed."""
    check_model(config)
    source = find_source(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = from_source(config, source) if source else from_nothing(config, seed)
        if config.image_size is not None and clip.model_cfg["vision_cfg"].get("timm_model_name"):
            clip = resized(clip, config.image_size)
    check_context(config, clip)
    if config.image_size or config.context_length:
        length = clip.tokenize(["a"]).shape[1]
        clip.notes.append(f"images of {clip.side} pixels, captions of {length} tokens")
    keep_all_layers(clip)
    clip.notes += patch_dropout_note(clip)
    draw_patches_on_device(clip.model)
    if config.grad_checkpointing:
        recompute_activations(clip)
    return clip


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


def find_source(config: ModelConfig) -> Source | None:
    """The weights that the config names, on this machine or brought here from the hub; None: random ones."""
    kind, what = kind_of(config.name), f"model.name={config.name!r}"
    if kind == "hub":
        repo = repo_of(config.name)
        description = find_file(repo, CONFIG_NAMES, what)
        path = find_file(repo, WEIGHT_NAMES, what)
        return described(path, f"{path.name} of {repo}", description, tokenizer_dir=None)
    given = config.pretrained if kind == "architecture" else config.name
    if given is None:
        return None
    if kind == "architecture" and is_tag(config.name, given):
        return of_tag(config.name, given)
    found = local(given, config.checkpoint)
    assert found is not None
    if found.description is None:
        return Source(found.weights, found.said)
    own_tokenizer = found.description.parent if found.description.name == FOLDER_CONFIG else None
    return described(found.weights, found.said, found.description, own_tokenizer)


def described(path: Path, said: str, description: Path, tokenizer_dir: Path | None) -> Source:
    model_cfg, preprocess_cfg = read_description(description)
    quick_gelu = bool(model_cfg.get("quick_gelu"))
    return Source(path, said, model_cfg, preprocess_cfg, quick_gelu, tokenizer_dir)


def of_tag(architecture: str, tag: str) -> Source:
    from open_clip import get_pretrained_cfg

    tag_cfg = get_pretrained_cfg(architecture, clean_tag(tag))
    repo, names = hub_files(pretrained_tags()[architecture][clean_tag(tag)])
    path = find_file(repo, names, f"model.pretrained={tag!r}")
    # Architectures may have QuickGELU where the tag is silent (roberta-ViT-B-32), so it is only ever added.
    return Source(path, f"the weights {tag}", None, tag_cfg, True if tag_cfg.get("quick_gelu") else None)


def from_nothing(config: ModelConfig, seed: int) -> Clip:
    clip = built(config, architecture_cfg(config.name), {}, None)
    clip.notes.append(f"starts from random weights (seed {seed})")
    return clip


def from_source(config: ModelConfig, source: Source) -> Clip:
    """The model with the weights of the source, under the options of the config."""
    big_vision = kind_of(config.name) == "architecture" and form_of(source.path) == NUMPY
    weights = None if big_vision else read_weights(source.path)
    model_cfg, preprocess_cfg, notes = identify(config, source, weights)
    if weights:
        model_cfg, more = with_bias(model_cfg, weights.state)
        notes += more
    clip = built(config, model_cfg, preprocess_cfg, source.tokenizer_dir)
    clip.pretrained = config.pretrained
    average = ", the moving average of its weights" if weights and weights.average else ""
    clip.notes += [f"starts from {source.said}{average}", *notes]
    if weights:
        fill(clip, weights, source.path)
    else:
        load_big_vision(clip.model, source.path)
    return clip


def identify(
    config: ModelConfig, source: Source, weights: Weights | None
) -> tuple[ModelCfg, dict[str, Any], list[str]]:
    """The config of the model and of its pixels for these weights, and what was chosen for them, in words."""
    notes: list[str] = []
    if kind_of(config.name) == "architecture":
        name, model_cfg = config.name, architecture_cfg(config.name)
    elif source.model_cfg is not None:
        name, model_cfg = config.name, source.model_cfg
    else:
        assert weights is not None
        name, model_cfg, notes = recognize(weights, source.path)
    quick_gelu = True if source.quick_gelu is None and weights and weights.openai else source.quick_gelu
    followed = with_activation(model_cfg, quick_gelu)
    if followed != model_cfg:
        state = "on: these weights were" if quick_gelu else "off: these weights were not"
        notes.append(f"QuickGELU switched {state} trained with it")
    if source.preprocess_cfg is not None:
        return followed, source.preprocess_cfg, notes
    twin = f"{name}-quickgelu"
    if quick_gelu is None and config.name == name and twin in architecture_files():
        notes.append(
            f"GELU, as {name} has it; for weights trained with QuickGELU, such as OpenAI's, use model={twin} "
            f"model.pretrained={source.path}"
        )
    preprocess_cfg, more = usual_preprocessing(name)
    return followed, preprocess_cfg, notes + more


def with_activation(model_cfg: ModelCfg, quick_gelu: bool | None) -> ModelCfg:
    """The config with the activation that the weights were trained with, where that is known."""
    if quick_gelu is None or quick_gelu == bool(model_cfg.get("quick_gelu")):
        return model_cfg
    without = {key: value for key, value in model_cfg.items() if key != "quick_gelu"}
    return {**without, "quick_gelu": True} if quick_gelu else without


def usual_preprocessing(architecture: str) -> tuple[dict[str, Any], list[str]]:
    """How the architecture's own weights want their pixels, where all agree; else open_clip's default. And a note."""
    from open_clip import get_pretrained_cfg
    from open_clip.transform import PreprocessCfg

    configs = [get_pretrained_cfg(architecture, tag) for tag in tags_of(architecture)]
    wanted = [{key: config[key] for key in PREPROCESSING if key in config} for config in configs]
    default = {key: getattr(PreprocessCfg(), key) for key in PREPROCESSING}
    if not wanted or all(config == default for config in wanted):
        return {}, []
    if all(config == wanted[0] for config in wanted):
        mean = ", ".join(f"{value:.3g}" for value in wanted[0]["mean"])
        return wanted[0], [
            f"pixels prepared as for the tags of {architecture} (mean {mean}, {wanted[0]['resize_mode']})"
        ]
    return {}, [f"pixels prepared as open_clip does by default; some tags of {architecture} want others"]


def built(config: ModelConfig, model_cfg: ModelCfg, preprocess_cfg: dict[str, Any], tokenizer_dir: Path | None) -> Clip:
    """The model under the options of the config, with weights to be replaced."""
    cfg = with_options(config, model_cfg)
    for repo, names, what in needed_parts(cfg, f"model.name={config.name!r}", own_tokenizer=tokenizer_dir is not None):
        check_reach(repo, names, what)
    try:
        clip = build(config.name, cfg, preprocess_cfg, tokenizer_dir)
    except ValueError as error:
        if config.patch_dropout and "patch_drop_rate" in str(error):  # of timm's towers without patches
            raise no_patch_dropout(config.patch_dropout, config.name) from error
        raise
    check_patch_dropout(clip)
    return clip


def fill(clip: Clip, weights: Weights, path: Path) -> None:
    """Copies the weights in, under open_clip's conversions; raises with the first differences and what would fit."""
    state, notes = converted(clip.model, weights.state)
    if differences := first_differences(clip.model, state):
        if differ(clip.model.state_dict(), state, POOL_POSITIONS):
            hint = "open_clip does not interpolate the positions of a ResNet's pool: leave model.image_size out."
        else:
            hint = suggestion(weights.state, path, clip.name)
            hint += f" Or use model={path} alone: its sizes follow from the weights." if weights.openai else ""
        raise ValueError(f"{path} holds the weights of another model than {clip.name}: {differences}. {hint}")
    clip.model.load_state_dict(state)
    clip.notes += notes
