"""Options that say how the predictor of a stream takes rows in, and where its states are kept."""

import argparse
from pathlib import Path
from typing import Any

from tsgdn.cli.main import Misuse
from tsgdn.cli.sources import without_password


def add_predictor_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `predictor_options` reads."""
    parser.add_argument("--freq", help="step of the series, such as h or D (the model's own)")
    parser.add_argument("--max-series", type=int, metavar="N", help="series that are at hand at a time, of each shard")
    parser.add_argument(
        "--on-full",
        choices=("reject", "evict"),
        default="reject",
        help="rows of further series are set aside, or those that were silent for longest wait in --state (reject)",
    )
    parser.add_argument("--on-unknown", choices=("create", "reject"), default="create", help="series not seen before")
    parser.add_argument(
        "--late-window",
        type=int,
        default=0,
        metavar="N",
        help="patches behind the newest row within which late values count as if they had come in order (0)",
    )
    parser.add_argument(
        "--on-conflict",
        choices=("reject", "replace"),
        default="reject",
        help="another value for a step that has one is set aside, or takes its place within --late-window (reject)",
    )
    parser.add_argument(
        "--exact", action="store_true", help="the same bits whatever rows come together: slower, for resumed streams"
    )
    parser.add_argument("--calibrate", action="store_true", help="correct the widths of forecasts by their own misses")
    parser.add_argument(
        "--max-future-skew",
        type=float,
        metavar="S",
        help="seconds by which a row may be ahead of when its broker got it (any)",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (auto)")


def predictor_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `StatefulPredictor.from_pretrained`.

    Raises:
        Misuse: one is out of range, or needs another.
    """
    if args.max_series is not None and args.max_series < 1:
        raise Misuse(f"--max-series is {args.max_series}, expected at least 1")
    if args.on_full == "evict" and (args.max_series is None or args.state is None):
        lacking = "--max-series" if args.max_series is None else "--state, or an evicted series would begin anew"
        raise Misuse(f"--on-full evict needs {lacking}")
    if not 0 <= args.late_window <= 10_000:
        raise Misuse(f"--late-window is {args.late_window}, expected 0 to 10000 patches")
    if args.on_conflict == "replace" and not args.late_window:
        raise Misuse("--on-conflict replace needs --late-window: how far back, in patches")
    if args.max_future_skew is not None and not 0 <= args.max_future_skew < float("inf"):
        raise Misuse(f"--max-future-skew is {args.max_future_skew}, expected seconds")
    options: dict[str, Any] = {"device": args.device, "on_unknown": args.on_unknown}
    if args.exact:
        options["exact"] = True
    for name, default in (
        ("freq", None), ("horizon", None), ("max_series", None), ("on_full", "reject"), ("late_window", 0),
        ("on_conflict", "reject"), ("max_future_skew", None), ("calibrate", False),
    ):  # fmt: skip
        if getattr(args, name) != default:
            options[name] = getattr(args, name)
    if getattr(args, "signals", None) is not None:
        options["signals"] = True
    return options


def open_predictor(args: argparse.Namespace, options: dict[str, Any]) -> Any:
    """The predictor of --model.

    Raises:
        Misuse: there is no such model, or it does not take the options.
    """
    from tsgdn.streaming.predictor import StatefulPredictor

    if "://" in args.model:
        raise Misuse(f"--model {without_password(args.model)!r} is an address, expected a local path")
    folder = Path(args.model).expanduser()
    try:
        predictor = StatefulPredictor.from_pretrained(folder, **options)
    except (ValueError, OSError, RuntimeError) as error:
        raise Misuse(f"--model {args.model}: {error}") from None
    if args.freq is not None:
        from tsgdn.data.clock import Clock
        from tsgdn.model.artefact import read_series_info

        own = read_series_info(folder).get("freq")
        if own is not None and Clock(own) != Clock(args.freq):
            raise Misuse(f"--freq is {args.freq!r}, the model was fitted on {own!r}: leave the option out")
    return predictor


def state_place(text: str) -> str | Path:
    """The place of --state: an address, checked, or a path.

    Raises:
        Misuse: an address that cannot be read.
    """
    from tsgdn.cli.sources import REDIS_OPTIONS, read_address

    if text.startswith(("redis://", "rediss://", "unix://")):
        read_address("--state", text, REDIS_OPTIONS)  # or the client's words may hold a password
    return text if "://" in text else Path(text).expanduser()
