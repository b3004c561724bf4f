"""A model -> a folder that plain open_clip loads, published only after plain open_clip has loaded it."""

import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipft.model.build import Clip, description
from clipft.model.encode import encode_image, encode_text

CONFIG_NAME, WEIGHTS_NAME = "open_clip_config.json", "open_clip_model.safetensors"
TOLERANCE = 1e-5  # of unit features, for the same tensors
MIN_COSINE = 0.999  # of our feature of a file and plain open_clip's
ORIENTATION = 0x0112  # EXIF tag
RELOAD = Path(__file__).with_name("reload.py")
PROBES = [
    "a",
    "a photo of a dog",
    "two brown dogs run over wet grass, one carries a stick",
    "many words " * 50,
]


@dataclass(frozen=True)
class Reloaded:
    """What plain open_clip computed from the exported folder in a process without clipft."""

    difference: float  # largest one of unit features, for the same pixels and tokens
    image: Float[Tensor, "n D"]  # of the original files, through open_clip's own preprocess
    text: Float[Tensor, "m D"]
    cosine: Float[Tensor, " n"]  # of each file's feature and ours
    causes: dict[str, str]  # key of a file below MIN_COSINE -> why
    versions: dict[str, str]


def export_folder(
    clip: Clip,
    out: Path,
    *,
    files: Sequence[tuple[str, bytes]],
    ours: Float[Tensor, "n D"],
    captions: Sequence[str],
    card: Callable[[Reloaded], str],
) -> Reloaded:
    """Writes the folder `out`, complete and checked or not at all.

    files: key and original bytes of validation images; ours: their features as clipft measured them.
    card: makes README.md from the check.
    """
    check_out(out)
    with staged(out) as folder:
        write_folder(clip, folder)
        reloaded = check_folder(clip, folder, files, ours, captions)
        (folder / "README.md").write_text(card(reloaded), encoding="utf-8")
    return reloaded


def check_out(out: Path) -> None:
    """Raises where an export would take the place of something else."""
    occupied = out.is_file() or (out.is_dir() and any(out.iterdir()))
    if occupied and not (out / CONFIG_NAME).is_file():
        raise ValueError(f"out={str(out)!r} holds something else than an export. Give another folder.")


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place when the block ends, and vanishes when the block raises."""
    folder, old = out.with_name(f".{out.name}.tmp"), out.with_name(f".{out.name}.old")
    for left_over in (folder, old):
        shutil.rmtree(left_over, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if out.exists():
        out.rename(old)
    folder.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def write_folder(clip: Clip, folder: Path) -> None:
    """Config and weights (and a tokenizer of transformers) as open_clip's local-dir: reads them."""
    (folder / CONFIG_NAME).write_text(json.dumps(description(clip), indent=2) + "\n", encoding="utf-8")
    state = {name: value.detach().cpu().contiguous() for name, value in clip.model.state_dict().items()}
    save_file(state, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    save_tokenizer = getattr(clip.tokenize, "save_pretrained", None)
    if save_tokenizer is not None:
        save_tokenizer(str(folder))


def check_folder(
    clip: Clip,
    folder: Path,
    files: Sequence[tuple[str, bytes]],
    ours: Float[Tensor, "n D"],
    captions: Sequence[str],
) -> Reloaded:
    """The comparison with plain open_clip; RuntimeError where the folder is not what was measured."""
    model = copy.deepcopy(clip.model).cpu().float().eval()
    pixels = torch.randn(4, 3, clip.side, clip.side, generator=torch.Generator().manual_seed(0))
    tokens = clip.tokenize(PROBES)
    with tempfile.TemporaryDirectory(prefix="clipft-export-") as job:
        write_job(Path(job), {"pixels": pixels, "tokens": tokens}, captions, [raw for _, raw in files])
        outputs, report = run_reload(folder, Path(job))
    with torch.no_grad():
        image, text = encode_image(model, pixels), encode_text(model, tokens, trim=False)
    gaps = [(outputs["fixed_image"] - image).abs().max(), (outputs["fixed_text"] - text).abs().max()]
    difference = float(torch.stack(gaps).max())
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"the export is wrong: for the same inputs, open_clip's features differ by {difference:.1e}."
        )
    if captions and not torch.equal(outputs["caption_tokens"], clip.tokenize(list(captions))):
        raise RuntimeError("the export is wrong: open_clip.get_tokenizer of the folder makes other tokens.")
    cosine = (outputs["image"] * ours.cpu().float()).sum(dim=-1)
    causes = explain(files, cosine, report["failed"])
    return Reloaded(
        difference=difference,
        image=outputs["image"],
        text=outputs["text"] if captions else torch.zeros(0, image.shape[1]),
        cosine=cosine,
        causes=causes,
        versions=report["versions"],
    )


def write_job(job: Path, inputs: dict[str, Tensor], captions: Sequence[str], images: Sequence[bytes]) -> None:
    """The files that reload.py reads."""
    save_file(inputs, job / "inputs.safetensors")
    (job / "captions.json").write_text(json.dumps(list(captions)), encoding="utf-8")
    (job / "images").mkdir()
    for i, raw in enumerate(images):
        (job / "images" / str(i)).write_bytes(raw)


def run_reload(folder: Path, job: Path) -> tuple[dict[str, Tensor], dict]:
    """reload.py's tensors and report."""
    # Offline, so that a folder that needs files of the hub is noticed.
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", str(RELOAD), str(folder.absolute()), str(job)]
    done = subprocess.run(command, env=env, cwd=job, capture_output=True, text=True)
    if done.returncode != 0:
        last_lines = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise RuntimeError(f"the export is wrong: plain open_clip cannot use the folder.\n{last_lines}")
    return load_file(job / "outputs.safetensors"), json.loads((job / "outputs.json").read_text(encoding="utf-8"))


def explain(files: Sequence[tuple[str, bytes]], cosine: Float[Tensor, " n"], failed: dict[str, str]) -> dict[str, str]:
    """The cause for each file that plain open_clip sees otherwise; RuntimeError if one has none."""
    causes = {}
    for i in torch.nonzero(~(cosine >= MIN_COSINE)).flatten().tolist():
        key, raw = files[i]
        causes[key] = failed.get(str(i)) or cause_of(raw)
        if not causes[key]:
            raise RuntimeError(
                f"the export is wrong: the feature of {key} has cosine {cosine[i]:.4f} to plain open_clip's, "
                "and neither EXIF rotation nor its pixel format explains it."
            )
    return causes


def cause_of(raw: bytes) -> str:
    """What about the file plain Pillow leaves to its user and clipft does not; empty if nothing."""
    with Image.open(BytesIO(raw)) as image:
        orientation = image.getexif().get(ORIENTATION, 1)
        if orientation != 1:
            return f"EXIF orientation {orientation}, which plain open_clip does not apply"
        if image.has_transparency_data:
            return "transparency, which plain open_clip drops and clipft puts on white"
        if image.mode not in ("RGB", "L", "1", "P"):
            return f"pixel format {image.mode}, which plain open_clip converts another way"
    return ""
