"""Names of optimizers and what each takes, from timm's source files: the command line answers without importing it."""

import ast
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from clipft.config import ADAMW, OptimConfig
from clipft.model.names import closest

UNFIT = {  # by the beginning of the class's name
    "Adahessian": "it needs second derivatives",
    "Kron": "it draws random numbers of its own, so that ranks and resumed runs would differ",
    "apex": "it needs the package apex and a GPU, and was never tried with them",
    "bitsandbytes": "it needs the package bitsandbytes and a GPU, and was never tried with them",
}


@dataclass(frozen=True)
class Takes:
    """What an optimizer of timm's registry can be given beside rate and weight decay."""

    class_name: str
    has_eps: bool = True
    has_momentum: bool = False
    has_betas: bool = False
    num_betas: int = 2


@cache
def optimizers() -> dict[str, Takes]:
    """Every name in timm's registry."""
    spec = find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("timm is not installed. Run: pip install timm")
    found: dict[str, Takes] = {}
    calls: list[ast.Call] = []
    for path in sorted((Path(spec.submodule_search_locations[0]) / "optim").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "OptimInfo(" in text:
            calls += [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    for call in calls:
        if isinstance(call.func, ast.Name) and call.func.id == "OptimInfo":
            given = given_to(call)
            has = {key: given[key] for key in ("has_eps", "has_momentum", "has_betas", "num_betas") if key in given}
            found[given["name"]] = Takes(given["opt_class"].removeprefix("torch.optim."), **has)
    for call in calls:  # register_alias(alias, target)
        if isinstance(call.func, ast.Attribute) and call.func.attr == "register_alias":
            alias, target = (ast.literal_eval(argument) for argument in call.args)
            found[alias] = found[target]
    return found


def given_to(call: ast.Call) -> dict[str, Any]:
    """The arguments of an OptimInfo(...) that are literals, and its class by name."""
    nodes = dict(zip(("name", "opt_class"), call.args, strict=False))
    nodes |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
    given = {}
    for key, node in nodes.items():
        try:
            given[key] = ast.literal_eval(node)
        except ValueError:
            given[key] = ast.unparse(node)
    return given


def check_optimizer(config: OptimConfig) -> None:
    """Raises for a name that is unknown or of no use here, and for what that optimizer does not take."""
    name, known = config.name, optimizers()
    if name not in known:
        near = closest(name, list(known))
        fit = ", ".join(each for each in sorted(known) if why_unfit(known[each]) is None)
        raise ValueError(f"optim.name={name!r} is unknown. {f'Did you mean {near}? ' if near else ''}There are: {fit}.")
    takes = known[name]
    if (reason := why_unfit(takes)) is not None:
        raise ValueError(f"optim.name={name!r} cannot be used: {reason}. adamw, lion, lamb, adopt and muon can.")
    for key, taken in (
        ("beta1", takes.has_betas and takes.num_betas == 2),
        ("beta2", takes.has_betas and takes.num_betas == 2),
        ("eps", takes.has_eps),
        ("momentum", takes.has_momentum),
    ):
        value = getattr(config, key)
        if value is not None and not taken:
            raise ValueError(f"optim.{key}={value} would be ignored: optim.name={name} does not take it.")
    if name != ADAMW and (config.beta1 is None) != (config.beta2 is None):
        raise ValueError(f"optim.beta1 and optim.beta2 go together for optim.name={name}: give both or none.")
    if config.lr is None and name != ADAMW:
        raise ValueError(f"optim.lr is needed with optim.name={name}: the default rate is AdamW's.")


def why_unfit(takes: Takes) -> str | None:
    return next((reason for start, reason in UNFIT.items() if takes.class_name.startswith(start)), None)
