"""A real Slurm of one node on the loopback, for tests: its daemons live in a temporary folder and end with it."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
ACCOUNT = "lab"  # the one that there is

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
KillWait=2
GresTypes=gpu
NodeName=localhost NodeAddr=127.0.0.1 CPUs={cores} RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=short Nodes=localhost Default=YES MaxTime=60 State=UP
PartitionName=long Nodes=localhost MaxTime=INFINITE State=UP
"""
CARDS = """
NodeName=localhost Name=gpu File=/dev/null
NodeName=localhost Name=gpu File=/dev/zero
"""  # files that exist: Slurm counts them and gives them out like cards

# The plugin's step inside a job drops SLURM_CONF, which no cluster with /etc/slurm needs.
SRUN = '#!/bin/sh\nSLURM_CONF="{folder}/slurm.conf" exec {srun} "$@"\n'
# Accounts need a database. What the plugin asks it is whether an account exists; sbatch takes any.
SACCTMGR = "#!/bin/sh\necho {account}\n"


def free_ports(number: int) -> list[int]:
    "Ports of the loopback that nobody listens on."
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in opened:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in opened]


def write_files(folder: Path) -> None:
    "Configuration, a key for munge, and the programs that stand in front of the installed ones."
    for name in ("munge", "state", "spool", "bin"):
        (folder / name).mkdir(mode=0o755)
    key = folder / "munge" / "key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))
    controller_port, node_port = free_ports(2)
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(
            host=host,
            controller_port=controller_port,
            node_port=node_port,
            folder=folder,
            cores=len(os.sched_getaffinity(0)),
        )
    )
    (folder / "gres.conf").write_text(CARDS)
    for name, text in {"srun": SRUN, "sacctmgr": SACCTMGR}.items():
        program = folder / "bin" / name
        program.write_text(text.format(folder=folder, srun=shutil.which("srun"), account=ACCOUNT))
        program.chmod(0o755)


def command_lines(folder: Path) -> list[list[str]]:
    "The daemons, each in the foreground; the controller first, since the node reports to it."
    munge = folder / "munge"
    files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed"}
    options = [f"--{name}={munge / file}" for name, file in files.items()]
    return [
        ["munged", "--foreground", *options, f"--log-file={munge / 'log'}"],
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-N", "localhost"],
    ]


def wait_until_idle(folder: Path, environment: dict[str, str], *, seconds: float = 30.0) -> None:
    "Skip the test where the node does not come up."
    end = time.monotonic() + seconds
    while True:
        said = subprocess.run(
            ["sinfo", "--noheader", "--format=%T"], env=environment, capture_output=True, text=True
        )
        if "idle" in said.stdout.split():
            return
        if time.monotonic() > end:
            logs = [(folder / f"{name}.log") for name in ("slurmctld", "slurmd")]
            last = [path.read_text().splitlines()[-3:] for path in logs if path.exists()]
            pytest.skip(f"Slurm does not start here: {said.stderr.strip()} {last}")
        time.sleep(0.1)


@contextlib.contextmanager
def running_slurm() -> Iterator[dict[str, str]]:
    "The variables of the environment with which a process reaches the cluster while the context lasts."
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing or os.getuid() != 0:
        pytest.skip(f"no Slurm can be started here: not installed {missing}, or not root")
    folder = Path(tempfile.mkdtemp(prefix="lpft-slurm-", dir="/tmp"))  # a socket's path is short
    folder.chmod(0o755)
    write_files(folder)
    told = {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }
    environment = os.environ | told
    daemons = []
    try:
        with (folder / "daemons.txt").open("wb") as said:
            for line in command_lines(folder):
                daemons.append(
                    subprocess.Popen(
                        line, env=environment, stdout=said, stderr=said, start_new_session=True
                    )
                )
        wait_until_idle(folder, environment)
        yield told
    finally:
        end(daemons, environment)
        shutil.rmtree(folder, ignore_errors=True)


def end(daemons: list[subprocess.Popen], environment: dict[str, str]) -> None:
    "Stop all jobs, then the daemons, last come first gone."
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(
            ["scancel", "--me", "--signal=KILL"], env=environment, capture_output=True, timeout=10
        )
        subprocess.run(["scancel", "--me"], env=environment, capture_output=True, timeout=10)
    for daemon in reversed(daemons):
        daemon.terminate()
        try:
            daemon.wait(timeout=10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    "A cluster for the tests of a file; the variables with which a process reaches it are set."
    with running_slurm() as told, pytest.MonkeyPatch.context() as patch:
        for name, value in told.items():
            patch.setenv(name, value)
        yield told
