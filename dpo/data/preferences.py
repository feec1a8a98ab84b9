"""A data set in memory: pairs by prompt, statistics of its rows, and the examples that training uses."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypedDict, get_args

from dpo.data.examples import TextExample, Truncation
from dpo.data.messages import checked_text
from dpo.system.errors import UserError

REPEATED = "it repeats an earlier row"
ONE_TARGET = "SFT trains on one target per prompt, and a later row has the same prompt"
NO_TOKEN = "the prompt has no tokens"
DROPPED, WARNED = "dropped: ", "kept although "


class RowStatistics(Counter[str]):
    """The number of rows of a data set that were "kept", "dropped: WHY", and "kept although WHY"."""

    @property
    def dropped(self) -> int:
        return sum(n for what, n in self.items() if what.startswith(DROPPED))

    @property
    def read(self) -> int:
        return self["kept"] + self.dropped

    def drop(self, why: str) -> None:
        self[DROPPED + why] += 1

    def drop_kept(self, why: str, n: int) -> None:
        """Count n rows that were counted as kept as dropped."""
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
            elif n and what not in ("kept", "read"):  # functions of earlier versions count "read" themselves
                details.append(f"{n:,} {what}")
        dropped = f", {self.dropped:,} dropped ({', '.join(reasons)})" if reasons else ""
        return "; ".join([f"{self.read:,} rows read: {self['kept']:,} kept{dropped}", *details])


class Entry(TypedDict):
    """The data of a prompt; pairs are (chosen, rejected) indices of responses."""

    responses: list[str]
    pairs: list[tuple[int, int]]
    sft_target: str


class PreferenceData(dict[str, Entry]):
    """A map prompt -> {"responses": [...], "pairs": [(chosen, rejected), ...], "sft_target": ...}, with statistics.

    truncation says which end of an over-long prompt is kept. drop_unusable drops rows that cannot be trained on; hh,
    shp and se keep what the original keeps. Count each row with one call of add, add_pair or counts.drop.

    rows has the row numbers (from 1) of a prompt's pairs, kept_rows those of its rows. SFT trains on sft_target.
    """

    def __init__(self, truncation: Truncation, drop_unusable: bool = False):
        super().__init__()
        if truncation not in get_args(Truncation):
            raise UserError(f"PreferenceData({truncation!r}): must be one of {', '.join(get_args(Truncation))}")
        self.truncation = truncation
        self.drop_unusable = drop_unusable
        self.counts = RowStatistics()
        self.rows: dict[str, list[int]] = {}
        self.kept_rows: dict[str, list[int]] = {}
        self.seen: set[tuple[str, str, str]] = set()

    def add(self, prompt: str, responses: Sequence[str], pairs: Iterable[tuple[int, int]], sft_target: str) -> None:
        """Append a row's responses to a prompt; pairs are indices into them; sft_target replaces an earlier one."""
        row = self.counts.read + 1
        self.counts["kept"] += 1
        entry = self.setdefault(prompt, {"responses": [], "pairs": [], "sft_target": sft_target})
        first = len(entry["responses"])
        new_pairs = [(first + chosen, first + rejected) for chosen, rejected in pairs]
        entry["responses"].extend(responses)
        entry["pairs"].extend(new_pairs)
        entry["sft_target"] = sft_target
        self.rows.setdefault(prompt, []).extend([row] * len(new_pairs))
        self.kept_rows.setdefault(prompt, []).append(row)

    def add_pair(self, prompt: str, chosen: str, rejected: str) -> bool:
        """Add a row's pair, with the chosen response as sft_target, or count it as dropped; True if it was kept."""
        if not self.accepts(prompt, chosen, rejected):
            return False
        self.add(prompt, [chosen, rejected], [(0, 1)], chosen)
        return True

    def accepts(self, prompt: str, chosen: str, rejected: str) -> bool:
        """Whether a pair is kept. If not, count its row as dropped; otherwise count warnings."""
        errors = validation_errors(prompt, (chosen, rejected))
        if errors and self.drop_unusable:
            self.counts.drop(errors[0])
            return False
        for error in errors:
            self.counts.warn(error)
        self.counts.warn(REPEATED, (prompt, chosen, rejected) in self.seen)
        self.seen.add((prompt, chosen, rejected))
        return True

    def drop_prompt(self, prompt: str, why: str) -> None:
        """Remove all rows of a prompt, and count them as dropped."""
        self.counts.drop_kept(why, len(self.kept_rows[prompt]))
        self[prompt]["responses"], self[prompt]["pairs"] = [], []
        self.rows[prompt], self.kept_rows[prompt] = [], []


def validation_errors(prompt: str, responses: Sequence[str]) -> list[str]:
    """The reasons why a prompt and its responses cannot be trained on."""
    errors = {
        "the prompt is empty": not prompt.strip(),
        "a response is empty": not all(map(str.strip, responses)),
        "both responses are equal": len(responses) > 1 and responses[0] == responses[1],
    }
    return [error for error, is_so in errors.items() if is_so]


def make_groups(
    data: PreferenceData, source: str, sft: bool, eos: str, empty_prompts: Collection[str] = ()
) -> list[list[TextExample]]:
    """Turn a data set into one list of examples per prompt, the unit of the shuffle.

    Texts with the eos token are dropped if data.drop_unusable is set; rows of empty_prompts (prompts without tokens)
    are always dropped. This updates data, so call it once.
    """
    groups = []
    for prompt, entry in list(data.items()):
        rows = data.kept_rows[prompt]
        examples: list[tuple[tuple[str, ...], int]] = []
        if prompt in empty_prompts:
            data.counts.drop_kept(NO_TOKEN, len(rows))
        elif sft:
            examples = [((entry["sft_target"],), rows[-1])]
            data.counts.drop_kept(ONE_TARGET, len(rows) - 1)
        else:
            pairs = [(entry["responses"][chosen], entry["responses"][rejected]) for chosen, rejected in entry["pairs"]]
            examples = list(zip(pairs, data.rows[prompt], strict=True))
        group = [TextExample(prompt, responses, data.truncation, row, source) for responses, row in examples]
        group = handle_eos(data, group, eos)
        if group or not data.drop_unusable:  # the original also shuffles prompts without a pair
            groups.append(group)
        else:
            del data[prompt]
    if sft:
        data.counts.pop(WARNED + REPEATED, None)  # one of equal rows is kept, the others are dropped
    return groups


def handle_eos(data: PreferenceData, group: list[TextExample], eos: str) -> list[TextExample]:
    """Count the examples of a prompt with the eos token, and drop them if data.drop_unusable is set."""
    without = [text for text in group if not any(eos in string for string in text.strings())]
    n_with = len(group) - len(without)
    if not n_with:
        return group
    if data.drop_unusable:
        data.counts.drop_kept(f"the text contains {eos}", n_with)
        return without
    data.counts.warn(f"the text contains {eos}", n_with)
    return group


@contextmanager
def naming_row(where: str, number: int) -> Iterator[None]:
    """Raise UserError that names the row if it has a wrong form."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        reason = str(error) if isinstance(error, UserError) else f"has a wrong form ({type(error).__name__}: {error})"
        raise UserError(f"{where}, row {number}: {reason}") from None


def as_preference_data(value: object, name: str) -> PreferenceData:
    """Convert the result of a function in DATASETS to PreferenceData; UserError if it has neither allowed form.

    A plain map prompt -> {"responses", "pairs", "sft_target"}, as the original's functions return, counts one row per
    prompt and keeps the start of over-long prompts, as the original does for all data sets but hh.
    """
    if isinstance(value, PreferenceData):
        return value
    if not isinstance(value, Mapping):
        form = 'a PreferenceData or a dict {prompt: {"responses", "pairs", "sft_target"}}'
        raise UserError(f"DATASETS[{name!r}]: its function must return {form}, not {type(value).__name__}")
    data = PreferenceData("keep_start")
    for number, (prompt, entry) in enumerate(value.items(), start=1):
        with naming_row(f"data set {name}", number):
            add_entry(data, checked_text(prompt, "the prompt"), entry)
    return data


def add_entry(data: PreferenceData, prompt: str, entry: object) -> None:
    """Add one prompt of a plain map, as a row; UserError if it has another form."""
    if not isinstance(entry, Mapping):
        raise UserError(f"must be a dict with responses, pairs and sft_target, not {type(entry).__name__}")
    responses = [checked_text(text, "a response") for text in entry["responses"]]
    pairs = [(chosen, rejected) for chosen, rejected in entry["pairs"]]
    for pair in pairs:
        if not all(isinstance(index, int) and 0 <= index < len(responses) for index in pair):
            raise UserError(f"the pair {pair} must index the {len(responses)} responses")
        data.accepts(prompt, *(responses[index] for index in pair))
    data.add(prompt, responses, pairs, checked_text(entry.get("sft_target"), "sft_target"))
