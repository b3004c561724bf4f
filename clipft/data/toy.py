"""Drawn scenes of coloured shapes with captions, packed like any other set: data for a first run."""

import math
from dataclasses import dataclass
from io import BytesIO
from itertools import combinations, product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from clipft.data.manifest import MANIFEST
from clipft.data.pack import write_set
from clipft.data.sources.row import Row, columns_json

SIZE = 64  # px
SUPERSAMPLE = 4  # for smooth edges
NUM_TRAIN, NUM_HELD_OUT = 4000, 300
NUM_PAIRS = 90
SHARD_SAMPLES = 1000
SEED = 0

Colour = tuple[int, int, int]
COLOURS: dict[str, Colour] = {
    "red": (215, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 80, 215),
    "yellow": (240, 205, 40),
    "purple": (140, 60, 170),
    "orange": (245, 135, 30),
    "cyan": (60, 205, 215),
}
GROUNDS: dict[str, Colour] = {"white": (245, 245, 245), "black": (20, 20, 20), "gray": (128, 128, 128)}
RADII = {"small": 13.0, "large": 21.5}
PAIR_SHAPES = ("disc", "cross", "ring")  # plain ones: beside each other they are small
RELATIONS = ("left of", "above")


def regular(corners: int, radius: float, turn: float) -> list[tuple[float, float]]:
    """Corners as (radius, angle), the first one at `turn`."""
    return [(radius, turn + 2 * math.pi * i / corners) for i in range(corners)]


def cross(arm: float, half: float) -> list[tuple[float, float]]:
    quarter = [(half, half), (half, arm), (-half, arm)]
    corners = []
    for _ in range(4):
        corners += quarter
        quarter = [(-y, x) for x, y in quarter]
    return [(math.hypot(x, y), math.atan2(y, x)) for x, y in corners]


# Corners in units of the radius that a scene gives; the factors make all shapes look equally large.
SHAPES = {
    "disc": regular(48, 1.05, 0.0),
    "triangle": regular(3, 1.3, -math.pi / 2),
    "cross": cross(1.2, 0.3),
    "ring": regular(48, 1.05, 0.0),
}
HOLE = 0.67  # of a ring, in the same unit


@dataclass(frozen=True)
class Thing:
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One thing of a size on a background, or two things in a relation on any background."""

    things: tuple[Thing, ...]
    size: str | None = None
    ground: str | None = None
    relation: str | None = None

    @property
    def caption(self) -> str:
        if self.relation is None:
            return f"a {self.size} {self.things[0]} on a {self.ground} background"
        return f"a {self.things[0]} {self.relation} a {self.things[1]}"

    @property
    def label(self) -> str | None:
        """The class of a scene with one thing."""
        return str(self.things[0]) if self.relation is None else None


TEMPLATES = [f"a {size} {{c}} on a {ground} background" for size, ground in product(RADII, GROUNDS)]


def make_toy(out: Path) -> None:
    """Draw and pack the toy set into out, which appears in one move; nothing happens where it is already."""
    if not (out / MANIFEST).is_file():
        write_set(str(out), draw_rows(), "jpg", SHARD_SAMPLES, TEMPLATES)


def draw_rows() -> list[Row]:
    """All samples of the set; the same on every call."""
    rng = np.random.default_rng(SEED)
    scenes = all_scenes(rng)
    # Held-out images have different captions each, so that every query has one answer.
    held_out = {split: rng.permutation(len(scenes))[:NUM_HELD_OUT] for split in ("val", "test")}
    parts = {"train": np.arange(NUM_TRAIN) % len(scenes), **held_out}
    return [
        draw_row(scenes[number], f"{split}-{i:04d}", split, rng)
        for split, numbers in parts.items()
        for i, number in enumerate(numbers)
    ]


def draw_row(scene: Scene, key: str, split: str, rng: np.random.Generator) -> Row:
    file = BytesIO()
    draw(scene, rng).save(file, "JPEG", quality=95, subsampling=0)
    return Row(
        where=[],
        image=file.getvalue(),
        captions=[scene.caption],
        label=scene.label,
        split=split,
        rest=columns_json({"label": scene.label, "split": split}, [scene.caption]),
        key=key,
    )


def all_scenes(rng: np.random.Generator) -> list[Scene]:
    """All scenes with one thing and, for some pairs of things, one beside and one above the other."""
    single = [
        Scene(things=(Thing(colour, shape),), size=size, ground=ground)
        for size, colour, shape, ground in product(RADII, COLOURS, SHAPES, GROUNDS)
    ]
    things = [Thing(*thing) for thing in product(COLOURS, PAIR_SHAPES)]
    pairs = [two for two in combinations(things, 2) if two[0].colour != two[1].colour]
    chosen = [pairs[i] for i in rng.permutation(len(pairs))[:NUM_PAIRS]]
    in_order = [two if rng.random() < 0.5 else two[::-1] for two in chosen]
    return single + [Scene(things=two, relation=relation) for two in in_order for relation in RELATIONS]


def draw(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """One picture of the scene; place, size, rotation and colours are jittered, pixels are noisy."""
    ground = scene.ground or str(rng.choice(list(GROUNDS)))
    side = SIZE * SUPERSAMPLE
    behind = jitter(GROUNDS[ground], rng)
    image = Image.new("RGB", (side, side), behind)
    canvas = ImageDraw.Draw(image)
    for thing, (x, y, radius) in zip(scene.things, places(scene, rng), strict=True):
        turn = rng.uniform(-math.pi / 12, math.pi / 12)
        corners = [
            (
                SUPERSAMPLE * (x + radius * r * math.cos(angle + turn)),
                SUPERSAMPLE * (y + radius * r * math.sin(angle + turn)),
            )
            for r, angle in SHAPES[thing.shape]
        ]
        canvas.polygon(corners, fill=jitter(COLOURS[thing.colour], rng))
        if thing.shape == "ring":
            canvas.circle((SUPERSAMPLE * x, SUPERSAMPLE * y), SUPERSAMPLE * radius * HOLE, fill=behind)
    pixels = np.asarray(image.reduce(SUPERSAMPLE), np.float32)
    noise = 4 * rng.standard_normal(pixels.shape, np.float32)
    return Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))


def places(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Centre and radius of each thing, inside the picture and apart from each other."""
    if scene.size is not None:
        radius = RADII[scene.size] * rng.uniform(0.9, 1.05)
        x, y = rng.uniform(1.3 * radius, SIZE - 1.3 * radius, size=2)
        return [(x, y, radius)]
    spots = []
    for low, high in ((14, 18), (46, 50)):
        along, across, radius = rng.uniform(low, high), 32 + rng.uniform(-9, 9), rng.uniform(11, 13)
        spots.append((along, across, radius) if scene.relation == "left of" else (across, along, radius))
    return spots


def jitter(colour: Colour, rng: np.random.Generator) -> Colour:
    red, green, blue = np.clip(np.add(colour, rng.normal(0, 10, size=3)), 0, 255).astype(int).tolist()
    return red, green, blue
