"""What is kept of a data set: its pairs by prompt, the account of its rows, and the examples that training uses."""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypedDict, get_args

from dpo.data.examples import TextExample, Truncation
from dpo.system.errors import UserError

REPEATED = "kept although it repeats an earlier row"
ONE_TARGET = "left out: SFT trains on one target per prompt, and a later row has the same prompt"


class Entry(TypedDict):
    """What is kept of a prompt; pairs are (chosen, rejected), as indices of responses."""

    responses: list[str]
    pairs: list[tuple[int, int]]
    sft_target: str


class PreferenceData(dict[str, Entry]):
    """A map prompt -> {"responses": [...], "pairs": [(chosen, rejected), ...], "sft_target": ...}, with its account.

    truncation names the end of an over-long prompt that is kept. drop_unusable asks for rows that cannot be trained on
    to be left out; hh, shp and se keep what the original keeps.

    counts holds the number of rows read and kept, of those not trained on ("dropped: ..." where they are unusable,
    "left out: ..." else), and of remarkable ones ("kept although ..."): read == kept + n_left_out(counts). notes are
    lines to print once. rows holds the row number (from 1) of each pair of a prompt, kept_rows that of each of its
    rows. SFT trains on sft_target.
    """

    def __init__(self, truncation: Truncation, drop_unusable: bool = False):
        super().__init__()
        if truncation not in get_args(Truncation):
            raise UserError(f"PreferenceData({truncation!r}): must be one of {', '.join(get_args(Truncation))}")
        self.truncation = truncation
        self.drop_unusable = drop_unusable
        self.counts: Counter[str] = Counter()
        self.notes: list[str] = []
        self.rows: dict[str, list[int]] = {}
        self.kept_rows: dict[str, list[int]] = {}
        self.seen: set[tuple[str, str, str]] = set()

    def add(self, prompt: str, responses: Sequence[str], pairs: Iterable[tuple[int, int]], sft_target: str) -> None:
        """Append the last read row's responses to a prompt; pairs index them; its sft_target replaces earlier ones."""
        self.counts["kept"] += 1
        entry = self.setdefault(prompt, {"responses": [], "pairs": [], "sft_target": sft_target})
        first = len(entry["responses"])
        new_pairs = [(first + chosen, first + rejected) for chosen, rejected in pairs]
        entry["responses"].extend(responses)
        entry["pairs"].extend(new_pairs)
        entry["sft_target"] = sft_target
        row = self.counts["read"]
        self.rows.setdefault(prompt, []).extend([row] * len(new_pairs))
        self.kept_rows.setdefault(prompt, []).append(row)

    def add_pair(self, prompt: str, chosen: str, rejected: str) -> bool:
        """Add the last read row's pair, whose chosen response is the sft_target; count what is remarkable.

        Return whether the pair was kept.
        """
        if not self.accepts(prompt, chosen, rejected):
            return False
        self.add(prompt, [chosen, rejected], [(0, 1)], chosen)
        return True

    def accepts(self, prompt: str, chosen: str, rejected: str) -> bool:
        """Return whether a pair can be trained on, or is kept anyway; count what is remarkable."""
        found = flaws(prompt, (chosen, rejected))
        if found and self.drop_unusable:
            self.counts[f"dropped: {found[0]}"] += 1
            return False
        self.counts.update(f"kept although {flaw}" for flaw in found)
        self.counts[REPEATED] += (prompt, chosen, rejected) in self.seen
        self.seen.add((prompt, chosen, rejected))
        return True

    def leave_out(self, what: str, n: int) -> None:
        """Count n kept rows as not trained on after all."""
        self.counts["kept"] -= n
        self.counts[what] += n


def n_left_out(counts: Mapping[str, int]) -> int:
    """Return the number of rows that were read and are not trained on, for whatever reason."""
    return sum(n for what, n in counts.items() if what.startswith(("dropped: ", "left out: ")))


def flaws(prompt: str, responses: Sequence[str]) -> list[str]:
    """Return the reasons for which a prompt and its responses cannot teach anything."""
    problems = {
        "the prompt is empty": not prompt.strip(),
        "a response is empty": not all(map(str.strip, responses)),
        "both responses are equal": len(responses) > 1 and responses[0] == responses[1],
    }
    return [problem for problem, is_so in problems.items() if is_so]


def make_groups(
    data: PreferenceData, source: str, sft: bool, eos: str, empty_prompts: Collection[str] = ()
) -> list[list[TextExample]]:
    """Turn a data set into one list of examples per prompt, the unit of the shuffle.

    Texts that hold the eos token are dropped or kept as data.drop_unusable says, rows of empty_prompts (those that have
    no token) always dropped. data is brought up to date with what was dropped, so call this once.
    """
    groups = []
    for prompt in list(data):
        if prompt in empty_prompts:
            data.leave_out("dropped: the tokenizer turns the prompt into no token", len(data.kept_rows[prompt]))
            texts = []
        else:
            responses = sft_responses(data, prompt) if sft else pair_responses(data, prompt)
            texts = [TextExample(prompt, texts, data.truncation, row, source) for texts, row in responses]
            texts = handle_eos(data, texts, eos)
        if texts or not data.drop_unusable:  # a prompt without a pair takes part in the original's shuffle
            groups.append(texts)
        else:
            del data[prompt]
    if sft:
        data.counts.pop(REPEATED, None)  # of equal rows one is kept, and the others are counted as left out
    return groups


def pair_responses(data: PreferenceData, prompt: str) -> list[tuple[tuple[str, str], int]]:
    """Return ((chosen, rejected), row) for each pair of a prompt."""
    responses, pairs = data[prompt]["responses"], data[prompt]["pairs"]
    texts = [(responses[chosen], responses[rejected]) for chosen, rejected in pairs]
    return list(zip(texts, data.rows[prompt], strict=True))


def sft_responses(data: PreferenceData, prompt: str) -> list[tuple[tuple[str], int]]:
    """Return ((target,), row) for the SFT target of a prompt; count the other rows."""
    rows = data.kept_rows[prompt]
    data.leave_out(ONE_TARGET, len(rows) - 1)
    return [((data[prompt]["sft_target"],), rows[-1])]


def handle_eos(data: PreferenceData, texts: list[TextExample], eos: str) -> list[TextExample]:
    """Drop and count, or count alone, the texts of a prompt that hold the eos token."""
    without = [text for text in texts if not any(eos in string for string in (text.prompt, *text.responses))]
    n_with = len(texts) - len(without)
    if n_with and data.drop_unusable:
        data.leave_out(f"dropped: the text holds {eos}", n_with)
        return without
    if n_with:
        data.counts[f"kept although the text holds {eos}"] += n_with
    return texts


# Rows


@contextmanager
def reading_row(counts: Counter[str], where: str, number: int | None = None) -> Iterator[None]:
    """Count a row as read; UserError that names it if it does not have the form that the data set should have."""
    counts["read"] += 1
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        reason = str(error) if isinstance(error, UserError) else f"has another form ({type(error).__name__}: {error})"
        raise UserError(f"{where}, row {number or counts['read']}: {reason}") from None


def text_in(row: Mapping[str, Any], name: str) -> str:
    """Return a field of a row; UserError if it is not a text that can be written as UTF-8."""
    if name not in row:
        raise UserError(f"{name} must be a text, not missing")
    return checked_text(row[name], name)


def score_in(row: Mapping[str, Any], name: str) -> float:
    """Return a field of a row; UserError if it is not a finite number."""
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, not {value!r:.40}")
    return float(value)


def checked_text(text: object, name: str) -> str:
    """Return a text; UserError if it is none that can be written as UTF-8."""
    if not isinstance(text, str):
        raise UserError(f"{name} must be a text, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name} holds half of a surrogate pair, which is not a text") from None
    return text


def as_preference_data(value: object, name: str) -> PreferenceData:
    """Return what a function in DATASETS returned as PreferenceData; UserError if it has neither allowed form.

    A plain map prompt -> {"responses", "pairs", "sft_target"}, as the original's functions return it, counts one row
    per prompt and keeps the start of over-long prompts, as the original does for every data set but hh.
    """
    if isinstance(value, PreferenceData):
        return value
    if not isinstance(value, Mapping):
        form = 'a PreferenceData or a dict {prompt: {"responses", "pairs", "sft_target"}}'
        raise UserError(f"DATASETS[{name!r}]: its function must return {form}, not {type(value).__name__}")
    data = PreferenceData("keep_start")
    for prompt, entry in value.items():
        with reading_row(data.counts, f"data set {name}"):
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
    data.add(prompt, responses, pairs, text_in(entry, "sft_target"))
