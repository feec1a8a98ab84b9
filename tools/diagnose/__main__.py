"""Says what is wrong with a trained model: the whole evaluation against a reference, then findings in plain words.

python -m tools.diagnose policy=PATH reference=PATH datasets=[pairs.jsonl]

PATH is a run, RUN/step-N, the folder of a model or of a LoRA adapter, or a model's name on the Hub, of any trainer. A
run needs neither reference nor datasets, an adapter no reference. Other settings of a run's evaluation are accepted, as
n_eval_examples=1000. Everything is written to a folder: out=DIR, by default diagnosis_TIME.
"""

import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo.reporting.findings import Finding, findings, verdict
from dpo.system.console import guard_streams, log_message
from dpo.system.errors import UserError, exit_on_error, explain_os_error
from tools.diagnose.checkpoints import find

if TYPE_CHECKING:
    from dpo.settings.schema import Settings
    from dpo.training.objectives import Loss
    from tools.diagnose.checkpoints import Checkpoint


def start(arguments: Sequence[str]) -> None:
    """Print help, or diagnose what the arguments name."""
    from tools.diagnose.settings import OWN, READ, parse_arguments, resolve
    from utils import register_resolvers

    if not arguments or {"--help", "-h"} & {*arguments}:
        log_message(f"{__doc__}\nSettings, as of a run (python train.py --help KEY): columns.NAME,")
        log_message(textwrap.fill(", ".join(READ), 110, break_long_words=False))
        sys.exit(0 if arguments else 2)
    register_resolvers()
    given = parse_arguments(arguments)
    own = {key: given.pop(key, None) for key in OWN}
    if own["policy"] is None:
        raise UserError("policy: is missing; set policy=PATH, a run or the folder of a model or of an adapter")
    policy = find("policy", str(own["policy"]))
    reference = policy.reference() if own["reference"] is None else find("reference", str(own["reference"]))
    if reference is None:
        raise UserError("reference: is missing; set reference=PATH, the model that the policy was trained from")
    settings, loss = resolve(given, policy)
    out = create(own["out"])
    diagnose(policy, reference, settings, loss, out)


def create(out: str | None) -> Path:
    """Create the folder of the results; UserError if it exists with files in it."""
    path = Path(f"diagnosis_{datetime.now():%Y-%m-%d_%H-%M-%S}" if out is None else out)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise UserError(f"out={path}: is not empty; give another folder")
    except OSError as error:
        raise UserError(f"out={path}: {explain_os_error(error)}") from None
    return path


def diagnose(
    policy: "Checkpoint", reference: "Checkpoint", settings: "Settings", loss: "Loss", out: Path
) -> dict[str, float]:
    """Evaluate, write all files to a folder, print the findings, and return the figures."""
    from dpo.reporting.metrics import MetricLogger
    from dpo.reporting.page import update_report
    from dpo.reporting.trackers import Tracker
    from dpo.system.errors import actionable_errors
    from tools.diagnose.evaluation import load

    with actionable_errors("while evaluating; lower max_tokens_per_pass or eval_batch_size"):
        evaluation, figures = load(policy, reference, settings, loss)
        figures |= policy.training()
        n_examples = int(figures.get("examples", 1))
        logger = MetricLogger(out, Tracker())
        try:
            figures = evaluation.evaluate(logger, n_examples) | evaluation.sample(logger, n_examples) | figures
            figures |= evaluation.toggle()
            logger.metrics.append([{"examples": n_examples, "updates": int(figures.get("updates", 0))} | figures])
        finally:
            logger.close()
    found = findings(figures)
    write(out / "metrics.json", figures)
    write(out / "findings.json", {"verdict": verdict(figures), "findings": [as_json(each) for each in found]})
    (out / "config.yaml").write_text(config_text(policy, reference, settings, loss), encoding="utf-8")
    update_report(out)
    log_message(summary(figures, found))
    log_message(f"Everything is in {out}")
    return figures


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def as_json(finding: Finding) -> dict[str, str]:
    rule = finding.rule
    return {"name": rule.name, "text": finding.text, "cause": rule.cause, "advice": rule.advice, "source": rule.source}


def config_text(policy: "Checkpoint", reference: "Checkpoint", settings: "Settings", loss: "Loss") -> str:
    """The config.yaml of a diagnosis: what was compared, and the settings that were read."""
    from omegaconf import OmegaConf

    from dpo.settings.schema import flatten_plain
    from tools.diagnose.settings import is_read

    name = f"diagnosis of {policy.name}"
    values: dict[str, Any] = {"exp_name": name, "policy": policy.name, "reference": reference.name}
    flat = flatten_plain(settings.model_dump() | {"loss": {"name": name_of(loss)} | loss.model_dump()})
    config = OmegaConf.create(values)
    for key, value in flat.items():
        if is_read(key) or key.startswith("loss."):
            OmegaConf.update(config, key, value)
    return OmegaConf.to_yaml(config)


def name_of(loss: "Loss") -> str:
    from losses import LOSSES

    return next(name for name, kind in LOSSES.items() if type(loss) is kind)


def summary(figures: Mapping[str, float], found: Sequence[Finding]) -> str:
    """The findings in plain words, most important first, and the verdict."""
    lines = [""]
    for number, finding in enumerate(found, start=1):
        lines.append(f"{number}. {finding.rule.name}: {finding.text}")
        for title, text in (("Usual cause", finding.rule.cause), ("Try", finding.rule.advice)):
            lines += textwrap.wrap(f"{title}: {text}", 110, initial_indent="   ", subsequent_indent="      ")
        lines.append(f"   Source: {finding.rule.source}")
    return "\n".join([*lines, "", verdict(figures), ""])


if __name__ == "__main__":
    guard_streams()
    exit_on_error(lambda: start(sys.argv[1:]))
