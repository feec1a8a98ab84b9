"""Parses rows of preference data, in all their forms, into a prompt and responses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dpo.data.columns import COLUMNS, NO_COLUMN, ORDERS, PAIR, Fields, as_list, number
from dpo.data.examples import Ids
from dpo.data.messages import (
    SYSTEM,
    InconsistentRow,
    Message,
    UnusableRow,
    as_messages,
    as_tools,
    checked_text,
    comparable,
    read_written,
)
from dpo.data.ranking import PairChoice, Ranking, rank
from dpo.system.errors import UserError

ASSISTANT = "\n\nAssistant:"
HUMAN = "\n\nHuman:"
DIFFERENT_PROMPTS = "the rejected dialogue's prompt differs"

LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
NUMBERS = [role for role, column in COLUMNS.items() if column.is_number]
SINGLE = ("completion", "messages")  # roles of a single response
TrainOn = Literal["response", "last", "all"]


@dataclass(frozen=True)
class RowOptions:
    """How rows are read.

    sft: one response is enough. labels: a row may be a single response with a label. chat: each text becomes a turn.
    """

    sft: bool = False
    labels: bool = False
    chat: bool = False
    train_on: TrainOn = "response"
    pairs: PairChoice = "best_worst"


@dataclass(frozen=True)
class Row:
    """A prompt with its responses: all texts, or all lists of messages that begin and end with an assistant's turn.

    pairs are (chosen, rejected), indices of responses; empty for a single response. target is the response that SFT
    trains on. every_target: SFT trains on each distinct target of the prompt, not only the last one. ties counts the
    pairs left out because their scores are equal. ids, if an engine sampled the responses, are trained on as they are.
    """

    prompt: str | list[Message]
    responses: tuple[Any, ...]
    pairs: tuple[tuple[int, int], ...] = ()
    target: int = 0
    scores: tuple[float, ...] = ()
    label: bool | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)  # by role, such as weight
    tools: list[Any] | None = None
    every_target: bool = True
    prompts_differ: bool = False
    ties: int = 0
    columns_read: frozenset[str] = frozenset()  # by role
    ids: Ids | None = None


def parse_row(row: object, columns: Mapping[str, str], options: RowOptions) -> Row:
    """Find a row's prompt and responses; UserError if it has no known form, UnusableRow if it cannot be trained on.

    SFT needs no rejected response: it uses the better one, a completion, or messages.
    """
    if not isinstance(row, dict):
        raise UserError(f"must be an object with the fields chosen and rejected, not {type(row).__name__}")
    fields = Fields.of(row, columns)
    roles = response_roles(fields, row, options)
    is_list = roles == ["responses"]
    items = as_list(fields["responses"], fields.name("responses")) if is_list else [fields[role] for role in roles]
    answers = named_answers(fields, roles, items)
    if is_list and len(items) < (1 if options.sft else 2):
        raise UnusableRow("it has too few responses")
    are_messages = [isinstance(answer, (list, Mapping)) for _, answer in answers]
    if any(are_messages) and not all(are_messages) and not fields.is_beside_messages:
        raise UserError(f"{' and '.join(name for name, _ in answers)} must both be texts or both be messages")
    prompt = fields["prompt"] if "prompt" in fields else fields["messages"]
    if any(are_messages) or isinstance(prompt, (list, Mapping)) or (options.chat and "prompt" in fields):
        parsed = parse_conversations(fields, roles, answers, options.train_on)
    else:
        parsed = parse_texts(fields, roles, answers)
    ranking = rank(fields, roles, items, options.pairs) if len(items) > 1 else Ranking()
    label = label_of(fields, options.sft) if roles[0] in SINGLE else None
    columns_read = {*parsed.columns_read, *roles, *ranking.roles, "input", "sampled_ids", *NUMBERS}
    if label is not None:
        columns_read.add("label")
    return replace(
        parsed,
        pairs=ranking.pairs,
        target=ranking.best,
        scores=ranking.scores,
        ties=ranking.ties,
        label=None if options.sft else label,
        numbers=numbers_of(fields),
        columns_read=frozenset(columns_read & fields.values.keys()),
        ids=sampled_ids(fields, roles),
    )


def response_roles(fields: Fields, row: Mapping[str, Any], options: RowOptions) -> list[str]:
    """The roles of a row's responses; UserError if it lacks one, UnusableRow if one is null."""
    if "responses" in fields:
        return ["responses"]
    singles = [] if "chosen" in fields else [role for role in SINGLE if role in fields]
    is_labelled = bool(singles) and "label" in fields.values
    if is_labelled and not (options.sft or options.labels):
        raise UserError("has one response and a label, for loss=kto; this loss needs a chosen and a rejected response")
    if singles and (options.sft or is_labelled):
        return singles[:1]
    is_ordered = any(role in fields.columns for role in ORDERS)
    roles = ["chosen"] if options.sft and "rejected" not in fields and not is_ordered else list(PAIR)
    missing = [role for role in roles if role not in fields]
    if not missing:
        return roles
    alternatives = ["responses", *(SINGLE if options.sft or options.labels else ())]
    nulls = [role for role in (*roles, *alternatives) if role in fields.values and role not in fields]
    if all(role in nulls for role in missing) or any(role in nulls for role in alternatives):
        raise UnusableRow("a response is empty")
    existing = "the row's columns: " + ", ".join(repr(str(name))[1:-1] for name in list(row)[:20])
    if options.labels and singles:
        raise UserError(f"{fields.name('label')} must be true or false, not missing; {existing}")
    role, name = missing[0], fields.name(missing[0])
    if options.sft:
        role, name = "completion", "chosen, completion or messages"
    advice = f"set columns.{role}=NAME"
    if singles:
        advice += f", or loss=sft to train on {fields.name(singles[0])}"
    raise UserError(f"{name} must be a text, not missing; {existing}; {advice}")


def named_answers(fields: Fields, roles: Sequence[str], items: Sequence[Any]) -> list[tuple[str, Any]]:
    """Each response with its name in error messages; items are the responses as the row holds them."""
    if roles != ["responses"]:
        return [(fields.name(role), item) for role, item in zip(roles, items, strict=True)]
    names = [f"{fields.name('responses')}, response {number}" for number in range(1, len(items) + 1)]
    return [(name, response_of(item, name)) for name, item in zip(names, items, strict=True)]


def response_of(item: object, name: str) -> Any:
    """A response of a list: the item itself, or what an object holds as its response."""
    if isinstance(item, Mapping) and not item.keys() & {"role", "from"}:
        keys = [key for key in COLUMNS["responses"].keys if key in item]
        if len(keys) != 1:
            known = ", ".join(COLUMNS["responses"].keys)
            raise UserError(f"{name} must be an object with one of {known}, not with {', '.join(keys) or 'none'}")
        item = item[keys[0]]
    if item is None or item == []:
        raise UnusableRow("a response is empty")
    return read_written(item, name)


def parse_texts(fields: Fields, roles: Sequence[str], answers: Sequence[tuple[str, Any]]) -> Row:
    """Parse a row of texts: a prompt with responses, or hh-style dialogues that share all but the last answer."""
    texts = tuple(checked_text(answer, name) for name, answer in answers)
    if "prompt" in fields:
        if all(text.startswith(HUMAN) for text in texts) and "sampled_ids" not in fields:
            problem = f"{answers[0][0]} is a whole dialogue, but {fields.name('prompt')} is given as well"
            raise UserError(f"{problem}; columns.prompt={NO_COLUMN} leaves it out")
        return Row(checked_text(fields["prompt"], fields.name("prompt")), texts, columns_read=frozenset(["prompt"]))
    if "prompt" in fields.values and not all(ASSISTANT in text for text in texts):
        raise UnusableRow("the prompt is empty")
    if roles[0] in ("completion", "responses"):
        raise UserError(f"{fields.name('prompt')} must be a text, not missing; set columns.prompt=NAME")
    advice = "; a row without dialogues needs a prompt; set columns.prompt=NAME"
    prompt, responses, prompts_differ = split_dialogues(texts, advice)
    return Row(prompt, responses, every_target=False, prompts_differ=prompts_differ)


def split_dialogues(dialogues: Sequence[str], advice: str = "") -> tuple[str, tuple[str, ...], bool]:
    """The prompt of hh-style dialogues, their last answers, and whether their prompts differ.

    As in the original, all answers begin where the first dialogue's last answer does. UserError if it has no answer.
    """
    if ASSISTANT not in dialogues[0]:
        raise UserError(f"the chosen dialogue has no {ASSISTANT!r}{advice}")
    start = dialogues[0].rfind(ASSISTANT) + len(ASSISTANT)
    prompt = dialogues[0][:start]
    prompts_differ = not all(dialogue.startswith(prompt) for dialogue in dialogues)
    return prompt, tuple(dialogue[start:] for dialogue in dialogues), prompts_differ


def sampled_ids(fields: Fields, roles: Sequence[str]) -> Ids | None:
    """The token ids of a row that an engine sampled, None if it has none; UserError if they are malformed."""
    if "sampled_ids" not in fields:
        return None
    name, given = fields.name("sampled_ids"), fields["sampled_ids"]
    advice = f"columns.sampled_ids={NO_COLUMN} tokenizes the texts"
    if roles == ["responses"]:
        raise UserError(f"{name} holds the ids of chosen and rejected, not of {fields.name('responses')}; {advice}")
    sides = ["prompt", *("completion" if role in SINGLE else role for role in roles)]
    if not isinstance(given, Mapping):
        form = f"an object with the token ids of {', '.join(sides)}"
        raise UserError(f"{name} must be {form}, not {type(given).__name__}; {advice}")
    for side in sides:
        if not are_ids(ids := given.get(side)):
            found = "missing" if ids is None else repr(ids)[:40]
            raise UserError(f"{name}, {side} must be a list of token ids, at least one, not {found}; {advice}")
    prompt, *responses = (given[side] for side in sides)
    return Ids(prompt, tuple(responses))


def are_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int and 0 <= token < 2**31 for token in value)


# Conversations


def parse_conversations(
    fields: Fields, roles: Sequence[str], answers: Sequence[tuple[str, Any]], train_on: TrainOn
) -> Row:
    """Parse a row of messages: responses that continue a prompt, or whole conversations.

    The prompt is the column prompt or messages, or what whole conversations share, up to a turn of the user or a tool.
    """
    responses = [as_messages(answer, name, "assistant") for name, answer in answers]
    if fields.is_beside_messages and len(responses) > 1 and continues(responses[1]):
        responses[1] = [*responses[0][:-1], *responses[1]]
    names = " and ".join(name for name, _ in answers)
    if any(turns[-1]["role"] != "assistant" for turns in responses):
        raise UnusableRow("the last turn of a conversation is not the assistant's")
    prompt, roles_read = given_prompt(fields, roles, responses, names)
    if len(set(map(continues, responses))) > 1:
        raise UserError(f"{names} must both be whole conversations, or both continue a prompt")
    conversations = [[*prompt, *turns] for turns in responses]
    start = find_start(conversations, len(prompt), train_on)
    prompt = conversations[0][:start]
    parts = tuple(turns[start:] for turns in conversations)
    earlier_turns = [*prompt, *(turn for part in parts for turn in part[:-1])]
    if any(map(is_empty, earlier_turns)):
        raise UnusableRow("a turn is empty")
    tools = as_tools(fields["tools"], fields.name("tools"))
    columns_read = frozenset([*roles_read, *(role for role in ("system", "tools") if role in fields)])
    return Row(with_system(prompt, fields), parts, tools=tools, columns_read=columns_read)


def continues(turns: Sequence[Message]) -> bool:
    """Whether turns continue a prompt instead of being a whole conversation."""
    return bool(turns[0]["role"] == "assistant")


def given_prompt(
    fields: Fields, roles: Sequence[str], responses: Sequence[Sequence[Message]], names: str
) -> tuple[list[Message], list[str]]:
    """The turns of a column that the responses continue, and its role; none if they are whole conversations."""
    if "prompt" in fields:
        return prompt_before(responses, fields, names), ["prompt"]
    is_prompt = "messages" in fields and "messages" not in roles and not fields.is_beside_messages
    if is_prompt and all(map(continues, responses)):
        return as_messages(fields["messages"], fields.name("messages"), "user"), ["messages"]
    if all(len(turns) == 1 for turns in responses):
        if "prompt" in fields.values:
            raise UnusableRow("the prompt is empty")
        raise UserError(f"{fields.name('prompt')} is missing; responses that are single answers need a prompt")
    return [], []


def prompt_before(responses: Sequence[Sequence[Message]], fields: Fields, names: str) -> list[Message]:
    """The turns of the column prompt, none if the responses contain them.

    UserError if the responses neither contain nor continue them.
    """
    name, value = fields.name("prompt"), fields["prompt"]
    prompt = as_messages(value, name, "user")
    if all(map(continues, responses)):
        is_repeated = continues(prompt) and all(same_turns(turns[: len(prompt)], prompt) for turns in responses)
        return [] if is_repeated else prompt
    if isinstance(value, str):
        is_contained = all(has_text(turns, value.strip()) for turns in responses)
    else:
        is_contained = all(has_turns(turns, prompt) for turns in responses)
    if not is_contained:
        problem = f"{names} neither contain the turns of {name} nor continue them with a turn of the assistant"
        raise UserError(f"{problem}; columns.prompt={NO_COLUMN} reads them as whole conversations")
    return []


def has_text(turns: Sequence[Message], text: str) -> bool:
    """Whether a text is empty, or the whole content of a turn that is not the assistant's."""
    return not text or any(turn["role"] != "assistant" and turn["content"].strip() == text for turn in turns)


def has_turns(turns: Sequence[Message], wanted: Sequence[Message]) -> bool:
    """Whether the wanted turns are among the turns, one after the other."""
    return any(same_turns(turns[start : start + len(wanted)], wanted) for start in range(len(turns)))


def same_turns(first: Sequence[Message], second: Sequence[Message]) -> bool:
    """Whether two lists of turns are equal, except for keys that do not matter, such as ids and times."""
    return first == second or list(map(comparable, first)) == list(map(comparable, second))


def is_empty(turn: Message) -> bool:
    """Whether a turn has no text although it must have one; a system turn may be empty."""
    return turn["role"] not in SYSTEM and len(comparable(turn)) == 2  # only its role and its name


def find_start(conversations: Sequence[Sequence[Message]], n_prompt: int, train_on: TrainOn) -> int:
    """The index of the turn at which the responses begin, a turn of the assistant after one of the user or a tool.

    The first n_prompt turns belong to the prompt in any case.
    """
    first, *others = conversations
    last = len(first) - 1
    starts = [index for index in range(1, len(first)) if is_start(first, index)]
    if train_on == "last":
        if not all(same_turns(turns[:-1], first[:-1]) for turns in others):
            raise UnusableRow("the conversations differ in more than their last turn")
        start = last
    else:
        if others:
            end = first_difference(conversations)
        elif train_on == "all":
            end = n_prompt or min(starts, default=0)
        else:
            end = n_prompt or last
        start = max([n_prompt, *(index for index in starts if index <= end)])
    if start not in starts:
        raise InconsistentRow("the turn before a response is not the user's or a tool's")
    return start


def is_start(turns: Sequence[Message], index: int) -> bool:
    return turns[index]["role"] == "assistant" and turns[index - 1]["role"] in ("user", "tool")


def first_difference(conversations: Sequence[Sequence[Message]]) -> int:
    """The index of the first turn that differs, or of the shortest conversation's last turn if none does.

    UnusableRow if a turn that differs is not the assistant's.
    """
    shortest = min(map(len, conversations))
    for index in range(shortest):
        turns = [conversation[index] for conversation in conversations]
        if all(same_turns([turn], turns[:1]) for turn in turns[1:]):
            continue
        for turn in turns:
            if turn["role"] != "assistant":
                raise UnusableRow(f"the conversations first differ in a turn of the {turn['role']}")
        return index
    return shortest - 1


def with_system(prompt: list[Message], fields: Fields) -> list[Message]:
    """The prompt with the column system as its first turn; UserError if it begins with another system turn."""
    if not fields["system"]:
        return prompt
    turn = {"role": "system", "content": checked_text(fields["system"], fields.name("system"))}
    if prompt[0]["role"] not in SYSTEM:
        return [turn, *prompt]
    if prompt[0]["content"] == turn["content"]:
        return prompt
    problem = f"{fields.name('system')} is given, but the conversation already has another system turn"
    raise UserError(f"{problem}; columns.system={NO_COLUMN} leaves the column out")


# Numbers and labels


def label_of(fields: Fields, sft: bool) -> bool | None:
    """Whether the single response is desirable, None without a label; UnusableRow if SFT must not train on it.

    SFT ignores labels that are neither true nor false, unless the user set the column.
    """
    if "label" not in fields.values:
        return None
    is_given = not any(role in fields.columns for role in PAIR)  # a given label leaves no column for pairs
    if sft and not is_given and str(fields["label"]).strip().lower() not in LABELS:
        return None
    label = parse_label(fields["label"], fields.name("label"))
    if sft and not label:
        raise UnusableRow("the response is labelled undesirable")
    return label


def parse_label(value: object, name: str) -> bool:
    """Whether a response is desirable: true, false, 1, 0, 1.0, 0.0 or their text; UserError for anything else."""
    if value is None or value == "":  # CSV writes null as an empty cell
        raise InconsistentRow(f"{name} must be true or false, not {'null' if value is None else 'empty'}")
    is_desirable = LABELS.get(str(value).strip().lower())
    if is_desirable is None:
        raise UserError(f"{name} must be true or false, not {str(value)[:40]!r}")
    return is_desirable


def numbers_of(fields: Fields) -> dict[str, float]:
    """The numbers of a row by role; UnusableRow if its weight is 0."""
    numbers = {role: number(fields[role], fields.name(role)) for role in NUMBERS if role in fields.columns}
    weight = numbers.get("weight", 1.0)
    if weight < 0:
        raise UserError(f"{fields.name('weight')} must be a number above 0, not {weight:g}")
    if weight == 0:
        raise UnusableRow("its weight is 0")
    return numbers
