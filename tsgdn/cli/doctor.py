"""`tsgdn doctor`: what this installation is made of, and whether it fits together."""

import argparse
import json
import os
import platform
import re
import sqlite3
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

from tsgdn import __version__


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `tsgdn doctor`."""
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    """Prints the report; exit code 1 when a required package is missing or outside its range."""
    report = examine()
    print(json.dumps(report, indent=2) if args.json else as_text(report))
    return 0 if report["ok"] else 1


def examine() -> dict[str, Any]:
    """Everything that `doctor` knows, as plain values."""
    packages = _packages()
    return {
        "ok": all(package["ok"] for package in packages),
        "tsgdn": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "sqlite": sqlite3.sqlite_version,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        **_torch(),
        "data": _data_places(),
        "packages": packages,
    }


def as_text(report: dict[str, Any]) -> str:
    """The report as lines to read."""
    facts = {key: value for key, value in report.items() if key not in ("ok", "packages", "data", "kernels")}
    lines = [f"{key:<10}{value}" for key, value in facts.items()]
    if report.get("kernels"):  # there are none where torch does not load
        lines += ["", "kernels, for float32 and narrower"]
        lines += [f"  {k['device']}: {k['path'] or 'none'} ({k['why']})" for k in report["kernels"]]
    lines += ["", "data is looked for in"]
    lines += [f"  {p['path']}  ({p['from']}; {'there' if p['exists'] else 'not there'})" for p in report["data"]]
    lines += ["", f"{'package':<18}{'installed':<12}{'pinned':<12}required"]
    for package in report["packages"]:
        installed, pinned = package["installed"] or "missing", package["pinned"] or "-"
        note = "" if package["ok"] else "   <- does not fit"
        if package["ok"] and package["pinned"] and installed.split("+")[0] != pinned:
            note = "   (not the pinned one)"
        lines.append(f"{package['name']:<18}{installed:<12}{pinned:<12}{package['required'] or 'any'}{note}")
    bad = [package["name"] for package in report["packages"] if not package["ok"]]
    lines += ["", f"does not fit: {', '.join(bad)}; pip install -U tsgdn mends it" if bad else "all fits"]
    return "\n".join(lines)


def _torch() -> dict[str, Any]:
    try:
        import torch
    except (ImportError, OSError) as error:  # a broken install is just what this command is for
        return {"device": f"torch does not load: {error}"}
    device = "cpu"
    if torch.cuda.is_available():
        device = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return {
        "device": device,
        "cuda": torch.version.cuda or "none in this build",
        "threads": torch.get_num_threads(),
        "kernel": os.environ.get("TSGDN_KERNEL", "auto"),
        "kernels": _kernels(),
    }


def _kernels() -> list[dict[str, Any]]:
    """Per device: what an op would run there, and why."""
    import torch

    from tsgdn.kernels import kernel_for

    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    rows = []
    for device in devices:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what it would say is in the row
                path = kernel_for(device, torch.float32)
            why = _why(device)
        except (RuntimeError, ValueError) as error:  # a demand that cannot be met: every op there would say so
            path, why = None, str(error)
        rows.append({"device": str(device), "path": path, "why": why})
    return rows


def _why(device: Any) -> str:
    """What decided, in the order in which `kernel_for` asks."""
    import torch

    from tsgdn.kernels.choice import HAS_TRITON, TESTED

    demand = os.environ.get("TSGDN_KERNEL", "auto")
    if demand != "auto":
        return f"TSGDN_KERNEL={demand}"
    if device.type != "cuda":
        return "the Triton kernels are for GPUs"
    if not HAS_TRITON:
        return "triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    name = f"compute capability {capability[0]}.{capability[1]}"
    if capability in TESTED:
        return f"tested on {name}"
    return f"not tested on {name}; run make test-gpu, then set TSGDN_KERNEL=triton"


def _data_places() -> list[dict[str, Any]]:
    from tsgdn.data.catalog import cache_folder

    given = os.environ.get("TSGDN_DATA")
    places = [("TSGDN_DATA", Path(given))] if given else []
    places.append(("TSGDN_CACHE" if os.environ.get("TSGDN_CACHE") else "user cache", cache_folder()))
    return [{"from": origin, "path": str(path), "exists": path.is_dir()} for origin, path in places]


def _packages() -> list[dict[str, Any]]:
    """Our direct requirements and triton: what is installed, what is allowed, what make would install."""
    from packaging.requirements import Requirement

    pins = _pins()
    try:
        required = [Requirement(text) for text in metadata.requires("tsgdn") or []]
    except metadata.PackageNotFoundError:  # run from a source tree that was never installed
        required = []
    wanted = [r for r in required if (r.marker is None or r.marker.evaluate({"extra": ""}))]
    names = {r.name for r in wanted}
    # never required to run: kernels are torch's where triton is not
    optional = [r for r in required if r.name in ("triton", "matplotlib") and r.name not in names]
    rows = []
    for requirement, needed in [*((r, True) for r in wanted), *((r, False) for r in optional)]:
        if any(row["name"] == requirement.name for row in rows):
            continue
        installed = _installed(requirement.name)
        fits = not needed if installed is None else requirement.specifier.contains(installed, prereleases=True)
        rows.append(
            {
                "name": requirement.name,
                "installed": installed,
                "pinned": pins.get(_canonical(requirement.name)),
                "required": str(requirement.specifier),
                "ok": fits,
            }
        )
    return rows


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _pins() -> dict[str, str]:
    """What constraints.txt says, where this is a checkout."""
    path = Path(__file__).parents[2] / "constraints.txt"
    if not path.is_file():
        return {}
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    pairs = (line.split("==") for line in lines if "==" in line)
    return {_canonical(name): version for name, version in pairs}


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
