"""The tensors of a TorchScript archive, such as OpenAI published; no code in it is compiled, imported or called.

The archive (a zip file) holds the module tree as a program for pickle's stack machine, in data.pkl, and the bytes of
each tensor in data/<number>. The program is interpreted here, for the few instructions that torch.jit.save writes;
what a name in it stands for is decided by this file alone.
"""

import math
import pickletools
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
REBUILD = "torch._utils._rebuild_tensor_v2"
ORDERED = "collections.OrderedDict"
TAGGED = "torch.jit._pickle.restore_type_tag"
LISTS = {f"torch.jit._pickle.build_{kind}list" for kind in ("int", "double", "bool", "tensor")}
MODULE = "__torch__."  # begins the names of the classes that the archive itself defines
CONSTANTS = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
    "EMPTY_TUPLE": (),
}
LITERALS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE")
MOST_VALUES = 100_000  # a module may stand in many places, and such nesting grows without end
FIXED_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class Global:
    """A name that the program mentions; it stands for nothing but itself."""

    name: str


class Module(dict[str, Any]):
    """Attributes of a module by name."""


class Unexpected(Exception):
    """Something that an archive of weights does not need."""


class Mark:
    """Where the arguments of an instruction begin on the stack."""


def read_torchscript(path: Path) -> dict[str, Any]:
    """Tensors and numbers of all modules under their dotted names; raises ValueError for anything unexpected."""
    try:
        with zipfile.ZipFile(path) as archive:
            root = next(name for name in archive.namelist() if name.partition("/")[2] == "data.pkl")
            storages = Storages(archive, root.removesuffix("data.pkl"))
            tree = interpret(archive.read(root), storages)
        if not isinstance(tree, Module):
            raise Unexpected("its root is no module")
        return dict(flatten(tree))
    except (OSError, MemoryError):  # about this machine, now; not about the file
        raise
    except Exception as error:  # of pickletools, zipfile and torch, by what is wrong with the file
        what = str(error) if isinstance(error, Unexpected) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{path} is a TorchScript archive that clipft does not read: {what}. {convert(path)}"
        ) from error


def convert(path: Path) -> str:
    """How to make safetensors of it where the file can be trusted."""
    return (
        'Where you trust the file, convert it: python -c "import torch; from safetensors.torch import save_file; '
        f"state = torch.jit.load('{path}', map_location='cpu').state_dict(); "
        "save_file({name: value.clone() for name, value in state.items()}, 'weights.safetensors')\""
    )


class Storages:
    """The bytes of the archive's tensors."""

    def __init__(self, archive: zipfile.ZipFile, root: str):
        self.archive, self.root = archive, root
        self.read: dict[str, Tensor] = {}
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise Unexpected("its numbers are big-endian")

    def __getitem__(self, asked: Any) -> Tensor:
        """The storage that a persistent id names, as one flat tensor."""
        word, kind, key, _device, length = asked
        if word != "storage" or not isinstance(kind, Global) or not kind.name.startswith("torch."):
            raise Unexpected(f"it asks for {asked!r}")
        if key not in self.read:
            dtype = DTYPES.get(kind.name.removeprefix("torch."))
            info = self.archive.getinfo(f"{self.root}data/{key}")
            if dtype is None or info.compress_type != zipfile.ZIP_STORED or info.file_size != length * dtype.itemsize:
                raise Unexpected(f"tensor {key} ({kind.name}, {length} numbers, {info.file_size} bytes)")
            raw = bytearray(self.archive.read(info))
            self.read[key] = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        return self.read[key]


def interpret(program: bytes, storages: Storages) -> Any:
    """What the program leaves on its stack."""
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    for instruction, argument, _ in pickletools.genops(program):
        name = instruction.name
        if name == "STOP":
            return stack.pop()
        if name == "PROTO":
            continue
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in LITERALS:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        else:
            execute(name, argument, stack, storages)
    raise Unexpected("its program has no end")


def execute(name: str, argument: Any, stack: list[Any], storages: Storages) -> None:
    """One instruction that makes, fills or names something."""
    if name == "MARK":
        stack.append(Mark)
    elif name == "EMPTY_DICT":
        stack.append({})
    elif name == "EMPTY_LIST":
        stack.append([])
    elif name == "GLOBAL":
        stack.append(Global(".".join(argument.split(" "))))
    elif name == "TUPLE":
        stack.append(tuple(since_mark(stack)))
    elif name in FIXED_TUPLES:
        stack[-FIXED_TUPLES[name] :] = [tuple(stack[-FIXED_TUPLES[name] :])]
    elif name in ("SETITEM", "SETITEMS"):
        items = since_mark(stack) if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
        stack[-1].update(zip(items[::2], items[1::2], strict=True))
    elif name in ("APPEND", "APPENDS"):
        values = since_mark(stack) if name == "APPENDS" else [stack.pop()]
        stack[-1].extend(values)
    elif name == "BINPERSID":
        stack.append(storages[stack.pop()])
    elif name in ("NEWOBJ", "REDUCE"):
        arguments, callee = stack.pop(), stack.pop()
        stack.append((new_module if name == "NEWOBJ" else call)(callee, arguments))
    elif name == "BUILD":
        attributes = stack.pop()
        if not isinstance(stack[-1], Module) or not isinstance(attributes, dict):
            raise Unexpected(f"it sets attributes of {type(stack[-1]).__name__}")
        stack[-1].update(attributes)
    else:
        raise Unexpected(f"its program has the instruction {name}")


def since_mark(stack: list[Any]) -> list[Any]:
    """The values after the last mark; all of it leaves the stack."""
    start = max((place for place, value in enumerate(stack) if value is Mark), default=None)
    if start is None:
        raise Unexpected("its program misses a mark")
    values = stack[start + 1 :]
    del stack[start:]
    return values


def new_module(callee: Any, arguments: Any) -> Module:
    if not isinstance(callee, Global) or not callee.name.startswith(MODULE) or arguments != ():
        raise Unexpected(f"it makes an object of {callee!r}")
    return Module()


def call(callee: Any, arguments: Any) -> Any:
    """What the few functions that torch.jit.save needs would return."""
    name = callee.name if isinstance(callee, Global) else None
    if name == REBUILD:
        return rebuild(*arguments)
    if name == ORDERED and arguments == ():
        return {}
    if name in LISTS:
        return list(arguments[0])
    if name == TAGGED:  # a list or dict with the name of its type
        return arguments[0]
    raise Unexpected(f"it calls {name or callee!r}")


def rebuild(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], _requires_grad: bool, _hooks: Any
) -> Tensor:
    """A view of the storage; torch itself raises where it would reach beyond."""
    if math.prod(size) > storage.numel():
        raise Unexpected(f"a tensor of {size} shows its {storage.numel()} numbers more than once")
    return torch.as_strided(storage, size, stride, offset)


def flatten(module: Module, prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in module.items():
        if isinstance(value, Module):
            found += flatten(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor | int | float) and not isinstance(value, bool):
            found.append((prefix + name, value))
        elif not isinstance(value, bool | str | list | tuple | dict | None):
            raise Unexpected(f"{prefix}{name} is a {type(value).__name__}")
        if len(found) > MOST_VALUES:
            raise Unexpected(f"it has more than {MOST_VALUES:,} values")
    return found
