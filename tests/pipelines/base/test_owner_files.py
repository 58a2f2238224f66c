"""What the file of an owner says to other users of its machine, and to what its process starts."""

import os
import shutil
import subprocess
import sys

import pytest

from pipelines.base import owner, storage

HIDDEN = """
mount -t proc -o hidepid=2 proc /proc || exit 77
setpriv --reuid 65534 --regid 65534 --clear-groups "$0" -c '
from pipelines.base import owner_files
record = owner_files.of_this_process(45)
print([owner_files.state_of({**record, "pid": pid, "started": "1"}, set()) for pid in (1, 1 << 20)])' || exit 2
"""


def test_an_owner_that_the_system_hides_from_other_users_is_watched(tmp_path):
    """Process 1 is of root, and is alive; clusters with many users mount /proc so that others see nothing of it."""
    unshare = ["unshare", "-m", "-p", "--fork", "sh", "-c", HIDDEN, sys.executable]
    if os.getuid() or not shutil.which("unshare") or not shutil.which("setpriv"):
        pytest.skip("needs root, unshare and setpriv")
    shown = subprocess.run(unshare, capture_output=True, text=True, check=False)
    if shown.returncode in (1, 77):
        pytest.skip(f"may not mount /proc: {shown.stderr}")
    assert shown.stdout == "['unknown', 'gone']\n", shown.stderr


def test_a_fork_of_an_owner_does_not_release_its_directory(tmp_path):
    with owner.owned(str(tmp_path), lease=1000) as first:
        if not (child := os.fork()):
            first.release()
            os._exit(0)
        os.waitpid(child, 0)
        assert not storage.read_json(f"{tmp_path}/owner/000001.json")["released"]
