"""Judges training runs by the held-out prompts of rounds, beside the rounds: reward against KL, on- and off-policy.

python benchmarks/on_policy.py OUT RUN/step-N ...      a row per round of OUT, and one per checkpoint
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from dpo.settings.run_config import read_run_config
from dpo.system.devices import pick_device
from tools.candidates import find_candidate
from tools.rounds.drawing import Drawing, read_samples
from tools.rounds.judgement import Judgement, judge, read_history
from tools.rounds.loop import Rounds
from tools.rounds.policies import Policy, sums_of_samples
from tools.rounds.prompts import read_prompts
from tools.rounds.settings import validate_config
from utils import register_resolvers


def judge_checkpoint(rounds: Rounds, checkpoint: Path) -> Judgement:
    """The metrics of a run's checkpoint on the held-out prompts, as those of a round."""
    first, prompts = rounds.policy(0), read_prompts(rounds.held_out)
    policy = Policy(find_candidate(checkpoint), first.tokenizer, first.stops, Path())
    with TemporaryDirectory() as folder:
        drawing = Drawing(rounds.config.engine, policy, prompts, 1, "held-out", Path(folder) / "samples.jsonl")
        drawing.run()
        samples = read_samples(drawing.path)
    history = read_history(rounds.out)[:1]
    device = pick_device(rounds.config.run.device)
    sums = {
        name: sums_of_samples(each, samples, prompts, device) for name, each in (("policy", policy), ("first", first))
    }
    judged = rounds.score_held_out(prompts, samples, history)
    return judge(1, judged, sums | {"previous": sums["first"]}, history)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder of rounds that are done")
    parser.add_argument("checkpoints", nargs="*", type=Path, metavar="RUN/step-N")
    options = parser.parse_args()
    register_resolvers()
    rounds = Rounds(validate_config(read_run_config(options.out)))
    rows = [(f"round {judgement.round}", judgement) for judgement in read_history(options.out)]
    rows += [(str(path), judge_checkpoint(rounds, path)) for path in options.checkpoints]
    names = ("policy", "KL, nats per response", "score", "win rate", "entropy", "length", "distinct 2-grams")
    print(f"\n| {' | '.join(names)} |\n{'|---' * len(names)}|")
    for name, judgement in rows:
        cells = [judgement.metrics.get(key) for key in ("kl_first", "score", "win_rate")]
        shown = ["" if one is None else f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]" for one in cells]
        shown += [f"{judgement.metrics[key].value:.3g}" for key in ("entropy_per_token", "length", "distinct_2")]
        print(f"| {name} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()
