"""What every test may rely on: a seed, one thread, no network, and memory that nobody filled reads as NaN."""

import ipaddress
import os
import random
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined: before anything imports Triton

hypothesis.settings.register_profile("tsgdn", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("tsgdn")
torch.set_num_threads(1)


def _stays_here(host: object) -> bool:
    if host in (None, "", b"", "localhost", b"localhost", socket.gethostname()):
        return True
    text = host.decode() if isinstance(host, bytes) else str(host)
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _no_network(event: str, args: tuple) -> None:
    """An audit hook: whatever library it comes from, nothing leaves this machine."""
    if event in ("socket.connect", "socket.sendto"):
        address = args[1]
        if isinstance(address, tuple) and not _stays_here(address[0]):
            raise OSError(f"tests have no network, and something wants {address[0]}")
    elif event == "socket.getaddrinfo" and not _stays_here(args[0]):
        raise socket.gaierror(socket.EAI_NONAME, f"tests have no network, and something wants {args[0]}")


sys.addaudithook(_no_network)


@pytest.fixture(autouse=True)
def _same_numbers_every_time(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seeds, and torch.empty filled with NaN (the largest integer): a read before the write shows.

    The filling is part of torch's deterministic mode, which some CUDA operators do not offer.
    """
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # GluonTS draws from the global generator
    torch.manual_seed(0)
    if request.node.get_closest_marker("gpu") is None:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Downloads and simulated sets of the tests stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TSGDN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


NO_DATA = "needs the real data sets: set TSGDN_DATA to the folder that holds them"


def _data_root() -> Path | None:
    folder = os.environ.get("TSGDN_DATA", "")
    return Path(folder) if folder and Path(folder).is_dir() else None


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of the real data sets; the test is skipped where there is none."""
    root = _data_root()
    if root is None:
        pytest.skip(NO_DATA)
    return root


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips, with a reason, what this machine cannot run."""
    without_data = _data_root() is None
    without_gpu = not torch.cuda.is_available()
    for item in items:
        if without_data and item.get_closest_marker("data"):
            item.add_marker(pytest.mark.skip(reason=NO_DATA))
        if without_gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
