"""Processes and kernels that start at once: they are forked from one that has imported what they need."""

import contextlib
import json
import socket
import sys

import pytest
from repository import ROOT

sys.path.insert(0, str(ROOT / "nbs" / "_ext"))
import warm_python

OWN = ["lpft_nb.stages", "lpft_nb.experiments", "lpft_nb.records", "lpft_nb.tangent_kernel"]


@pytest.fixture(scope="session")
def warm_server(tmp_path_factory):
    "The process that forks, and the words that stand for `python`; it has imported this tree's package."
    server, python = warm_python.offer(tmp_path_factory.mktemp("warm"), [*warm_python.COMMON, *OWN])
    yield server, python
    server.communicate()


@pytest.fixture(scope="session")
def python(warm_server) -> list[str]:
    "The words that stand for `python` in a command; a process of its own all the same."
    return warm_server[1]


def warmed(own_kernel, spec: dict):
    "The launcher's `own_kernel` with kernels of this description, and everything else that the launcher says of them."

    @contextlib.contextmanager
    def described(folder, report):
        with own_kernel(folder, report):
            path = folder / "kernels" / "python3" / "kernel.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | spec))
            yield

    return described


@pytest.fixture(scope="session")
def launching_warm(warm_server):
    "A context in which the launcher's kernels are such processes."
    from lpft_nb.lab import launch

    described = warmed(launch.own_kernel, warm_python.kernel(*warm_server))

    @contextlib.contextmanager
    def context():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "own_kernel", described)
            yield

    return context


@pytest.fixture
def warm_kernels(launching_warm):
    "While a test runs, the launcher's kernels start at once."
    with launching_warm():
        yield


def worlds_of(processes: int) -> list[dict[str, str]]:
    "What torchrun puts into the environment of each of several processes that work together on this machine."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_PORT": port}
    shared |= {"MASTER_ADDR": "127.0.0.1"}
    ranks = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
    return [{name: str(value) for name, value in world.items()} for world in ranks]
