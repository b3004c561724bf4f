"""What became of every sample: indexed = used + dropped + left out + not reached."""

from collections import Counter
from typing import Any

from clipft.data.loader import Batch
from clipft.learn.gather import all_objects

SEEN_BEFORE_JUDGING = 200  # one bad sample among the first few is no rate


class Ledger:
    """Counts over all ranks; reasons come together when a state is saved."""

    def __init__(self, max_bad_frac: float):
        self.max_bad_frac = max_bad_frac
        self.num_slots = self.num_used = self.num_dropped = 0
        self.reasons: Counter[str] = Counter()  # of all ranks, up to the last meeting
        self.mine: Counter[str] = Counter()  # of this rank, since then

    def see(self, batch: Batch) -> int:
        """Takes note of the reasons in this rank's batch; returns how many rows were dropped."""
        self.mine.update(batch.dropped)
        return sum(batch.dropped.values())

    def add(self, batch_size: int, used: int, dropped: int) -> None:
        """Adds a step and its sums over ranks; raises when too many samples could not be used."""
        self.num_slots += batch_size
        self.num_used, self.num_dropped = self.num_used + used, self.num_dropped + dropped
        seen = self.num_used + self.num_dropped
        if seen >= SEEN_BEFORE_JUDGING and self.num_dropped > self.max_bad_frac * seen:
            reasons = ", ".join(f"{reason} {count}" for reason, count in (self.reasons + self.mine).most_common(5))
            raise ValueError(
                f"{self.num_dropped} of the first {seen} samples could not be used ({reasons} on this rank), "
                f"more than data.max_bad_frac={self.max_bad_frac}. Repair the data, or raise the limit."
            )

    def meet(self) -> None:
        """Joins the reasons of all ranks; every rank has to come."""
        for counts in all_objects(dict(self.mine)):
            self.reasons.update(counts)
        self.mine.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"slots": self.num_slots, "used": self.num_used, "dropped": dict(self.reasons)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_slots, self.num_used, self.reasons = state["slots"], state["used"], Counter(state["dropped"])
        self.num_dropped = sum(self.reasons.values())


def account(state: dict[str, Any], num_units: int, batch_size: int, step: int) -> dict[str, Any]:
    """The ledger of `step` steps as results.json shows it; raises if a sample is not accounted for."""
    used, dropped = state["used"], sum(state["dropped"].values())
    per_epoch = num_units // batch_size
    whole, begun = step // per_epoch, -(-step // per_epoch)
    left_out = whole * (num_units - per_epoch * batch_size)
    if used + dropped != state["slots"]:
        raise RuntimeError(
            f"the ledger does not balance: {used} used and {dropped} dropped of {state['slots']} samples"
        )
    if state["slots"] != step * batch_size:  # resume=force has changed the batch on the way: no whole epochs to count
        return {"used": used, "dropped": state["dropped"]}
    return {
        "epochs": begun,
        "indexed": begun * num_units,
        "used": used,
        "dropped": state["dropped"],
        "left_out": left_out,
        "not_reached": begun * num_units - left_out - step * batch_size,
    }
