import subprocess
import sys
from pathlib import Path

from pipelines.base import user_code


def test_modules_and_packages_in_folders_are_sent_and_installed_ones_are_not(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_scores.py").write_text("raise SystemExit('imported')")
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").write_text("")
    monkeypatch.chdir(tmp_path)  # which is not on the path of `jest`
    names = [
        "my_package.deep.er:factory",
        "my_scores:factory",
        "my_scores:other",
        "torch:factory",
        "nowhere:f",
        "fasttext",
    ]
    assert user_code.to_send(names) == [tmp_path / "my_package", tmp_path / "my_scores.py"]
    out = capsys.readouterr().out
    assert "the module nowhere is not on this machine's path: every node has to have it" in out
    assert "the package torch is installed, so not sent along" in out
    assert "fasttext" not in out


def test_a_package_on_the_path_is_sent(tmp_path):
    (tmp_path / "elsewhere.py").write_text("")
    code = "from pipelines.base import user_code; print(*user_code.to_send(['elsewhere:f']))"
    command = [sys.executable, "-c", f"import sys; sys.path.append({str(tmp_path)!r}); {code}"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert Path(out.split()[-1]) == tmp_path / "elsewhere.py"
