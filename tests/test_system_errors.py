"""What the system refuses while the student is written is said by its own number, which the commands know."""

import errno

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from opd_lightning.export import system_errors


def test_what_the_system_says_is_raised(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No such file.*run/student"), system_errors("run/student"):
        save_file({"weight": torch.zeros(3)}, tmp_path / "nowhere" / "model.safetensors")


def test_a_full_disk_is_one_of_the_commands_sentences():
    """In the words of safetensors."""
    said = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(OSError, match="No space") as caught, system_errors("run/student"):
        raise SafetensorError(said)
    assert caught.value.errno == errno.ENOSPC


def test_another_error_stays():
    with pytest.raises(SafetensorError, match="header"), system_errors("run/student"):
        raise SafetensorError("invalid header")
