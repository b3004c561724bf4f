"""bench data: from shards to batches on one core, without a model, beside open_clip's transform and webdataset."""

import tempfile
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from clipft.bench.report import Row, ratios
from clipft.bench.shards import draw_samples, write_shards
from clipft.config import ModelConfig
from clipft.data.augment import Augment, apply_augment
from clipft.data.decode import decode_rgb
from clipft.data.index import index_shards
from clipft.data.loader import train_loader
from clipft.data.order import Shuffle, rng_for
from clipft.data.pairs import build_units
from clipft.fit import tokenizer
from clipft.model.encode import can_trim
from clipft.model.load import load_model

SIDE, BATCH, MAX_PIXELS, CROP = 224, 32, 64_000_000, 0.9
TRAINED = Augment(SIDE, CROP, 0.0, 0.0, "bicubic", "shortest", (0, 0, 0))  # what open_clip trains with by default
WHOLE = Augment(SIDE, 1.0, 0.0, 0.0, "bicubic", "shortest", (0, 0, 0))


def bench_data(sides: list[int], num: int, rounds: int) -> list[Row]:
    """A row for the image path and one for the whole way to batches, for each size of source."""
    from open_clip import image_transform

    torch.set_num_threads(1)
    theirs: Any = image_transform(SIDE, is_train=True, mean=None, std=None)
    clip = load_model(ModelConfig(name="ViT-B-32", pretrained=None), seed=0)
    tokens = tokenizer(clip, can_trim(clip.model, clip.tokenize))
    rows = []
    for side in sides:
        samples = list(draw_samples(side, num))
        raw = [jpeg for jpeg, _ in samples]
        largest, mean = differences(raw)
        gap = {"largest difference": largest, "mean difference": mean}
        rows.append(
            compared(f"image path, {side} px", num, rounds, lambda r=raw: ours(r), lambda r=raw: pil(r, theirs)) | gap
        )
        with tempfile.TemporaryDirectory(prefix="clipft-bench-") as folder:
            shards = write_shards(Path(folder), iter(samples), per_shard=max(BATCH, num // 2))
            rows.append(
                compared(
                    f"shards to batches, {side} px",
                    num // BATCH * BATCH,
                    rounds,
                    lambda s=shards: our_batches(s, tokens),
                    lambda s=shards: their_batches(s, theirs, clip.tokenize),
                )
            )
    return rows


def compared(what: str, num: int, rounds: int, mine: Callable[[], Any], other: Callable[[], Any]) -> Row:
    """Samples per second of processor time, in turns, the first round not counted."""
    speeds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        for speed, work in zip(speeds, (mine, other), strict=True):
            start = time.process_time()
            work()
            speed.append(num / (time.process_time() - start))
    ratio = ratios(speeds[0][1:], speeds[1][1:])
    median = [float(np.median(speed[1:])) for speed in speeds]
    return {"what": what, "ours /s/core": median[0], "open_clip /s/core": median[1], "ratio": ratio}


def ours(raw: list[bytes]) -> None:
    for i, jpeg in enumerate(raw):
        apply_augment(TRAINED, decode_rgb(jpeg, MAX_PIXELS), rng_for(0, 0, i))


def pil(raw: list[bytes], transform: Callable[[Image.Image], Any]) -> None:
    """As open_clip's loader: webdataset's pilrgb decoder, then the training transform."""
    for jpeg in raw:
        transform(open_rgb(jpeg))


def open_rgb(jpeg: bytes) -> Image.Image:
    with BytesIO(jpeg) as stream:
        return Image.open(stream).convert("RGB")


def differences(raw: list[bytes]) -> tuple[int, float]:
    """Largest and mean difference, in steps of 255, of ours and Pillow's way to the evaluation's picture."""
    gaps = [np.abs(whole(jpeg).astype(int) - whole_by_pillow(jpeg).astype(int)) for jpeg in raw]
    return int(max(gap.max() for gap in gaps)), float(np.mean([gap.mean() for gap in gaps]))


def whole(jpeg: bytes) -> UInt8[np.ndarray, "S S 3"]:
    return apply_augment(WHOLE, decode_rgb(jpeg, MAX_PIXELS), rng_for(0)).permute(1, 2, 0).numpy()


def whole_by_pillow(jpeg: bytes) -> UInt8[np.ndarray, "S S 3"]:
    """The picture that open_clip's evaluation transform makes, before its colours are normalised."""
    from open_clip import image_transform

    plain: Any = image_transform(SIDE, is_train=False, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return (plain(open_rgb(jpeg)) * 255).round().byte().permute(1, 2, 0).numpy()


def our_batches(shards: list[str], tokenize: Callable[[list[str]], torch.Tensor]) -> None:
    units = build_units(index_shards(shards), "one")
    steps = len(units) // BATCH
    loader = train_loader(
        units,
        augment=TRAINED,
        tokenize=tokenize,
        max_pixels=MAX_PIXELS,
        positives="caption",
        group=None,
        text_errors="strict",
        seed=0,
        order=Shuffle(0, len(units), BATCH),
        num_steps=steps,
        rank=0,
        world=1,
        start_step=0,
        workers=0,
        pin=False,
    )
    assert sum(int(batch.valid.sum()) for batch in loader) == steps * BATCH


def their_batches(shards: list[str], transform: Callable[[Image.Image], Any], tokenize: Callable) -> None:
    """The pipeline of open_clip_train 3.3.0 (data.get_wds_dataset) over webdataset's reader, in this process."""
    import webdataset

    wds: Any = webdataset  # which fills its namespace by star imports
    pipeline = wds.DataPipeline(
        wds.SimpleShardList(shards),
        wds.tarfile_to_samples(),
        wds.shuffle(bufsize=5000, initial=1000),
        wds.decode("pilrgb"),
        wds.rename(image="jpg;png;jpeg;webp", text="txt"),
        wds.map_dict(image=transform, text=lambda text: tokenize([text])[0]),
        wds.to_tuple("image", "text"),
        wds.batched(BATCH, partial=False),
    )
    batches: Iterator[Any] = iter(pipeline)
    assert sum(len(texts) for _, texts in batches) > 0
