"""What the model that a set is for makes of a picture and a caption."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Reader:
    """Sent to other processes, so `count` must be picklable."""

    name: str
    image_size: int
    """Side of its images in pixels."""
    context_length: int
    """The most tokens of a caption, start and end included."""
    count: Callable[[list[str]], list[int]]
    """Tokens of each caption, start and end included and nothing cut."""
    english: bool
    """Whether its tokenizer is CLIP's own, whose words are English."""
