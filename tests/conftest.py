"""The real command line, trainers made in-process, and tiny models with their own kinds of tokenizer, built offline."""

import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

# The environment of every test, set before a library reads it: nothing that a user has set for other programs.
FOREIGN = (
    *("WANDB_", "HF_", "TRANSFORMERS_", "ACCELERATE_", "FSDP_", "TORCH", "TQDM_", "HYDRA_", "OPENAI_"),
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_", "GROUP_", "ROLE_"),  # of launchers
    *("SLURM_", "OMPI_", "PMI_", "MV2_"),
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"),  # local servers need none
    *("COLUMNS", "LINES", "PYTHONWARNINGS", "PYTHONIOENCODING", "PYTHONUNBUFFERED", "PYTHONOPTIMIZE"),
    *("MKL_NUM_THREADS", "MKL_VERBOSE", "OMP_", "KMP_", "LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"),
)
for name in [name for name in os.environ if name.startswith(FOREIGN)]:
    del os.environ[name]
os.environ["OMP_NUM_THREADS"] = "1"  # of other processes; of this one, see below
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="datasets-")  # of this process alone
# What Inductor compiled for other instructions (ATEN_CPU_CAPABILITY) is not a key of its cache, and gives NaN.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="inductor-")
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # in this process: each other one would import torch
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would not survive the forks of faults.py
if "PYTEST_XDIST_WORKER" not in os.environ:  # whose home is that of the process that started it
    os.environ["HOME"] = tempfile.mkdtemp(prefix="home-")  # without keys, caches and settings of other programs

import hydra
import numpy as np
import pytest
import torch
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import trainers as bpe
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from build import build_trainer, load_inputs
from dpo.data.columns import COLUMNS
from dpo.data.examples import Tokenization
from dpo.data.formats import open_file
from dpo.data.formatting import RowFormatter
from dpo.data.loader import Loaded, Loader, NamedRows, RawData
from dpo.data.mixture import Mixture
from dpo.data.preferences import PreferenceData
from dpo.data.records import Encoder
from dpo.runs.run_dir import RunDir
from dpo.settings.schema import ColumnSettings, Settings, default_values, flatten, validate
from dpo.training.objectives import Loss
from losses import LOSSES
from preference_datasets import load_files
from trainers import BasicTrainer, Inputs
from utils import register_resolvers

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = ROOT / "tests" / "goldens"
TINY = (
    f"model.name_or_path='{GOLDENS / 'tiny-gpt2'}'",
    f"datasets=['{GOLDENS / 'data'}']",
    "max_length=160",
    "max_prompt_length=96",
    "batch_size=8",
    "precision=float32",
    "device=cpu",
    "sample_during_eval=false",
    "report=false",
    "background_saves=false",  # so that a test can read a checkpoint right after it was asked for
)


DATA_SETTINGS = {"split_train": None, "split_test": None, "train_on": "response", "pairs": "best_worst"}
DATA_SETTINGS |= {"prompt_format": "auto"}


def golden_rows(split: str) -> list[dict[str, str]]:
    """Return the dialogues of the goldens' data, split train or test."""
    return [row for _, row in open_file(GOLDENS / "data" / f"{split}.jsonl")]


def without_measurements(record: dict) -> dict:
    """Return a record of metrics.jsonl without what a clock or the system measured."""
    measured = ("seconds/", "memory_gb/", "mfu")
    return {k: v for k, v in record.items() if not (k.endswith("_per_second") or k.startswith(measured))}


# Files with tests of a minute come first: at the end, the other worker would wait for them.
LONG = ("test_demo.py", "test_trainers_sharded.py", "test_train.py")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


# Small counts in `make test`, full ones in `make soak`


def pytest_addoption(parser):
    parser.addoption("--soak", action="store_true", help="the full counts of kills, stops, mutations")


def pytest_configure(config):
    if config.option.markexpr == "not gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a machine with GPUs tests what any other does; -m gpu uses them


def pytest_sessionfinish():
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"])
    shutil.rmtree(os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["HOME"])


@pytest.fixture
def counts(request):
    """Return a function that chooses between a small count and the full one."""
    return lambda small, full: full if request.config.getoption("--soak") else small


@pytest.fixture
def report(record_property):
    """Return a function that adds a line to the summary of the test run."""
    return lambda line: record_property("measured", line)


def pytest_terminal_summary(terminalreporter):
    for done in terminalreporter.getreports("passed"):
        for name, line in getattr(done, "user_properties", ()):
            if name == "measured" and done.when == "call":
                terminalreporter.write_line(f"measured: {line}")


# The command line


@dataclass(frozen=True)
class Run:
    """What one command line did."""

    returncode: int
    stdout: str
    stderr: str
    folder: Path

    def records(self) -> list[dict[str, float]]:
        """Return the records of metrics.jsonl."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def run_cli(tmp_path):
    """Return a function that runs train.py with overrides, without wandb."""

    def run(*overrides: str) -> Run:
        folder = tmp_path / "run"
        command = [sys.executable, "train.py", "wandb.enabled=false", f"local_run_dir='{folder}'", *overrides]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return Run(done.returncode, done.stdout, done.stderr, folder)

    return run


# In-process


def compose(*overrides: str) -> DictConfig:
    """Compose the config as the command line does, but each choice of files from config/ only once."""
    files = tuple(override for override in overrides if (ROOT / "config" / override.partition("=")[0]).is_dir())
    values = [parse_override(override) for override in ("wandb.enabled=false", *overrides) if override not in files]
    config = copy.deepcopy(compose_files(files))
    ConfigLoaderImpl._apply_overrides_to_config(values, config)
    return config


@cache
def compose_files(overrides: tuple[str, ...]) -> DictConfig:
    """Compose the config by Hydra alone."""
    register_resolvers()
    with hydra.initialize_config_dir(str(ROOT / "config"), version_base=None):
        return hydra.compose("config", overrides=list(overrides))


@cache
def parse_override(override: str) -> Override:
    """Parse one override as Hydra does."""
    return OverridesParser.create().parse_override(override)


def validated(*overrides: str) -> tuple[Settings, Loss]:
    """Return the settings and the loss of a command line; UserError as the command line."""
    config = compose(*overrides)
    return validate(flatten(config), default_values(ROOT / "config", config.loss.name), LOSSES)


def make_loss(name: str, **settings: object) -> Loss:
    """Make a loss with the defaults of its YAML file, but for the given settings."""
    defaults = OmegaConf.to_container(OmegaConf.load(ROOT / "config" / "loss" / f"{name}.yaml"))
    return LOSSES[name](**{key: value for key, value in defaults.items() if key != "name"} | settings)


def inputs_of(*overrides: str) -> Inputs:
    """Return what a command line's settings are checked against before weights load; UserError as the command line."""
    return load_inputs(*validated(*overrides))


class Groups(list):
    """The text examples of a split, group after group, with its statistics."""

    def __init__(self, loaded: Loaded):
        self.loaded, self.split, self.counts = loaded, loaded.split, loaded.counts
        examples = (example.text for example in loaded.split)
        super().__init__([list(islice(examples, size)) for size in loaded.split.sizes.tolist()])


def read_data(name, sft=False, tokenizer=None, **options) -> dict[str, Groups]:
    """Read the splits of one's own data as load_data does; options are settings, columns, and a cache of tables."""
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(GOLDENS / "tiny-gpt2")
    lengths = (options.pop("max_length", 160), options.pop("max_prompt_length", 96), options.pop("add_bos", False))
    drop = options.pop("on_inconsistent", "refuse") == "drop"
    vocab_size, cache = options.pop("vocab_size", None), options.pop("cache", None)
    formatter = RowFormatter(options.get("prompt_format", "auto"), tokenizer, options.pop("chat_template_args", None))
    labels = options.pop("labels", False)
    roles = {role: options.pop(role) for role in list(options) if role in COLUMNS}
    settings = Settings.model_construct(
        **DATA_SETTINGS | options, columns=ColumnSettings.model_construct(**dict.fromkeys(COLUMNS) | roles)
    )
    encoder = Encoder(formatter, Tokenization(tokenizer, *lengths, vocab_size), sft, drop_inconsistent=drop)
    with tempfile.TemporaryDirectory() as temporary:
        loaded = load_files(str(name), settings, Loader(encoder, Path(cache or temporary)), labels)
        return {split: Groups(each) for split, each in zip(("train", "test"), loaded, strict=True)}


def load_entries(data: PreferenceData, name: str, sft=False, tokenizer=None) -> Groups:
    """Load what a function in DATASETS returned, as load_data does."""
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(GOLDENS / "tiny-gpt2")
    encoder = Encoder(RowFormatter("auto", tokenizer), Tokenization(tokenizer, 160, 96), sft, data.truncation)
    encoder.keeps_unusable = not data.drop_unusable
    with tempfile.TemporaryDirectory() as cache:
        rows = NamedRows(name, list(data.numbered_rows(sft)))
        return Groups(*Loader(encoder, Path(cache))(RawData(name, [rows], ["train"], data.counts)))


class Listed(list):
    """Groups of text examples as a BatchIterator takes them, tokenized when they are needed."""

    text_digest = Mixture.text_digest

    def __init__(self, groups, tokenize):
        super().__init__(text for group in groups for text in group)
        self.sizes, self.tokenize = np.array([len(group) for group in groups], dtype=np.int64), tokenize

    def __getitem__(self, index):
        return self.tokenize([super().__getitem__(index)])[0]


@pytest.fixture
def make_trainer(tmp_path):
    """Return a function that builds the trainer that a command line would build."""
    with ExitStack() as stack:
        made = []

        def make(*overrides: str) -> BasicTrainer:
            places = (f"local_run_dir='{tmp_path / f'run{len(made)}'}'", f"local_dirs=['{tmp_path}']")
            overrides = (*TINY, *places, *overrides)
            settings, loss = validated(*overrides)
            run = stack.enter_context(RunDir(Path(settings.local_run_dir), compose(*overrides)))
            made.append(build_trainer(settings, loss, load_inputs(settings, loss), run))
            return made[-1]

        yield make


@pytest.fixture
def trained(make_trainer):
    """Return a function that trains a tiny model by one update and returns its run directory."""
    counts = ("n_examples=8", "n_eval_examples=8", "eval_batch_size=8", "do_first_eval=false", "max_length=100")

    def train(*overrides: str) -> Path:
        trainer = make_trainer(*counts, "lr=1e-2", "warmup_steps=0", *overrides)
        trainer.train()
        return trainer.run.path

    return train


# Tokenizers and models

WORDS = [row["chosen"] for row in golden_rows("train")]


def train_bpe(tokenizer: Tokenizer, special_tokens: list[str], alphabet: list[str]) -> Tokenizer:
    """Learn a vocabulary of 400 from the goldens' dialogues."""
    trainer = bpe.BpeTrainer(
        vocab_size=400, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    return tokenizer


def byte_level(*special_tokens: str) -> Tokenizer:
    """Make a byte-level BPE as GPT-2, GPT-NeoX and Qwen2 have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return train_bpe(tokenizer, list(special_tokens), pre_tokenizers.ByteLevel.alphabet())


def sentencepiece(bos: str, *special_tokens: str, prepend: bool) -> Tokenizer:
    """Make a BPE with ▁ for spaces, bytes as fallback and BOS before each text, as Llama and Gemma have it."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    prepended = [normalizers.Prepend("▁")] if prepend else []
    tokenizer.normalizer = normalizers.Sequence([*prepended, normalizers.Replace(" ", "▁")])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    train_bpe(tokenizer, ["<unk>", bos, *special_tokens, *bytes_], [])
    template = {"single": f"{bos} $A", "special_tokens": [(bos, tokenizer.token_to_id(bos))]}
    tokenizer.post_processor = processors.TemplateProcessing(**template)
    return tokenizer


def tiny_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Make a tokenizer with the special tokens that a family's have."""
    end = "<|endoftext|>"
    if family == "gpt2":  # eos stands for everything, and there is no pad
        return PreTrainedTokenizerFast(
            tokenizer_object=byte_level(end), bos_token=end, eos_token=end, unk_token=end, model_max_length=256
        )
    if family == "gpt_neox":  # pad equal to eos
        return PreTrainedTokenizerFast(tokenizer_object=byte_level(end), eos_token=end, pad_token=end)
    if family == "qwen2":  # no bos; pad apart from eos
        tokens = {"eos_token": "<|im_end|>", "pad_token": end}
        return PreTrainedTokenizerFast(tokenizer_object=byte_level(end, "<|im_end|>"), **tokens)
    if family in ("llama", "mixtral"):  # bos and eos, no pad
        tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        return PreTrainedTokenizerFast(tokenizer_object=sentencepiece("<s>", "</s>", prepend=True), **tokens)
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=sentencepiece("<bos>", "<eos>", "<pad>", prepend=False), **tokens)


def tiny_config(family: str, vocab_size: int):
    """Return the config of a model of 2 layers, with dropout 0.1 wherever the family has one.

    The weights are large, so that a token's probability depends strongly on those before it.
    """
    shared = {"vocab_size": vocab_size, "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shared_sizes = {**shared, **sizes, "max_position_embeddings": 256, "attention_dropout": 0.1}
    if family == "gpt2":
        drop = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.1)
        return GPT2Config(**shared, **drop, n_embd=32, n_layer=2, n_head=4, n_positions=256)
    if family == "gpt_neox":
        return GPTNeoXConfig(**shared_sizes, hidden_dropout=0.1)
    if family == "llama":
        return LlamaConfig(**shared_sizes, num_key_value_heads=2)
    if family == "qwen2":
        return Qwen2Config(**shared_sizes, num_key_value_heads=2)
    if family == "mixtral":
        routers = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5}
        return MixtralConfig(**shared_sizes, num_key_value_heads=2, **routers)
    layer_types = ["sliding_attention", "full_attention"]
    return Gemma3TextConfig(**shared_sizes, num_key_value_heads=2, head_dim=8, layer_types=layer_types)


FAMILIES = ("gpt2", "gpt_neox", "llama", "qwen2", "gemma3")


@pytest.fixture(scope="session", params=FAMILIES)
def tiny_folder(request, write_tiny_folder) -> Path:
    """Return the folder of one family's tiny random model and its tokenizer, as from_pretrained opens them."""
    return write_tiny_folder(request.param)


@pytest.fixture(scope="session")
def write_tiny_folder(tmp_path_factory):
    """Return a function that writes a family's folder, once: pytest makes a fixture anew when its parameter changes."""

    @cache
    def write(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        tokenizer = tiny_tokenizer(family)
        tokenizer.save_pretrained(folder)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(tiny_config(family, len(tokenizer))).save_pretrained(folder)
        return folder

    return write
