"""What is compiled at run time compiles with the Debian packages that the Dockerfile names, and with no others."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What the Python of python:3.11-slim-bookworm depends on
OF_PYTHON = (
    "ca-certificates libbz2-1.0 libexpat1 libffi8 liblzma5 libncursesw6 libreadline8 libsqlite3-0 libssl3 zlib1g"
)
COMPILED = """
from triton.runtime.build import compile_module_from_src
from jest_core.training.step import train_step
from tests.core.training.test_step import make_learner, super_batch

stub = '''
#include <Python.h>
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "stub"};
PyMODINIT_FUNC PyInit_stub(void) { return PyModule_Create(&definition); }
'''
try:  # the language of the stub of Triton's driver
    compile_module_from_src(stub, "stub")
    print("Triton's stub compiled")
except Exception as error:
    print(error)
learner = make_learner(["training.augmentation={}", "selection.method=uniform"])
learner.towers.compile()  # training.compile
train_step(learner, super_batch(learner.towers), 0)
print("a step compiled")
"""


def _packages() -> list[str]:
    """The Debian packages that all images have."""
    worker = (ROOT / "docker/Dockerfile").read_text().partition("AS learner")[0]
    (names,) = re.findall(r"apt-get install -y --no-install-recommends (.*) \\", worker)
    return str(names).split()


def _run(root: Path, cache: str) -> subprocess.CompletedProcess[str]:
    """COMPILED as user 1000 in this root, which sees nothing of this machine but Python and the repository."""
    seen = {sys.base_prefix, str(Path(sys.prefix).resolve()), str(ROOT)}
    mounts = "".join(f"mkdir -p {root}{each}; mount --bind {each} {root}{each}; " for each in sorted(seen))
    mounts += "".join(f"mount --rbind /{each} {root}/{each}; " for each in ("proc", "dev"))
    variables = f"HOME=/tmp/{cache} PYTHONPATH={ROOT} PYTHONDONTWRITEBYTECODE=1 PATH=/usr/local/bin:/usr/bin:/bin"
    enter = f"{mounts} exec chroot --userspec=1000:1000 {root} env -i {variables} {sys.executable} /tmp/compiled.py"
    return subprocess.run(
        ["unshare", "--mount", "bash", "-ec", enter], capture_output=True, text=True, check=False, timeout=500
    )


@pytest.mark.long
def test_the_images_compile_with_their_packages_alone(tmp_path: Path):
    if shutil.which("debootstrap") is None:
        pytest.skip("needs root, and debootstrap with its Debian mirror")
    root, included = tmp_path / "root", ",".join([*OF_PYTHON.split(), *_packages()])
    made = ["debootstrap", "--variant=minbase", f"--include={included}", "bookworm", str(root)]
    done = subprocess.run(made, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    (root / "tmp/compiled.py").write_text(COMPILED)
    (root / "root").chmod(0o755)  # where Python may be

    compiled = _run(root, "with")
    assert "Triton's stub compiled" in compiled.stdout, compiled.stdout + compiled.stderr
    assert "a step compiled" in compiled.stdout, compiled.stdout + compiled.stderr

    compilers = ["g++", "g++-12", "gcc", "gcc-12", "cpp", "cpp-12"]
    subprocess.run(["chroot", root, "dpkg", "--purge", "--force-depends", *compilers], check=True, capture_output=True)
    missing = _run(root, "without")
    assert "Failed to find C compiler" in missing.stdout, missing.stdout + missing.stderr
    assert missing.returncode, missing.stdout
