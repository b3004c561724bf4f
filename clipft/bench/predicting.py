"""bench predict: what larger machines and batches would do, from formulas and constants that are measured here."""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from clipft.bench import losses
from clipft.bench.loading import bench_data
from clipft.bench.report import Row
from clipft.bench.stepping import PEAKS
from clipft.capacity import full_length_batch
from clipft.config import ModelConfig
from clipft.fit import towers_of
from clipft.learn.memory import bytes_per_pair, peak_bytes
from clipft.model.load import load_model

CPU = torch.device("cpu")
MODEL, WIDTH, RANKS, MICRO_BATCH = "ViT-B-32", 512, 8, 256
B = 8192  # at which the losses are measured
SIDE, SAMPLES = 512, 96
GPU, MFU, CORES = "H100", 0.4, 16


def bench_predict() -> list[Row]:
    """A row for each prediction: the formula, the constants in it and what comes out."""
    activations, forward = tower_constants()
    # Beside what the loss makes of them lie the gathered features, of both sides in fp32.
    ours = 8 * WIDTH + (peak(losses.ours, B) - peak(losses.ours, B // 2)) / (B // 2)
    local = peak(losses.local, B) / (B * B / RANKS)
    loaded = next(row for row in bench_data([SIDE], SAMPLES, 1) if "batches" in row["what"])["ours /s/core"]
    step = f"a = {activations / 1e6:.1f} MB a pair ({MODEL}, fp32, 77 tokens), m = {MICRO_BATCH}"
    return [
        said(
            f"batch whose loss needs the memory of a micro-batch, W = {RANKS}",
            "m a / c",
            f"{step}, c = {ours / 1e3:.1f} kB a row",
            MICRO_BATCH * activations / ours,
        ),
        said(
            "the same with open_clip's local loss",
            "sqrt(m a W / o)",
            f"{step}, o = {local:.1f} B a score",
            math.sqrt(MICRO_BATCH * activations * RANKS / local),
        ),
        said(
            f"samples/s that {CORES} cores load, {SIDE} px",
            "(cores - 1) r",
            f"r = {loaded:.0f} /s a core",
            (CORES - 1) * loaded,
        ),
        said(
            f"samples/s of {MODEL} on one {GPU} at {MFU:.0%} MFU",
            "MFU peak / 3 F",
            f"F = {forward / 1e9:.1f} GFLOP a pair forward, 77 tokens, peak {PEAKS[GPU]:.0f} TFLOP/s (data sheet)",
            MFU * PEAKS[GPU] * 1e12 / (3 * forward),
        ),
    ]


def said(what: str, formula: str, constants: str, value: float) -> Row:
    return {"predicted, not measured": what, "formula": formula, "constants measured here": constants, "value": value}


def tower_constants() -> tuple[float, float]:
    """Bytes that a pair keeps from its forward to its backward pass, and FLOPs of its forward pass."""
    clip = load_model(ModelConfig(name=MODEL, pretrained=None), seed=0)
    clip.model.train()
    towers = towers_of(clip)

    def features(pairs: int) -> Tensor:
        batch = full_length_batch(clip, pairs)
        return towers.image.encode(batch).sum() + towers.text.encode(batch).sum()

    activations = bytes_per_pair(lambda pairs: features(pairs).backward())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        features(1)
    return activations, counter.get_total_flops()


def peak(build: losses.Build, batch: int) -> int:
    """Bytes of a rank's loss and its gradients at this global batch."""
    return peak_bytes(build(batch // RANKS, batch, WIDTH, CPU), CPU)
