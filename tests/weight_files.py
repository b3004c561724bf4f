"""Small models and files of weights in every form, for tests."""

import pickle
import warnings
import zipfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipft.config import ModelConfig
from clipft.model.build import Clip, build

SIZES = {"input_resolution": 32, "context_length": 16, "vocab_size": 49408}
OPENAI = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
    "quick_gelu": True,
}
"""As large as one of OpenAI's models can be made small: heads have 64 channels, the tokenizer has 49408 tokens."""
OPENAI_RESNET = {**OPENAI, "vision_cfg": {"image_size": 64, "layers": [1, 2, 1, 1], "width": 64, "patch_size": None}}


def model(name: str | Path, pretrained: str | Path | None = None, **options: Any) -> ModelConfig:
    return ModelConfig(name=str(name), pretrained=None if pretrained is None else str(pretrained), **options)


def drawn(model_cfg: dict[str, Any], seed: int = 3) -> Clip:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build("small", model_cfg, {})


def features(clip: Clip, of: Any = None) -> tuple[Tensor, Tensor]:
    """Of fixed inputs, by the clip's model or another of its sizes."""
    size = clip.preprocess_cfg["size"]
    side = size if isinstance(size, int) else size[0]
    pixels = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        other = (of or clip.model).eval()
        return other.encode_image(pixels), other.encode_text(clip.tokenize(["a red circle", "two dogs run over grass"]))


def in_mixed_precision(clip: Clip) -> dict[str, Tensor]:
    """The state as OpenAI's models save it on a GPU: matrices in fp16, norms and embeddings in fp32."""
    from open_clip.model import convert_weights_to_fp16

    other = deepcopy(clip.model)
    convert_weights_to_fp16(other)
    return other.state_dict()


def save_torchscript(clip: Clip, path: Path) -> Path:
    """An archive of the layout of OpenAI's: traced, in mixed precision, with its sizes beside the modules."""
    from open_clip.model import convert_weights_to_fp16

    other = deepcopy(clip.model).eval()
    convert_weights_to_fp16(other)
    mask = other.attn_mask
    del other.attn_mask
    other.attn_mask = mask  # plain, as in OpenAI's code: no weight
    for name, size in SIZES.items():
        if hasattr(other, name):
            delattr(other, name)
        other.register_buffer(name, torch.tensor(size))
    side = clip.model_cfg["vision_cfg"]["image_size"]
    pixels, tokens = torch.zeros(1, 3, side, side).half(), torch.zeros(1, 16, dtype=torch.long)
    with warnings.catch_warnings():  # torch deprecates TorchScript, and traces sizes as constants
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", "Converting a tensor to a Python")
        inputs = {"encode_image": (pixels,), "encode_text": (tokens,)}
        torch.jit.trace_module(other, inputs, check_trace=False).save(str(path))
    return path


class Payload:
    """Pickled, it makes a file in the working directory when it is loaded without care."""

    def __reduce__(self):
        return (Path.touch, (Path("payload-ran"),))


def with_program(path: Path, program: bytes) -> Path:
    """The archive with another data.pkl."""
    with zipfile.ZipFile(path) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, raw in parts.items():
            archive.writestr(name, program if name.endswith("/data.pkl") else raw)
    return path


def pickled(value: Any) -> bytes:
    return pickle.dumps(value, protocol=2)


class Nested(nn.Module):
    """Modules, parameters, buffers, numbers, lists and a shared module, as torch.jit.script saves them."""

    sizes: list[int]
    words: list[str]
    table: dict[str, int]

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
        self.again = self.inner
        self.scale = nn.Parameter(torch.tensor(2.5))
        self.matrix = nn.Parameter(torch.randn(4, 3, dtype=torch.float16).t())
        self.register_buffer("count", torch.tensor([7]))
        self.resolution, self.sizes, self.words, self.table = 224, [1, 2], ["a"], {"b": 3}

    def forward(self, x: Tensor) -> Tensor:
        return self.again(x) * self.scale
