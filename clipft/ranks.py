"""This process's place among the ranks: device, process group, threads."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from clipft.config import TrainerConfig
from clipft.learn.gather import all_objects
from clipft.report import job_cores

Decided = TypeVar("Decided")


@dataclass(frozen=True)
class Ranks:
    device: torch.device
    rank: int
    world: int
    local_world: int
    precision: str
    """Lightning's name."""

    @property
    def first(self) -> bool:
        return self.rank == 0

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision as training uses it, for evaluation."""
        types = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
        if self.precision not in types:
            return nullcontext()
        return torch.autocast(self.device.type, types[self.precision])

    def cores(self) -> int:
        """Processor cores that this rank may count on."""
        return max(1, job_cores() // self.local_world)


@contextmanager
def joined(config: TrainerConfig) -> Iterator[Ranks]:
    """Joins the other ranks (torchrun's variables say which); leaves them at the end."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_world = (
        int(os.environ.get("LOCAL_RANK", 0)),
        int(os.environ.get("LOCAL_WORLD_SIZE", world)),
    )
    device = choose_device(config.accelerator, local_rank)
    if config.precision == "16-mixed" and device.type == "cpu":
        raise ValueError("trainer.precision='16-mixed' needs a GPU. Use 32-true or bf16-mixed on a CPU.")
    if "LOCAL_WORLD_SIZE" in os.environ and config.devices not in (1, local_world):
        raise ValueError(
            f"trainer.devices={config.devices}, but {local_world} processes were started on this machine. Leave it out."
        )
    ranks = Ranks(device, rank, world, local_world, config.precision or default_precision(device))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(ranks.cores())
    if world > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=config.dist_timeout_s))
    try:
        yield ranks
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def choose_device(accelerator: str, local_rank: int) -> torch.device:
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise ValueError(f"trainer.accelerator={accelerator!r}: torch sees no CUDA device. Use auto or cpu.")
    if accelerator == "mps" and not torch.backends.mps.is_available():
        raise ValueError("trainer.accelerator='mps': torch sees no MPS device. Use auto or cpu.")
    if accelerator in ("auto", "gpu") and torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"trainer.devices asks for device {local_rank + 1} and torch sees {torch.cuda.device_count()}. "
                "Use fewer trainer.devices, or trainer.accelerator=cpu."
            )
        return torch.device("cuda", local_rank)
    if accelerator in ("auto", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def default_precision(device: torch.device) -> str:
    """bf16 where the GPU has it, fp16 with a scaler on older ones, else fp32 (on CPUs bf16 is often slower)."""
    if device.type != "cuda":
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"


def first_to_all(ranks: Ranks, decide: Callable[[], Decided]) -> Decided:
    """What rank 0 decides, on every rank; what it finds wrong is raised on every rank."""
    said: list[Any] = [None]
    if ranks.first:
        try:
            said = [decide()]
        except (ValueError, OSError) as error:
            said = [error]
    if ranks.world > 1:
        dist.broadcast_object_list(said)
    decided = said[0]
    if isinstance(decided, Exception):
        raise decided
    return decided


def meet(ranks: Ranks) -> None:
    """Returns when every rank has come here."""
    if ranks.world > 1:
        dist.barrier()


def check_alike(facts: dict[str, str]) -> None:
    """Raises on every rank, naming rank and key, unless all have the same facts."""
    everyone = all_objects(facts)
    for rank, theirs in enumerate(everyone):
        for key in sorted(facts.keys() | theirs.keys()):
            if theirs.get(key) != everyone[0].get(key):
                raise ValueError(
                    f"{key} is {theirs.get(key)} on rank {rank} and {everyone[0].get(key)} on rank 0. All ranks must "
                    "have the same config, code, data, weights and versions."
                )
