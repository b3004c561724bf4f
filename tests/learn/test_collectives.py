"""What a step sends between ranks, counted by torch's profiler: a wrapper in Python would not see DDP's buckets."""

from collections import Counter

import pytest
from ranks import on_ranks
from test_step import Wrapped, own_step, prepared_backward, scale_and_bias, small_case
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function

GATHER, REDUCE = "gloo:all_gather", "gloo:all_reduce"
BUCKET_MB = 0.0005  # so that even these small towers fill several


def collectives_of_a_step(name: str, micro_batch: int, with_ids: bool) -> dict[str, dict[str, int] | int]:
    """Names and numbers of a step's collectives, of those during its backward, and DDP's number of buckets."""
    case = small_case()
    scale_and_bias(case.model, name)  # before DDP looks at what is trained
    wrapped = DistributedDataParallel(Wrapped(case.model), bucket_cap_mb=BUCKET_MB)
    prepared = prepared_backward(wrapped)

    def backward(loss: Tensor) -> None:
        with record_function("backward"):
            prepared(loss)

    def step() -> None:
        own_step(case, wrapped, name, "share", micro_batch, backward, with_ids)

    for _ in range(2):  # DDP makes its buckets anew after the first step
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    events = profiler.events() or []
    spans = [event.time_range for event in events if event.name == "backward"]
    sent = [event for event in events if event.name.startswith(("gloo:", "nccl:", "c10d::"))]
    during = [e for e in sent if any(span.start <= e.time_range.start <= span.end for span in spans)]
    buckets = wrapped._get_ddp_logging_data()["rebuilt_bucket_sizes"].split(",")
    return {
        "backwards": len(spans),
        "all": dict(Counter(event.name for event in sent)),
        "during backward": dict(Counter(event.name for event in during)),
        "buckets": len(buckets),
    }


SETTINGS = [("clip", 100, True), ("clip", 2, True), ("siglip", 100, True), ("siglip", 2, True), ("clip", 2, False)]


def collectives() -> list[dict[str, dict[str, int] | int]]:
    return [collectives_of_a_step(*setting) for setting in SETTINGS]


@pytest.mark.process
def test_a_step_gathers_features_ids_and_log_sum_exps_once_and_its_backward_only_fills_ddps_buckets(tmp_path):
    for found in on_ranks(2, tmp_path, collectives):
        for (name, micro_batch, with_ids), of in zip(SETTINGS, found, strict=True):
            gathers, buckets = 1 + (name == "clip") + with_ids, of["buckets"]
            assert of["backwards"] == (1 if micro_batch == 100 else 3) and buckets > 2
            assert of["all"] == {
                "c10d::_allgather_base_": gathers,
                GATHER: gathers,
                "c10d::allreduce_": buckets,
                REDUCE: buckets,
            }
            assert of["during backward"] == {"c10d::allreduce_": buckets, REDUCE: buckets}
