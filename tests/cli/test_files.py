"""Where files go: links, devices, pipes, long names and permissions."""

import os
import stat
import sys
import threading
from pathlib import Path

import pytest

from batchnorm import OutputError
from batchnorm._files import check_writable, write_whole


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_link_stays_a_link_and_its_file_is_written(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("new")
    assert write_whole(tmp_path / "link", "a") == tmp_path / "link"
    write_whole(tmp_path / "dangling", "b")
    assert (tmp_path / "link").is_symlink()
    assert [(tmp_path / name).read_text() for name in ("real", "new")] == ["a", "b"]
    assert left(tmp_path) == ["dangling", "link", "new", "real"]


@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_a_file_keeps_its_permissions(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file"
    path.touch()
    path.chmod(mode)
    write_whole(path, b"new")
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert path.read_bytes() == b"new"


def test_a_device_is_written_and_stays(tmp_path: Path) -> None:
    check_writable(os.devnull)
    write_whole(os.devnull, "gone")
    assert stat.S_ISCHR(Path(os.devnull).stat().st_mode)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
def test_a_pipe_is_written_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    check_writable(path)  # does not wait for a reader
    seen: list[str] = []
    reader = threading.Thread(target=lambda: seen.append(path.read_text()), daemon=True)
    reader.start()
    write_whole(path, "content")
    reader.join(10)
    assert seen == ["content"]
    assert path.is_fifo()


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/fd leads to the open file")
def test_an_open_file_is_written_where_it_stands(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as file:
        file.write("before ")
        file.flush()
        write_whole(f"/dev/fd/{file.fileno()}", "content")
        file.write(" after")
    assert (tmp_path / "log").read_text() == "before content after"


def test_a_name_may_be_as_long_as_names_can_be(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 250)
    check_writable(path)
    assert write_whole(path, "content").read_text() == "content"


@pytest.mark.parametrize("write", [check_writable, lambda path: write_whole(path, "content")])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("y" * 300, "name too long"),
        ("missing/file", "mkdir -p"),
        ("file/inside", "expected a file in a folder that exists"),
        ("loop", "symbolic link"),
        ("zero\0byte", "null byte"),
        ("", "Add a file name"),
    ],
)
def test_a_path_that_cannot_be_written_is_said_before_the_work(
    tmp_path: Path, write: object, name: str, words: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OutputError) as caught:
        write(tmp_path / name)  # type: ignore[operator]
    assert words in str(caught.value)
    assert left(tmp_path) == ["file", "loop"]


def test_a_folder_that_takes_no_files_is_said_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkstemp", full)
    with pytest.raises(OutputError, match="No space left on device"):
        check_writable(tmp_path / "file")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OutputError, match="Input/output error"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert left(tmp_path) == ["file"]
