"""The command `tsgdn`: standard library only, each command is imported when it is asked for.

Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 misuse (nothing was applied),
130 interrupted.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from tsgdn import __version__

if TYPE_CHECKING:
    import argparse


class Misuse(Exception):
    """A wrong option, file or schema; its text is shown in one line and the exit code is 2."""


class Command(NamedTuple):
    """Where a command lives.

    Attributes:
        group: heading in the help.
        module: imported when the command is asked for.
        help: one line.
        arguments: function of the module that adds options to a parser; None: `run` takes the raw arguments.
        run: function of the module that does the work and returns the exit code.
    """

    group: str
    module: str
    help: str
    arguments: str | None = "add_arguments"
    run: str = "run"


TRAIN, SCORE, LIVE, HELP = "Train", "Data and scores", "Stream", "Look around"

COMMANDS = {
    "fit": Command(TRAIN, "tsgdn.cli.train", "fit a forecaster: --config NAME|FILE", None, "main"),
    "validate": Command(TRAIN, "tsgdn.cli.train", "loss of a checkpoint on the validation windows", None, "main"),
    "test": Command(TRAIN, "tsgdn.cli.train", "loss of a checkpoint on the test windows", None, "main"),
    "predict": Command(TRAIN, "tsgdn.cli.train", "quantiles of a checkpoint for the test windows", None, "main"),
    "data": Command(SCORE, "tsgdn.cli.data", "list, describe, get or simulate data sets"),
    "evaluate": Command(SCORE, "tsgdn.cli.evaluate", "WQL, MASE, ND and coverage on published windows"),
    "backtest": Command(
        SCORE,
        "tsgdn.cli.evaluate",
        "scores at every origin, in one pass over the series",
        "add_backtest_arguments",
        "run_backtest",
    ),
    "bench": Command(SCORE, "tsgdn.cli.bench", "accuracy of mixers, speed of kernels; rows in a results.csv"),
    "stream": Command(LIVE, "tsgdn.cli.stream", "observations in, quantile forecasts out, line by line"),
    "state": Command(LIVE, "tsgdn.cli.state", "look at, copy, compare, spread or renew the states of a stream"),
    "verify": Command(
        LIVE,
        "tsgdn.cli.model",
        "check that stream and batch agree; exit 1 when they differ",
        "add_verify_arguments",
        "run_verify",
    ),
    "export": Command(
        LIVE, "tsgdn.cli.model", "checkpoint to a folder that streams", "add_export_arguments", "run_export"
    ),
    "demo": Command(HELP, "tsgdn.cli.demo", "fit, evaluate and stream a small model, in minutes"),
    "doctor": Command(HELP, "tsgdn.cli.doctor", "versions, devices, their kernels, where data is looked for"),
}

EXTRAS = {"matplotlib": "plot"}
"""Packages that come with an extra of ours."""


def usage() -> str:
    """The text of `tsgdn --help`."""
    width = max(map(len, [*COMMANDS, "--version"]))
    lines = ["usage: tsgdn COMMAND [options]", "", "Forecasts that keep up: fit once, observe, forecast at any moment."]
    group = None
    for name, command in COMMANDS.items():
        if command.group != group:
            group = command.group
            lines += ["", f"{group}:"]
        lines.append(f"  {name:<{width}}  {command.help}")
    lines += [
        "",
        "Options:",
        f"  {'--help':<{width}}  this text; tsgdn COMMAND --help tells more",
        f"  {'--version':<{width}}  the version",
    ]
    return "\n".join(lines)


def say(name: str, text: object) -> None:
    """One line on stderr."""
    who = f"tsgdn {name}" if name else "tsgdn"
    print(f"{who}: {' '.join(str(text).split())}", file=sys.stderr, flush=True)


def _parser(name: str, description: str) -> "argparse.ArgumentParser":
    import argparse  # not needed for the help, which is to be quick

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            """Raises instead of printing the usage over many lines; parsers of subcommands are of this class too."""
            raise Misuse(f"{message} (see {self.prog} --help)")

    return Parser(prog=f"tsgdn {name}", description=description)


def dispatch(name: str, argv: Sequence[str]) -> int:
    """Imports the command and runs it."""
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    run = getattr(module, command.run)
    if command.arguments is None:
        return run([name, *argv]) or 0
    parser = _parser(name, command.help[0].upper() + command.help[1:])
    getattr(module, command.arguments)(parser)
    return run(parser.parse_args(list(argv))) or 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Set TSGDN_DEBUG=1 to see the traceback of an error that is otherwise told in one line.
    """
    name, *rest = [*(sys.argv[1:] if argv is None else argv)] or [""]
    if name in ("", "-h", "--help", "help") and not rest:
        print(usage(), file=sys.stdout if name else sys.stderr)
        return 0 if name else 2
    if name == "--version":
        print(f"tsgdn {__version__}")
        return 0
    if name == "help":
        name, rest = rest[0], ["--help"]
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        what = "option" if name.startswith("-") else "command"
        say("", f"no {what} {name!r}; " + (f"did you mean {near[0]!r}?" if near else "see tsgdn --help"))
        return 2
    try:
        code = dispatch(name, rest)
        print(end="", flush=True)  # a closed pipe must be noticed here, not at exit
        return code
    except Misuse as error:
        return _told(name, error, 2)
    except BrokenPipeError:
        # The reader (head, less) has seen enough. What is left in the buffer must not complain at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        return _told(name, error, 2)
    except OSError as error:
        return _told(name, error, 1)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        return _told(name, f"{error.name} is not installed; pip install 'tsgdn[{extra}]'", 1)
    except KeyboardInterrupt:
        say(name, "interrupted")
        return 130


def _told(name: str, error: object, code: int) -> int:
    if os.environ.get("TSGDN_DEBUG"):
        import traceback

        traceback.print_exc()
    say(name, error)
    return code
