"""Steps whose gradients were not finite: all ranks leave them out, and say which samples were to blame."""

from collections.abc import Callable

from clipft.learn.gather import all_objects
from clipft.learn.module import StepRecord
from clipft.report import RunFailed

SHOWN_KEYS = 8


class Skips:
    def __init__(self, max_skipped: int, say: Callable[[str], None]):
        self.max_skipped, self.say, self.in_a_row = max_skipped, say, 0

    def add(self, record: StepRecord, keys: list[str], skipped: bool) -> None:
        """Reports a skipped step, on all ranks together; raises after max_skipped in a row."""
        if not skipped:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        mine = [key for key, fine in zip(keys, record.finite.tolist(), strict=True) if not fine]
        guilty = [key for each in all_objects(mine) for key in each]
        shown = ", ".join(guilty[:SHOWN_KEYS]) + (
            f" and {len(guilty) - SHOWN_KEYS} more" if guilty[SHOWN_KEYS:] else ""
        )
        cause = f"features of {shown} are not" if guilty else "all features are, so it happened in the backward pass"
        self.say(f"step {record.step} is left out: its gradients are not finite ({cause})")
        if self.in_a_row >= self.max_skipped:
            raise RunFailed(
                f"{self.in_a_row} steps in a row, up to step {record.step}, had gradients that are not finite "
                f"(train.max_skipped={self.max_skipped}). The weights are still those before them. Lower optim.lr or "
                "raise optim.warmup_frac, use trainer.precision=32-true, or look at the samples named above; "
                "resume=force goes on from the last saved state under the new settings."
            )
