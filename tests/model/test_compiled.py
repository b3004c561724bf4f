"""Compiled blocks give the features and gradients of plain ones; graphs are counted.

The backend is aot_eager, which traces and differentiates as inductor does and needs no compiler; inductor and whole
runs are in tests/test_run_compiled.py.
"""

import pytest
import torch
from alone import alone
from torch import Tensor
from torch._dynamo.utils import counters
from torch.testing import assert_close

from clipft.model import compiled
from clipft.model.blocks import AS_THEY_ARE, Blocks
from clipft.model.build import build, build_model
from clipft.model.compiled import MOST_GRAPHS, TEXT_BUCKET, check_compile, compiled_blocks, compiles
from clipft.model.encode import OpenClip, encode_image, encode_text, trim_tokens
from clipft.model.names import architecture_cfg

# torch asks every tensor for its gradient as it traces; it hides the warning of that, unless warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
CPU = torch.device("cpu")
LENGTH, EOS = 40, 99
CFG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": LENGTH, "vocab_size": EOS + 1, "width": 32, "heads": 2, "layers": 3},
}


@pytest.fixture
def blocks() -> Blocks:
    return compiled_blocks("aot_eager")


WORDS = CFG | {"text_cfg": CFG["text_cfg"] | {"vocab_size": 49408}}  # of open_clip's own tokenizer


def model(checkpointing: bool = False) -> OpenClip:
    torch.manual_seed(0)
    found: OpenClip = build_model(CFG).double().train()
    found.set_grad_checkpointing(checkpointing)
    return found


def texts(*lengths: int) -> Tensor:
    """Captions that end after so many tokens, with zeros behind."""
    tokens = torch.zeros(len(lengths), LENGTH, dtype=torch.long)
    for row, length in zip(tokens, lengths, strict=True):
        row[: length - 1] = torch.randint(1, EOS, (length - 1,))
        row[length - 1] = EOS
    return tokens


def features_and_gradients(clip: OpenClip, tokens: Tensor, blocks: Blocks) -> dict[str, Tensor]:
    torch.manual_seed(1)
    pixels = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    image, text = encode_image(clip, pixels, blocks), encode_text(clip, tokens, False, blocks)
    clip.zero_grad()
    (image * text.roll(1, dims=0)).sum().backward()
    grads = {name: value.grad for name, value in clip.named_parameters() if value.grad is not None}
    assert len(grads) > 60
    return {"image": image.detach(), "text": text.detach(), **{name: grad.clone() for name, grad in grads.items()}}


def test_captions_are_cut_to_multiples_of_the_bucket_up_to_the_context():
    clip = model()
    lengths = {
        longest: trim_tokens(clip, texts(2, longest, 2), TEXT_BUCKET).shape[1] for longest in (2, 15, 16, 17, 40)
    }
    assert lengths == {2: 16, 15: 16, 16: 16, 17: 32, 40: 40}


@pytest.mark.slow
@pytest.mark.parametrize(("checkpointing", "lengths"), [(False, (2, 17, 40)), (True, (5,))])
@alone
def test_features_and_gradients_are_those_of_open_clip_at_any_length_of_the_captions(blocks, checkpointing, lengths):
    plain, ours = model(), model(checkpointing)
    for longest in lengths:
        full = texts(2, longest, 2)
        cut = trim_tokens(ours, full, TEXT_BUCKET)
        found = features_and_gradients(ours, cut, blocks)
        torch.manual_seed(1)
        pixels = torch.randn(3, 3, 16, 16, dtype=torch.float64)
        image, text = plain.encode_image(pixels, normalize=True), plain.encode_text(full, normalize=True)
        plain.zero_grad()
        (image * text.roll(1, dims=0)).sum().backward()
        assert_close(found.pop("image"), image, rtol=0, atol=1e-12)
        assert_close(found.pop("text"), text, rtol=0, atol=1e-12)
        for name, grad in found.items():
            assert_close(grad, plain.get_parameter(name).grad, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@alone
def test_what_stands_behind_the_end_token_in_a_bucket_cannot_matter(blocks):
    clip, tokens = model(), texts(5, 9, 3)
    other = tokens.clone()
    for row, length in zip(other, (5, 9, 3), strict=True):
        row[length:] = torch.randint(1, EOS, (LENGTH - length,))
    one, two = (features_and_gradients(clip, each[:, :16], blocks) for each in (tokens, other))
    assert_close(two["text"], one["text"], rtol=0, atol=1e-13)
    assert_close(two["transformer.resblocks.0.attn.in_proj_weight"], one["transformer.resblocks.0.attn.in_proj_weight"])


@pytest.mark.slow
@alone
def test_all_blocks_of_a_tower_share_a_graph_and_there_is_one_for_each_length(blocks):
    """Two functions, the last block's and that of the others: one pair of graphs for the image, one for each bucket."""
    clip = model()
    for _ in range(2):
        for longest in (3, 20, 16, 25, 40):
            features_and_gradients(clip, trim_tokens(clip, texts(2, longest, 2), TEXT_BUCKET), blocks)
    buckets = len({16, 32, 40})
    assert list(clip.state_dict()) == list(model().state_dict())  # no "_orig_mod"
    assert counters["stats"]["unique_graphs"] == 2 * (1 + buckets) < MOST_GRAPHS
    assert not counters["graph_break"]


@pytest.mark.slow
@alone
def test_a_tower_whose_first_blocks_are_frozen_has_few_graphs_more(blocks):
    clip = model()
    for name, parameter in clip.named_parameters():
        parameter.requires_grad_(".resblocks.2." in name or "resblocks" not in name)
    clip.visual.conv1.requires_grad_(False)
    tokens = trim_tokens(clip, texts(2, 5, 2), TEXT_BUCKET)
    (
        encode_text(clip, tokens, False, blocks).sum() + encode_image(clip, torch.randn(3, 3, 16, 16), blocks).sum()
    ).backward()
    assert counters["stats"]["unique_graphs"] <= 4


def test_only_towers_of_open_clips_own_blocks_are_compiled_and_the_plan_says_which():
    whole, half = build("whole", WORDS, {}), build("tiny", architecture_cfg("tiny"), {})
    assert compiles(whole) == ["image", "text"] and compiles(half) == ["text"]  # tiny's image tower is timm's
    if not compiled.lacking(CPU):
        check_compile(half, CPU)
        assert "blocks of the text tower are compiled (the other tower of tiny cannot be)" in half.notes[-1]


def test_a_model_with_nothing_to_compile_is_refused():
    text = WORDS["text_cfg"] | {"no_causal_mask": True, "pool_type": "last"}
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    none = build("none", CFG | {"vision_cfg": vision, "text_cfg": text}, {})
    with pytest.raises(ValueError, match=r"train\.compile=true would be ignored: neither tower of none"):
        check_compile(none, CPU)


def test_a_machine_without_a_compiler_is_told_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    clip = build("whole", WORDS, {})
    with pytest.raises(ValueError, match=r"train\.compile=true needs a C\+\+ compiler \(g\+\+ or clang\+\+"):
        check_compile(clip, CPU)
    assert compiled_blocks() != AS_THEY_ARE
