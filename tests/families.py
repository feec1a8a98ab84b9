"""A tiny random model of every causal language model that transformers implements, and what becomes of it here.

One table of sizes serves all families; a config takes from it what it has. Weights are large, norms are not 1, and
rotary frequencies are not the default ones, so that a wrong key of a config changes log-probabilities by far.
`PYTHONPATH=. python tests/families.py` writes the table in docs/models.md.
"""

import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import torch
from conftest import GOLDENS, ROOT, tiny_tokenizer, validated
from open_export import logps, open_export
from tiny_models import make_examples
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dpo.model.layout_check import choose_layout
from dpo.model.loading import load_policy
from dpo.model.logps import ResponseLogps, response_logps
from dpo.model.packing import Packer
from dpo.model.refusals import disable_randomness
from dpo.runs.export import export_model
from dpo.system.errors import UserError

NAMES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 128
MAX_PARAMETERS = 20_000_000
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "audio_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "word_embed_proj_dim"), 32
    ),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "ffn_hidden_size", "hidden_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "prefix_intermediate_size", "shared_intermediate_size"), 64),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads", "decoder_attention_heads"), 4),
    **{"encoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "d_kv": 8, "global_head_dim": 8},
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "block_size"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k", "moe_topk", "moe_top_k"), 2),
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
    **{"index_n_heads": 2, "index_head_dim": 8, "index_topk": 64, "rotary_dim": 4, "hidden_size_per_layer_input": 8},
    **{"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1, "state_size": 4},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    **{"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "mamba_d_ssm": 64, "num_kv_shared_layers": 0},
    **{"image_size": 8, "patch_size": 4, "attention_types": [[["global", "local"], 1]], "default_language": "en_XX"},
}
# What some families need instead; build tries each of these, and every two of them
ALTERNATIVES: tuple[dict[str, Any], ...] = (
    {},
    {"head_dim": None},
    {"num_key_value_heads": 4},
    {"num_experts_per_tok": 1},
    {"hidden_size_per_layer_input": 0},
    {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3}
    | {"num_key_value_heads": 4, "head_dim": None},
    {"layer_types": ["full_attention"] * 2},
    {"num_hidden_layers": 4},
    {"head_dim": 16},
    {"head_dim": 4},
    {"num_heads": 8},
    {"is_decoder": True},
)


class NotBuilt(Exception):
    """No tiny model of a family; the reason in one line."""


def build(name: str) -> PreTrainedModel:
    """Make a random model of a family; NotBuilt if no sizes fit."""
    reason = ""
    for one, two in combinations_with_replacement(ALTERNATIVES, 2):
        try:
            return build_with(name, SIZES | one | two)
        except NotBuilt as error:
            reason = reason or str(error)
        except Exception as error:  # of any kind: a config that does not fit itself
            reason = reason or f"{type(error).__name__}: {' '.join(str(error).split())}"
    raise NotBuilt(reason)


def build_with(name: str, sizes: dict[str, Any]) -> PreTrainedModel:
    config = make_config(CONFIG_MAPPING[name], sizes)
    set_rotary_frequencies(config)
    with torch.device("meta"):
        n = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if n > MAX_PARAMETERS:
        raise NotBuilt(f"{n / 1e6:,.0f} million parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    randomize(model)
    mask = torch.tensor([[1] * 8, [1] * 6 + [0] * 2])  # padded, since some families fail only then
    with torch.no_grad():
        model(input_ids=torch.arange(16).view(2, 8), attention_mask=mask, use_cache=False)
    return model


def make_config(kind: type[PreTrainedConfig], sizes: dict[str, Any]) -> PreTrainedConfig:
    """Make a config and its nested configs with the sizes that they have."""
    fields = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    fields |= set(kind.attribute_map) | set(inspect.signature(kind.__init__).parameters)
    values = {key: value for key, value in sizes.items() if key in fields and value is not None}
    for key, nested in kind.sub_configs.items():
        default = getattr(kind(), key, None) if nested is AutoConfig else None
        nested = type(default) if default is not None else nested
        if nested is not AutoConfig:
            values[key] = make_config(nested, sizes)
    return kind(**values)


def set_rotary_frequencies(config: PreTrainedConfig) -> None:
    """Give rotary embeddings a base other than the default, a different one for each kind of layer."""
    for each in nested_configs(config):
        rope = getattr(each, "rope_parameters", None) or {}
        for i, one in enumerate([value for value in rope.values() if isinstance(value, dict)] or [rope]):
            if "rope_theta" in one:
                one["rope_theta"] = 300.0 / (i + 1)


def nested_configs(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """Return a config and all below it."""
    below = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return [config, *(each for value in below for each in nested_configs(value))]


@torch.no_grad()
def randomize(model: PreTrainedModel, scale: float = 1.0) -> None:
    """Add noise to every parameter: to matrices as much as keeps activations of size 1, to others a tenth."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        size = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
        parameter += scale * size * noise.to(parameter.dtype)


# What becomes of a family

EXAMPLES = make_examples([(9, 5, 3), (4, 2, 8), (13, 1, 6)])
CPU = torch.device("cpu")
EXACT = 1e-5  # nats per token; rounding is below
ALIKE = 1e-4  # the same between versions of transformers; a wrong key is well above (test_families.py)
OLD_TRANSFORMERS = "transformers==4.56.2 tokenizers==0.22.1 huggingface-hub==0.35.3"


@dataclass
class Outcome:
    """What becomes of a family's model: the cells of its row in the table."""

    trains: str
    opens: str = ""  # in this version of transformers
    opens_in_old: str = ""
    expected: Sequence[float] = ()  # the trained model's log-probabilities of open_export.IDS


def measure(name: str, folder: Path) -> Outcome:
    """Load a family's model as a run does, compare its log-probabilities, change it, and export it to folder/hf."""
    try:
        build(name).save_pretrained(folder / "source")
    except NotBuilt as error:
        return Outcome(f"not built ({shorten(str(error))})")
    config = AutoConfig.from_pretrained(folder / "source")
    disable_randomness(config)
    model = f"model.name_or_path='{folder / 'source'}'"
    settings, _ = validated("loss=dpo", model, f"datasets=['{GOLDENS / 'data'}']", "precision=float32")
    try:
        policy = load_policy(settings, config, CPU)
    except UserError as error:
        return Outcome(f"refused ({shorten(str(error))})")
    try:
        layout, worst = compare(policy, folder / "source")
    except Exception as error:  # a model that fails in a forward pass fails in training
        return Outcome(f"fails ({shorten(str(error))})")
    randomize(policy, 0.1)
    outcome = Outcome(f"exact, {layout}" if worst < EXACT else f"off by {worst:.0e}, {layout}", expected=logps(policy))
    export_model(folder / "hf", policy, tiny_tokenizer("llama"))
    outcome.opens = verdict(outcome.expected, open_export(str(folder / "hf")))
    return outcome


@torch.no_grad()
def compare(policy: PreTrainedModel, source: Path) -> tuple[str, float]:
    """Return the layout and the largest difference to plain transformers on each sequence alone, in nats per token."""
    module = ResponseLogps.wrap(policy)
    with torch.enable_grad():
        layout = choose_layout(module, EXAMPLES, "shared_prefix", 30, torch.float32).layout
    plain = AutoModelForCausalLM.from_pretrained(source).eval()
    worst = 0.0
    for batch in Packer(layout, 40, CPU)(EXAMPLES):
        expected = []
        for example in batch.examples:
            for response in example.responses:
                ids = torch.tensor([example.prompt + response])
                logits = plain(input_ids=ids, use_cache=False).logits[0, -len(response) - 1 : -1]
                expected.append(logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0])
        tokens = response_logps(module, batch).tokens
        assert tokens is not None
        worst = max(worst, (tokens - torch.cat(expected)).abs().max().item())
    return layout, worst


def verdict(expected: Sequence[float], opened: list[float] | str) -> str:
    """Say whether an export computes the trained model's log-probabilities."""
    if isinstance(opened, str):
        return "unknown there" if "does not recognize this architecture" in opened else f"no ({shorten(opened)})"
    worst = max(abs(one - two) for one, two in zip(expected, opened, strict=True))
    return "yes" if worst < ALIKE else f"off by {worst:.0e}"


def shorten(reason: str) -> str:
    """Return the cause in an error's first line, without names of folders, families and errors."""
    line = re.sub(
        r"^(\w+Error: |Class validation error.*?Error: |model.name_or_path\S*: )+", "", reason.splitlines()[0]
    )
    line = re.sub(r"this \S+ model", "this model", line)
    return re.split(r"[:;(.] ", f"{line} ")[0].strip()[:80]


def open_in_old(folders: Sequence[Path], old: Path) -> dict[str, list[float] | str]:
    """Open exports in the transformers of a folder."""
    command = [sys.executable, str(ROOT / "tests" / "open_export.py"), *map(str, folders)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(old)}, capture_output=True, text=True, check=True
    )
    opened: dict[str, list[float] | str] = json.loads(done.stdout.splitlines()[-1])
    return opened


def install_old(folder: Path) -> Path:
    """Return the folder in OLD_TRANSFORMERS of the environment, or install transformers 4.56.2 into a folder."""
    if "OLD_TRANSFORMERS" in os.environ:
        return Path(os.environ["OLD_TRANSFORMERS"])
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    subprocess.run([*pip, *OLD_TRANSFORMERS.split()], check=True)
    return folder


def measure_all(folder: Path, names: Sequence[str] = NAMES) -> dict[str, Outcome]:
    """Measure families, also in transformers 4.56.2."""
    old = install_old(folder / "old")
    outcomes = {}
    for name in names:
        (folder / name).mkdir()
        outcomes[name] = measure(name, folder / name)
    exports = {name: folder / name / "hf" for name, outcome in outcomes.items() if outcome.opens}
    opened = open_in_old(list(exports.values()), old)
    for name, export in exports.items():
        outcomes[name].opens_in_old = verdict(outcomes[name].expected, opened[str(export)])
    return outcomes


def make_table(outcomes: dict[str, Outcome]) -> str:
    """Return a Markdown table with a row for each distinct outcome, the most frequent first."""
    rows: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, outcome in outcomes.items():
        rows[outcome.trains, outcome.opens, outcome.opens_in_old].append(name)
    lines = ["| trains | opens in 5 | opens in 4.56 | | families |", "|---|---|---|---|---|"]
    for cells, names in sorted(rows.items(), key=lambda row: -len(row[1])):
        lines.append(f"| {' | '.join(cells)} | {len(names)} | {', '.join(names)} |")
    return "\n".join(lines)


PAGE = ROOT / "docs" / "models.md"


def replace_table(page: str, table: str) -> str:
    """Return the page with another table of families."""
    before, _, rest = page.partition("| trains |")
    return before + table + rest[rest.index("\n\n") :]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        PAGE.write_text(replace_table(PAGE.read_text(), make_table(measure_all(Path(temporary)))))
