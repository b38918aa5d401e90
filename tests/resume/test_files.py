"""Checkpoint files: whole or not there, and read without executing code."""

import errno
import logging
import os

import pytest
import torch

from opd_lightning.resume.files import WholeFiles, checkpoints, readable

STATE = {"global_step": 3, "weights": torch.arange(1000.0)}


class Full(WholeFiles):
    """A disk that is full after some bytes, by a device that always is."""

    def open(self, path):
        return open("/dev/full", "wb", buffering=0)


class Breaks(WholeFiles):
    """A disk that breaks halfway through."""

    def open(self, path):
        file = path.open("wb")
        write = file.write

        class Half:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def write(self, data):
                if file.tell() + len(data) > 2000:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                return write(data)

            def flush(self):
                file.flush()

        return Half()


def test_what_is_written_is_read(tmp_path):
    files = WholeFiles()
    files.save_checkpoint(STATE, tmp_path / "checkpoints" / "step=3.ckpt")
    got = files.load_checkpoint(tmp_path / "checkpoints" / "step=3.ckpt")
    assert got["global_step"] == 3
    assert torch.equal(got["weights"], STATE["weights"])
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step=3.ckpt"]


@pytest.mark.parametrize("disk", [Full, Breaks])
def test_a_disk_that_refuses_leaves_the_good_one(disk, tmp_path, caplog):
    path, older = tmp_path / "step=3.ckpt", tmp_path / "step=2.ckpt"
    WholeFiles().save_checkpoint(STATE, path)
    WholeFiles().save_checkpoint(STATE, older)
    before = path.read_bytes()
    files = disk()
    with caplog.at_level(logging.ERROR):
        files.save_checkpoint(STATE | {"global_step": 4}, path)
        files.remove_checkpoint(older)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step=2.ckpt", "step=3.ckpt"]
    (line,) = caplog.messages
    assert "step=3.ckpt could not be written" in line
    assert "the run goes on" in line


def test_after_a_good_one_older_ones_go(tmp_path):
    files = WholeFiles()
    for step in (1, 2):
        files.save_checkpoint(STATE, tmp_path / f"step={step}.ckpt")
    files.remove_checkpoint(tmp_path / "step=1.ckpt")
    assert [p.name for p in tmp_path.iterdir()] == ["step=2.ckpt"]


def test_what_cannot_be_saved_is_no_disk_s_fault(tmp_path):
    with pytest.raises(Exception, match=r"pickle|lambda"):
        WholeFiles().save_checkpoint({"global_step": lambda: 3}, tmp_path / "step=3.ckpt")
    assert list(tmp_path.iterdir()) == []


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_checkpoint_executes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"global_step": 1, "x": Evil()}, tmp_path / "step=1.ckpt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        WholeFiles().load_checkpoint(tmp_path / "step=1.ckpt", weights_only=False)
    assert readable(tmp_path / "step=1.ckpt") is None
    assert not (tmp_path / "executed").exists()


def test_the_latest_comes_first_and_damaged_ones_are_known(tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    files = WholeFiles()
    for name in ("step=40", "step=120", "best-step=80"):
        files.save_checkpoint(STATE, folder / f"{name}.ckpt")
    (folder / "notes.ckpt").write_text("no step in its name")
    assert [step for step, _ in checkpoints(tmp_path)] == [120, 80, 40]
    latest = folder / "step=120.ckpt"
    latest.write_bytes(latest.read_bytes()[:-500])
    with caplog.at_level(logging.WARNING):
        assert readable(latest) is None
    assert "step=120.ckpt cannot be read" in caplog.text
    assert readable(folder / "step=40.ckpt")["global_step"] == 3
