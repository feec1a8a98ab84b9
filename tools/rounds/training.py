"""The training run of a round: its settings, and the process that trains."""

import sys
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from signal import Signals

from omegaconf import DictConfig, OmegaConf

from dpo.data.columns import PAIR_SCORES
from dpo.settings.constraints import START
from dpo.settings.schema import Settings
from dpo.system.errors import EXIT_CODES, print_errors
from dpo.system.files import atomic_write
from dpo.system.processes import watch_parent
from tools.candidates import Candidate, find_candidate
from tools.rounds.settings import GROUPS, Config, RoundsSettings
from train import quoted


def round_dir(out: Path, k: int) -> Path:
    return out / f"round-{k}"


def run_dir(out: Path, k: int) -> Path:
    return round_dir(out, k) / "run"


def find_policy(config: Config, k: int) -> Candidate:
    """The policy that round k has trained; for 0 the first policy."""
    if k == 0:
        return Candidate("the first policy", config.run, config.loss, None)
    return find_candidate(run_dir(config.out, k))


def weights_files(config: Config, k: int) -> list[Path]:
    """The files with the weights of the policy that round k has trained; for 0 those that settings name here."""
    if k > 0:
        return sorted((run_dir(config.out, k) / "LATEST").resolve().glob("hf/*.safetensors"))
    model, lora = config.run.model, config.run.lora
    folders = [Path(model.name_or_path), *([Path(lora.path)] if lora is not None and lora.path else [])]
    patterns = ("config.json",) if model.from_scratch else ("*.safetensors", "*.bin", "config.json")
    files = [path for folder in folders for pattern in patterns for path in sorted(folder.glob(pattern))]
    return [*files, *([Path(model.archive)] if model.archive else [])]


# Settings


def rounds_trained_on(config: Config, k: int) -> range:
    """The rounds whose pairs round k trains on: its own, and `replay` earlier ones."""
    return range(max(1, k - config.rounds.replay), k + 1)


def run_config(config: Config, k: int) -> DictConfig:
    """The config of the training run of round k."""
    own = RoundsSettings.model_fields.keys() - {"datasets", "reference"}
    values = {key: value for key, value in config.values.items() if key not in own and key not in GROUPS}
    run = OmegaConf.create(values)
    pairs = [str(round_dir(config.out, j) / "data") for j in rounds_trained_on(config, k)]
    run.local_run_dir = str(run_dir(config.out, k))
    run.exp_name = f"{config.values.exp_name}-round-{k}"
    run.datasets = [*pairs, *config.rounds.datasets]
    if config.run.shares is not None:
        run.shares = [*(1.0 for _ in pairs), *config.run.shares]
    if not config.rounds.datasets:  # the names of columns are those of the prompts' files, not of the pairs
        run.columns = {role: name if role == "sampled_ids" else None for role, name in run.columns.items()}
    for role in PAIR_SCORES if config.loss.needs_scores else ():
        run.columns[role] = role
    for key, value in weights_of_round(config, k).items():
        OmegaConf.update(run, key, value)
    return run


def weights_of_round(config: Config, k: int) -> dict[str, str]:
    """The settings of round k that name the weights of policy and reference."""
    rounds, is_adapter = config.rounds, config.run.lora is not None
    last = run_dir(config.out, k - 1) / "LATEST" / ("hf" if is_adapter else "policy.pt")
    starts_from_last = rounds.start == "previous" and k > 1
    weights = {"reference": START}
    if starts_from_last:
        weights["lora.path" if is_adapter else "model.archive"] = str(last)
    if not config.loss.needs_reference:
        return weights
    if rounds.reference not in ("previous", "first"):
        weights["reference"] = rounds.reference
    elif rounds.reference == "previous" and k > 1 and not starts_from_last:
        weights["reference"] = str(last)
    elif rounds.reference == "first" and starts_from_last:
        weights["reference"] = first_weights(config.run)
    return weights


def first_weights(settings: Settings) -> str:
    """The path of the first policy, for `reference`."""
    if settings.lora is not None and settings.lora.path is not None:
        return settings.lora.path
    return settings.model.archive or settings.model.name_or_path


# The process


def train(config: Config, k: int, overrides: Sequence[str] = ()) -> None:
    """Train round k to its end: begin, or continue from the newest checkpoint. SystemExit with its code if it fails.

    Training has a process of its own, so that nothing of the other stages is left in memory or changes its numbers.
    """
    folder, values = run_dir(config.out, k), run_config(config, k)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.yaml").exists():
        atomic_write(folder / "config.yaml", OmegaConf.to_yaml(values, resolve=True).encode())
    arguments = [f"resume={quoted(str(folder))}", *places(values), *overrides]
    process = get_context("spawn").Process(target=run_command, args=(arguments,))
    process.start()
    try:
        process.join()
    except BaseException:  # a signal, which a terminal sends to both processes; a second one is passed on by it as well
        process.terminate()
        process.join()
        raise
    code = process.exitcode
    if code:
        how = f"ended with exit code {code}" if code > 0 else f"was killed by {Signals(-code).name}"
        print_errors([f"round {k}: training {how}"])
        sys.exit(code if code > 0 else EXIT_CODES["rank"])


def places(values: DictConfig) -> list[str]:
    """Overrides with the paths of a run: OUT may have been moved since the run began."""
    paths = {key: OmegaConf.select(values, key) for key in ("model.archive", "lora.path", "reference")}
    data = ",".join(quoted(name) for name in values.datasets)
    return [f"datasets=[{data}]", *(f"{key}={quoted(path)}" for key, path in paths.items() if path is not None)]


def run_command(arguments: list[str]) -> None:
    """Run the command line of train.py in this process, which ends with the one that started it."""
    watch_parent()
    sys.argv = ["train.py", *arguments]
    from train import main

    main()
