from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from clipft.model.build import build
from clipft.model.encode import encode_image
from clipft.ship.folder import cause_of, explain, export_folder, staged

MICRO = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 16, "width": 16, "heads": 2, "layers": 2},
    "quick_gelu": True,
}
CAPTIONS = ["a red circle", "two dogs run over wet grass"]


def encoded(image: Image.Image, **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def picture(mode="RGB") -> Image.Image:
    """Dark top left, bright bottom right: other features when turned."""
    ramp = np.linspace(0, 255, 48)[:, None] * np.linspace(0, 1, 40)[None, :]
    image = Image.fromarray(np.stack([ramp, ramp[::-1], 255 - ramp], axis=-1).astype(np.uint8))
    return image.convert(mode)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(), format="JPEG", exif=exif)


def see_through() -> bytes:
    image = picture()
    image.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 40), (48, 1)).astype(np.uint8)))
    return encoded(image, format="PNG")


def as_measured(clip, raw: bytes) -> torch.Tensor:
    image = ImageOps.exif_transpose(Image.open(BytesIO(raw))).convert("RGBA")
    on_white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    with torch.no_grad():
        return encode_image(clip.model.eval(), clip.preprocess(on_white)[None])[0]


def micro():
    torch.manual_seed(0)
    clip = build("micro", MICRO, {"mean": [0.5] * 3, "std": [0.25] * 3, "resize_mode": "squash"})
    with torch.no_grad():  # random features hardly depend on the image
        clip.model.visual.conv1.weight.mul_(20)
    return clip


@pytest.mark.process
def test_an_export_is_what_plain_open_clip_computes_and_causes_of_other_pixels_are_named(tmp_path):
    clip = micro()
    files = [
        ("a/plain", encoded(picture(), format="PNG")),
        ("a/turned", rotated()),
        ("a/alpha", see_through()),
    ]
    ours = torch.stack([as_measured(clip, raw) for _, raw in files])
    out = tmp_path / "with space" / "export"
    reloaded = export_folder(
        clip, out, files=files, ours=ours, captions=CAPTIONS, card=lambda check: f"{len(check.causes)} causes"
    )
    assert reloaded.difference <= 1e-5
    assert reloaded.cosine[0] > 0.9999
    assert set(reloaded.causes) == {"a/turned", "a/alpha"}
    assert "EXIF orientation 6" in reloaded.causes["a/turned"]
    assert "transparency" in reloaded.causes["a/alpha"]
    assert reloaded.text.shape == (2, 24)
    assert (out / "README.md").read_text() == "2 causes"
    assert [path.name for path in out.parent.iterdir()] == ["export"]


@pytest.mark.process
def test_an_export_that_lost_its_activation_is_refused_and_leaves_nothing(tmp_path):
    clip = micro()
    del clip.model_cfg["quick_gelu"]
    with pytest.raises(RuntimeError, match="export is wrong: for the same inputs"):
        export_folder(clip, tmp_path / "export", files=[], ours=torch.zeros(0, 24), captions=[], card=lambda check: "")
    assert list(tmp_path.iterdir()) == []


def test_a_finished_folder_takes_the_place_of_the_former_one(tmp_path):
    out = tmp_path / "export"
    for content in ("first", "second"):
        with staged(out) as folder:
            (folder / "file").write_text(content)
    assert (out / "file").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_failing_block_leaves_the_former_folder_as_it_was(tmp_path):
    out = tmp_path / "export"
    out.mkdir()
    (out / "old").write_text("kept")
    with pytest.raises(RuntimeError), staged(out) as folder:
        (folder / "new").write_text("half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert (out / "old").read_text() == "kept"


def test_a_folder_that_is_no_export_is_never_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else than an export"):
        export_folder(micro(), tmp_path, files=[], ours=torch.zeros(0, 24), captions=[], card=lambda check: "")
    assert (tmp_path / "thesis.txt").exists()


def test_another_feature_of_an_ordinary_file_is_an_error_and_not_a_footnote():
    files = [("a/1", encoded(picture(), format="JPEG"))]
    assert explain(files, torch.tensor([0.9995]), {}) == {}
    with pytest.raises(RuntimeError, match=r"a/1 has cosine 0\.9000"):
        explain(files, torch.tensor([0.9]), {})
    assert explain(files, torch.tensor([0.0]), {"0": "plain Pillow cannot open it"}) == {
        "a/1": "plain Pillow cannot open it"
    }


@pytest.mark.parametrize(
    ("raw", "cause"),
    [
        (encoded(picture("CMYK"), format="JPEG"), "pixel format CMYK"),
        (encoded(picture("LA"), format="PNG"), "transparency"),
        (encoded(Image.fromarray(np.full((4, 4), 40_000, np.uint16)), format="PNG"), "pixel format I;16"),
        (encoded(picture("L"), format="PNG"), ""),
        (encoded(picture("P"), format="PNG"), ""),
    ],
)
def test_pixel_formats_that_plain_pillow_reads_otherwise_are_causes(raw, cause):
    assert cause_of(raw).startswith(cause)
    assert bool(cause_of(raw)) == bool(cause)
