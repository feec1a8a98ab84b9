"""What becomes of the rows of a data set: how many are kept, and why others are dropped."""

from collections import Counter

DROPPED, WARNED = "dropped: ", "kept although "


class RowStatistics(Counter[str]):
    """The number of a data set's rows that were "kept", "dropped: REASON" and "kept although REASON"."""

    @property
    def dropped(self) -> int:
        return sum(n for what, n in self.items() if what.startswith(DROPPED))

    @property
    def read(self) -> int:
        return self["kept"] + self.dropped

    def drop(self, why: str, n: int = 1) -> None:
        self[DROPPED + why] += n

    def drop_kept(self, why: str, n: int) -> None:
        """Count n rows as dropped that were counted as kept before."""
        self["kept"] -= n
        self[DROPPED + why] += n

    def warn(self, why: str, n: int = 1) -> None:
        """Count n kept rows with a warning."""
        self[WARNED + why] += n

    def summary(self, n_prompts: int) -> str:
        """One line for the log."""
        reasons, details = [], [f"{n_prompts:,} prompts"]
        for what, n in self.items():
            if n and what.startswith(DROPPED):
                reasons.append(f"{n:,} because {what.removeprefix(DROPPED)}")
            elif n and what not in ("kept", "read"):  # functions written for earlier versions count "read" themselves
                details.append(f"{n:,} {what}")
        dropped = f", {self.dropped:,} dropped ({', '.join(reasons)})" if reasons else ""
        return "; ".join([f"{self.read:,} rows read: {self['kept']:,} kept{dropped}", *details])
