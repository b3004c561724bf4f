"""A model's tokenizer without the rest of open_clip, which takes over ten seconds to import."""

import importlib.util
import json
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from clipft.config import ModelConfig
from clipft.data.check.reader import Reader
from clipft.model.check import check_model, needed_parts
from clipft.model.hub import CONFIG_NAMES, check_reach, find_file
from clipft.model.names import architecture_cfg, open_clip_dir
from clipft.model.sizes import with_options
from clipft.model.sources import FOLDER_CONFIG, kind_of, local, read_description, repo_of
from clipft.model.towers import ModelCfg, text_of, vision_of

ALONE = "clipft_open_clip_tokenizer"  # under which the module lies that was loaded without its package
ADDED = 2  # start and end token


@dataclass(frozen=True)
class CountTokens:
    """Counts the tokens of captions; each process loads the tokenizer when it first needs it."""

    text_cfg: str
    """As JSON."""
    tokenizer_dir: Path | None

    def __call__(self, captions: list[str]) -> list[int]:
        return count_tokens(load_tokenizer(self.text_cfg, self.tokenizer_dir), captions)


def reader_of(config: ModelConfig) -> Reader:
    """What the model takes; raises for a model that cannot be, or whose tokenizer is out of reach."""
    check_model(config)
    model_cfg, tokenizer_dir = description_of(config)
    model_cfg = with_options(config, model_cfg)
    what = f"model.name={config.name!r}"
    for repo, names, part in needed_parts(model_cfg, what, own_tokenizer=tokenizer_dir is not None):
        if part.endswith("tokenizer"):
            check_reach(repo, names, part)
    text, size = text_of(model_cfg), vision_of(model_cfg).get("image_size", 224)
    return Reader(
        name=config.name,
        image_size=config.image_size or (size if isinstance(size, int) else size[0]),
        context_length=text.get("context_length", 77),
        count=CountTokens(json.dumps(text), tokenizer_dir),
        english=not text.get("hf_tokenizer_name"),
    )


def description_of(config: ModelConfig) -> tuple[ModelCfg, Path | None]:
    """The model's config, and the folder with a tokenizer of its own where it has one."""
    kind = kind_of(config.name)
    if kind == "architecture":
        return architecture_cfg(config.name), None
    if kind == "hub":
        return read_description(find_file(repo_of(config.name), CONFIG_NAMES, f"model.name={config.name!r}"))[0], None
    found = local(config.name, config.checkpoint)
    if found is None or found.description is None:
        raise ValueError(
            f"model.name={config.name!r} is a weight file without a description of its model. Name its architecture "
            "instead, such as model=ViT-B-32: weights make no difference here."
        )
    own_tokenizer = found.description.name == FOLDER_CONFIG
    return read_description(found.description)[0], found.description.parent if own_tokenizer else None


def tokenizer_module() -> ModuleType:
    """open_clip/tokenizer.py: as part of its package where that is imported, else by itself, with torch alone."""
    loaded = sys.modules.get("open_clip.tokenizer") or sys.modules.get(ALONE)
    if loaded is not None:
        return loaded
    spec = importlib.util.spec_from_file_location(ALONE, open_clip_dir() / "tokenizer.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[ALONE] = module
    return module


def make_tokenizer(module: ModuleType, text_cfg: dict[str, Any], tokenizer_dir: Path | None) -> Any:
    """open_clip's tokenizer for the text tower; those of transformers are read from the folder, if given."""
    length = text_cfg.get("context_length", module.DEFAULT_CONTEXT_LENGTH)
    options = text_cfg.get("tokenizer_kwargs") or {}
    if not text_cfg.get("hf_tokenizer_name"):
        return module.SimpleTokenizer(context_length=length, **options)
    source = str(tokenizer_dir or text_cfg["hf_tokenizer_name"])
    return module.HFTokenizer(source, context_length=length, tokenizer_mode=text_cfg.get("tokenizer_mode"), **options)


@lru_cache(1)
def load_tokenizer(text_cfg: str, tokenizer_dir: Path | None) -> Any:
    return make_tokenizer(tokenizer_module(), json.loads(text_cfg), tokenizer_dir)


def count_tokens(tokenizer: Any, captions: list[str]) -> list[int]:
    """Tokens of each caption before any is cut, start and end included."""
    if not hasattr(tokenizer, "tokenizer"):  # open_clip's own
        return [len(tokenizer.encode(caption)) + ADDED for caption in captions]
    if not captions:
        return []
    clips = tokenizer.tokenizer_mode == "clips"  # adds three by itself, the class token last
    texts = [tokenizer.clean_fn(caption) for caption in captions]
    found = tokenizer.tokenizer(texts, add_special_tokens=not clips, truncation=False, verbose=False)
    return [len(ids) + (ADDED + 1 if clips else 0) for ids in found["input_ids"]]
