"""Failures: what a user can fix, why a run ended, and how both are reported."""

import errno
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from dpo.system.console import log_message, printable, write_text

# Why a run ended, and its exit code.
EXIT_CODES = {
    "refused": 2,
    "no checkpoint": 3,
    "disk": 4,
    "not finite": 5,
    "memory": 6,
    "rank": 7,
    "verification": 8,
    "no good checkpoint": 9,  # stop_if ended the run before the first one
    # 128 plus the signal's number, as in a shell
    "SIGHUP": 129,
    "SIGINT": 130,
    "SIGTERM": 143,
}


class UserError(ValueError):
    """Something a user can fix, one message per problem, shown without a traceback."""

    def __init__(self, *problems: str):
        super().__init__(*problems)

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class RunError(Exception):
    """A run cannot continue; the message is shown without a traceback."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.exit_code = EXIT_CODES[reason]


class Stopped(Exception):
    """A signal asked the run to stop; its state has been saved if there was any to save."""

    def __init__(self, signal_name: str):
        super().__init__(signal_name)
        self.exit_code = EXIT_CODES[signal_name]


def summarize_error(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def join_names(names: Sequence[str], most: int = 8) -> str:
    """The first names of a list, and how many more there are."""
    n_others = len(names) - most
    return ", ".join(names[:most]) + (f" and {n_others:,} more" if n_others > 0 else "")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the memory of the device or of the machine is exhausted."""
    reported = isinstance(error, RuntimeError) and re.search(
        "out of memory|not enough memory|can't allocate memory", str(error)
    )
    return bool(reported) or isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM


@contextmanager
def actionable_errors(hint: str) -> Iterator[None]:
    """Turn out-of-memory and compiler errors into one line that names a setting that helps; hint says where it was."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        reason = summarize_error(error)
        if is_out_of_memory(error):
            raise RunError(f"out of memory {hint} ({reason})", "memory") from None
        if any(kind.__module__.startswith("torch._dynamo") for kind in type(error).__mro__):
            message = f"the model cannot be compiled here ({reason})"
            raise UserError(f"{message}; set compile=false, or layout=padded if it is already false") from None
        raise


def raise_problems(problems: Sequence[str]) -> None:
    """Raise one UserError with all problems, if there are any."""
    if problems:
        raise UserError(*problems)


def explain_os_error(error: OSError) -> str:
    """Describe an OSError: the file if it is known, and the reason without the error's number."""
    subject = f"{error.filename}: " if error.filename else "a file "
    return f"{subject}cannot be read or written ({error.strerror or summarize_error(error)})"


def exit_code_of(error: BaseException) -> int:
    """The code with which exit_on_error would exit; 1 for an unexpected error."""
    if isinstance(error, UserError):
        return EXIT_CODES["refused"]
    if isinstance(error, (RunError, Stopped)):
        return error.exit_code
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        return EXIT_CODES["SIGINT"]
    if is_out_of_memory(error):
        return EXIT_CODES["memory"]
    return EXIT_CODES["disk"] if isinstance(error, OSError) else 1


def exit_on_error(work: Callable[[], None]) -> None:
    """Call work; on an expected failure print it without a traceback and exit with its code in EXIT_CODES."""
    try:
        work()
    except UserError as error:
        print_errors(error.args)
        sys.exit(EXIT_CODES["refused"])
    except RunError as error:
        print_errors([str(error)])
        sys.exit(error.exit_code)
    except (OSError, RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            print_errors([f"out of memory before training ({summarize_error(error)}); a smaller model needs less"])
            sys.exit(EXIT_CODES["memory"])
        if not isinstance(error, OSError):
            raise
        print_errors([f"{explain_os_error(error)}; earlier checkpoints are intact"])
        sys.exit(EXIT_CODES["disk"])
    except Stopped as error:
        log_message(f"Stopped by {error}.")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        log_message("Interrupted.")
        sys.exit(EXIT_CODES["SIGINT"])


def print_errors(problems: Sequence[str]) -> None:
    """Print each problem to stderr after "error: ", with further lines indented and control characters escaped."""
    for problem in problems:
        write_text(sys.stderr, f"error: {printable(problem, indent='  ')}\n")
