"""The wheel holds all that a run needs and nothing else, and runs where no checkout is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from package.readme import ROOT

pytestmark = pytest.mark.slow


def run(*words: str | Path, cwd: Path, **variables: str) -> str:
    """Run a program with nothing of this process's Python paths, and return what it printed."""
    environment = {
        k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=environment | {"OMP_NUM_THREADS": "1"} | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from this tree without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The python of an environment that has the wheel, and what it depends on but not the checkout.

    The dependencies are this environment's: its folder is on the path, and what its .pth files would add
    (an editable install) is not.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    binary = folder / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        binary,
        "install",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=folder,
    )
    (site,) = (folder / "lib").glob("python3.*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return binary


def test_contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    yamls = {f"opd_lightning/conf/{p.relative_to(ROOT / 'conf')}" for p in (ROOT / "conf").rglob("*.yaml")}
    assert len(yamls) > 40
    assert yamls <= names
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "opd_lightning").rglob("*.py")}
    assert modules <= names
    for role in ("teacher", "student"):
        shipped = f"opd_lightning/checkpoints/word_problems/{role}"
        files = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
        assert {f"{shipped}/{name}" for name in files} <= names
    tops = {name.split("/")[0] for name in names}
    (info,) = [top for top in tops if top.endswith(".dist-info")]
    assert tops == {"opd_lightning", info}
    assert f"{info}/licenses/LICENSE" in names
    suffixes = {Path(name).suffix for name in names if not name.startswith(info)}
    assert suffixes <= {".py", ".yaml", ".json", ".safetensors", ".jinja", ".md", ".typed"}


def test_size(wheel):
    """About 4 MB of checkpoints, compressed, and some text."""
    assert 1e6 < wheel.stat().st_size < 5e6


def test_it_is_not_the_checkout_that_is_imported(python, tmp_path):
    where = "import opd_lightning, opd_lightning.paths as p; print(opd_lightning.__file__); print(p.CONF_DIR)"
    file, conf = run(python, "-c", where, cwd=tmp_path).split()
    assert Path(file).is_relative_to(python.parents[1])
    assert Path(conf) == Path(file).parent / "conf"
    paths = run(python, "-c", "import sys; print('\\n'.join(sys.path))", cwd=tmp_path).split("\n")
    assert str(ROOT) not in paths


def test_it_trains(python, tmp_path):
    out = run(python, "-m", "opd_lightning.train", "debug=fast", cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert "greedy accuracy" in out
    (path,) = tmp_path.glob("runs/**/summary.json")
    summary = json.loads(path.read_text())
    assert summary["optimizer_steps"] == 2
    assert summary["git_commit"] is None
    assert (path.parent / "student" / "model.safetensors").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]


def test_it_evaluates(python, tmp_path):
    words = ("student.path=builtin:word_problems/student", "problems=2", "max_new_tokens=8")
    assert "pass@1" in run(python, "-m", "opd_lightning.evaluate", *words, cwd=tmp_path, HF_HUB_OFFLINE="1")
    (path,) = tmp_path.glob("runs/**/evaluation.json")
    assert json.loads(path.read_text())["problems"] == 2
