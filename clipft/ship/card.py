"""README.md of an exported model: what it is, what was measured, how to load it."""

from collections import Counter
from pathlib import PurePath

from clipft.ship.folder import MIN_COSINE, Reloaded

MAX_GAP = 0.005  # half a point of R@k

HEADER = """\
---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
tags: [clip, clipft]
---
"""
USAGE = """\
```python
import open_clip
import torch
from PIL import Image

folder = "local-dir:path/to/this/folder"
model, preprocess = open_clip.create_model_from_pretrained(folder)
tokenizer = open_clip.get_tokenizer(folder)
model.eval()
with torch.no_grad():
    image = model.encode_image(preprocess(Image.open("photo.jpg")).unsqueeze(0), normalize=True)
    text = model.encode_text(tokenizer(["a dog", "a cat"]), normalize=True)
print((model.logit_scale.exp() * image @ text.T).softmax(dim=-1))
```
"""


def card_text(
    *,
    name: str,
    base: str,
    data: str,
    split: str,
    galleries: dict[str, int],
    before: dict[str, float],
    exported: dict[str, float],
    plain: dict[str, float],
    reloaded: Reloaded,
    versions: dict[str, str],
) -> str:
    """The card of an export.

    before, exported: flat maps of results.json; plain: the same metrics from `reloaded`'s features;
    galleries: what was searched through and how many, such as {"emoji images": 400}.
    """
    sizes = ", ".join(f"{count} {what}" for what, count in galleries.items())
    parts = [
        f"{HEADER}# {leaf(name)}",
        f"CLIP model, fine-tuned with clipft from {leaf(base)} on {leaf(data)}.",
        "## Results",
        f"Measured on the {split} split" + (f" ({sizes})." if sizes else "."),
        metrics_table(before, exported, plain),
        "## Use",
        USAGE.rstrip(),
        "## Check of this export",
        "\n".join(check_lines(exported, plain, reloaded)),
        "Made with " + ", ".join(f"{package} {version}" for package, version in versions.items()) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def leaf(text: str) -> str:
    """The last part of a path, as a card must not show where things lay on somebody's machine."""
    return PurePath(text.replace("\\", "/")).name or text


def metrics_table(before: dict[str, float], exported: dict[str, float], plain: dict[str, float]) -> str:
    """A row per metric; the plain column only where plain open_clip's features were measured too."""
    columns = {"base": before, "exported": exported} | ({"plain open_clip": plain} if plain else {})
    rows = [f"| metric | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for metric in exported:
        cells = [f"{values[metric]:.4f}" if metric in values else "" for values in columns.values()]
        rows.append(f"| {metric} | {' | '.join(cells)} |")
    return "\n".join(rows)


def check_lines(exported: dict[str, float], plain: dict[str, float], reloaded: Reloaded) -> list[str]:
    """The comparison with plain open_clip, in sentences."""
    lines = [f"- Same pixels and tokens, in a process without clipft: features agree to {reloaded.difference:.0e}."]
    if len(reloaded.cosine):
        lines.append(
            f"- {len(reloaded.cosine)} original files through open_clip's own preprocess: "
            f"lowest cosine {reloaded.cosine.min():.4f}, {len(reloaded.causes)} below {MIN_COSINE}."
        )
    for cause, count in Counter(reloaded.causes.values()).most_common():
        example = next(key for key, value in reloaded.causes.items() if value == cause)
        lines.append(f"- {count} files (such as {example}): {cause}.")
    gaps = {metric: value - exported[metric] for metric, value in plain.items() if metric in exported}
    far = {metric: gap for metric, gap in gaps.items() if "recall" in metric and abs(gap) > MAX_GAP}
    why = "the files named above" if reloaded.causes else "no single file explains it"
    lines += [
        f"- {metric} differs by {100 * gap:+.1f} points with plain open_clip: {why}." for metric, gap in far.items()
    ]
    return lines
