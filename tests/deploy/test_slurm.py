"""The Slurm script agrees with its document. tests/slurm runs it."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = (ROOT / "deploy/slurm/jest.sbatch").read_text()
DOCUMENT = (ROOT / "deploy/docs/slurm.md").read_text()


def test_every_variable_of_the_script_is_in_the_document_with_its_default():
    defaults = dict(re.findall(r"=\$\{(JEST_\w+):-([^$}]*)", SCRIPT))
    rows = [re.findall(r"`(JEST_\w+)`", line) for line in DOCUMENT.splitlines() if line.startswith("| `JEST_")]
    assert defaults.keys() == {name for names in rows for name in names}
    for name, default in defaults.items():
        assert not default or re.search(rf"^\| `{name}` \| `?{default}`? \|", DOCUMENT, re.MULTILINE), name


def test_jest_gets_the_seconds_from_the_signal_to_the_limit_but_for_the_requeue():
    notice = int(re.search(r"#SBATCH --signal=B:USR1@(\d+)", SCRIPT)[1])
    assert int(re.search(r"JEST_STOP_SECONDS:-(\d+)", SCRIPT)[1]) == notice - 45


def test_the_installation_of_programs_passes_its_linter():
    shellcheck = [Path(sys.executable).parent / "shellcheck", ROOT / "tests/install.sh"]
    done = subprocess.run(shellcheck, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
