"""A Python that has imported torch, transformers and their like when it starts: one process imports, then forks.

What nearly every chapter imports takes several seconds, a hundred times a build. The process `serve` imports it once and
forks a process of its own for each command. Instead of `python script.py` or `python -m ipykernel_launcher` one starts
`start`, which asks for such a process over a socket, hands over its folder, environment and output, lives as long as the
process does and ends with its status. When `start` is killed, the process goes with it.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

# What most chapters import. Nothing of this book's package: that is what they show. Nothing that imports
# matplotlib.pyplot: figures appear where it finds a running kernel at its import.
COMMON = """accelerate datasets ipykernel.kernelapp matplotlib.figure networkx pandas papermill peft pyarrow.parquet pydantic
scipy.optimize scipy.stats sklearn.linear_model sklearn.metrics sklearn.model_selection torch torch.func transformers
transformers.models.bert.modeling_bert""".split()
CPU_FILE = (
    "LPFT_BOOK_CPU"  # where a process writes the CPU seconds that it and its own processes used
)
LONGEST = 1 << 20  # bytes of a request
INLINE = {
    "MPLBACKEND": "module://matplotlib_inline.backend_inline"
}  # what a kernel sets, read when matplotlib is imported


def cpu_seconds() -> float:
    """CPU seconds of this process and of those that it started and that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def end_with(link: socket.socket):
    """End this process when the other side of the link is gone."""
    link.recv(1)
    os._exit(1)


def execute(command: list[str]) -> int:
    """What `python` does with these words, `-m module` or a script and its arguments; the exit status."""
    at = 1 if command[0] == "-m" else 0
    run = runpy.run_module if at else runpy.run_path
    sys.argv = command[at:]
    try:
        run(command[at], run_name="__main__", **({"alter_sys": True} if at else {}))
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def become(link: socket.socket, request: dict, outputs: list[int]):
    """In the forked process: run the command that was asked for, tell its status, and end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for target, source in enumerate(outputs):
        os.dup2(source, target)
        os.close(source)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    threading.Thread(target=end_with, args=(link,), daemon=True).start()
    status = execute(request["command"])
    if CPU_FILE in os.environ:
        Path(os.environ[CPU_FILE]).write_text(f"{cpu_seconds():.2f}", encoding="utf-8")
    atexit._run_exitfuncs()  # temporary folders and the like
    sys.stdout.flush(), sys.stderr.flush()
    link.send(bytes([status]))
    os._exit(status)  # to take down what was imported, module by module, would last three seconds


def serve(path: str, *modules: str):
    """Import, listen at the socket `path`, fork a process for each that asks; end when standard input does."""
    sys.path.pop(0)  # the folder of this file
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a process that has ended
    for name in modules:
        importlib.import_module(name)
    gc.freeze()  # forked processes share these objects: nothing goes through them again
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        while listening in select.select([listening, sys.stdin], [], [])[0]:
            link, _ = listening.accept()
            message, outputs, _, _ = socket.recv_fds(link, LONGEST, 3)
            if os.fork() == 0:
                listening.close()
                become(link, json.loads(message), outputs)
            link.close()
            for number in outputs:
                os.close(number)


def start(path: str, *command: str):
    """What stands for `python`: ask for a process, wait for its end, and end with its status."""
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(path)
        request = {"command": command, "folder": os.getcwd(), "environment": dict(os.environ)}
        socket.send_fds(link, [json.dumps(request).encode()], [0, 1, 2])
        status = link.recv(1)
    sys.exit(status[0] if status else 1)


def offer(folder: Path, modules: list[str]) -> tuple[subprocess.Popen, list[str]]:
    """Start `serve` with its socket in a folder: the process, and the words that stand for `python`."""
    path = str(folder / "socket")
    command = [sys.executable, __file__, "serve", path, *modules]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, env={**os.environ, **INLINE})
    while not Path(path).exists():
        if server.poll() is not None:
            raise RuntimeError(f"{' '.join(command)} ended with {server.returncode}")
        time.sleep(0.1)
    return server, [sys.executable, "-I", "-S", __file__, "start", path]


def kernel(server: subprocess.Popen, python: list[str]) -> dict:
    """A kernel of such a Python, as Jupyter describes kernels; it ends with the server."""
    launcher = ["-m", "ipykernel_launcher", f"--IPKernelApp.parent_handle={server.pid}"]
    return {
        "argv": [*python, *launcher, "-f", "{connection_file}"],
        "display_name": "Python 3",
        "language": "python",
        "interrupt_mode": "message",
    }


if __name__ == "__main__":
    {"serve": serve, "start": start}[sys.argv[1]](*sys.argv[2:])
