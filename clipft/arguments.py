"""Command-line arguments as people type them -> overrides as Hydra reads them; nothing heavy is imported here."""

import ast
import dataclasses
import difflib
import inspect
import itertools
import re
import typing
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from clipft import config as config_module
from clipft.conf_files import data_folder, yaml_names
from clipft.data.remote.addresses import is_remote, refuse_secrets
from clipft.model.names import architecture_cfg, architecture_files, closest
from clipft.model.sources import kind_of
from clipft.model.towers import check_towers

DATA_TEXT = tuple(f"data.{field}" for field in ("name", "path", "train", "val", "test"))
PACK_TEXT = ("source", "out", "root", "csv.delimiter", "split.by", "columns.image", "columns.label", "columns.split")
FREE_TEXT = (
    *("data.cache_dir", "name", "runs_dir", "run", "model.name", "model.pretrained", "columns.caption"),
    *DATA_TEXT,
    *PACK_TEXT,
)
GROUPS = ("model", "data", "tune")
SWEEPER = "hydra.sweeper."  # begins the keys of its options
SWEEPERS = {"grid": config_module.GridConfig, "optuna": config_module.SearchConfig}
HYDRA_FLAGS = (
    "--cfg",
    "-c",
    "--package",
    "-p",
    "--config-dir",
    "-cd",
    "--config-name",
    "-cn",
    "--info",
    "-i",
)
"""Flags of Hydra that are followed by a word of their own."""


@dataclasses.dataclass(frozen=True)
class Option:
    key: str
    type: str
    default: str
    doc: str


def options_of(schema: type, prefix: str = "") -> Iterator[Option]:
    """Every option of the schema with the one line that documents it, in the order of the file."""
    docs = field_docs(schema)
    for field in dataclasses.fields(schema):
        hint = typing.get_type_hints(schema)[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from options_of(hint, f"{prefix}{field.name}.")
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        shown = "required" if default is dataclasses.MISSING else "null" if default is None else str(default)
        kind = "value" if hint is typing.Any else getattr(hint, "__name__", str(hint)).replace("None", "null")
        yield Option(prefix + field.name, kind, shown, docs[field.name])


@cache
def config_tree() -> ast.Module:
    return ast.parse(inspect.getsource(config_module))


def field_docs(schema: type) -> dict[str, str]:
    """The string below each field of a dataclass, which Python itself throws away."""
    body = next(
        node.body for node in config_tree().body if isinstance(node, ast.ClassDef) and node.name == schema.__name__
    )
    docs = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            docs[field.target.id] = str(text.value.value)
    return docs


def to_overrides(arguments: list[str], schema: type) -> list[str]:
    """Hydra overrides; raises ValueError for unknown keys and names with the closest ones, and for repeated keys."""
    keys = {option.key for option in options_of(schema)}
    groups = group_names(keys)
    multirun = is_multirun(arguments)
    overrides: list[str] = []
    seen: dict[str, str] = {}
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if is_flag(before, argument) or is_hydras(argument):
            overrides.append(argument)
            continue
        key, equals, value = argument.partition("=")
        check_key(argument, key, bool(equals), keys, groups)
        if key in seen:
            raise ValueError(repeated(key, seen[key], value))
        if not multirun and key not in FREE_TEXT and is_sweep(value) and not Path(value).exists():
            raise ValueError(f"{argument!r} has several values. Add -m to train with each (a list is written [A,B]).")
        seen[key] = value
        overrides += rewrite(key, value, sweeps=multirun and is_sweep(value))
    if seen.get("model.pretrained", "null") != "null":  # checked, and refused where the model brings its own weights
        overrides = [each for each in overrides if each != "model.pretrained=null"]
    if schema is config_module.Config and not seen.keys() & {"model", "data", "experiment", "data.path", "data.train"}:
        overrides.append("experiment=toy")
    return overrides


def group_names(keys: Iterable[str]) -> list[str]:
    """Folders of conf/ whose files may be named among the options, such as tune=lit."""
    keys = set(keys)
    groups = [group for group in GROUPS if any(key.startswith(f"{group}.") for key in keys)]
    return [*groups, *(["experiment"] if "train.epochs" in keys else [])]


def is_multirun(arguments: list[str]) -> bool:
    """Whether Hydra will read several configs in the arguments."""
    return any(argument in ("-m", "--multirun", "hydra.mode=MULTIRUN") for argument in arguments)


def split_flags(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Hydra's flags with their words, and the overrides, Hydra's own (hydra.key=value) among them."""
    flags: list[str] = []
    overrides: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        (flags if is_flag(before, argument) else overrides).append(argument)
    return flags, overrides


def is_flag(before: str, argument: str) -> bool:
    """Whether the argument that comes after `before` is a flag of Hydra or a flag's word."""
    return argument.startswith("-") or before in HYDRA_FLAGS


def is_hydras(override: str) -> bool:
    return override.startswith(("hydra.", "hydra/"))


def is_sweep(value: str) -> bool:
    """Whether Hydra reads several values in it, a,b or one of its functions; a list or a text is one value."""
    return value[:1] not in ("[", "{", "'", '"') and ("," in value or re.match(r"[a-z_]+\(", value) is not None)


def check_key(argument: str, key: str, has_value: bool, keys: set[str], groups: list[str]) -> None:
    known = [*keys, *groups]
    if key in known and has_value:
        return
    bare = key.lstrip("+~")
    # The right name in the wrong node comes before a name that is merely spelt alike.
    near = [name for name in known if name.split(".")[-1] == bare.split(".")[-1] != bare]
    near = near or [name for name in known if name.split(".")[-1] == bare]
    near = near or difflib.get_close_matches(bare, known, n=1, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else " --help lists all options."
    if not has_value and key in known:
        raise ValueError(f"{argument!r} has no value: options are written {key}=VALUE.")
    if not has_value:
        raise ValueError(f"{argument!r} has no value: options are written key=value.{hint}")
    raise ValueError(f"{key} is no option.{hint}")


def check_sweeper(arguments: list[str]) -> None:
    """Raises for a sweeper, or an option of it, that there is not."""
    given = {argument.partition("=")[0]: argument.partition("=")[2] for argument in arguments}
    name = given.get("hydra/sweeper", "grid")
    check_name("hydra/sweeper", name, list(SWEEPERS))
    keys = {each: [option.key for option in options_of(SWEEPERS[each], SWEEPER)] for each in SWEEPERS}
    for key in given:
        if not key.startswith(SWEEPER) or key in keys[name] or key.startswith(f"{SWEEPER}params."):
            continue
        if key in keys["optuna"]:
            raise ValueError(f"{key} belongs to a search: add hydra/sweeper=optuna.")
        names = [option.key for option in options_of(SWEEPERS[name])]
        near = difflib.get_close_matches(key.removeprefix(SWEEPER), names, n=1, cutoff=0.5)
        hint = f" Did you mean {SWEEPER}{near[0]}?" if near else f" There are: {', '.join(keys[name])}."
        raise ValueError(f"{key} is no option of hydra/sweeper={name}.{hint}")


def repeated(key: str, first: str, second: str) -> str:
    if not second.endswith(".tar"):
        return f"{key} is given twice ({first!r} and {second!r}). Give it once."
    return (
        f"{key} is given twice ({first!r} and {second!r}). That is what a shell makes of unquoted braces; "
        f"quote them: '{key}=\"shards/train-{{000..009}}.tar\"'"
    )


def rewrite(key: str, value: str, sweeps: bool) -> list[str]:
    if sweeps:
        return [f"{key}={value}"]
    if key == "model":
        return model_overrides(value)
    if key == "data" or key in DATA_TEXT:
        refuse_secrets(key, value)  # before anything shows the config
    if key == "data":
        return data_overrides(value)
    if key in ("tune", "experiment"):
        check_name(key, value, yaml_names(key))
    if key in FREE_TEXT:
        return [f"{key}={quoted(value)}"]
    return [f"{key}={value}"]


def quoted(value: str) -> str:
    """The value as a string of Hydra's grammar, which refuses {0..3}, inner =, leading ~, # and parentheses bare."""
    if value[:1] in ("'", '"', "[") or value == "null":
        return value
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def model_overrides(value: str) -> list[str]:
    value = value.strip("'\"")
    if value in yaml_names("model") or kind_of(value) == "architecture":
        if value in architecture_files():
            check_towers(value, architecture_cfg(value))
        return [f"model={value}"]
    return [f"model.name={quoted(value)}", "model.pretrained=null"]


def data_overrides(value: str) -> list[str]:
    value = value.strip("'\"")
    if is_remote(value):
        return [f"data.path={quoted(value)}"]
    if value in yaml_names("data"):
        return [f"data={value}"]
    path = data_folder(value)
    if path.is_dir():
        return [f"data.name={quoted(path.resolve().name)}", f"data.path={quoted(str(path))}"]
    packed = [shards.parent.name for shards in Path("data").glob("*/shards.json")]
    near = closest(value, [*yaml_names("data"), *packed])
    hint = f" Did you mean data={near}?" if near else ""
    raise ValueError(
        f"data={value} is neither conf/data/{value}.yaml nor a packed folder ({path}).{hint} "
        f"To make it: clipft data pack source=FOLDER out=data/{Path(value).name}"
    )


def check_name(key: str, value: str, names: list[str]) -> None:
    if value not in names:
        near = closest(value, names)
        hint = f" Did you mean {near}?" if near else ""
        raise ValueError(f"{key}={value} is unknown.{hint} There are: {', '.join(names)}.")


def explain(error: Exception) -> str:
    """The message; of Hydra and OmegaConf with the key it is about."""
    if type(error) is ValueError:
        return str(error)
    cause = error.__cause__ or error
    key = getattr(cause, "full_key", None) or ""
    text = str(getattr(cause, "msg", None) or cause).splitlines()[0]
    if key == "model.pretrained" and "mandatory" in text.lower():
        return (
            "model.pretrained is not set, and this architecture has no default weights here. Give one of its tags "
            "(model.pretrained=TAG), or model.pretrained=null to start from random weights."
        )
    if "mandatory" in text.lower():
        return f"{key} is required: give {key}=VALUE."
    return f"{key}: {text}" if key and key not in text else text
