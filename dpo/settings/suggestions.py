"""Answers to settings that do not exist, found from the words alone, before anything slow is imported."""

import difflib
import re
from collections.abc import Collection, Mapping, Sequence

from dpo.settings.aliases import ALIASES, LOSS_NAMES
from dpo.system.installation import COMMAND

NEAR = 0.85  # the similarity, as difflib measures it, from which a word counts as a typing error for another
HYDRA_ONLY = re.compile(r"--(config|experimental|hydra|shell)|-(cp|cn|cd|sc)$")  # with these flags nothing is checked
OTHER_NAMES = {"loss": LOSS_NAMES}
NO_SUCH_FILE = {
    "model": "use model.name_or_path={}, a folder or a name on the hub",
    "lora": "leave it out to train all weights",
}


def find_wrong_words(
    arguments: Sequence[str], known: Collection[str], options: Mapping[str, Sequence[str]]
) -> list[str]:
    """Return one line per argument of a command line that no config can take; known are all keys, options the groups.

    What only Hydra can judge passes: its own flags and settings, deletions, packages.
    """
    if any(HYDRA_ONLY.match(argument) for argument in arguments):
        return []
    problems: list[str] = []
    words = [
        word if word.isprintable() else ascii(word)[1:-1] for word in arguments
    ]  # a terminal obeys what it is sent
    for before, argument, following in zip(["", *words], words, [*words[1:], ""], strict=False):
        if argument.startswith("--"):
            problems += _flag_problem(argument, following, known, options)
        elif setting := re.fullmatch(r"\+{0,2}([\w.-]+)=(.*)", argument):
            problems += _setting_problem(setting[1], setting[2], known, options)
        elif argument[:1] not in ("-", "~", "+") and not argument.strip("=").count("=") and before[:1] != "-":
            form = "a setting is written KEY=VALUE without spaces; put quotes around a value that has some"
            return [*problems, f"{argument}: {form}"]  # what follows may be the rest of the same setting
    return problems


def suggest(key: str, value: str | None, known: Collection[str]) -> str:
    """Return the line for a key that no config has, or not the chosen loss, with what was probably meant.

    known are the dotted names of all settings; value is what was typed after the equals sign, None if it is unknown.
    """
    if key.startswith("lora.") and key in known:
        return f"{key}: belongs to lora=default, without which all weights are trained; add lora=default"
    if key in known:
        return f"{key}: the chosen loss has no such setting"
    groups = _groups(known)
    if key in groups:
        instead = ALIASES[key].text(value) if key in ALIASES else f"`{COMMAND} --help {key}` lists them"
        return f"{key}: is a group of settings; {instead}"
    problem = f"{key}: there is no such setting; "
    names = _names(known)
    answers = {_squash(name): f"did you mean {meant}?" for name, meant in names.items()}
    answers |= {_squash(name): answer.text(value) for name, answer in ALIASES.items()}
    group, parent, last = key.partition(".")[0], key.rpartition(".")[0], key.rpartition(".")[2]
    for word in (_squash(key), _squash(last)):
        if word in answers:
            return problem + answers[word]
    if parent in known and parent not in groups:  # lr.anything
        return f"{problem}did you mean {parent}?"
    if group in groups:  # loss.bta
        near, lists = _nearest(key, names), f"--help {group}"
    elif group in ALIASES:  # lora.anything, whose value is not that of lora
        return problem + ALIASES[group].text(None)
    else:
        near, lists = _nearest(key, [*names, *ALIASES]), "--help"
    return problem + (f"`{COMMAND} {lists}` lists all of them" if near is None else answers[near])


def suggest_option(group: str, name: str, options: Sequence[str]) -> str:
    """Return the line for a file that a group, as model or loss, does not have, with what was probably meant."""
    problem = f"{group}={name}: there is no such file in config/{group}/; choose one of {' '.join(options)}"
    if (other := OTHER_NAMES.get(group, {}).get(name.lower())) is not None:
        return f"{problem}; use {other}"
    names = {_squash(option): option for option in options}
    near = None if "/" in name else _nearest(name, options)  # a path or a hub name is no typing error
    if near is not None:
        return f"{problem}; did you mean {names[near]}?"
    return f"{problem}; {NO_SUCH_FILE[group].format(name)}" if group in NO_SUCH_FILE else problem


def _setting_problem(key: str, value: str, known: Collection[str], options: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the line for KEY=VALUE if there is no such key, or one per file that a group does not have."""
    if key in options:
        names = value.split(",") if re.fullmatch(r"[\w./~,-]+", value) else []  # several in a sweep
        return [suggest_option(key, name, options[key]) for name in names if name not in options[key]]
    parent, _, last = key.rpartition(".")
    is_element = parent in known and last.isdecimal()  # local_dirs.0
    is_mapping = key in _groups(known) and value.startswith("{")  # wandb={enabled:false}
    if key in known or is_element or is_mapping or key.split(".")[0] == "hydra":
        return []
    return [suggest(key, value, known)]


def _flag_problem(
    argument: str, following: str, known: Collection[str], options: Mapping[str, Sequence[str]]
) -> list[str]:
    """Return the line for a setting that is written as a flag, --KEY=VALUE or --KEY VALUE; none for Hydra's flags."""
    flag, _, value = argument.partition("=")
    key = flag[2:].replace("-", "_")
    if not value and following[:1] != "-" and "=" not in following:
        value = following
    if key in known or key in options:
        return [f"{argument}: settings are written without dashes, {key}={value or 'VALUE'}"]
    words = {_squash(word) for word in (*ALIASES, *_names(known))}
    if _squash(key) not in words:
        return []
    return [suggest(key, value or None, known) + "; settings are written without dashes"]


def _names(known: Collection[str]) -> dict[str, str]:
    """Return {word: what it means} for every key, its last part, and every group."""
    full = {key: key for key in known if not key.endswith(".name")}  # loss.name is set by loss=NAME
    return {key.rpartition(".")[2]: key for key in full} | {group: group for group in _groups(known)} | full


def _groups(known: Collection[str]) -> list[str]:
    """Return the names that stand before a dot, as wandb, model and loss."""
    return list(dict.fromkeys(key.partition(".")[0] for key in known if "." in key))


def _squash(word: str) -> str:
    """Return a word without what people vary: dots, dashes, underscores, capitals."""
    return re.sub(r"[\W_]", "", word).lower()


def _nearest(word: str, names: Collection[str]) -> str | None:
    """Return the name, squashed, of which a word may be a typing error or another order of its parts, or None."""
    short = {_squash(name): name for name in names}
    near = difflib.get_close_matches(_squash(word), short, n=1, cutoff=NEAR)
    others = (key for key, name in short.items() if _is_reordered(word, name) or _is_stuttered(_squash(word), key))
    return near[0] if near else next(others, None)


def _is_reordered(word: str, name: str) -> bool:
    """Return whether two words differ in the order of their parts, or of their letters after the first."""
    parts = [sorted(re.split(r"[\W_]+", text.lower())) for text in (word, name)]
    return parts[0] == parts[1] or (word[:1] == name[:1] and sorted(_squash(word)) == sorted(_squash(name)))


def _is_stuttered(word: str, name: str) -> bool:
    """Return whether two words differ in how often they repeat a letter, which alone makes short ones unlike."""
    first, second = (re.sub(r"(.)\1+", r"\1", text) for text in (word, name))
    return first == second and len(first) > 1
