"""Nothing in a step waits for the device.

Two stand-ins on a CPU, and the real thing for a GPU. Numbers that are read: torch's operations are watched while real
steps run. Copies that are waited for: the step runs on tensors without content that say they are on a GPU, where a
copy from host memory, an index on the host or a shape that depends on values can be seen.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from alone import alone
from small import MODEL_CFG, make_config, make_data, make_model, train_here
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from clipft.data.loader import Batch
from clipft.learn.after_step import AfterStep
from clipft.learn.average import Average
from clipft.learn.losses import build_loss
from clipft.learn.module import ContrastiveModule
from clipft.learn.optimizer import gradient_norm
from clipft.learn.step import Tower, Towers, contrastive_backward
from clipft.model.build import build_model
from clipft.model.encode import OpenClip, encode_image, encode_text, per_channel, to_float
from clipft.model.patches import draw_patches_on_device

READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique_dim", "_unique2")
CUDA, PAIRS = torch.device("cuda", 0), 6
WARM = 2  # steps that make the optimizer's state, buffers and constants
CFG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 100, "width": 32, "heads": 2, "layers": 2},
}


class Watch(TorchDispatchMode):
    """Takes down operations that would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in READS or (name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])):
            self.found[name] += 1
        given = {each.device.type for each in self._tensors(args)}
        there = given | {each.device.type for each in self._tensors([out])}
        if len(there) > 1 and not (kwargs or {}).get("non_blocking"):
            self.found[f"{name} between {' and '.join(sorted(there))}"] += 1
        return out

    def _tensors(self, values: Any) -> Iterator[Tensor]:
        """Those that have axes: a number on the host goes to the device as an argument of what is started there."""
        for value in values:
            if isinstance(value, Tensor):
                yield from [value] if value.ndim else []
            elif isinstance(value, list | tuple):
                yield from self._tensors(value)


@contextmanager
def fake_gpu() -> Iterator[None]:
    per_channel.cache_clear()
    with FakeTensorMode():
        yield
    per_channel.cache_clear()


def on_gpu(**vision: Any) -> OpenClip:
    with CUDA:
        return build_model(CFG | {"vision_cfg": CFG["vision_cfg"] | vision}).train()


def step(model: OpenClip, loss: str = "clip", duplicates: str = "share", smoothing: float = 0.0) -> None:
    """All of a step but the backward passes, which torch does not start for a GPU that is not there."""
    pixels = torch.zeros(PAIRS, 3, 16, 16, dtype=torch.uint8, device=CUDA)
    tokens, ids = torch.zeros(PAIRS, 12, dtype=torch.long, device=CUDA), torch.arange(PAIRS, device=CUDA)
    batch = Batch(pixels, tokens, ids >= 0, ids, [str(row) for row in range(PAIRS)], {})
    towers = Towers(
        Tower(lambda batch: encode_image(model, to_float(batch.pixels, [0.5] * 3, [0.25] * 3))),
        Tower(lambda batch: encode_text(model, batch.tokens, trim=False)),
    )
    contrastive_backward(
        towers,
        model.logit_scale,
        None,
        batch,
        loss=build_loss(loss, duplicates, smoothing),
        with_ids=True,
        gather_dtype=torch.bfloat16,
        batch_size=PAIRS,
        micro_batch=4,
        seed=(0, 0),
        backward=lambda loss: None,
        no_sync=nullcontext,
    )


def update(model: OpenClip, optimizer: torch.optim.AdamW, average: Average) -> None:
    """What ContrastiveModule does with the gradients."""
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    norm = gradient_norm(model.parameters())
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, norm)
    skipped = ~torch.isfinite(norm)
    optimizer.found_inf = skipped.float()  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()
    average.update(skipped)


@alone
def test_features_loss_and_update_wait_for_nothing_on_tensors_of_a_gpu():
    with fake_gpu():
        model = on_gpu(patch_dropout=0.5)
        draw_patches_on_device(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        average = Average(model, 0.9, False, {})
        step(model)  # constants go to the device once
        with Watch() as watch:
            step(model)
            step(model, duplicates="mask", smoothing=0.1)
            step(model, "siglip")
            update(model, optimizer, average)
        assert not watch.found


@alone
def test_what_would_wait_is_seen():
    with fake_gpu(), Watch() as watch:
        to_float(torch.zeros(1, 3, 4, 4, dtype=torch.uint8, device=CUDA), [0.5] * 3, [0.25] * 3)
        step(on_gpu(patch_dropout=0.5))  # as open_clip draws
        torch.zeros(4).to(CUDA, non_blocking=True)  # which is none
    assert set(watch.found) == {"_to_copy between cpu and cuda", "index between cpu and cuda"}
    with Watch() as here:
        torch.ones(()).item()
        torch.arange(3)[torch.arange(3) > 1]
    assert set(here.found) == {"_local_scalar_dense", "index"}


def watched_steps(monkeypatch: pytest.MonkeyPatch, watch: Any) -> list[str]:
    """Puts the watch around what a step does in the training process; the list grows by each such call."""
    calls: list[str] = []

    def around(owner: Any, name: str) -> None:
        plain = getattr(owner, name)

        def watched(*arguments: Any) -> Any:
            calls.append(name)
            with watch() if calls.count(name) > WARM else nullcontext():
                return plain(*arguments)

        monkeypatch.setattr(owner, name, watched)

    around(ContrastiveModule, "transfer_batch_to_device")
    around(ContrastiveModule, "training_step")
    around(AfterStep, "_sum")
    return calls


STEPS = 6  # of make_config
OPTIONS = [
    ("train.micro_batch=3", "train.ema=0.9"),
    ("loss.name=siglip", "loss.positives=image", "tune.layer_decay.text=0.5"),
    ("loss.duplicates=mask", "loss.label_smoothing=0.1", "loss.gather_dtype=bfloat16"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_model(folder / "model", {k: v | {"layers": 2} if "cfg" in k else v for k, v in MODEL_CFG.items()})
    make_data(folder / "data")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options[0])
def test_steps_of_a_run_read_no_number_from_the_device(root, monkeypatch, options):
    watch = Watch()
    steps = watched_steps(monkeypatch, lambda: watch)
    assert train_here(make_config(root, f"name={options[0]}", "trainer.accelerator=cpu", *options))[0] == 0
    assert len(steps) == 3 * STEPS and not watch.found


@pytest.mark.slow
def test_an_optimizer_that_leaves_out_no_step_by_itself_is_asked_at_each(root, monkeypatch):
    """All but those that are fused; the read numbers show that the watch sees what a real step does."""
    watch = Watch()
    watched_steps(monkeypatch, lambda: watch)
    assert train_here(make_config(root, "name=lion", "trainer.accelerator=cpu", "optim.name=lion"))[0] == 0
    assert watch.found["_local_scalar_dense"] >= STEPS - WARM


@contextmanager
def refusing_to_wait() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("options", [*OPTIONS, ("trainer.precision=16-mixed",)], ids=lambda options: options[0])
def test_steps_of_a_run_on_a_gpu_wait_for_nothing(root, monkeypatch, options):
    steps = watched_steps(monkeypatch, refusing_to_wait)
    name = f"name=gpu-{options[0]}"
    assert train_here(make_config(root, name, "trainer.accelerator=gpu", "data.workers=1", *options))[0] == 0
    assert len(steps) == 3 * STEPS
