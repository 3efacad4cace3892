"""What people get from an index: built as it is published, installed where no checkout is."""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]


def run(*command: object, cwd: Path) -> str:
    """Return what a command printed; no variable leads it to this checkout."""
    ours = ("PYTHON", "SWLORA_E2E")
    outside = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=outside, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive."""
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, made of the source archive and not of the checkout, as build tools do."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as file:
        file.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=source)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of an environment that has the wheel, and the packages it needs."""
    environment = tmp_path_factory.mktemp("clean") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=ROOT)
    python = environment / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "--python", python, "install", "--no-index", "--no-deps", wheel, cwd=environment)
    packages = sysconfig.get_path("purelib", vars={"base": str(environment)})
    # What a .pth file names comes after the environment's own packages, and .pth files there are
    # not read: all that swlora needs is found, an editable swlora among it is not.
    (Path(packages) / "needs.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def test_the_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    source = ROOT / "src"
    here = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    beside = {name for name in names if ".dist-info/" in name}
    assert names - beside == here
    of_each_kind = ("web/static/main.js", "web/templates/base.html", "py.typed")
    assert here >= {f"swlora/{name}" for name in of_each_kind}
    assert {name.partition(".dist-info/")[2] for name in beside} == {
        *("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
    }


def test_the_sdist_has_what_git_keeps(sdist: Path) -> None:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("this is no checkout of git")
    here = {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert names == here | {"PKG-INFO"}


def test_an_index_shows_what_pyproject_says(wheel: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    name = f"swlora-{project['version']}.dist-info/"
    about = PathDistribution(zipfile.Path(wheel, name))  # type: ignore[arg-type]
    assert about.version == project["version"]
    assert about.metadata["Requires-Python"] == project["requires-python"]
    assert about.metadata["Description-Content-Type"] == "text/markdown"
    assert about.metadata.get_payload().strip() == (ROOT / "README.md").read_text("utf-8").strip()
    needed = [one for one in about.requires or [] if "extra ==" not in one]
    assert len(needed) == len(project["dependencies"])
    assert set(about.metadata.get_all("Provides-Extra", [])) == set(
        project["optional-dependencies"]
    )


def test_it_runs_outside_the_checkout(programs: Path, model_folder, tmp_path: Path) -> None:
    code = "import swlora; print(swlora.__file__, swlora.__version__)"
    place, version = run(programs / "python", "-c", code, cwd=tmp_path).split()
    assert Path(place).is_relative_to(programs.parent)
    swlora, model = programs / "swlora", ("--model", model_folder("llama"), "--dtype", "float32")
    assert run(swlora, "--version", cwd=tmp_path).split() == ["swlora", version]
    assert "identify" in run(swlora, "--help", cwd=tmp_path)
    write = ("--prompt", "good day", "--max-new-tokens", 3, "--json", "written.json")
    run(swlora, "generate", *model, *write, cwd=tmp_path)
    assert "text" in json.loads((tmp_path / "written.json").read_text())
    find = ("--windows", 1, "--window-tokens", 32, "--controls", 1, "--max-candidates", 1)
    run(swlora, "identify", *model, *find, "--output", "found", cwd=tmp_path)  # reads english.txt
    assert (tmp_path / "found/superweights.md").is_file()
