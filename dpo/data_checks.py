"""What the data lacks for a run, and what its number of updates does not reach."""

from collections.abc import Sequence
from itertools import islice

from dpo.examples import BatchIterator, TextExample
from dpo.settings import Settings
from dpo.table_data import scores_of


def data_problems(settings: Settings, train_batches: BatchIterator, eval_batches: BatchIterator) -> list[str]:
    """Return one line for each way in which there is too little data."""
    problems, n = [], train_batches.n_items
    if n < settings.batch_size:
        remedy = f"lower it to {n} or less" if n else "give it some"
        problems.append(f"batch_size={settings.batch_size}: the training data holds {n} examples; {remedy}")
    elif len(train_batches) == 0:
        problems.append("n_epochs, n_examples: no update would be made; raise them")
    if eval_batches.n_items == 0:
        problems.append("datasets: there is no example to evaluate on; add a test.jsonl with at least one")
    return problems


def score_problems(groups: Sequence[Sequence[TextExample]]) -> list[str]:
    """Return a line on the first example without scores, which only files and hub data sets of one's own have."""
    unscored = () if all(scores_of(groups)) else (text for group in groups for text in group if not text.scores)
    return [f"loss=odpo: {text.source}, row {text.row} has no scores" for text in islice(unscored, 1)]


def schedule_notes(settings: Settings, n_updates: int) -> list[str]:
    """Return a line for each part of the schedule that a run of n_updates does not reach."""
    notes, warmup, n_examples = [], settings.warmup_steps, n_updates * settings.batch_size
    if warmup >= n_updates:
        reached = settings.lr * n_updates / (warmup + 1)
        notes.append(
            f"warmup_steps={warmup}: the run has {n_updates:,} updates, so the learning rate ends at {reached:.2g}."
        )
    if settings.eval_every >= n_examples:
        run = f"the run has {n_examples:,} examples, so it evaluates at its start (do_first_eval) and end alone"
        notes.append(f"eval_every={settings.eval_every:,}: {run}")
    return notes
