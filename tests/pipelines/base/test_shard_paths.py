"""data.shards -> paths: what a pattern names, and what is said of what is no shard."""

import time
from pathlib import Path

import pytest

from jest_core.run_file import sources
from pipelines.base import shard_paths, storage
from pipelines.base.shard_paths import expand


@pytest.fixture(params=["local", "s3"])
def folder(request, tmp_path):
    return str(tmp_path) if request.param == "local" else f"{request.getfixturevalue('s3')}/{tmp_path.name}"


def test_globs_braces_and_lists_of_shards(folder: str):
    for name in ("00000", "00001", "00002"):
        storage.write_bytes(f"{folder}/{name}.parquet", b"x")
    whole = [f"{folder}/{name}.parquet" for name in ("00000", "00001", "00002")]
    assert expand(["*.parquet"], folder) == whole
    assert expand(["{00000..00002}.parquet"], folder) == whole
    assert expand(["00002.parquet", "{00000..00001}.parquet"], folder) == [whole[2], *whole[:2]]
    assert expand([whole[0]], "/nowhere") == whole[:1]
    assert expand([folder], "/nowhere") == expand([f"{folder}/"], "/nowhere") == whole
    for name in ("b.tar", "a.tar", "a.parquet"):  # img2dataset leaves metadata beside its tars
        storage.write_bytes(f"{folder}/tars/{name}", b"x")
        storage.write_bytes(f"{folder}/datacomp/shards/{name}", b"x")
    assert expand(["tars"], folder) == [f"{folder}/tars/{name}.tar" for name in "ab"]
    storage.write_bytes(f"{folder}/00000_stats.json", b"{}")
    assert expand(["*"], folder) == whole
    assert expand(["tars/*"], folder) == [f"{folder}/tars/{name}.tar" for name in "ab"]
    assert expand(["datacomp"], folder) == [f"{folder}/datacomp/shards/{name}.tar" for name in "ab"]
    with pytest.raises(FileNotFoundError, match=r"no shard at .*00003\.parquet"):
        expand(["{00000..00003}.parquet"], folder)


def files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


@pytest.mark.parametrize("name", ["a::b", "a[1]b", "a{1,2}b", "{", "a?*", "back\\slash", "a{0..3}b[!c]::s3"])
def test_a_path_that_exists_is_what_it_says(name, tmp_path):
    names_itself(name, str(tmp_path))


def test_a_path_on_s3_that_exists_is_what_it_says(s3, tmp_path):
    names_itself("a{0..3}b[!c]::s3", f"{s3}/{tmp_path.name}")


def names_itself(name: str, folder: str) -> None:
    """No character in it is special, at the top, below root, or in root; what follows is a pattern again."""
    storage.write_bytes(f"{folder}/{name}/x/0.tar", b"x")
    storage.write_bytes(f"{folder}/{name}/x/1.TAR", b"x")
    both = [f"{folder}/{name}/x/{i}" for i in ("0.tar", "1.TAR")]
    assert storage.read_bytes(both[0]) == b"x"
    for pattern in ("x", "x/*", "x/{0.tar,1.TAR}", "{x/0.tar,x/1.TAR}", "x/?.*"):
        assert expand([pattern], f"{folder}/{name}") == both
        assert expand([f"{name}/{pattern}"], folder) == both
        assert expand(sources([f"{folder}/{name}/{pattern}"]), "/nowhere") == both  # items of a list are not split
    assert expand([f"{folder}/{name}/x/0.tar"], "/nowhere") == both[:1]


def test_a_range_is_bounded_before_it_is_expanded(tmp_path):
    started = time.process_time()
    for pattern, n in {
        "{0..99999999}.parquet": "100,000,000",
        "{000000..999999}/{00..99}.tar": "100,000,000",
        "{a,{0..9999}{0..9999}}{x,y}.tar": "200,000,002",
        "{999999999..0..3}.tar": "333,333,334",
        "{-5..9999999}.tar": "10,000,005",
    }.items():
        with pytest.raises(ValueError, match=f"names {n} paths, more than 1,000,000"):
            expand([pattern], str(tmp_path))
    assert time.process_time() - started < 1
    for pattern in (
        "{a,b}{0..9}{x}",
        "{a/{0..9},b/{00..10..5}}.tar",
        "\\{0..9\\}",
        "{a..e}",
        "a{,b}",
        "{}",
        "{1..1}{5..2}",
    ):
        counted = shard_paths._n_paths(pattern)
        assert counted == len(list(shard_paths.braceexpand(pattern))) or pattern == "{a..e}"  # letters are few
    with pytest.raises(ValueError, match=r"Unbalanced braces.*close each brace"):
        expand(["{0..9.tar"], str(tmp_path))


def test_what_is_no_shard_is_said_at_once(tmp_path):
    files(tmp_path, "images/1.jpg", "images/2.jpg", "captions.csv", "z/a.tar.gz", "z/b.tgz", "z/b.tar", "s/README.md")
    root = str(tmp_path)
    for pattern in ("images/*.jpg", "images", "images/*"):
        with pytest.raises(
            FileNotFoundError, match=r"no shard at .*there are 2 \.jpg \(such as 1\.jpg\), and shards are"
        ):
            expand([pattern], root)
    for pattern in ("captions.csv", "{captions.csv,images}"):
        with pytest.raises(ValueError, match=r"captions\.csv is no shard: shards are \.tar and \.parquet files"):
            expand([pattern], root)
    for pattern in ("z", "z/*", "z/a.tar.gz"):
        with pytest.raises(ValueError, match=r"z/a\.tar\.gz is compressed.*decompress it"):
            expand([pattern], root)
    assert expand(["z/*.tar"], root) == [f"{root}/z/b.tar"]
    (tmp_path / "empty").mkdir()
    for pattern in ("empty", "empty/*", "s/a.tar", "nowhere/*.tar", "nowhere/{0..3}.tar"):
        with pytest.raises(FileNotFoundError, match=r"no shard at .*: correct the path, or root"):
            expand([pattern], root)


def test_what_is_left_out_of_a_mixed_folder_is_named(tmp_path, capsys):
    files(tmp_path, "0.tar", "0.parquet", "0_stats.json", "0.tar.zst", "_SUCCESS", ".crc")
    assert expand([str(tmp_path)], "") == [f"{tmp_path}/0.tar"]
    assert not capsys.readouterr().out  # what img2dataset writes beside its tars needs no word
    files(tmp_path, "1.parquet", "list.csv", "2.jpg", "3.jpg")
    for pattern in ("", "/*"):
        assert expand([f"{tmp_path}{pattern}"], "") == [f"{tmp_path}/0.tar"]
        assert "2 .jpg, 1 .parquet, 1 .csv (such as 1.parquet) are not read" in capsys.readouterr().out


def test_a_folder_named_like_a_file_stands_for_its_files(tmp_path):
    """Spark writes a folder data.parquet; other tools write parts without a suffix."""
    files(
        tmp_path, "data.parquet/part-0.snappy.parquet", "data.parquet/_SUCCESS", "plain/part-00000", "plain/part-00001"
    )
    part = f"{tmp_path}/data.parquet/part-0.snappy.parquet"
    for pattern in ("data.parquet", "*.parquet", "{data,data}.parquet", "."):
        assert expand([pattern], str(tmp_path)) in ([part], [part, part])
    assert expand(["plain/part-*"], str(tmp_path)) == [f"{tmp_path}/plain/part-0000{i}" for i in range(2)]
    (tmp_path / "link").symlink_to(tmp_path / "data.parquet")
    (tmp_path / "link.parquet").symlink_to(part)
    assert expand(["link"], str(tmp_path)) == [f"{tmp_path}/link/part-0.snappy.parquet"]
    assert expand(["link.parquet"], str(tmp_path)) == [f"{tmp_path}/link.parquet"]


def test_a_glob_or_folder_that_has_folders_alone_says_so(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "parts" / name).mkdir(parents=True)
        (tmp_path / "parts" / name / "0.tar").touch()
    for pattern in ("parts", "parts/*"):
        with pytest.raises(FileNotFoundError, match=r"but folders \(such as a\)"):
            shard_paths.expand([pattern], str(tmp_path))
    assert len(shard_paths.expand(["parts/*/*.tar"], str(tmp_path))) == 2
