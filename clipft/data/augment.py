"""RGB pixels of any size -> pixels of the model's size, by the evaluation's geometry or a random one."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor

from clipft.config import DataConfig

# data.augment -> crop_min, affine_degrees, flip_prob
PRESETS = {"none": (1.0, 0.0, 0.0), "light": (0.9, 0.0, 0.0), "strong": (0.9, 5.0, 0.5)}
RATIO = (3 / 4, 4 / 3)  # of torchvision's RandomResizedCrop, which open_clip keeps
CROP_TRIES = 10  # likewise


@dataclass(frozen=True)
class Augment:
    """How pixels are brought to the model's size; crop_min 1 is the evaluation's geometry (resize_mode)."""

    size: int
    crop_min: float
    affine_degrees: float
    flip_prob: float
    interpolation: str
    resize_mode: str
    fill: tuple[int, int, int]

    @property
    def is_random(self) -> bool:
        """Whether an image comes out otherwise another time."""
        return self.crop_min < 1 or self.affine_degrees > 0 or self.flip_prob > 0


@dataclass(frozen=True)
class Box:
    top: int
    left: int
    height: int
    width: int


def build_augment(config: DataConfig, preprocess: dict[str, Any]) -> Augment:
    """The preset of data.augment with what data.* overrides; geometry as the model's preprocess says."""
    crop_min, degrees, flip = PRESETS[config.augment]
    return Augment(
        size=square_side(preprocess["size"]),
        crop_min=crop_min if config.crop_min is None else config.crop_min,
        affine_degrees=degrees if config.affine_degrees is None else config.affine_degrees,
        flip_prob=flip if config.flip_prob is None else config.flip_prob,
        # "random" is for open_clip's training transform only; its evaluation takes bicubic then.
        interpolation="bilinear" if preprocess.get("interpolation") == "bilinear" else "bicubic",
        resize_mode=preprocess.get("resize_mode") or "shortest",
        fill=as_colour(preprocess.get("fill_color", 0)),
    )


def square_side(size: int | list | tuple) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) > 1:
        raise ValueError(f"model.name: its image size {size!r} is not square. Use a model with square images.")
    return int(sides.pop())


def as_colour(fill: int | list | tuple) -> tuple[int, int, int]:
    red, green, blue = (fill,) * 3 if isinstance(fill, int) else fill
    return int(red), int(green), int(blue)


def apply_augment(
    augment: Augment, pixels: UInt8[np.ndarray, "H W 3"], rng: np.random.Generator
) -> UInt8[Tensor, "3 S S"]:
    """Crop and resize, then affine, then flip; draws from rng in this order and only where switched on."""
    if augment.crop_min < 1:
        height, width = pixels.shape[:2]
        box = random_crop_box(height, width, augment.crop_min, rng)
        crop = pixels[box.top : box.top + box.height, box.left : box.left + box.width]
        image = resize(crop, augment.size, augment.size, augment.interpolation)
    else:
        image = fit(augment, pixels)
    if augment.affine_degrees > 0:
        image = random_affine(image, augment.affine_degrees, rng)
    if augment.flip_prob > 0 and rng.random() < augment.flip_prob:
        image = image.flip(2)
    return image.contiguous()


def random_crop_box(height: int, width: int, crop_min: float, rng: np.random.Generator) -> Box:
    """A box distributed like that of torchvision's RandomResizedCrop(scale=(crop_min, 1))."""
    for _ in range(CROP_TRIES):
        area = height * width * rng.uniform(crop_min, 1.0)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w)
    w = max(1, min(width, round(height * RATIO[1])))
    h = max(1, min(height, round(width / RATIO[0])))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def resize(pixels: UInt8[np.ndarray, "H W 3"], height: int, width: int, interpolation: str) -> UInt8[Tensor, "3 h w"]:
    """Antialiased resize in uint8, Pillow's algorithm with vector code (4 to 7 times as fast per core).

    Measured on random crops of photos: within 2 of 255 of Pillow, the horizontal pass first. Pillow 13 takes
    the vertical pass first on tall crops; the clipping between the passes then moves under 0.1 % of the
    values by more, up to 8.
    """
    source = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    return F.interpolate(source, size=(height, width), mode=interpolation, antialias=True)[0]


def fit(augment: Augment, pixels: UInt8[np.ndarray, "H W 3"]) -> UInt8[Tensor, "3 S S"]:
    """The geometry of open_clip's evaluation transform for this resize_mode."""
    side, mode = augment.size, augment.interpolation
    height, width = pixels.shape[:2]
    if augment.resize_mode == "squash":
        return resize(pixels, side, side, mode)
    if augment.resize_mode == "longest":
        ratio = max(height, width) / side
        return pad(resize(pixels, max(1, round(height / ratio)), max(1, round(width / ratio)), mode), augment)
    short = min(height, width)
    image = resize(pixels, side * height // short, side * width // short, mode)
    top, left = round((image.shape[1] - side) / 2), round((image.shape[2] - side) / 2)
    return image[:, top : top + side, left : left + side]


def pad(image: UInt8[Tensor, "3 h w"], augment: Augment) -> UInt8[Tensor, "3 S S"]:
    """The image in the middle of a square of the fill colour."""
    height, width = image.shape[1:]
    top, left = (augment.size - height) // 2, (augment.size - width) // 2
    square = torch.tensor(augment.fill, dtype=torch.uint8)[:, None, None].repeat(1, augment.size, augment.size)
    square[:, top : top + height, left : left + width] = image
    return square


def random_affine(image: UInt8[Tensor, "3 S S"], degrees: float, rng: np.random.Generator) -> UInt8[Tensor, "3 S S"]:
    """Rotated and sheared about the centre, each by up to so many degrees; corners mirror the image."""
    angle, shear = np.radians(rng.uniform(-degrees, degrees, size=2))
    cos, sin, slant = math.cos(angle), math.sin(angle), math.tan(shear)
    matrix = torch.tensor([[[cos, cos * slant - sin, 0.0], [sin, sin * slant + cos, 0.0]]])
    grid = F.affine_grid(matrix, [1, *image.shape], align_corners=False)
    moved = F.grid_sample(image[None].float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return moved[0].round().clamp(0, 255).to(torch.uint8)
