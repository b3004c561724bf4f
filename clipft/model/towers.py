"""Which models of open_clip can be trained here, told from their configs alone; open_clip is not imported."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

TRANSFORMERS = "pip install transformers sentencepiece"
SIMPLE_VOCABULARY = 49408  # of open_clip's own tokenizer
TOKENIZER_OPTIONS = {"clean", "strip_sep_token", "language", "additional_special_tokens"}

ModelCfg = dict[str, Any]


@dataclass(frozen=True)
class Rule:
    """What a config must not say, and why."""

    found: Callable[[ModelCfg], bool]
    why: str


def text_of(model_cfg: ModelCfg) -> dict[str, Any]:
    return model_cfg["text_cfg"]


def vision_of(model_cfg: ModelCfg) -> dict[str, Any]:
    return model_cfg["vision_cfg"]


def sides(size: Any) -> set[int]:
    return set(size) if isinstance(size, list | tuple) else {size}


NOT_SUPPORTED = (
    Rule(
        lambda cfg: "multimodal_cfg" in cfg,
        "it is a CoCa model (it also writes captions); clipft trains two-tower models",
    ),
    Rule(
        lambda cfg: "audio_cfg" in cfg,
        "it listens to sound; clipft trains on images and texts",
    ),
    Rule(
        lambda cfg: bool(cfg.get("naflex")) or "naflex" in (vision_of(cfg).get("timm_model_name") or ""),
        "its image tower is a NaFlex one (patches of images of any shape); clipft feeds squares of one size",
    ),
    Rule(
        lambda cfg: bool(text_of(cfg).get("output_tokens") or vision_of(cfg).get("output_tokens")),
        "a tower of it returns tokens beside its feature (output_tokens)",
    ),
    Rule(
        lambda cfg: isinstance(vision_of(cfg).get("attentional_pool"), str),
        "its attention pool makes several features of an image (attentional_pool is not true or false)",
    ),
    Rule(
        lambda cfg: len(sides(vision_of(cfg).get("image_size", 224))) > 1,
        "its images are not square; clipft feeds squares",
    ),
    Rule(
        lambda cfg: (
            not text_of(cfg).get("hf_tokenizer_name")
            and (
                bool(text_of(cfg).get("hf_model_name"))
                or text_of(cfg).get("vocab_size", SIMPLE_VOCABULARY) < SIMPLE_VOCABULARY
            )
        ),
        "its config names no tokenizer (hf_tokenizer_name), and open_clip's own has other tokens than its text tower",
    ),
    Rule(
        # Others reach transformers' from_pretrained, where trust_remote_code would run code of a repository.
        lambda cfg: bool(set(text_of(cfg).get("tokenizer_kwargs") or {}) - TOKENIZER_OPTIONS),
        f"its tokenizer_kwargs go beyond {', '.join(sorted(TOKENIZER_OPTIONS))}",
    ),
)


def unsupported(model_cfg: ModelCfg) -> str | None:
    """Why models of this config cannot be trained here; None where they can."""
    return next((rule.why for rule in NOT_SUPPORTED if rule.found(model_cfg)), None)


def of_transformers(model_cfg: ModelCfg) -> str | None:
    """The tower or tokenizer that the config takes from transformers, if any."""
    text = text_of(model_cfg)
    return text.get("hf_model_name") or text.get("hf_tokenizer_name") or None


def status(model_cfg: ModelCfg) -> str:
    """Empty where the model works, "needs ..." where a package is missing, "not supported: ..."."""
    if why := unsupported(model_cfg):
        return f"not supported: {why}"
    if of_transformers(model_cfg) and find_spec("transformers") is None:
        return f"needs {TRANSFORMERS}"
    return ""


def check_towers(name: str, model_cfg: ModelCfg) -> None:
    """Raise for models that cannot be built or trained here."""
    if why := unsupported(model_cfg):
        raise ValueError(f"model.name={name!r} is not supported: {why}. `clipft models` lists all.")
    foreign = of_transformers(model_cfg)
    if foreign and find_spec("transformers") is None:
        raise ValueError(f"model.name={name!r} uses {foreign} of transformers. Run: {TRANSFORMERS}")
