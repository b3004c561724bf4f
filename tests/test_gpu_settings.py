"""What makes steps fast on a GPU, as far as it shows without one."""

import os
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from alone import alone
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import Dataset, SequentialSampler

from clipft import ranks, run
from clipft.bench.scaling import start_ranks
from clipft.bench.stepping import Resident, place, train
from clipft.config import OptimConfig, TrainerConfig
from clipft.data.loader import Batch
from clipft.data.waiting import InFlight, Wait, in_order
from clipft.launch import rank_variables
from clipft.learn.optimizer import build_optimizer
from clipft.model.build import build_model
from clipft.model.encode import encode_image, encode_text
from clipft.ranks import default_precision

CFG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 100, "width": 32, "heads": 2, "layers": 3},
}


def test_mixed_precision_is_bf16_where_the_gpu_has_it(monkeypatch):
    for supported, name in ((True, "bf16-mixed"), (False, "16-mixed")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda supported=supported, **_: supported)
        assert default_precision(torch.device("cuda", 0)) == name
    assert default_precision(torch.device("cpu")) == "32-true"


def test_adamw_is_one_kernel():
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3), 1e-3, dict.fromkeys(("weight", "bias"), 1.0))
    assert type(optimizer) is torch.optim.AdamW and all(group["fused"] for group in optimizer.param_groups)


def test_attention_needs_no_mask_in_memory_but_for_the_single_query_of_the_last_text_block(monkeypatch):
    calls: list[tuple[bool, bool, int]] = []
    plain = F.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        calls.append((options["attn_mask"] is not None, options["is_causal"], query.shape[-2]))
        return plain(query, key, value, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    model = build_model(CFG).train()
    encode_image(model, torch.randn(2, 3, 16, 16))
    assert calls == [(False, False, 5), (False, False, 5), (False, False, 1)]
    calls.clear()
    encode_text(model, torch.tensor([[1, 2, 99, 0], [1, 99, 0, 0]]), trim=False)
    assert calls == [(False, True, 4), (False, True, 4), (True, False, 1)]


class Copies(TorchDispatchMode):
    """Takes down copies between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[torch.dtype, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.device != args[0].device:
            self.found.append((out.dtype, bool((kwargs or {}).get("non_blocking"))))
        return out


@alone
def test_pixels_go_to_the_device_as_bytes_and_nobody_waits_for_them():
    rows = torch.arange(2)
    with FakeTensorMode(allow_non_fake_inputs=True), Copies() as copies:
        batch = Batch(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), rows[:, None], rows >= 0, rows, ["a", "b"], {})
        batch.to(torch.device("cuda", 0))
    types = [torch.uint8, torch.int64, torch.bool, torch.int64]
    assert copies.found == [(dtype, True) for dtype in types]


class One(Dataset):
    def __init__(self, item: Any):
        self.item = item

    def __getitem__(self, index: int) -> Any:
        return self.item


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_batch_of_the_loader_lies_in_page_locked_memory():
    rows = torch.arange(2)
    batch = Batch(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), rows[:, None], rows >= 0, rows, ["a", "b"], {})
    loader = in_order(One(batch), SequentialSampler([0]), InFlight(1), str, Wait(), 1, pin=True)
    assert next(iter(loader)).pixels.is_pinned()


class BucketViews(pl.Callback):
    """Writes down whether all gradients lie in larger memory that they share."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        grads = [each.grad for each in pl_module.parameters() if each.grad is not None]
        shared = len({grad.untyped_storage().data_ptr() for grad in grads})
        self.file.write_text(f"{len(grads)} {shared}")


def two_steps(resident: Resident, folder: Path, rank: int, port: int) -> None:
    os.environ |= rank_variables(rank, 2, port)
    run.quiet_libraries()
    with ranks.joined(TrainerConfig(accelerator="cpu", precision="32-true")) as place:
        (folder / str(rank)).mkdir()
        mine = Resident(resident.clip, resident.batch, resident.full_tokens, place)
        train(mine, folder / str(rank), 2, watching=[BucketViews(folder / f"views-{rank}")])


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_gradients_of_several_ranks_lie_in_the_buckets_that_are_sent(tmp_path):
    resident = place("tiny", 2, torch.device("cpu"), "32-true")
    start_ranks(2, lambda rank, port: two_steps(resident, tmp_path, rank, port))
    grads, shared = map(int, (tmp_path / "views-0").read_text().split())
    assert grads > 50 and shared == 2
