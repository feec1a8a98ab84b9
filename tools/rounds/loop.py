"""The rounds: prompts, samples, scores, pairs, training, judgement; each stage writes files and is never repeated."""

import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from dpo.model.loading import load_model_config
from dpo.reporting.page import RunFiles
from dpo.system.console import log_message
from dpo.system.devices import pick_device
from dpo.system.files import MANIFEST, atomic_dir, link_or_copy
from tools.rounds.drawing import Drawing, read_samples
from tools.rounds.judgement import (
    Judged,
    Judgement,
    best_round,
    judge,
    judgement_files,
    read_history,
    score_samples,
    stop_reason,
    to_ask,
    write_judgement,
)
from tools.rounds.manifest import SCORER, Counts, Manifest, hash_file
from tools.rounds.pairs import PAIRINGS, make_pairs, split_rows
from tools.rounds.policies import Policy, sums_of_samples
from tools.rounds.prompts import PromptReader, prompts_of_round, read_prompts, split_prompts
from tools.rounds.records import Prompt, Sample
from tools.rounds.report import summary_line, write_report
from tools.rounds.scoring import Scoring, distinct_texts, is_usable
from tools.rounds.settings import Config, settings_fingerprint
from tools.rounds.store import read_rows, write_rows
from tools.rounds.training import find_policy, round_dir, rounds_trained_on, run_dir, train, weights_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STOPS, BEST = "stops.jsonl", "best"  # files in OUT


class Rounds:
    """The rounds in a folder, OUT, as far as they are done."""

    def __init__(self, config: Config, overrides: Sequence[str] = ()):
        self.config, self.overrides, self.out = config, overrides, config.out
        self.manifest = Manifest(self.out, settings_fingerprint(config.values))
        self.train_prompts, self.held_out = self.out / "prompts.jsonl", self.out / "held_out.jsonl"

    def run(self) -> None:
        """Run all rounds, or those that are left; a round that makes the policy worse is the last."""
        self.prompts()
        self.judge(0)
        for k in range(1, self.config.rounds.rounds + 1):
            self.choose_prompts(k)
            self.sample(k)
            self.score(k)
            self.pair(k)
            if self.has_too_few_pairs(k):
                break
            self.train(k)
            self.judge(k)
            if self.is_worse(k):
                break
        self.close()

    # The stages of a round

    def prompts(self) -> None:
        """Read and tokenize all prompts, and hold some out."""
        settings = self.config.rounds

        def work() -> Counts:
            reader = PromptReader(self.config.run)
            train, held_out = split_prompts(reader, settings, self.config.run.seed)
            write_rows(self.train_prompts, map(asdict, train))
            write_rows(self.held_out, map(asdict, held_out))
            write_rows(self.out / STOPS, [{"stops": reader.stops}])
            return {"prompts": len(train), "held-out prompts": len(held_out)}

        sources = {"prompts": settings.prompts, "eval_prompts": settings.eval_prompts or ()}
        inputs = {
            f"{key}={path}": hash_file(path)  # OUT has a file prompts.jsonl of its own
            for key, names in sources.items()
            for name in names
            for path in files_of(Path(name))
        }
        outputs = [self.train_prompts, self.held_out, self.out / STOPS]
        self.manifest.run("prompts", inputs, work, lambda: outputs)

    def choose_prompts(self, k: int) -> None:
        """Choose the prompts of round k."""
        path = round_dir(self.out, k) / "prompts.jsonl"

        def work() -> Counts:
            n, seed = self.config.rounds.prompts_per_round, self.config.run.seed
            chosen = prompts_of_round(read_prompts(self.train_prompts), k, n, seed)
            write_rows(path, map(asdict, chosen))
            return {"prompts": len(chosen)}

        self.manifest.run(f"round-{k}/prompts", self.hashes(self.train_prompts), work, lambda: [path])

    def sample(self, k: int) -> None:
        """Sample for the prompts of round k from the policy of the round before."""
        folder = round_dir(self.out, k)
        name, n = f"round-{k}", self.config.rounds.samples
        self.draw(f"{name}/samples", k - 1, folder / "prompts.jsonl", n, name, folder / "samples.jsonl")

    def draw(self, stage: str, k: int, prompts: Path, n: int, name: str, path: Path) -> None:
        """Sample n responses per prompt from the policy of round k; ids and seeds of samples begin with name."""

        def work() -> Counts:
            return Drawing(self.config.engine, self.policy(k), read_prompts(prompts), n, name, path).run()

        inputs = self.hashes(prompts, *weights_files(self.config, k))
        self.manifest.run(stage, inputs, work, lambda: [path])

    def score(self, k: int) -> None:
        """Score the usable samples of round k."""
        folder = round_dir(self.out, k)

        def work() -> Counts:
            samples = read_samples(folder / "samples.jsonl")
            usable = [sample for sample in samples if is_usable(sample)]
            scores = self.scoring(read_prompts(folder / "prompts.jsonl"), distinct_texts(usable))
            rows = [
                {"id": one.id, "score": scores.get((one.prompt, one.text)) if is_usable(one) else None}
                for one in samples
            ]
            write_rows(folder / "scores.jsonl", rows)
            return {"scored": len(usable), "unusable": len(samples) - len(usable), "distinct texts": len(scores)}

        inputs = self.hashes(folder / "prompts.jsonl", folder / "samples.jsonl") | self.scorer_of(f"round-{k}/scores")
        self.manifest.run(f"round-{k}/scores", inputs, work, lambda: [folder / "scores.jsonl"])

    def pair(self, k: int) -> None:
        """Make pairs of the samples of round k."""
        folder, rounds = round_dir(self.out, k), self.config.rounds
        files = [folder / f"{name}.jsonl" for name in ("prompts", "samples", "scores")]

        def work() -> Counts:
            samples: dict[int, list[Sample]] = defaultdict(list)
            for sample in read_samples(files[1]):
                samples[sample.prompt].append(sample)
            scores = {row["id"]: row["score"] for row in read_rows(files[2])}
            pairing, seed = PAIRINGS[rounds.pairing], self.config.run.seed
            rows, counts = make_pairs(
                read_prompts(files[0]), samples, scores, pairing, rounds.min_margin, seed, f"round-{k}"
            )
            log_message(counts.summary())
            write_rows(outputs[0], rows)
            for path, part in zip(outputs[1:], split_rows(rows, seed), strict=True):
                write_rows(path, part)
            return {"pairs": counts.pairs, "prompts with a pair": counts.paired, "prompts": counts.prompts}

        outputs = [folder / name for name in ("pairs.jsonl", "data/train.jsonl", "data/test.jsonl")]
        self.manifest.run(f"round-{k}/pairs", self.hashes(*files), work, lambda: outputs)

    def train(self, k: int) -> None:
        """Train the policy of round k."""

        def work() -> Counts:
            train(self.config, k, self.overrides)
            last = RunFiles(run_dir(self.out, k)).metrics[-1]
            return {name: int(last[name]) for name in ("examples", "updates")}

        folders = [round_dir(self.out, j) / "data" for j in rounds_trained_on(self.config, k)]
        pairs = [folder / f"{name}.jsonl" for folder in folders for name in ("train", "test")]
        inputs = self.hashes(*pairs, *weights_files(self.config, k - 1))
        self.manifest.run(f"round-{k}/training", inputs, work, lambda: weights_files(self.config, k))

    def judge(self, k: int) -> None:
        """Judge the policy of round k, or for 0 the first policy, on the held-out prompts."""
        folder = round_dir(self.out, k) / "judgement"
        samples = folder / "samples.jsonl"
        self.draw(f"round-{k}/judgement/samples", k, self.held_out, 1, "held-out", samples)

        def work() -> Counts:
            prompts, drawn = read_prompts(self.held_out), read_samples(samples)
            history = read_history(self.out)[:k]
            judged = self.score_held_out(prompts, drawn, history)
            device = pick_device(self.config.run.device)
            policies = {"policy": k, "first": 0, "previous": max(0, k - 1)}
            logps = {j: sums_of_samples(self.policy(j), drawn, prompts, device) for j in sorted({*policies.values()})}
            judgement = judge(k, judged, {name: logps[j] for name, j in policies.items()}, history)
            write_judgement(self.out, judgement)
            log_message(summary_line(judgement))
            return {"samples": len(drawn)}

        weights = [path for j in sorted({0, max(0, k - 1), k}) for path in weights_files(self.config, j)]
        inputs = self.hashes(self.held_out, samples, *weights) | self.scorer_of(f"round-{k}/judgement")
        self.manifest.run(f"round-{k}/judgement", inputs, work, lambda: judgement_files(self.out, k))

    def score_held_out(
        self, prompts: Sequence[Prompt], samples: Sequence[Sample], history: Sequence[Judgement]
    ) -> list[Judged]:
        """Score the samples of held-out prompts; history has the judgements of earlier rounds."""
        first = history[0].samples if history else None
        is_pairwise = self.config.scorer.is_pairwise
        texts: dict[int, list[str]] = {}
        if not is_pairwise:
            asked = to_ask(samples)
            texts = {samples[i].prompt: [samples[i].text] for i in asked}
        elif first is not None:
            asked = to_ask(samples, [judged.sample for judged in first])
            texts = {samples[i].prompt: [samples[i].text, first[i].sample.text] for i in asked}
        else:
            asked = []
        scores = self.scoring(prompts, texts)
        answers = {i: scores[samples[i].prompt, samples[i].text] for i in asked}
        return score_samples(prompts, samples, answers, is_pairwise, first)

    # The end

    def has_too_few_pairs(self, k: int) -> bool:
        """Whether the pairs of round k do not make one batch, or none is left to evaluate on, which is printed."""
        n_train, n_test = (len(read_rows(round_dir(self.out, k) / f"data/{name}.jsonl")) for name in ("train", "test"))
        needed = self.config.run.batch_size
        if n_train >= needed and n_test:
            return False
        log_message(
            f"The rounds stop before training in round {k}: its samples make {n_train:,} pairs to train on and "
            f"{n_test:,} to evaluate on, and batch_size={needed} is needed; more prompts or samples make more."
        )
        return True

    def is_worse(self, k: int) -> bool:
        """Whether the policy of round k is worse than before, which is printed."""
        rounds = self.config.rounds
        reason = stop_reason(read_history(self.out)[: k + 1], rounds.min_entropy, rounds.max_unfinished)
        if reason is not None:
            log_message(f"The rounds stop: {reason}.")
        return reason is not None

    def close(self) -> None:
        """Export the best round, and write the report."""
        limits = self.config.rounds.min_entropy, self.config.rounds.max_unfinished
        best = best_round(read_history(self.out), *limits).round
        write_report(self.out, *limits)
        if best == 0:
            log_message("No round is better than the first policy, so none is exported.")
        else:
            export_best(self.out, best)
            log_message(f"The best round is {best}: {self.out / BEST}")
        log_message(f"Report: {self.out / 'report.html'}")

    # What stages need

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        return load_model_config(self.config.run.model, self.config.run.chat_template)[1]

    @cached_property
    def scoring(self) -> Scoring:
        scorer = self.config.scorer
        return Scoring(scorer, scorer.fingerprint(), self.config.run, self.out / "answers.jsonl")

    def scorer_of(self, stage: str) -> dict[str, str]:
        """The hash of the scorer, or of the one that a finished stage had if another one is accepted."""
        done, fingerprint = self.manifest.stages.get(stage), self.scoring.fingerprint
        if self.config.rounds.accept_scorer and done is not None and done.inputs[SCORER] != fingerprint:
            log_message(f"{stage}: has scores of an earlier version of the scorer, which stay (accept_scorer=true).")
            fingerprint = done.inputs[SCORER]
        return {SCORER: fingerprint}

    def policy(self, k: int) -> Policy:
        """The policy of round k; 0 is the first one."""
        (row,) = read_rows(self.out / STOPS)
        return Policy(find_policy(self.config, k), self.tokenizer, row["stops"], round_dir(self.out, k) / "model")

    def hashes(self, *paths: Path) -> dict[str, str]:
        """The hash of each file by its path, from OUT if it is there."""
        names = {
            str(path.relative_to(self.out)) if path.is_relative_to(self.out) else str(path): path for path in paths
        }
        return {name: hash_file(path) for name, path in names.items()}


def files_of(path: Path) -> list[Path]:
    """The file at a path, or the files of a folder; none for anything else, such as the name of a data set."""
    return [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())


def export_best(out: Path, k: int) -> None:
    """Make OUT/best the export of round k, by hard links to its files."""
    source, best = (run_dir(out, k) / "LATEST").resolve() / "hf", out / BEST
    manifest = (source / MANIFEST).read_bytes()
    if (best / MANIFEST).is_file() and (best / MANIFEST).read_bytes() == manifest:
        return

    def write(folder: Path) -> None:
        for path in sorted(source.rglob("*")):
            target = folder / path.relative_to(source)
            if path.is_dir():
                target.mkdir()
            elif path != source / MANIFEST:  # which is written anew: a link would change the export's own
                link_or_copy(path, target)

    shutil.rmtree(best, ignore_errors=True)
    atomic_dir(best, write)
