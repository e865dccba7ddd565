"""A Python that is forked instead of started behaves like one that is started, and goes with whoever asked for it."""

import os
import subprocess
import time

import pytest
import warm_python

PRINT = "import os, sys; print(sys.argv[1:], os.getcwd(), os.environ.get('COLOUR')); sys.exit(7)"
WAIT = "import os, pathlib, time; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(600)"


@pytest.fixture
def script(tmp_path):
    def written(code: str) -> str:
        (tmp_path / "script.py").write_text(code)
        return str(tmp_path / "script.py")

    return written


def run(python, folder, *words, **environment):
    return subprocess.run(
        [*python, *words],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_words_folder_environment_and_status_arrive(python, script, tmp_path):
    done = run(python, tmp_path, script(PRINT), "a", "b c", COLOUR="green")
    assert done.stdout == f"['a', 'b c'] {tmp_path} green\n"
    assert (done.returncode, done.stderr) == (7, "")


def test_a_module_runs_as_well(python, tmp_path):
    done = run(python, tmp_path, "-m", "lpft_nb", "--version")
    assert done.returncode == 0 and done.stdout.startswith("lpft-nb ")


@pytest.mark.parametrize("code", ["1 / 0", "raise SystemExit('no such thing')"])
def test_an_error_is_told(python, script, tmp_path, code):
    done = run(python, tmp_path, script(code))
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr or "no such thing" in done.stderr


def test_it_does_not_know_what_another_has_done(python, script, tmp_path):
    run(python, tmp_path, script("import torch; torch.mark = 1"))
    assert (
        run(python, tmp_path, script("import torch; assert not hasattr(torch, 'mark')")).returncode
        == 0
    )


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def waits_for(condition) -> bool:
    limit = time.monotonic() + 60
    while not condition() and time.monotonic() < limit:
        time.sleep(0.02)
    return condition()


def test_who_kills_the_starter_kills_the_process(python, script, tmp_path):
    starter = subprocess.Popen([*python, script(WAIT)], cwd=tmp_path)
    assert waits_for(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text())
    pid = int((tmp_path / "pid").read_text())
    assert lives(pid) and pid != starter.pid
    starter.kill()
    starter.wait()
    assert waits_for(lambda: not lives(pid))


def test_it_leaves_its_cpu_seconds(python, script, tmp_path):
    file = tmp_path / "cpu"
    code = "import time\nwhile time.process_time() < 0.3: pass"
    run(python, tmp_path, script(code), **{warm_python.CPU_FILE: str(file)})
    assert 0.2 < float(file.read_text()) < 30


def test_a_server_that_cannot_import_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="ended with 1"):
        warm_python.offer(tmp_path, ["no_such_module"])
