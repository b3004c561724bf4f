"""Whether a ModelConfig can be loaded, found out as far as that goes without torch and open_clip."""

from collections.abc import Iterator
from pathlib import Path

from clipft.config import ModelConfig
from clipft.model.forms import form_of
from clipft.model.hub import CONFIG_NAMES, HUB, TOKENIZER_NAMES, WEIGHT_NAMES, cached_file, check_reach, hub_files
from clipft.model.names import architecture_cfg, clean_tag, closest, pretrained_tags, tags_of
from clipft.model.sizes import with_options
from clipft.model.sources import (
    FOLDER_CONFIG,
    is_tag,
    kind_of,
    kind_of_path,
    local,
    looks_like_path,
    near_files,
    neither,
    read_description,
    repo_of,
)
from clipft.model.towers import ModelCfg, check_towers


def check_model(config: ModelConfig) -> None:
    """Raise for a name, file, tag or combination that cannot be loaded; nothing is asked of the hub."""
    kind = kind_of(config.name)
    check_choice(config)
    if kind == "architecture":
        check_towers(config.name, architecture_cfg(config.name))
        with_options(config, architecture_cfg(config.name))
        if config.pretrained is not None:
            check_pretrained(config.name, config.pretrained, config.checkpoint)
    elif config.pretrained is not None:
        raise ValueError(
            f"model.pretrained={config.pretrained!r} would be ignored: the weights come from "
            f"model.name={config.name!r}. Leave model.pretrained out."
        )
    elif kind == "hub":
        repo_of(config.name)
    else:
        model_cfg = check_local(config.name, config.checkpoint)
        if model_cfg:
            with_options(config, model_cfg)


def check_choice(config: ModelConfig) -> None:
    """Raises for a model.checkpoint that nothing would read."""
    given = config.name if config.pretrained is None else config.pretrained
    if config.checkpoint == "best" or kind_of_path(given) == "run":
        return
    raise ValueError(
        f"model.checkpoint={config.checkpoint!r} picks weights of a run directory, and {given!r} is none. Leave it out."
    )


def check_pretrained(architecture: str, pretrained: str, checkpoint: str) -> None:
    """Raises for a model.pretrained that is neither a tag of the architecture nor weights on this machine."""
    if is_tag(architecture, pretrained):
        return
    what = f"model.pretrained={pretrained!r}"
    if kind_of_path(pretrained):
        check_local(pretrained, checkpoint)
        return
    if pretrained.startswith(HUB):
        raise ValueError(f"{what}: a repository of the hub brings its own architecture. Use model={pretrained} alone.")
    if Path(pretrained).is_dir():
        raise ValueError(f"{what} {neither(Path(pretrained))}")
    if looks_like_path(pretrained):
        raise ValueError(f"{what} does not exist.{near_files(Path(pretrained))}")
    tags = tags_of(architecture)
    if not tags:
        raise ValueError(
            f"{what}: there are no weights for {architecture}. Give a weight file, or use model.pretrained=null to "
            "start from random weights."
        )
    near = closest(pretrained, tags)
    hint = f"Did you mean {near}? " if near else ""
    raise ValueError(f"{what} is no tag of {architecture} and no file. {hint}Its tags: {', '.join(tags)}.")


def check_local(name: str, checkpoint: str) -> ModelCfg | None:
    """The config of the model where there is one; raises for towers that cannot be trained and for damaged weights."""
    found = local(name, checkpoint)
    assert found is not None
    model_cfg = read_description(found.description)[0] if found.description else None
    if model_cfg:
        check_towers(name, model_cfg)
    form_of(found.weights)
    return model_cfg


def check_reachable(config: ModelConfig) -> None:
    """Raise, within seconds, for what must come from the hub, is not in its cache and cannot be downloaded."""
    for repo, names, what in needed_from_hub(config):
        check_reach(repo, names, what)


def needed_from_hub(config: ModelConfig) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Repository, names of a file of which one is needed, and what it is needed for."""
    kind, what = kind_of(config.name), f"model.name={config.name!r}"
    if kind == "hub":
        yield repo_of(config.name), CONFIG_NAMES, what
        yield repo_of(config.name), WEIGHT_NAMES, what
        if found := cached_file(repo_of(config.name), CONFIG_NAMES):
            model_cfg = read_description(found)[0]
            check_towers(config.name, model_cfg)
            yield from needed_parts(model_cfg, what, own_tokenizer=False)
    elif kind == "architecture":
        yield from needed_parts(architecture_cfg(config.name), what, own_tokenizer=False)
        if config.pretrained is not None and is_tag(config.name, config.pretrained):
            place = pretrained_tags()[config.name][clean_tag(config.pretrained)]
            yield *hub_files(place), f"model.pretrained={config.pretrained!r}"
    elif (found := local(config.name, config.checkpoint)) and found.description:
        model_cfg = read_description(found.description)[0]
        yield from needed_parts(model_cfg, what, own_tokenizer=found.description.name == FOLDER_CONFIG)


def needed_parts(model_cfg: ModelCfg, what: str, own_tokenizer: bool) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """What transformers reads from the hub for the text tower."""
    text = model_cfg["text_cfg"]
    tower, tokenizer = text.get("hf_model_name"), text.get("hf_tokenizer_name")
    if tower and not Path(tower).exists():
        yield tower, ("config.json",), f"{what}, its text tower"
    if tokenizer and not own_tokenizer and not Path(tokenizer).exists():
        yield tokenizer, TOKENIZER_NAMES, f"{what}, its tokenizer"
