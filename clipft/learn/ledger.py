"""What became of every sample: indexed = used + dropped + left out + not reached."""

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

from clipft.data.loader import Batch
from clipft.learn.gather import all_objects, rank, world
from clipft.report import RunFailed

SEEN_BEFORE_JUDGING = 200  # one bad sample among the first few is no rate
MOST_IN_A_ROW = 100
NUM_EXAMPLES = 5  # keys that are kept for each reason


class Ledger:
    """Counts over all ranks; reasons and examples come together when a state is saved."""

    def __init__(self, max_bad_frac: float, num_all: int, data: str):
        """`num_all` slots are those of the whole run; `data` names what they are filled with."""
        self.max_bad_frac, self.num_all, self.data = max_bad_frac, num_all, data
        self.data_changed = False  # on the way, under resume=force
        self.num_slots = self.num_used = self.num_dropped = 0
        self.in_a_row = 0  # unusable samples up to the newest one, in the order of the global batches
        self.reasons: Counter[str] = Counter()  # of all ranks, up to the last meeting
        self.examples: dict[str, list[str]] = {}
        self.mine: Counter[str] = Counter()  # of this rank, since then
        self.my_examples: dict[str, list[str]] = {}

    def add(self, rows: Sequence[int], used: int, sums: Sequence[int], mine: Sequence[tuple[str, str]]) -> None:
        """Adds a step of so many rows on each rank; raises, on all ranks, when too many samples could not be used.

        `sums` are bad_counts, summed over ranks; `mine` has key and reason of this rank's bad rows.
        """
        for key, reason in mine:
            self.mine[reason] += 1
            note(self.my_examples, reason, [key])
        dropped, *runs = sums
        self.num_slots += sum(rows)
        self.num_used, self.num_dropped = self.num_used + used, self.num_dropped + dropped
        longest, self.in_a_row = longest_run(self.in_a_row, rows, runs)
        seen = self.num_used + self.num_dropped
        if longest >= MOST_IN_A_ROW:
            self._give_up(f"{longest} samples in a row could not be used", "Repair the data, or see why it is not read")
        if seen >= min(SEEN_BEFORE_JUDGING, self.num_all) and self.num_dropped > self.max_bad_frac * seen:
            limit = f", more than data.max_bad_frac={self.max_bad_frac}"
            what = f"{self.num_dropped} of the first {seen} samples could not be used{limit}"
            self._give_up(what, "Repair the data, or raise the limit")

    def _give_up(self, what: str, advice: str) -> None:
        self.meet()
        reasons = "; ".join(
            f"{reason} {count}, such as {', '.join(self.examples[reason])}"
            for reason, count in self.reasons.most_common(5)
        )
        raise RunFailed(f"{what} ({reasons}). {advice}; clipft data verify with out=FILE names all of them.")

    def line(self) -> str:
        """The ledger in a few words for the line of progress."""
        reasons = ", ".join(reason for reason, _ in (self.reasons + self.mine).most_common(3))
        dropped = f"  dropped {self.num_dropped:,}" + (f" ({reasons})" if reasons else "")
        of_all = "" if self.data_changed else f" of {self.num_all:,}"
        return f"used {self.num_used:,}{of_all}" + (dropped if self.num_dropped else "")

    def meet(self) -> None:
        """Joins the reasons and examples of all ranks; every rank has to come."""
        for counts, examples in all_objects((dict(self.mine), self.my_examples)):
            self.reasons.update(counts)
            for reason, keys in examples.items():
                note(self.examples, reason, keys)
        self.mine.clear()
        self.my_examples = {}

    def state_dict(self) -> dict[str, Any]:
        return {
            "slots": self.num_slots,
            "used": self.num_used,
            "dropped": dict(self.reasons),
            "examples": self.examples,
            "in_a_row": self.in_a_row,
            "data": self.data,
            "data_changed": self.data_changed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_slots, self.num_used, self.reasons = state["slots"], state["used"], Counter(state["dropped"])
        self.num_dropped = sum(self.reasons.values())
        self.examples, self.in_a_row = state["examples"], state["in_a_row"]
        self.data_changed = state["data_changed"] or state["data"] != self.data


def bad_counts(batch: Batch) -> list[int]:
    """What the ledger wants to have summed over ranks: the number of bad rows, then for each rank its bad_run."""
    runs = [0] * 3 * world()
    runs[3 * rank() : 3 * rank() + 3] = bad_run(batch.bad, len(batch))
    return [len(batch.bad), *runs]


def note(examples: dict[str, list[str]], reason: str, keys: list[str]) -> None:
    """Adds the keys to those of the reason, as far as there is room and they are new."""
    kept = examples.setdefault(reason, [])
    kept += [key for key in keys if key not in kept][: NUM_EXAMPLES - len(kept)]


def bad_run(bad: Collection[int], num_rows: int) -> tuple[int, int, int]:
    """How many of num_rows rows are bad one after the other: at their beginning, at most, at their end."""
    if not bad:
        return 0, 0, 0
    good = [-1, *(row for row in range(num_rows) if row not in bad), num_rows]
    gaps = [after - before - 1 for before, after in pairwise(good)]
    return gaps[0], max(gaps), gaps[-1]


def longest_run(before: int, rows: Sequence[int], runs: Sequence[int]) -> tuple[int, int]:
    """The longest run of ranks laid end to end behind a run of `before`, and the one that goes on at their end.

    `runs` has three numbers for each rank (see bad_run).
    """
    longest = current = before
    for num_rows, head, most, tail in zip(rows, runs[::3], runs[1::3], runs[2::3], strict=True):
        longest = max(longest, current + head, most)
        current = current + num_rows if head == num_rows else tail
    return longest, current


def account(
    state: dict[str, Any],
    *,
    num_units: int | None,
    per_epoch: int,
    batch_size: int,
    step: int,
    incomplete: dict[str, int],
    examples: dict[str, str],
) -> dict[str, Any]:
    """The ledger of `step` steps as results.json shows it; raises if a sample is not accounted for.

    `num_units` are those of an epoch, of which `per_epoch` steps use all but a remainder. `incomplete` are the samples
    that the index of the shards leaves out of each epoch, by reason, with one of each in `examples`. Where there are
    no epochs (num_units None for a mix, or data that changed on the way) it says what was drawn.
    """
    used, dropped = state["used"], sum(state["dropped"].values())
    if used + dropped != state["slots"]:
        raise RuntimeError(
            f"the ledger does not balance: {used} used and {dropped} dropped of {state['slots']} samples"
        )
    shown = {**{reason: [key] for reason, key in examples.items()}, **state["examples"]}
    if num_units is None or state["data_changed"]:
        drawn = {"drawn": state["slots"], "used": used, "dropped": state["dropped"]}
        return {**drawn, "incomplete": incomplete, "examples": shown}
    if state["slots"] != step * batch_size:
        raise RuntimeError(f"the ledger does not balance: {state['slots']} samples in {step} steps of {batch_size}")
    whole, begun = step // per_epoch, -(-step // per_epoch)
    left_out = whole * (num_units - per_epoch * batch_size)
    never = {reason: begun * count for reason, count in incomplete.items()}
    return {
        "epochs": begun,
        "indexed": begun * (num_units + sum(incomplete.values())),
        "used": used,
        "dropped": dict(Counter(state["dropped"]) + Counter(never)),
        "left_out": left_out,
        "not_reached": begun * num_units - left_out - step * batch_size,
        "examples": shown,
    }
