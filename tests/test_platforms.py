"""jest starts without Linux-only calls, as on macOS, and `make` finds a suitable Python."""

import ast
import hashlib
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from pipelines.planning import calibrate

ROOT = Path(__file__).resolve().parent.parent
FILES = [path for folder in ("jest_core", "pipelines") for path in (ROOT / folder).rglob("*.py")]

# names that macOS or the oldest supported Python does not have
MISSING = {
    "os": r"sched_\w+|SCHED_\w+|process_cpu_count|posix_fa\w+|POSIX_FADV_\w+|fdatasync|copy_file_range|splice|pipe2"
    r"|memfd_create|MFD_\w+|eventfd\w*|EFD_\w+|timerfd_\w+|TFD_\w+|pidfd_open|P_PIDFD|getrandom|GRND_\w+|setns|unshare"
    r"|CLONE_\w+|[gs]etres[ug]id|(get|set|list|remove)xattr|XATTR_\w+|O_(DIRECT|TMPFILE|NOATIME|LARGEFILE|PATH|RSYNC)",
    "signal": r"SIG(RTMIN|RTMAX|PWR|STKFLT|POLL|CLD)|sig(timedwait|waitinfo)|pidfd_send_signal",
    "socket": r"AF_(NETLINK|PACKET|ALG|VSOCK|CAN|TIPC)|SO_(BINDTODEVICE|MARK|DOMAIN|PROTOCOL|PEERCRED)|SOCK_\w+EXEC"
    r"|SOCK_NONBLOCK|TCP_(USER_TIMEOUT|QUICKACK|CORK|DEFER_ACCEPT)",
    "select": r"e?poll|EPOLL\w+",
    "resource": r"prlimit|RUSAGE_THREAD|RLIMIT_(NICE|OFILE|MSGQUEUE|RTPRIO|RTTIME|SIGPENDING)",
    "time": r"CLOCK_(BOOTTIME|TAI)|pthread_getcpuclockid",
    "fcntl": r"F_(SETPIPE_SZ|GETPIPE_SZ|NOTIFY|SETLEASE|GETLEASE|ADD_SEALS|GET_SEALS|OFD_\w+)",
}
OF_PROCESSES = r"cpu_affinity|cpu_num|ionice|rlimit|io_counters|memory_maps|pss"  # of psutil, on Linux only
OF_LIBC = r"mallopt|malloc_trim|prctl|mallinfo2?"
PATHS = r"/(proc|sys|dev|run)/.+|fork"  # macOS can fork, but Python warns that its libraries may crash
# these have a fallback, which the start-up below uses
WITH_A_FALLBACK = {"cluster.py: mallopt", "calibrate.py: '/proc/cpuinfo'"}
WITH_A_FALLBACK |= {"read_costs.py: '/proc/thread-self/schedstat'"}
WITH_A_FALLBACK |= {f"owner_files.py: '{path}'" for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid")}

START = """
import importlib, json, re, sys, types
from pathlib import Path

root, missing = sys.argv[1], json.loads(sys.argv[2])
ours = (root + "/jest_core/", root + "/pipelines/")

class Elsewhere(types.ModuleType):
    # hidden from our code only: libraries have their own fallbacks for macOS
    def __getattr__(self, name):
        hidden = self.__dict__.get("_hidden", {})
        if name not in hidden or sys._getframe(1).f_code.co_filename.startswith(ours):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r} on this platform")
        return hidden[name]

for module, names in missing.items():
    module = importlib.import_module(module)
    hidden = {name: getattr(module, name) for name in dir(module) if re.fullmatch(names, name)}
    for name in hidden:
        delattr(module, name)
    module._hidden, module.__class__ = hidden, Elsewhere

for folder in ("jest_core", "pipelines"):
    for path in sorted(Path(root, folder).rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        # kernels need Triton, which is for Linux only, and are imported only with a GPU
        if name != "jest_core.selection.kernels" and path.name != "__main__.py":
            importlib.import_module(name)

from typer.testing import CliRunner
from pipelines.commands import app
from pipelines.base import cluster

assert cluster.n_cores() >= 1
ctypes = sys.modules["ctypes"]
ctypes.CDLL = lambda name: types.SimpleNamespace()  # a C library without mallopt
cluster.keep_freed_memory()
for command in (["--help"], ["plan", root + "/deploy/runs/demo-small/joint.yaml", "--set", f"root={root}/deploy"]):
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
"""


def test_jest_starts_without_linux_only_calls():
    command = [sys.executable, "-W", "ignore", "-c", START, str(ROOT), json.dumps(MISSING)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def uses(text: str) -> set[str]:
    """The Linux-only names that a source uses without a hasattr check."""
    used, checked = set(), set()
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Call(func=ast.Name(id="hasattr"), args=[_, ast.Constant(value=str(name))]):
                checked.add(name)
            case ast.Attribute(value=ast.Name(id=module), attr=name) if re.fullmatch(MISSING.get(module, "-"), name):
                used.add(name)
            case ast.Attribute(attr=name) if re.fullmatch(f"{OF_PROCESSES}|{OF_LIBC}", name):
                used.add(name)
            case ast.ImportFrom(module=module, names=names):
                used |= {alias.name for alias in names if re.fullmatch(MISSING.get(module or "", "-"), alias.name)}
            case ast.Constant(value=str(value)) if re.fullmatch(PATHS, value):
                used.add(repr(value))
    return used - checked


def test_linux_only_calls_have_a_fallback():
    used = {f"{path.name}: {use}" for path in FILES for use in uses(path.read_text())}
    assert used == WITH_A_FALLBACK


@pytest.mark.parametrize(
    "line",
    [
        "os.sched_getaffinity(0)",
        "os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)",
        "from os import O_DIRECT",
        "psutil.Process().memory_full_info().pss",
        "ctypes.CDLL(None).prctl(1, 9)",
        "open('/proc/self/status')",
        "get_context('fork')",
    ],
)
def test_linux_only_calls_are_detected(line):
    assert uses(line)
    assert not uses("if hasattr(os, 'sched_getaffinity'): os.sched_getaffinity(0)")


def test_a_processor_has_a_name_without_proc(monkeypatch):
    monkeypatch.setattr(calibrate.Path, "exists", lambda self: False)
    assert calibrate.cpu()


def find(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run deploy/find_python.sh with `folder` as PATH and home."""
    return subprocess.run(
        ["/bin/sh", str(ROOT / "deploy/find_python.sh"), *arguments],
        env={"PATH": str(folder), "HOME": str(folder)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def program(path: Path, text: str) -> Path:
    """Write an executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


RUNS = f'exec {sys.executable} "$@"'


def test_the_first_suitable_python_is_found(tmp_path):
    # as pyenv's shim for a version that is not installed
    program(tmp_path / "python3", 'echo "command not found" >&2; exit 127')
    program(tmp_path / "python3.13", "echo is Python 3.9")  # the answer of an old Python to the script's question
    fits = program(tmp_path / "python3.12", RUNS)
    program(tmp_path / "python3.11", RUNS)
    assert find(tmp_path).stdout == f"{fits}\n"
    assert find(tmp_path, "3.11", "3.12").stdout == f"{tmp_path}/python3.11\n"
    assert find(tmp_path, PYTHON=f"{tmp_path}/python3.11").stdout == f"{tmp_path}/python3.11\n"


def test_pythons_of_pyenv_and_uv_are_found_and_uv_installs_one(tmp_path):
    uv = program(
        tmp_path / "uv", f'[ "$2" = install ] && : >{tmp_path}/done; [ -e {tmp_path}/done ] && echo {tmp_path}/own'
    )
    installed = program(tmp_path / "own", RUNS)
    done = find(tmp_path)
    assert done.stdout == f"{installed}\n"
    assert "uv installs 3.13" in done.stderr
    uv.unlink()
    pyenvs = program(tmp_path / ".pyenv/versions/3.12.1/bin/python", RUNS)
    assert find(tmp_path).stdout == f"{pyenvs}\n"


def test_unsuitable_pythons_are_refused_with_a_remedy(tmp_path):
    bare = find(tmp_path)
    assert (bare.returncode, bare.stdout) == (1, "")
    assert re.fullmatch(r"jest needs Python 3.11 to 3.14: none is here\. Install .* make PYTHON=.*\n", bare.stderr)
    program(tmp_path / "python3", "echo is Python 3.9")
    assert "none is here; python3 is Python 3.9. Install" in find(tmp_path).stderr
    assert find(tmp_path, PYTHON="python3").stderr == "jest needs Python 3.11 to 3.14: python3 is Python 3.9\n"
    program(tmp_path / ".venv/bin/python", "echo is Python 3.9")
    refused = find(tmp_path, "--check", f"{tmp_path}/.venv")
    assert refused.returncode == 1
    assert "`make clean` removes it" in refused.stderr
    assert not find(tmp_path, "--check", sys.prefix).stderr


def test_the_project_and_the_script_name_the_same_pythons():
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    script = (ROOT / "deploy/find_python.sh").read_text()
    assert required == ">=3.11,<3.15"
    assert "(3, 11) <= sys.version_info[:2] <= (3, 14)" in script
    assert "set -- 3.14 3.13 3.12 3.11" in script


@pytest.mark.slow
def test_a_lock_is_installed_whole_by_uv_and_by_pip_where_uv_fails(tmp_path):
    """Also after an interrupted installation (by Ctrl-C or a full disk) that left half of a package."""
    venv, wheel, lock = tmp_path / "venv", tmp_path / "half-1-py3-none-any.whl", tmp_path / "run.txt"
    metadata = {"METADATA": "Metadata-Version: 2.1\nName: half\nVersion: 1\n", "WHEEL": "Wheel-Version: 1.0\n"}
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("half/__init__.py", "")
        for name, text in (metadata | {"RECORD": "half/__init__.py,,\n"}).items():
            archive.writestr(f"half-1.dist-info/{name}", text + "Tag: py3-none-any\n" * (name == "WHEEL"))
    lock.write_text(f"half==1 --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n")
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    (module,) = (venv / "lib").glob("python3*/site-packages")
    module, uv = module / "half" / "__init__.py", venv / "bin" / "uv"
    (tmp_path / "uv.toml").write_text(f'no-index = true\nfind-links = ["{tmp_path}"]\n')
    here = {"UV_CONFIG_FILE": str(tmp_path / "uv.toml"), "UV_CACHE_DIR": str(tmp_path / "cache")}
    here |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PATH": "/usr/bin:/bin"}

    def install() -> str:
        words = ["/bin/sh", str(ROOT / "deploy/install_lock.sh"), str(venv), str(lock)]
        done = subprocess.run(words, env=here, capture_output=True, text=True, check=True)
        assert module.exists()
        return done.stderr

    uv.symlink_to(Path(sys.executable).parent / "uv")
    assert install() == ""
    module.unlink()
    (venv / ".cut-short-run.txt").touch()
    assert install() == ""
    for text in ("exit 2", "kill -9 $$"):
        uv.unlink()
        program(uv, text)
        module.unlink()
        assert "pip installs what" in install()
    uv.unlink()
    module.unlink()
    assert "uv could not be had" in install()
    assert not (venv / ".cut-short-run.txt").exists()
