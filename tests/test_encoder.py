import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small import MODEL_CFG, make_model
from torch.testing import assert_close

import clipft
from clipft.encoder import Encoder
from clipft.model.build import build

CAPTIONS = ["a red dog", "two blue birds over a lake", "green", "word " * 40, "<end_of_text> a cat"]


def picture(seed: int, mode: str = "RGB") -> Image.Image:
    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, 256, (4, 5, 4 if mode == "RGBA" else 3), np.uint8)
    return Image.fromarray(coarse.repeat(8, axis=0).repeat(8, axis=1), mode)


PICTURES = [picture(i) for i in range(7)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("encoder") / "model")


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return clipft.load(folder, device="cpu")


@pytest.mark.process
def test_the_package_is_imported_without_torch():
    code = "import sys, clipft; assert callable(clipft.load) and not {'torch', 'open_clip'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def by_open_clip(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit features by open_clip's own functions, one at a time."""
    import open_clip

    name = f"local-dir:{folder}"
    parts: Any = open_clip.create_model_and_transforms(name, require_pretrained=True)
    model, preprocess, tokenize = parts[0].eval(), parts[2], open_clip.get_tokenizer(name)
    with torch.no_grad():
        images = [model.encode_image(preprocess(each)[None], normalize=True)[0] for each in PICTURES]
        texts = [model.encode_text(tokenize([each]), normalize=True)[0] for each in CAPTIONS[:4]]
    return torch.stack(images), torch.stack(texts)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_features_are_those_of_open_clip_at_any_batch_size(folder: Path, encoder: Encoder, batch_size: int):
    image, text = by_open_clip(folder)
    assert_close(encoder.encode_image(PICTURES, batch_size), image, atol=1e-5, rtol=0)
    assert_close(encoder.encode_text(CAPTIONS[:4], batch_size), text, atol=1e-5, rtol=0)
    assert_close(encoder.encode_text(CAPTIONS, batch_size).norm(dim=-1), torch.ones(5))


def test_a_list_without_items_gives_no_rows(encoder: Encoder):
    assert encoder.encode_image([]).shape == encoder.encode_text([]).shape == (0, 16)


def test_a_path_a_picture_and_its_pixels_give_the_same_features(encoder: Encoder, tmp_path: Path):
    paths = [tmp_path / f"{i}.png" for i in range(len(PICTURES))]
    for path, each in zip(paths, PICTURES, strict=True):
        each.save(path)
    expected = encoder.encode_image(PICTURES)
    pixels = torch.stack([encoder.preprocess(each) for each in PICTURES])
    for images in (paths, [str(path) for path in paths], pixels, list(pixels)):
        assert torch.equal(encoder.encode_image(images), expected)


def test_transparency_lies_on_white_and_orientation_is_applied_in_any_form(encoder: Encoder, tmp_path: Path):
    clear = picture(1, "RGBA")
    white = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    clear.save(tmp_path / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = BytesIO()
    PICTURES[0].save(raw, "PNG", exif=exif)
    turned = PICTURES[0].transpose(Image.Transpose.ROTATE_270)
    found = encoder.encode_image([clear, tmp_path / "clear.png", Image.open(raw)])
    assert_close(found, encoder.encode_image([white, white, turned]), atol=2e-3, rtol=0)
    assert not torch.allclose(found[2], encoder.encode_image(PICTURES[:1])[0], atol=1e-2)


def test_what_cannot_be_read_is_named(encoder: Encoder, tmp_path: Path):
    (tmp_path / "page.jpg").write_text("<html>")
    with pytest.raises(ValueError, match=r"page\.jpg cannot be used: format_not_allowed"):
        encoder.encode_image([tmp_path / "page.jpg"])
    with pytest.raises(ValueError, match=r"none\.jpg cannot be read: No such file"):
        encoder.encode_image([tmp_path / "none.jpg"])
    raw = BytesIO()
    picture(0).resize((300, 300)).save(raw, "JPEG")
    with pytest.raises(ValueError, match="an image cannot be read"):
        encoder.encode_image([Image.open(BytesIO(raw.getvalue()[:2000]))])


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 15, 16), torch.zeros(2, 3, 16, 16, dtype=torch.uint8)])
def test_tensors_that_are_no_preprocessed_pixels_are_refused(encoder: Encoder, images: torch.Tensor):
    with pytest.raises(ValueError, match=r"must be float \[3, 16, 16\]"):
        encoder.encode_image(images)


def test_a_single_item_is_refused_where_a_list_is_meant(encoder: Encoder):
    with pytest.raises(ValueError, match=r"texts must be a list: write \[text\]"):
        encoder.encode_text("a dog")
    for image in ("a.jpg", torch.zeros(3, 16, 16)):
        with pytest.raises(ValueError, match="images must be a list"):
            encoder.encode_image(image)
    with pytest.raises(ValueError, match="batch_size=0"):
        encoder.encode_text(["a"], batch_size=0)


def test_names_of_special_tokens_in_a_text_are_words(encoder: Encoder):
    tokens = encoder.tokenize(["<end_of_text> a cat"])[0].tolist()
    assert tokens.count(49407) == 1 and tokens.index(49407) > 4


def test_scores_are_cosines_of_each_image_and_its_text(encoder: Encoder):
    images, texts = PICTURES[:4], CAPTIONS[:4]
    expected = [
        float(encoder.encode_image([image])[0] @ encoder.encode_text([text])[0])
        for image, text in zip(images, texts, strict=True)
    ]
    assert_close(encoder.score(images, texts), torch.tensor(expected))


def test_clipscore_weighs_the_positive_part_of_the_cosine_to_the_prefixed_text(encoder: Encoder):
    images, texts = PICTURES[:4], CAPTIONS[:4]
    prefixed = [f"A photo depicts {text}" for text in texts]
    cosine = encoder.score(images, prefixed)
    assert (cosine < 0).any() and (cosine > 0).any()
    expected = [2.5 * max(float(each), 0.0) for each in cosine]
    assert_close(encoder.score(images, texts, kind="clipscore"), torch.tensor(expected))


def test_scores_need_a_text_for_each_image_and_a_known_kind(encoder: Encoder):
    with pytest.raises(ValueError, match="2 images and 1 texts"):
        encoder.score(PICTURES[:2], ["a"])
    with pytest.raises(ValueError, match="kind='bleu' is unknown"):
        encoder.score(PICTURES[:1], ["a"], kind="bleu")


def test_classes_have_the_softmax_of_scaled_cosines_to_the_mean_of_their_prompts(encoder: Encoder):
    names, templates = ["dog", "cat", "two {birds}"], ["a {c}.", "a photo of a {c}, a type of {c}."]
    found = encoder.classify(PICTURES, names, templates)
    for row, image in zip(found, encoder.encode_image(PICTURES), strict=True):
        logits = []
        for name in names:
            prompts = [encoder.encode_text([each.replace("{c}", name)])[0] for each in templates]
            mean = (prompts[0] + prompts[1]) / 2
            logits.append(float(encoder.clip.model.logit_scale.exp() * image @ mean / mean.norm()))
        assert_close(row, torch.tensor(logits).softmax(0), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"'a photo' has no \{c\}"):
        encoder.classify(PICTURES, names, ["a photo"])
    with pytest.raises(ValueError, match="0 classnames"):
        encoder.classify(PICTURES, [])


def test_the_default_prompt_is_a_photo_of_a_class(encoder: Encoder):
    plain = encoder.classify(PICTURES, ["dog", "cat"])
    assert torch.equal(plain, encoder.classify(PICTURES, ["dog", "cat"], ["a photo of a {c}."]))


def test_an_architecture_takes_the_weights_that_are_named_or_its_default():
    tiny = clipft.load("tiny", device="cpu")
    assert tiny.clip.pretrained is None
    assert_close(tiny.encode_text(["a"]), clipft.load("tiny", None, device="cpu").encode_text(["a"]))
    with pytest.raises(ValueError, match=r"has no default weights\. Give pretrained=TAG"):
        clipft.load("RN101")
    with pytest.raises(ValueError, match="no tag of ViT-B-32"):
        clipft.load("ViT-B-32", "opena")
    with pytest.raises(ValueError, match="Did you mean ViT-B-32"):
        clipft.load("ViTB32", None)


def hugging_face(encoder: Encoder):
    """transformers' text model of Stable Diffusion with the same weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=16,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=49407,
    )
    state = encoder.clip.model.state_dict()
    new = {
        "embeddings.token_embedding.weight": state["token_embedding.weight"],
        "embeddings.position_embedding.weight": state["positional_embedding"],
        "final_layer_norm.weight": state["ln_final.weight"],
        "final_layer_norm.bias": state["ln_final.bias"],
    }
    names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
    names |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for block in range(2):
        ours, theirs = f"transformer.resblocks.{block}", f"encoder.layers.{block}"
        for kind in ("weight", "bias"):
            for mine, other in names.items():
                new[f"{theirs}.{other}.{kind}"] = state[f"{ours}.{mine}.{kind}"]
            parts = state[f"{ours}.attn.in_proj_{kind}"].chunk(3)
            for name, part in zip("qkv", parts, strict=True):
                new[f"{theirs}.self_attn.{name}_proj.{kind}"] = part
    model = CLIPTextModel(config).eval()
    prefix = "text_model." if any(name.startswith("text_model.") for name in model.state_dict()) else ""
    missing = model.load_state_dict({f"{prefix}{name}": value for name, value in new.items()}, strict=False)
    assert not missing.unexpected_keys and all("position_ids" in name for name in missing.missing_keys)
    return model


@pytest.fixture(scope="module")
def generator_encoder() -> Encoder:
    """With the context, activation and vocabulary of the text tower of Stable Diffusion 1.x."""
    torch.manual_seed(0)
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    clip = build("text", {**MODEL_CFG, "text_cfg": text, "quick_gelu": True}, {})
    return Encoder(clip, torch.device("cpu"), trim=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of SWIG types that transformers' imports bring along
def test_token_embeddings_padded_with_end_tokens_are_what_image_generators_condition_on(generator_encoder: Encoder):
    tokens = generator_encoder.tokenize(CAPTIONS)
    for row in tokens:
        row[row.argmax() :] = 49407
    with torch.no_grad():
        expected = hugging_face(generator_encoder)(tokens).last_hidden_state
    found = generator_encoder.token_embeddings(CAPTIONS)
    assert found.shape == (5, 77, 16)
    assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_token_embeddings_padded_with_zeros_hold_the_text_feature_and_differ_behind_the_end(generator_encoder: Encoder):
    model = generator_encoder.clip.model
    padded = generator_encoder.token_embeddings(CAPTIONS, pad="zero", batch_size=2)
    ends = generator_encoder.tokenize(CAPTIONS).argmax(dim=-1)
    pooled = padded[torch.arange(5), ends] @ model.text_projection.detach()
    assert_close(pooled / pooled.norm(dim=-1, keepdim=True), generator_encoder.encode_text(CAPTIONS))
    by_end = generator_encoder.token_embeddings(CAPTIONS)
    for row, end in enumerate(ends.tolist()):
        assert_close(padded[row, : end + 1], by_end[row, : end + 1])
        assert end == 76 or not torch.allclose(padded[row, end + 1 :], by_end[row, end + 1 :], atol=1e-2)
    with pytest.raises(ValueError, match="pad='eos' is unknown"):
        generator_encoder.token_embeddings(CAPTIONS, pad="eos")


def test_towers_without_an_end_token_have_no_token_embeddings():
    text = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1, "no_causal_mask": True}
    text |= {"pool_type": "last"}
    clip = build("other", {**MODEL_CFG, "text_cfg": text, "custom_text": True}, {})
    with pytest.raises(ValueError, match="not causal"):
        Encoder(clip, torch.device("cpu"), trim=False).token_embeddings(["a"])


def test_a_prompt_loss_without_crops_is_half_the_squared_angle_of_the_resized_picture(encoder: Encoder):
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    loss = encoder.prompt_loss("a red dog", num_crops=0)(image)
    shift, width = (torch.tensor(encoder.clip.preprocess_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    cosine = encoder.encode_image(((image - shift) / width)[None])[0] @ encoder.encode_text(["a red dog"])[0]
    assert_close(loss, torch.acos(cosine) ** 2 / 2, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_crops", [0, 5])
def test_the_gradient_of_a_prompt_loss_is_that_of_finite_differences(encoder: Encoder, num_crops: int):
    loss_of = encoder.prompt_loss("a red dog", num_crops=num_crops)

    def loss(image: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)  # the same views each time
        return loss_of(image)

    image = torch.rand(3, 20, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()
    [gradient] = torch.autograd.grad(loss(image), image)
    direction = gradient / gradient.norm()
    step = 0.02
    with torch.no_grad():
        slope = (loss(image + step * direction) - loss(image - step * direction)) / (2 * step)
    assert_close(slope, gradient.norm(), rtol=0.02, atol=0)


def test_a_prompt_loss_averages_the_views_that_augment_makes(encoder: Encoder):
    image = torch.rand(3, 40, 30, generator=torch.Generator().manual_seed(0))
    corners = [image[:, :16, :16], image[:, 20:36, 10:26], image[:, :16, 10:26]]
    calls = iter(corners)
    mean = encoder.prompt_loss("green", num_crops=3, augment=lambda _: next(calls))(image)
    single = [encoder.prompt_loss("green", num_crops=0)(corner) for corner in corners]
    assert_close(mean, torch.stack(single).mean(), atol=1e-5, rtol=1e-4)


def test_following_a_prompt_loss_brings_a_picture_nearer_to_the_text(encoder: Encoder):
    torch.manual_seed(0)
    logits = torch.zeros(3, 16, 16, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.2)
    loss_of = encoder.prompt_loss("two blue birds", num_crops=4)
    before = encoder.prompt_loss("two blue birds", num_crops=0)(logits.sigmoid()).detach()
    for _ in range(60):
        optimizer.zero_grad()
        loss_of(logits.sigmoid()).backward()
        optimizer.step()
    after = encoder.prompt_loss("two blue birds", num_crops=0)(logits.sigmoid()).detach()
    assert after < 0.9 * before
    assert all(parameter.grad is None for parameter in encoder.clip.model.parameters())


def test_a_prompt_loss_refuses_what_it_cannot_take(encoder: Encoder):
    with pytest.raises(ValueError, match=r"must be a float tensor \[3, H, W\]"):
        encoder.prompt_loss("a dog")(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="num_crops=-1"):
        encoder.prompt_loss("a dog", num_crops=-1)
