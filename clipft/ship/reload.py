"""A script, run in a process of its own: what plain open_clip computes from an exported folder.

    python -P reload.py FOLDER JOB

JOB holds inputs.safetensors (pixels, tokens), captions.json and images/0, images/1, ... as the files are;
outputs.safetensors and outputs.json are written beside them. Imports nothing of clipft, so that the folder
is read as anybody else would read it.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

BATCH = 64


def preprocessed(path: Path, preprocess: Any) -> Tensor | str:
    """The image as a user of open_clip would prepare it, or why that fails."""
    try:
        with Image.open(path) as image:
            return preprocess(image)
    except Exception as error:  # Pillow raises many types for files it cannot read
        return f"plain Pillow cannot open it: {error}"


def encode_files(model: Any, preprocess: Any, paths: list[Path], width: int) -> tuple[Tensor, dict[str, str]]:
    """Unit features of the files, zero for those that cannot be opened, and the reasons by file name."""
    features, failed = torch.zeros(len(paths), width), {}
    for start in range(0, len(paths), BATCH):
        rows, pixels = [], []
        for i, path in enumerate(paths[start : start + BATCH], start):
            prepared = preprocessed(path, preprocess)
            if isinstance(prepared, str):
                failed[path.name] = prepared
            else:
                rows.append(i)
                pixels.append(prepared)
        if rows:
            features[rows] = model.encode_image(torch.stack(pixels), normalize=True)
    return features, failed


@torch.no_grad()
def main(folder: str, job: Path) -> None:
    create: Callable[..., tuple[Any, Any, Any]] = cast(Any, open_clip.create_model_and_transforms)
    model, _, preprocess = create(f"local-dir:{folder}", require_pretrained=True)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    inputs = load_file(job / "inputs.safetensors")
    outputs = {
        "fixed_image": model.encode_image(inputs["pixels"], normalize=True),
        "fixed_text": model.encode_text(inputs["tokens"], normalize=True),
    }
    paths = sorted((job / "images").iterdir(), key=lambda path: int(path.name))
    outputs["image"], failed = encode_files(model, preprocess, paths, outputs["fixed_image"].shape[1])
    captions = json.loads((job / "captions.json").read_text(encoding="utf-8"))
    if captions:
        outputs["caption_tokens"] = tokenizer(captions)
        batches = outputs["caption_tokens"].split(BATCH)
        outputs["text"] = torch.cat([model.encode_text(tokens, normalize=True) for tokens in batches])
    assert "clipft" not in sys.modules
    save_file(outputs, job / "outputs.safetensors")
    versions = {"open_clip": open_clip.__version__, "torch": torch.__version__}
    (job / "outputs.json").write_text(json.dumps({"failed": failed, "versions": versions}), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
