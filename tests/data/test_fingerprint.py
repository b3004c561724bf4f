"""What is seen of an image: usable or not, its bytes, its looks."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from clipft.data.alike import near_pairs
from clipft.data.fingerprint import KINDS, REASONS, look_at_image, look_at_images


def scene(seed: int, size: tuple[int, int] = (320, 240)) -> Image.Image:
    """Shapes on a ground, as a photo has large parts and edges."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(rng.integers(0, 256, 3).tolist()))
    canvas = ImageDraw.Draw(image)
    for _ in range(25):
        x, y = rng.integers(-40, size[0]), rng.integers(-40, size[1])
        box = [int(x), int(y), int(x + rng.integers(20, 160)), int(y + rng.integers(20, 160))]
        canvas.ellipse(box, fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def look_same(*raws: bytes) -> bool:
    """Whether every one of the files looks like the first."""
    seen = look_at_images(raws, None, True)
    pairs = {(a, b) for a, b in near_pairs(seen["hash"], seen["colours"]).tolist()}
    return bool(seen["hashed"].all()) and all((0, i) in pairs for i in range(1, len(raws)))


@pytest.mark.parametrize("seed", range(8))
def test_a_picture_saved_again_in_other_ways_looks_the_same(seed: int):
    image = scene(seed)
    others = [
        encode(image, quality=40),
        encode(image, "PNG"),
        encode(image, "WEBP", quality=60),
        encode(image.resize((160, 120)), quality=85),
        encode(image.resize((960, 720)), quality=85),
        encode(image.resize((224, 224)), quality=85),
    ]
    assert look_same(encode(image, quality=95), *others)


def test_other_pictures_do_not_look_the_same():
    seen = look_at_images([encode(scene(seed)) for seed in range(60)], None, True)
    assert len(near_pairs(seen["hash"], seen["colours"])) == 0
    mirrored = scene(1).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert not look_same(encode(scene(1)), encode(mirrored))


def test_the_same_shape_in_another_colour_does_not_look_the_same():
    hearts = []
    for colour in ("#d01010", "#1010d0"):
        image = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(image).ellipse([12, 12, 52, 52], fill=colour)
        hearts.append(encode(image, "PNG"))
    assert not look_same(*hearts)


def test_flat_pictures_look_like_no_other():
    """Their hash would be that of noise: all lakes would be one lake."""
    rng = np.random.default_rng(0)
    raws = [encode(Image.fromarray((90 + rng.normal(0, 3, (64, 64, 3))).astype(np.uint8))) for _ in range(5)]
    seen = look_at_images(raws, None, True)
    assert not seen["hashed"].any() and len(set(seen["digest"].tolist())) == 5 and not seen["reason"].any()


def test_a_picture_is_seen_upright():
    image = scene(3)
    turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right to see it upright
    assert look_same(encode(image), encode(turned, exif=exif))
    assert not look_same(encode(image), encode(turned))


def test_a_picture_that_is_cut_off_can_be_packed_and_looks_like_nothing(tmp_path: Path):
    raw = encode(scene(2), "PNG")
    seen = look_at_images([raw, raw[: len(raw) // 2], raw[:20], b""], None, True)
    reasons = [REASONS[n - 1] if n else None for n in seen["reason"].tolist()]
    assert reasons == [None, None, "image_header_damaged", "image_empty"]
    assert seen["hashed"].tolist() == [True, False, False, False]


@pytest.mark.parametrize("deep", [False, True])
def test_looking_at_the_header_alone_finds_the_same_reasons_and_kinds(tmp_path: Path, deep: bool):
    raws = {"a": encode(scene(0), "PNG"), "b": encode(scene(0)), "c": b"text", "d": b"", "e": encode(scene(0))[:10]}
    for name, raw in raws.items():
        (tmp_path / name).write_bytes(raw)
    seen = [look_at_image(str(tmp_path / name), str(tmp_path), deep) for name in (*raws, "gone")]
    assert [KINDS[each["kind"]] for each in seen[:2]] == ["png", "jpg"]
    reasons = [REASONS[each["reason"] - 1] if each["reason"] else None for each in seen]
    assert reasons == [None, None, "format_not_allowed", "image_empty", "image_header_damaged", "image_missing"]
