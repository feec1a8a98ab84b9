"""A data set in memory, as the functions in DATASETS return it: responses and pairs by prompt."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypedDict, get_args

from dpo.data.examples import Truncation
from dpo.data.messages import checked_text, naming_row
from dpo.data.rows import Row
from dpo.data.statistics import RowStatistics
from dpo.system.errors import UserError


class Entry(TypedDict):
    """The data of a prompt; pairs are (chosen, rejected) indices of responses."""

    responses: list[str]
    pairs: list[tuple[int, int]]
    sft_target: str


class AddedRow(NamedTuple):
    """A row of a prompt; pairs are (chosen, rejected) indices of the row's responses."""

    number: int
    responses: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]


class PreferenceData(dict[str, Entry]):
    """A map prompt -> {"responses": [...], "pairs": [(chosen, rejected), ...], "sft_target": ...}, with statistics.

    truncation says which end of an over-long prompt is kept. drop_unusable drops rows that cannot be trained on; hh,
    shp and se keep what the original keeps. Count each row with one call of add, add_pair or counts.drop.

    rows has the rows of each prompt, numbered from 1. SFT trains on sft_target.
    """

    def __init__(self, truncation: Truncation, drop_unusable: bool = False):
        super().__init__()
        if truncation not in get_args(Truncation):
            raise UserError(f"PreferenceData({truncation!r}): must be one of {', '.join(get_args(Truncation))}")
        self.truncation = truncation
        self.drop_unusable = drop_unusable
        self.counts = RowStatistics()
        self.rows: dict[str, list[AddedRow]] = {}

    def add(self, prompt: str, responses: Sequence[str], pairs: Iterable[tuple[int, int]], sft_target: str) -> None:
        """Append a row's responses to a prompt; pairs are indices into them; sft_target replaces an earlier one."""
        row = AddedRow(self.counts.read + 1, tuple(responses), tuple(pairs))
        self.counts["kept"] += 1
        entry = self.setdefault(prompt, {"responses": [], "pairs": [], "sft_target": sft_target})
        first = len(entry["responses"])
        entry["pairs"].extend((first + chosen, first + rejected) for chosen, rejected in row.pairs)
        entry["responses"].extend(responses)
        entry["sft_target"] = sft_target
        self.rows.setdefault(prompt, []).append(row)

    def add_pair(self, prompt: str, chosen: str, rejected: str) -> None:
        """Add a row's pair, with the chosen response as sft_target."""
        self.add(prompt, [chosen, rejected], [(0, 1)], chosen)

    def drop_prompt(self, prompt: str, why: str) -> None:
        """Remove all rows of a prompt, and count them as dropped."""
        self.counts.drop_kept(why, len(self.rows[prompt]))
        self[prompt]["responses"], self[prompt]["pairs"] = [], []
        self.rows[prompt] = []

    def numbered_rows(self, sft: bool) -> Iterator[tuple[int, Row]]:
        """Yield the rows of each prompt with their numbers; for SFT each has the prompt's target."""
        for prompt, rows in self.rows.items():
            target = (self[prompt]["sft_target"],)
            for number, responses, pairs in rows:
                yield number, Row(prompt, target if sft else responses, () if sft else pairs, every_target=False)


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
    data.add(prompt, responses, pairs, checked_text(entry.get("sft_target"), "sft_target"))
