"""What `clipft models` prints."""

from clipft.model.names import architecture_cfg, architecture_names, closest, tags_of
from clipft.model.towers import status

WIDTH = 36  # of the longest names


def list_models(words: list[str]) -> str:
    """A line per architecture whose name or tags hold all the words: name, tags of its weights, what keeps it away."""
    lines = {name: line_of(name) for name in architecture_names()}
    found = [line for line in lines.values() if all(word.lower() in line.lower() for word in words)]
    if not found:
        near = closest(" ".join(words), list(lines))
        raise ValueError(f"no architecture or tag has {' and '.join(words)}. {f'Did you mean {near}?' if near else ''}")
    return "\n".join([f"{'model':{WIDTH}}  model.pretrained", *found])


def line_of(name: str) -> str:
    obstacle = status(architecture_cfg(name))
    tags = ", ".join(tags_of(name)) or "no tags"
    return f"{name:{WIDTH}}  {f'[{obstacle}] ' if obstacle else ''}{tags}"
