"""Tensors in nested dicts, lists and tuples."""

from typing import Any

from torch import Tensor


def size_of(node: Any) -> int:
    """Bytes of all tensors in nested containers."""
    if isinstance(node, Tensor):
        return node.nbytes
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple) else ()
    return sum(size_of(child) for child in children)


def copied(node: Any) -> Any:
    """The same nested dicts and lists with copies of the tensors in host memory."""
    if isinstance(node, Tensor):
        return node.detach().to("cpu", copy=True)
    if isinstance(node, dict):
        return {key: copied(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(copied(value) for value in node)
    return node
