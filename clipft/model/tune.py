"""TuneConfig -> the share of the learning rate that each parameter gets; which of them are trained at all."""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from clipft.config import LayerDecayConfig, TuneConfig
from clipft.model.encode import OpenClip
from clipft.model.groups import TOWERS, Group, groups_of
from clipft.model.names import closest

Rule = dict[str, Any]  # match, lr_mult


def lr_multipliers(model: OpenClip, config: TuneConfig) -> dict[str, float]:
    """Of each parameter: what its rule says times its tower's layer decay; 0 is frozen."""
    groups = groups_of(model)
    rules = deciding_rules(groups, config)
    check_blocks(groups, config)
    check_layer_decay(groups, rules, config.layer_decay)
    decays = {"image": config.layer_decay.image, "text": config.layer_decay.text}
    return {
        name: rules[name]["lr_mult"] * (decays.get(group.tower) or 1.0) ** group.depth for name, group in groups.items()
    }


def deciding_rules(groups: dict[str, Group], config: TuneConfig) -> dict[str, Rule]:
    """The first rule that matches each parameter, by its name or what its group is called; each rule has to decide."""
    words = {name: [name, *group.words(config.blocks or 0)] for name, group in groups.items()}
    decided: dict[str, Rule] = {}
    for number, rule in enumerate(config.rules, 1):
        matched = [name for name, each in words.items() if any(fnmatchcase(word, rule["match"]) for word in each)]
        new = [name for name in matched if name not in decided]
        if not new:
            raise ValueError(f"tune.rules: rule {number}, {rule['match']!r}, {why_unused(rule, bool(matched), words)}")
        decided.update({name: rule for name in new})
    left = [name for name in groups if name not in decided]
    if left:
        raise ValueError(
            f"tune.rules: no rule matches {', '.join(left[:3])}{f' and {len(left) - 3} more' if left[3:] else ''}. "
            'Every parameter needs one: end the list with {match: "*"}, or {match: "*", lr_mult: 0} to freeze the rest.'
        )
    return decided


def why_unused(rule: Rule, matched: bool, words: dict[str, list[str]]) -> str:
    if matched:
        return "decides nothing: all that it matches is matched by a rule before it. Put it first, or leave it out."
    near = closest(rule["match"].strip("*."), list(dict.fromkeys(word for each in words.values() for word in each)))
    groups = ", ".join(sorted({each[2] for each in words.values()}))
    return f"matches no parameter. {f'Did you mean {near}? ' if near else ''}The groups are called: {groups}."


def check_blocks(groups: dict[str, Group], config: TuneConfig) -> None:
    for tower in TOWERS:
        num_blocks = max(group.num_blocks for group in groups.values() if group.tower == tower)
        named = any(fnmatchcase(f"{tower}.last_blocks", rule["match"]) for rule in config.rules)
        if named and (config.blocks or 0) > num_blocks:
            raise ValueError(f"tune.blocks={config.blocks}: the {tower} tower has {num_blocks} blocks.")


def check_layer_decay(groups: dict[str, Group], rules: dict[str, Rule], config: LayerDecayConfig) -> None:
    for tower, decay in (("image", config.image), ("text", config.text)):
        mine = {name: group for name, group in groups.items() if group.tower == tower}
        if decay is not None and not any(rules[name]["lr_mult"] for name in mine):
            raise ValueError(f"tune.layer_decay.{tower}={decay} would be ignored: nothing of that tower is trained.")
        if decay is not None and not any(group.num_blocks for group in mine.values()):
            raise ValueError(f"tune.layer_decay.{tower}={decay}: no blocks are known of this tower. Leave it out.")


def freeze(model: OpenClip, multipliers: dict[str, float]) -> None:
    """Leaves those parameters trainable that are to get a share of the rate."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(multipliers[name] > 0)
    if not any(multipliers.values()):
        raise ValueError("tune.rules freezes every parameter: there is nothing to train.")


def tune_table(model: OpenClip, multipliers: dict[str, float], lr: float) -> Iterator[str]:
    """A line for each group: its parameters, those that are trained, the rates they peak at."""
    groups, parameters = groups_of(model), dict(model.named_parameters())
    yield f"{'':<12} {'parameters':>13} {'trained':>13}   lr"
    for title in sorted({group.name for group in groups.values()}, key=place_in_table):
        members = [name for name, group in groups.items() if group.name == title]
        trained = [name for name in members if parameters[name].requires_grad]
        sizes = [sum(parameters[name].numel() for name in names) for names in (members, trained)]
        rates = sorted({lr * multipliers[name] for name in trained})
        shown = " to ".join(f"{rate:.1e}" for rate in dict.fromkeys([rates[0], rates[-1]])) if rates else "-"
        of_all, of_trained = (len({groups[name].block for name in names}) for names in (members, trained))
        blocks = f", {of_trained} of {of_all} blocks" if title.endswith("blocks") else ""
        yield f"{title:<12} {sizes[0]:>13,} {sizes[1]:>13,}   {shown}{blocks}"


def place_in_table(title: str) -> tuple[int, int]:
    """Towers as a batch names them, each from its input to its features."""
    tower, _, part = title.partition(".")
    return [*TOWERS, "scale"].index(tower), ["", "embed", "blocks", "head"].index(part)
