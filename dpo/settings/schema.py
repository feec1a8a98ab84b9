"""The schema of a config: one typed, frozen model per YAML group, and all problems of a config in one message.

Defaults, units and meanings are only in config/*.yaml; a field here declares the values it accepts.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from dpo.settings.config_files import format_value
from dpo.settings.constraints import combination_problems
from dpo.settings.hints import suggest
from dpo.system.errors import raise_problems
from dpo.system.installation import COMMAND

MAPPINGS = ("optimizer_args", "chat_template_args")  # settings that are mappings with keys of their own
REMOVED = ("fsdp_port",)  # keys of earlier versions that did nothing; the config.yaml of their runs has them

# The types of values. A description completes the sentence "KEY=VALUE: must be ...".

Text = Annotated[str, Field(pattern=r"\S", description="a name")]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False, description="a number above 0")]
NotNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False, description="a number, 0 or more")]
Negative = Annotated[float, Field(strict=True, lt=0, allow_inf_nan=False, description="a number below 0")]
Probability = Annotated[float, Field(strict=True, gt=0, le=1, description="a number above 0, at most 1")]
Smoothing = Annotated[float, Field(strict=True, ge=0, lt=0.5, description="a number from 0, below 0.5")]
Flag = Annotated[bool, Field(strict=True, description="true or false")]
Rate = Annotated[float, Field(strict=True, ge=0, lt=1, description="a number from 0, below 1")]
Dtype = Literal["float32", "bfloat16"]


def check_time(text: str) -> str:
    datetime.fromisoformat(text)
    return text


Time = Annotated[str, AfterValidator(check_time), Field(description="a time, as 2026-01-31 or 2026-01-31T12:00")]


def whole(unit: str, ge: int, le: int | None = None) -> Any:
    """The field of a whole number from ge to le, counted in a unit."""
    description = f"a whole number of {unit}, {ge} or more" if le is None else f"a whole number from {ge} to {le}"
    return Field(strict=True, ge=ge, le=le, description=description)


class Group(BaseModel):
    """A group of settings in the YAML; unknown keys are refused, and values are immutable."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class WandbSettings(Group):
    """The keys below `wandb`."""

    enabled: Flag
    entity: Text | None
    project: Text


@dataclass(frozen=True)
class Column:
    """How the column of a role is found and read."""

    names: tuple[str, ...] = ()  # in lower case; without names the column is read only if the user sets it
    takes_first: bool = False  # the first of several candidates is read; otherwise the user must choose
    is_number: bool = False  # a number of the row, in `numbers` of its examples
    keys: tuple[str, ...] = ()  # where the responses are objects, the keys that hold the same


class ColumnSettings(Group):
    """The keys below `columns`, one for each role."""

    prompt: Annotated[Text | None, Column(("prompt", "question", "instruction", "input"))]
    input: Annotated[Text | None, Column()]
    chosen: Annotated[Text | None, Column(("chosen", "response_j", "preferred_output"))]
    rejected: Annotated[
        Text | None,
        Column(("rejected", "response_k", "non_preferred_output", "rejected_response", "rejected_messages")),
    ]
    completion: Annotated[Text | None, Column(("completion", "response"), takes_first=True)]
    label: Annotated[Text | None, Column(("label", "kto_tag"))]
    messages: Annotated[Text | None, Column(("messages", "conversations", "conversation"), takes_first=True)]
    system: Annotated[Text | None, Column(("system",))]
    tools: Annotated[Text | None, Column(("tools",))]
    responses: Annotated[
        Text | None,
        Column(
            ("responses", "completions", "answers", "generations", "candidates"),
            keys=("response", "text", "content", "completion", "answer", "output"),
        ),
    ]
    scores: Annotated[Text | None, Column(("scores", "ratings"), keys=("score", "overall_score", "rating", "pm_score"))]
    ranks: Annotated[Text | None, Column(("ranks",), keys=("rank",))]
    preferred: Annotated[
        Text | None,
        Column(
            (
                "better_response_id",
                "safer_response_id",
                "preferred",
                "preferred_response",
                "preference",
                "better_response",
                "winner",
            )
        ),
    ]
    preference_strength: Annotated[Text | None, Column(("preference_strength", "overall_preference"))]
    score_chosen: Annotated[Text | None, Column()]
    score_rejected: Annotated[Text | None, Column()]
    weight: Annotated[Text | None, Column(is_number=True)]
    sampled_ids: Annotated[Text | None, Column(("sampled_ids",))]


# Columns of two responses in no order, in lower case; another column says which is better.
UNORDERED_PAIRS = (
    ("response_0", "response_1"),
    ("response_1", "response_2"),
    ("response1", "response2"),
    ("response_a", "response_b"),
    ("conversation_a", "conversation_b"),
)
# Columns of the worse response where `messages` is the better conversation.
REJECTED_BESIDE_MESSAGES = ("rejected_response", "rejected_messages")


class ModelSettings(Group):
    """The keys of config/model/."""

    name_or_path: Text = Field(
        description="a local folder or a name on the hub; or choose one of config/model/: model=gpt2"
    )
    tokenizer_name_or_path: Text | None
    archive: Text | None
    from_scratch: Flag
    block_name: Text | None
    policy_dtype: Dtype
    fsdp_policy_mp: Dtype | None
    reference_dtype: Literal["float32", "bfloat16", "float16"] | None
    router_loss_weight: NotNegative | None
    add_bos: Flag
    resize_embeddings: Flag


class StopIfSettings(Group):
    """The keys below `stop_if`; the conditions are in dpo/reporting/stopping.py."""

    min_entropy: Rate | None
    max_entropy: Positive | None
    max_cross_entropy: Positive | None
    max_unfinished: Probability | None
    min_log_ratio: Negative | None
    max_loss: Positive | None


class LoraSettings(Group):
    """The keys of config/lora/."""

    r: int = whole("", ge=1, le=4096)
    alpha: int = whole("", ge=1, le=2**20)
    dropout: Rate
    targets: Annotated[list[Text], Field(min_length=1)] | Literal["auto"] = Field(
        description="auto, or a list, as in [q_proj,v_proj]"
    )
    use_rslora: Flag
    use_dora: Flag
    init: Literal["kaiming", "gaussian"]
    path: Text | None
    export_merged: Flag
    quantize: Literal["nf4"] | None = Field(description="nf4")


class Settings(Group):
    """The keys of config/config.yaml. The loss is a separate object: its keys are its fields."""

    seed: int = whole("", ge=0, le=2**32 - 1)
    exp_name: str = Field(pattern=r"^\w[\w.+=-]*$", description="a name without slashes")
    local_dirs: list[Text] = Field(min_length=1, description="a list of folders")
    local_run_dir: Text
    resume: None = Field(description=f"given without Hydra's flags: {COMMAND} resume=RUN_DIR, or resume=auto")
    debug: Flag
    dry_run: Flag
    trackers: list[Literal["wandb", "tensorboard", "trackio"]] = Field(
        description="a list of wandb, tensorboard and trackio, as in [wandb,tensorboard]"
    )
    wandb: WandbSettings

    datasets: list[Text] = Field(min_length=1, description="a list, as in [hh] or [hh,shp]")
    shares: Annotated[list[Positive], Field(min_length=1)] | None = Field(
        description="a list of numbers, one per data set, as in [1,0.5]"
    )
    split_train: Text | None
    split_test: Text | None
    columns: ColumnSettings
    pairs: Literal["best_worst", "all", "best_rest"]
    train_on: Literal["response", "last", "all"]
    prompt_format: Literal["auto", "chat", "text", "hh"]
    chat_template: Text | None = Field(description="a file, or the text of a template")
    chat_template_args: dict[str, Any] | None = Field(description="{NAME: VALUE, ...}")
    chat_template_time: Time | None
    inspect: int = whole("examples", ge=0)
    inspect_ids: Flag
    on_inconsistent: Literal["refuse", "drop"]
    max_length: int = whole("tokens", ge=2)
    max_prompt_length: int = whole("tokens", ge=1)
    n_epochs: int | None = whole("epochs", ge=1)
    n_examples: int | None = whole("examples", ge=1)

    trainer: Literal["BasicTrainer", "FSDPTrainer", "TensorParallelTrainer"]
    n_processes: Annotated[int, Field(strict=True, ge=1)] | Literal["auto"] = Field(
        description="auto, or a whole number of processes"
    )
    replicate: int = whole("copies", ge=1)
    tensor_parallel: Annotated[int, Field(strict=True, ge=1)] | Literal["auto"] = Field(
        description="auto, or a whole number of processes"
    )
    ddp: Flag
    reduce_every_pass: Flag
    collective_timeout: int = whole("seconds", ge=1)
    device: str = Field(pattern=r"^(auto|cuda(:\d+)?|mps|cpu)$", description="one of auto, cuda, cuda:N, mps, cpu")
    precision: Literal["auto", "float32", "bfloat16"]
    layout: Literal["shared_prefix", "padded"]
    max_tokens_per_pass: Annotated[int, Field(strict=True, ge=1)] | Literal["auto", "fit"] = Field(
        description="auto, fit, or a whole number of tokens"
    )
    batch_size: int = whole("examples", ge=1)
    gradient_accumulation_steps: int = whole("microbatches", ge=1)
    lr: Positive
    warmup_steps: int = whole("updates", ge=0)
    scheduler: Literal["constant", "linear", "cosine", "wsd"]
    min_lr_ratio: Rate
    max_grad_norm: Positive
    optimizer: Literal[
        "Adadelta", "Adagrad", "Adam", "AdamW", "AdamW8bit", "Adamax", "Muon", "NAdam", "RAdam", "RMSprop", "SGD"
    ]
    optimizer_args: dict[str, Any] | None = Field(description="{NAME: VALUE, ...}")
    weight_decay: NotNegative | None
    reference: Text = Field(description="start, a file, a folder or a name on the Hub")
    sync_reference: int | None = whole("updates", ge=1)
    sync_mix: Probability
    activation_checkpointing: Flag
    compile: Flag | Literal["auto"] = Field(description="auto, true or false")

    eval_every: int = whole("examples", ge=1)
    keep_best: str | None = Field(
        pattern=r"^((max|min):)?[\w.-]+(/[\w.-]+)*$", description="NAME, max:NAME or min:NAME"
    )
    stop_after: int | None = whole("evaluations", ge=1)
    save_every: int | None = whole("examples", ge=1)
    keep_checkpoints: int | None = whole("checkpoints", ge=1)
    keep_policies: Flag
    background_saves: Flag
    export_dtype: Literal["auto", "float32", "bfloat16", "float16"]
    do_first_eval: Flag
    eval_batch_size: int = whole("examples", ge=1)
    n_eval_examples: int = whole("examples", ge=1)
    sample_during_eval: Flag
    n_eval_model_samples: int = whole("prompts", ge=1)
    sample_temperature: Positive
    sample_top_k: int = whole("tokens", ge=0)
    sample_top_p: Probability
    report: Flag
    push_to_hub: str | None = Field(pattern=r"^[\w.-]+/[\w.-]+$", description="a repository on the Hub, as in me/name")
    minimum_log_interval_secs: NotNegative

    model: ModelSettings
    stop_if: StopIfSettings
    lora: LoraSettings | None

    @property
    def compute_precision(self) -> str:
        """The precision, under either of the setting's two names."""
        return self.model.fsdp_policy_mp or self.precision


class LossSettings(Group):
    """The keys of config/loss/NAME.yaml: the fields of the loss itself."""

    def problems(self, settings: Mapping[str, Any]) -> Iterator[str]:
        """Yield a line for each combination of the loss's settings and the run's, {dotted key: value}, that is refused.

        Invalid settings are missing from settings.
        """
        yield from ()


LossT = TypeVar("LossT", bound=LossSettings)
GroupT = TypeVar("GroupT", bound=BaseModel)


def validate(
    values: Mapping[str, Any],
    defaults: Mapping[str, Any],
    losses: Mapping[str, type[LossT]],
    check_combinations: bool = True,
) -> tuple[Settings, LossT]:
    """The typed settings and the loss of {dotted key: value}; UserError with one line per problem.

    Missing keys take their defaults: a model's or loss's own YAML file, or an earlier version's run, may lack some.
    Combinations of settings need no check where nothing is trained: their files and libraries may be missing here.
    """
    trains_adapter = any(key.startswith("lora.") for key in values)
    if not trains_adapter:
        defaults = {key: value for key, value in defaults.items() if not key.startswith("lora.")} | {"lora": None}
    values = {**defaults, **values}
    name, known = values.get("loss.name"), known_keys(losses)
    run_values = {key: value for key, value in values.items() if not key.startswith("loss.")}
    settings, problems = build(Settings, run_values, "", known)
    loss_type = losses.get(name) if isinstance(name, str) else None
    loss = None
    if loss_type is None:
        problems["loss.name"] = f"loss.name={format_value(name)}: must be one of {', '.join(losses)}"
    else:
        loss, loss_problems = build(loss_type, loss_fields(values), "loss.", known)
        problems |= loss_problems
    lines = [line for line in problems.values() if line]
    if check_combinations:
        valid = {key: value for key, value in values.items() if key not in problems}
        lines += combination_problems(valid)
        checked = loss
        if loss_type is not None and loss is None:  # check combinations with the defaults of wrong values
            checked, _ = build(loss_type, loss_fields(defaults) | loss_fields(valid), "loss.", known)
        lines += checked.problems(valid) if checked else []
    raise_problems(lines)
    assert settings is not None and loss is not None
    return settings, loss


def loss_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key.startswith("loss.") and key != "loss.name"}


def build(
    kind: type[GroupT], values: Mapping[str, Any], prefix: str, known: Collection[str]
) -> tuple[GroupT | None, dict[str, str | None]]:
    """Make a pydantic model of dotted keys that begin with a prefix.

    Returns None if that fails, and {wrong key: line}; the line is None if another line names the cause.
    """
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *groups, name = key.removeprefix(prefix).split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    try:
        return kind.model_validate(nested), {}
    except ValidationError as error:
        details = {prefix + ".".join(field_path(kind, detail)): detail for detail in reversed(error.errors())}
        return None, {key: problem_line(kind, prefix, key, details[key], known) for key in reversed(details)}


def field_path(kind: type[BaseModel], detail: ErrorDetails) -> list[str]:
    """The names of groups and field in an error's location, without the members of unions and lists."""
    path: list[str] = []
    for part in map(str, detail["loc"]):
        path.append(part)
        group = group_of(kind, part)
        if group is None:
            break
        kind = group
    return path


def group_of(kind: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The model of the settings below a field; None for a field that holds a value."""
    annotation = kind.model_fields[name].annotation if name in kind.model_fields else None
    members = (annotation, *get_args(annotation))  # a group may be null
    return next((part for part in members if isinstance(part, type) and issubclass(part, BaseModel)), None)


def problem_line(
    kind: type[BaseModel], prefix: str, key: str, detail: ErrorDetails, known: Collection[str]
) -> str | None:
    """The line for a pydantic error; None if another line names the cause."""
    value, name = detail["input"], key.removeprefix(prefix)
    if detail["type"] == "extra_forbidden":
        return suggest(key, format_value(value), known)
    if isinstance(value, OmegaConfBaseException):
        caused = "name_or_path" in str(value) and key != "model.name_or_path"
        return None if caused else f"{key}: is missing; set {key}=VALUE, {allowed(kind, name)}"
    if detail["type"] == "missing":
        return f"{key}: is missing; a run's config.yaml holds every setting"
    if group_of(kind, name) is not None:
        return suggest(key, format_value(value), known)
    return f"{key}={format_value(value)}: must be {allowed(kind, name)}"


def allowed(kind: type[BaseModel], key: str) -> str:
    """The values that a field accepts, as the end of the sentence "must be ..."."""
    *groups, name = key.split(".")
    for group in groups:
        kind = group_of(kind, group) or kind
    field = kind.model_fields[name]
    members = (field.annotation, *get_args(field.annotation))
    choices = [choice for member in members for choice in get_args(member) if isinstance(choice, str)]
    described = [
        getattr(part, "description", None) for member in members for part in getattr(member, "__metadata__", ())
    ]
    descriptions = [field.description, f"one of {', '.join(choices)}" if choices else None, *described]
    optional = ", or null" if type(None) in members else ""
    return next((text for text in descriptions if text), "another value") + optional


def flatten(config: DictConfig, prefix: str = "") -> dict[str, Any]:
    """Flatten a config to {dotted key: value}; a value that is missing or cannot be interpolated becomes its error."""
    values: dict[str, Any] = {}
    for key in config:
        try:
            value = config[key]
        except OmegaConfBaseException as error:
            value = error
        if isinstance(value, DictConfig) and key not in MAPPINGS:
            values |= flatten(value, f"{prefix}{key!s}.")
        else:
            is_plain = not isinstance(value, (ListConfig, DictConfig))
            values[f"{prefix}{key!s}"] = value if is_plain else OmegaConf.to_container(value)
    return values


def default_values(config_dir: Path, loss_name: str | None, resumed: bool = False) -> dict[str, Any]:
    """The defaults of keys that a config may lack: model, loss and lora keys; in a resumed run, all keys."""
    files = {"model": config_dir / "model" / "blank_model.yaml", "loss": config_dir / "loss" / f"{loss_name}.yaml"}
    files["lora"] = config_dir / "lora" / "default.yaml"
    groups = {group: read_yaml(path) for group, path in files.items() if path.is_file()}
    top = read_yaml(config_dir / "config.yaml") if resumed else {}
    values = flatten_plain({key: value for key, value in top.items() if key not in ("defaults", "hydra")} | groups)
    if resumed:
        values["model.router_loss_weight"] = 0.0  # versions without this key never added the loss
    return {key: value for key, value in values.items() if value != "???" and "${" not in str(value)}


def read_yaml(path: Path) -> dict[Any, Any]:
    """The values of a YAML file, with its interpolations as they are."""
    values = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    assert isinstance(values, dict)
    return values


def flatten_plain(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts to {dotted key: value}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        is_group = isinstance(value, dict) and key not in MAPPINGS
        flat |= flatten_plain(value, f"{prefix}{key}.") if is_group else {f"{prefix}{key}": value}
    return flat


def known_keys(losses: Mapping[str, type[BaseModel]]) -> list[str]:
    """Every dotted key that a config may hold."""
    groups = {name: group_of(Settings, name) for name in Settings.model_fields}
    keys = [name for name, group in groups.items() if group is not Settings.model_fields[name].annotation]
    keys += [f"{name}.{key}" for name, group in groups.items() if group for key in group.model_fields]
    fields = dict.fromkeys(name for loss in losses.values() for name in loss.model_fields)
    return [*keys, "loss.name", *(f"loss.{name}" for name in fields)]
