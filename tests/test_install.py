"""The package as it is installed: every file is in the wheel, and a plain package index has all that it asks for."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("deepspeed", "deepspeed,megatron,wandb", "all", "deepspeed,megatron,wandb,test", "serve")
DATA = (".py", ".typed", ".cpp", ".h", ".json", ".safetensors", ".sh", ".sbatch", ".css", ".jinja", ".yaml")


def package_files() -> set[str]:
    """Every file of the package, as `megatron_lowbit/...`; three of its folders are links to the top level."""
    found = set()
    for folder, _, files in os.walk(ROOT / "megatron_lowbit", followlinks=True):
        if "__pycache__" not in folder:
            found |= {str((Path(folder) / name).relative_to(ROOT)) for name in files if name.endswith(DATA)}
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with an sdist of the repository, and a wheel built from that sdist; no isolation, no network."""
    pytest.importorskip("setuptools", minversion="77")
    made = tmp_path_factory.mktemp("built")
    source = made / "source"
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "runs", "tests", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored, symlinks=True)
    build(source, "sdist", made)
    (sdist,) = made.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(made / "unpacked", filter="data")
    (unpacked,) = (made / "unpacked").iterdir()
    build(unpacked, "wheel", made)
    return made


def build(source: Path, kind: str, into: Path) -> None:
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(into)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True, timeout=300)


def test_the_wheel_holds_every_file(built):
    (wheel,) = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == package_files()
    assert {"megatron_lowbit/slurm/stage.sbatch", "megatron_lowbit/kernels/csrc/hybrid.cpp"} <= names
    assert {"megatron_lowbit/launch/page/page.html.jinja", "megatron_lowbit/launch/page/page.css"} <= names


IMPORT = """
import megatron_lowbit as lowbit, megatron_lowbit.layers.linear, megatron_lowbit.launch, torch
from megatron_lowbit.kernels import pack_bits
assert pack_bits(torch.tensor([1, 2], dtype=torch.uint8), 4).tolist() == [0x21]
from megatron_lowbit.config import CommConfig
assert CommConfig.model_fields["bits"].description, "docstrings of fields are read from the source"
print(lowbit.__file__)
"""


def run_python(where: Path, **environment: str) -> Path:
    """The package's folder, as a Python without an installed one finds it that is started in `where`."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONSAFEPATH", "PYTHONPATH")}
    third_party = os.pathsep.join(path for path in sys.path if path.endswith("site-packages"))
    code = f"import sys; sys.path += {third_party!r}.split({os.pathsep!r}); {IMPORT}"
    done = subprocess.run(
        # -S: without site-packages' .pth files, so that an editable install of the repository is not what is found
        [sys.executable, "-S", "-c", code],
        cwd=where,
        env=env | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip()).parent


@pytest.mark.slow
def test_the_wheel_works_elsewhere(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    assert run_python(tmp_path, PYTHONPATH=str(tmp_path / "site")) == tmp_path / "site" / "megatron_lowbit"


@pytest.mark.slow
def test_the_repository_works_uninstalled():
    """A Python started in the repository's root once found the package without its kernels."""
    assert run_python(ROOT) == ROOT / "megatron_lowbit"


def plain_index() -> dict[str, str]:
    """The environment without what adds other packages to an index, such as a folder of wheels or a constraint."""
    cleared = {"PIP_FIND_LINKS", "PIP_NO_INDEX", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT", "UV_FIND_LINKS"}
    return {name: value for name, value in os.environ.items() if name not in cleared} | {"PIP_CONFIG_FILE": os.devnull}


def told(command: list[str]) -> str:
    """Standard output of a resolver; skips the test where it reaches no index."""
    done = subprocess.run(command, cwd=ROOT, env=plain_index(), capture_output=True, text=True, timeout=900)
    unreachable = ("Temporary failure in name resolution", "Network is unreachable", "dns error", "Could not connect")
    if done.returncode and any(words in done.stderr for words in unreachable):
        pytest.skip("no package index is in reach")
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("extras", EXTRAS)
def test_constraints_resolve_on_every_python(python, extras):
    """By uv, which resolves for a Python that need not be there."""
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or pytest.skip("uv is not installed")
    wanted = [argument for extra in extras.split(",") for argument in ("--extra", extra)]
    platform = ["--python-version", python, "--python-platform", "x86_64-unknown-linux-gnu"]
    lines = told([uv, "pip", "compile", "-q", "pyproject.toml", "-c", "constraints.txt", *platform, *wanted])
    assert "torch==2.13.0" in lines and "triton==3.7.1" in lines


@pytest.mark.slow
def test_pip_resolves_constraints_here():
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-cache-dir", "--quiet"]
    told([*pip, "-c", "constraints.txt", ".[all,test]"])
