"""Kernels for the book's chapters that need not import torch and transformers anew: one process imports, then forks.

What nearly every chapter imports takes several seconds, a hundred times a build. The process `serve` imports it once and
forks a kernel for each chapter: a process of its own, without the package of this book, which every chapter imports
itself. Jupyter starts `start` instead of a kernel; it asks for one over a socket, hands over its folder, environment and
output, and lives as long as the kernel does. When it is killed, the kernel goes with it.
"""

import atexit
import gc
import importlib
import json
import os
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
    "LPFT_BOOK_CPU"  # where a kernel writes the CPU seconds that it and its own processes used
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


def run_kernel(link: socket.socket, request: dict, outputs: list[int]):
    """In the forked process: become the kernel that was asked for, until it is told to end."""
    from ipykernel.kernelapp import IPKernelApp

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for target, source in enumerate(outputs):
        os.dup2(source, target)
        os.close(source)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    threading.Thread(target=end_with, args=(link,), daemon=True).start()
    parent = f"--IPKernelApp.parent_handle={os.getppid()}"  # end with it
    IPKernelApp.launch_instance(argv=[*request["arguments"], parent])
    if CPU_FILE in os.environ:
        Path(os.environ[CPU_FILE]).write_text(f"{cpu_seconds():.2f}", encoding="utf-8")
    atexit._run_exitfuncs()  # chapters' temporary folders
    os._exit(0)  # to take down what was imported, module by module, would last three seconds


def serve(path: str):
    """Import, listen at the socket `path`, fork a kernel for each that asks; end when standard input does."""
    sys.path.pop(0)  # the folder of this file
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a kernel that has ended
    for name in COMMON:
        importlib.import_module(name)
    gc.freeze()  # kernels then share these objects: nothing goes through them again
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        while listening in select.select([listening, sys.stdin], [], [])[0]:
            link, _ = listening.accept()
            message, outputs, _, _ = socket.recv_fds(link, LONGEST, 3)
            if os.fork() == 0:
                listening.close()
                run_kernel(link, json.loads(message), outputs)
            link.close()
            for number in outputs:
                os.close(number)


def start(path: str, *arguments: str):
    """What Jupyter starts: ask for a kernel and wait until it has ended."""
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(path)
        request = {
            "arguments": arguments,
            "folder": os.getcwd(),
            "environment": dict(os.environ),
        }
        socket.send_fds(link, [json.dumps(request).encode()], [0, 1, 2])
        link.recv(1)


def offer(folder: Path) -> subprocess.Popen:
    """Start `serve`, and let Jupyter find its kernels under the name that every notebook asks for."""
    path = str(folder / "socket")
    command = [sys.executable, __file__, "serve", path]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, env={**os.environ, **INLINE})
    while not Path(path).exists():
        if server.poll() is not None:
            raise RuntimeError(f"{' '.join(command)} ended with {server.returncode}")
        time.sleep(0.1)
    spec = {
        "argv": [sys.executable, "-I", "-S", __file__, "start", path, "-f", "{connection_file}"],
        "display_name": "Python 3",
        "language": "python",
        "interrupt_mode": "message",
    }
    kernel = folder / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text(json.dumps(spec), encoding="utf-8")
    paths = filter(None, [str(folder), os.environ.get("JUPYTER_PATH")])
    os.environ["JUPYTER_PATH"] = os.pathsep.join(paths)
    return server


if __name__ == "__main__":
    {"serve": serve, "start": start}[sys.argv[1]](*sys.argv[2:])
