"""Where in a model each parameter lies: the words that tuning rules, layer decay and the plan's table use."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from clipft.model.encode import OpenClip

Value = TypeVar("Value")

TOWERS = ("image", "text")
# In towers of open_clip and transformers: resblocks.3, layer2.0 (ResNet), encoder.layer.3, layers.3, block.3 (T5).
BLOCK = re.compile(r"\b(?:resblocks|layers?|blocks?)\.(\d+)\.|\blayer(\d)\.(\d+)\.")
HEADS = {"ln_post", "proj", "attn_pool", "attn_pool_contrastive", "attnpool", "head"}  # of image towers
HEADS |= {"ln_final", "text_projection", "pooler", "final_layer_norm", "layer_norm"}  # of text towers
NO_TOWER = ("logit_scale", "logit_bias")
ADDED = (99999,)  # how timm's matchers say "to the layer before"
NOTHING = "$."


@dataclass(frozen=True)
class Group:
    """embed (what comes before a tower's blocks), blocks, or head (final norm, pooling, projection); or the scale."""

    tower: str
    """image, text, or scale: the loss's scale and bias."""
    part: str = ""
    block: int = 0
    """Number of the block, counted from the input."""
    num_blocks: int = 0
    """Blocks of the tower."""

    @property
    def name(self) -> str:
        return f"{self.tower}.{self.part}" if self.part else self.tower

    @property
    def depth(self) -> int:
        """Layers above it in the tower: 0 for the head, 1 for the last block, all blocks and one for embed."""
        return {"embed": self.num_blocks + 1, "blocks": self.num_blocks - self.block}.get(self.part, 0)

    def words(self, last: int) -> list[str]:
        """What a rule can call it: image, image.blocks, image.blocks.11, image.blocks.-1, image.last_blocks."""
        words = [self.tower, self.name]
        if self.part == "blocks":
            words += [f"{self.name}.{self.block}", f"{self.name}.{-self.depth}"]
            words += [f"{self.tower}.last_blocks"] if self.depth <= last else []
        return words


def tower_modules(model: OpenClip, tower: str) -> list[nn.Module]:
    """The modules with a tower's parameters; of CLIP's text tower they lie beside the image tower."""
    if tower == "image":
        return [model.visual]
    return [child for name, child in model.named_children() if name != "visual"]


def tower_parameters(model: OpenClip, tower: str) -> Iterator[tuple[str, nn.Parameter]]:
    """A tower's parameters, by their names in the model."""
    return in_tower(model.named_parameters(), tower)


def in_tower(named: Iterable[tuple[str, Value]], tower: str) -> Iterator[tuple[str, Value]]:
    """What belongs to a tower among a model's parameters, or its whole state."""
    for name, value in named:
        if name not in NO_TOWER and name.startswith("visual.") == (tower == "image"):
            yield name, value


def is_frozen(model: OpenClip, tower: str) -> bool:
    """Whether nothing of the tower is trained."""
    return not any(parameter.requires_grad for _, parameter in tower_parameters(model, tower))


def groups_of(model: OpenClip) -> dict[str, Group]:
    """The group of every parameter, by its name in the model and in the model's order."""
    places = {tower: [name for name, _ in tower_parameters(model, tower)] for tower in TOWERS}
    trunk: Any = getattr(model.visual, "trunk", None)  # of timm
    matcher = trunk.group_matcher(coarse=False) if hasattr(trunk, "group_matcher") else None
    image = by_matcher(trunk, matcher, places["image"]) if isinstance(matcher, dict) else by_name(places["image"])
    found = numbered("image", image) | numbered("text", by_name(places["text"]))
    return {name: found.get(name, Group("scale")) for name, _ in model.named_parameters()}


def numbered(tower: str, parts: dict[str, Any]) -> dict[str, Group]:
    """Groups from the part of each parameter: embed, head, or what its block is sorted by."""
    blocks = sorted({part for part in parts.values() if not isinstance(part, str)})
    return {
        name: Group(tower, part, num_blocks=len(blocks))
        if isinstance(part, str)
        else Group(tower, "blocks", blocks.index(part), len(blocks))
        for name, part in parts.items()
    }


def by_name(names: list[str]) -> dict[str, Any]:
    """Parts of a tower of open_clip or transformers, whose modules have known names."""
    parts: dict[str, Any] = {}
    for name in names:
        match = BLOCK.search(name)
        if match:
            parts[name] = tuple(int(number) for number in match.groups() if number)
        else:
            parts[name] = "head" if HEADS & set(name.split(".")) else "embed"
    return parts


def by_matcher(trunk: nn.Module, matcher: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Parts of a tower of timm, by timm's own matcher of the names in its trunk; open_clip's head comes after it.

    What timm adds to the last block without a number of its own is the final norm: head, as in open_clip's towers.
    """
    from timm.models import group_parameters

    layers = group_parameters(trunk, matcher, reverse=True)
    expressions = [each for spec in matcher.values() for each in ([(spec, None)] if isinstance(spec, str) else spec)]
    known = {name for name in layers if any(re.match(each, name) for each, _ in expressions)}
    added = {name for name in known if any(re.match(each, name) for each, number in expressions if number == ADDED)}
    last = max(layers[name] for name in known)
    parts: dict[str, Any] = {}
    for name in names:
        short = name.removeprefix("visual.trunk.")
        if short not in known or (short in added and layers[short] == last):
            parts[name] = "head"
        else:
            parts[name] = "embed" if re.match(matcher.get("stem", NOTHING), short) else layers[short]
    return parts
