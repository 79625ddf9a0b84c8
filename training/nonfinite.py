"""Steps whose loss or gradient is not finite: how many are borne, and what is done after that.

Not here: telling whether a step is finite (`loop`), going back itself (`resume`).
"""

import dataclasses
from typing import Any

WITHIN = 100
MOST_RETURNS = 2


class NotFinite(RuntimeError):
    """Loss or gradient stayed not finite, and there is nothing left to try."""


@dataclasses.dataclass
class Skips:
    """Counts skipped steps.

    Fields: most, skipped steps among the last hundred that are borne; recent, numbers of those;
    streak, how many were skipped in a row just now; total; returns, how often the run went back.
    """

    most: int
    recent: list[int] = dataclasses.field(default_factory=list)
    streak: int = 0
    total: int = 0
    returns: int = 0

    def fine(self) -> None:
        """Count a step that was taken."""
        self.streak = 0

    def skip(self, step: int) -> bool:
        """Count a skipped step; tells whether these are more than are borne."""
        self.streak += 1
        self.total += 1
        self.recent = [s for s in self.recent if s > step - WITHIN] + [step]
        return len(self.recent) > self.most

    def go_back(self) -> bool:
        """Count a return to older weights; tells whether one more is allowed."""
        self.recent, self.streak = [], 0
        self.returns += 1
        return self.returns <= MOST_RETURNS

    def state(self) -> dict[str, Any]:
        """Return the counts for a checkpoint."""
        kept = dataclasses.asdict(self)
        del kept["most"]
        return kept

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a checkpoint's counts."""
        for name, value in state.items():
            setattr(self, name, value)
