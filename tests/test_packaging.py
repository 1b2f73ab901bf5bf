"""The build: its decisions one by one, and whole installations in scratch folders."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path
from types import ModuleType

import pytest
from script_modules import load_script
from setuptools.errors import SetupError

from mosa_kernels._extension import extension
from mosa_kernels.version import __version__

ROOT = Path(__file__).resolve().parents[1]
NO_CUDA_HOME = {"CUDA_HOME": "/nowhere"}


build = load_script("setup.py")


def csrc() -> list[Path]:
    return [path for path in (ROOT / "csrc").iterdir() if path.is_file()]


def make_nvcc(home: Path, architectures: str, compiles: bool = False) -> Path:
    """An nvcc that lists these architectures and fails at everything else."""
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    lines = "".join(f"echo compute_{name}\n" for name in architectures.split())
    nvcc.write_text(f'#!/bin/sh\n[ "$1" = --list-gpu-arch ] || exit {0 if compiles else 1}\n{lines}')
    nvcc.chmod(0o755)
    return nvcc


# Decisions


def test_all_wanted_architectures_that_nvcc_knows_and_ptx_for_newer_ones() -> None:
    cuda_13 = [75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121]
    expected = ["75-real", "80-real", "90-real", "100-real", "120-real", "90-virtual"]
    assert build.choose_architectures(cuda_13, None) == expected
    cuda_12_4 = [50, 52, 60, 61, 70, 72, 75, 80, 86, 87, 89, 90]
    assert build.choose_architectures(cuda_12_4, "") == ["70-real", "75-real", "80-real", "90-real", "90-virtual"]


@pytest.mark.parametrize(
    ("arch_list", "expected"),
    [
        ("8.0;9.0+PTX", ["80-real", "90-real", "90-virtual"]),
        ("8.0 9.0", ["80-real", "90-real"]),
        (" 8.6+PTX ", ["86-real", "86-virtual"]),
        ("9.0a;12.0", ["90a-real", "120-real"]),
        ("8.0,8.0", ["80-real"]),
    ],
)
def test_arch_list_of_pytorch_is_respected(arch_list: str, expected: list[str]) -> None:
    assert build.choose_architectures([75, 80, 86, 90, 120], arch_list) == expected


def test_code_for_gpus_between_the_steps_of_the_sources_comes_from_the_step_below() -> None:
    architectures = ["75-real", "86-real", "90-real", "90a-real", "120-real", "90-virtual", "120-virtual"]

    def code_for(steps: tuple[int, ...]) -> list[str]:
        return [flag.removeprefix("--generate-code=arch=compute_") for flag in build.code_flags(architectures, steps)]

    before = ["75,code=sm_75", "80,code=sm_86"]
    assert code_for(build.STEPS) == [
        *before,
        "80,code=sm_90",
        "90a,code=sm_90a",
        "80,code=sm_120",
        "80,code=compute_80",
    ]
    assert code_for(build.CLUSTER_STEPS) == [
        *before,
        "90,code=sm_90",
        "90a,code=sm_90a",
        "90,code=sm_120",
        "90,code=compute_90",
    ]


def test_the_steps_are_those_that_the_sources_name() -> None:
    def named(paths: list[Path]) -> set[int]:
        return {
            int(number) for path in paths for number in re.findall(r"__CUDA_ARCH__ [<>=]+ (\d+)0\b", path.read_text())
        }

    clusters = [path for path in csrc() if "_cluster" in path.name]
    assert named(clusters) == {90}
    assert named([path for path in csrc() if path not in clusters])
    assert named([path for path in csrc() if path not in clusters]) <= set(build.STEPS)
    assert set(build.CLUSTER_STEPS) == {*build.STEPS, 90}


@pytest.mark.parametrize("arch_list", ["Ampere", "80", "8.0+ptx", "8"])
def test_arch_list_that_is_none(arch_list: str) -> None:
    with pytest.raises(SetupError, match=re.escape(f"expected entries like 8.0 or 9.0+PTX, got {arch_list!r}")):
        build.choose_architectures([80, 90], arch_list)


def test_arch_list_beyond_the_toolkit() -> None:
    with pytest.raises(SetupError, match=r"TORCH_CUDA_ARCH_LIST: this nvcc compiles for 8.0, 9.0; got '7.0'"):
        build.choose_architectures([80, 90], "7.0")
    with pytest.raises(build.MissingError, match="this nvcc compiles for none of"):
        build.choose_architectures([30, 35], None)


def test_nvcc_is_found_in_cuda_home_first_then_on_path(tmp_path: Path) -> None:
    home, other = make_nvcc(tmp_path / "home", "80"), make_nvcc(tmp_path / "other", "90")
    both = {"CUDA_HOME": str(tmp_path / "home"), "PATH": str(other.parent)}
    assert build.find_nvcc(both) == home
    assert build.find_nvcc({"PATH": str(other.parent)}) == other
    assert build.choose_cuda(both) == (home, ["80-real", "80-virtual"])
    with pytest.raises(build.MissingError, match="CUDA_HOME is /nowhere, where bin/nvcc was not found"):
        build.find_nvcc({"CUDA_HOME": "/nowhere", "PATH": str(other.parent)})


def test_mosa_cuda_0_leaves_it_out_and_1_makes_it_a_must(tmp_path: Path) -> None:
    make_nvcc(tmp_path, "80")
    with pytest.raises(build.MissingError, match="MOSA_CUDA=0"):
        build.choose_cuda({"MOSA_CUDA": "0", "CUDA_HOME": str(tmp_path)})
    with pytest.raises(SetupError, match="MOSA_CUDA=1 asks for the CUDA kernels, but CUDA_HOME is /nowhere"):
        build.choose_cuda({"MOSA_CUDA": "1", **NO_CUDA_HOME})
    with pytest.raises(SetupError, match="MOSA_CUDA: expected 0, 1 or nothing, got 'yes'"):
        build.choose_cuda({"MOSA_CUDA": "yes"})


def test_nvcc_that_does_not_run_is_missing(tmp_path: Path) -> None:
    make_nvcc(tmp_path, "")
    with pytest.raises(build.MissingError, match="does not run"):
        build.choose_cuda({"CUDA_HOME": str(tmp_path)})


def test_a_compiler_that_is_not_there_is_named() -> None:
    with pytest.raises(build.MissingError, match="no C\\+\\+ compiler was found \\(looked for no-such-compiler"):
        build.find_tools({"CXX": "no-such-compiler"})


def test_version_has_one_source() -> None:
    assert build.package_version() == __version__


def test_the_oldest_environment_is_the_lower_bounds() -> None:
    metadata = (ROOT / "pyproject.toml").read_text()
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / ".ci" / "oldest.txt").read_text(), re.MULTILINE))
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', metadata))
    for name, pin in pins.items():
        assert f"{pin}.".startswith(f"{bounds[name]}."), name
    needed = metadata.partition("\ndependencies = [")[2].partition("]")[0]
    assert {re.match(r"[\w-]+", name)[0] for name in re.findall(r'"(.+)"', needed)} <= pins.keys()  # type: ignore[index]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_environment_of_make_says_what_debian_lacks(tmp_path: Path) -> None:
    """Debian's python3 comes without ensurepip: the exact package is named."""
    for name in ("ensurepip", "virtualenv"):
        (tmp_path / f"{name}.py").write_text("raise ImportError\n")
    (tmp_path / "bin").mkdir()
    for name in ("bash", "cat", "rm"):
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    bare = {"PATH": str(tmp_path / "bin"), "PYTHONPATH": str(tmp_path)}
    script = (ROOT / ".ci" / "make-venv", tmp_path / "venv")
    output = run("bash", *script, sys.executable, cwd=tmp_path, ok=False, **bare)
    version = "{}.{}".format(*sys.version_info)
    assert f"sudo apt install python{version}-venv" in output
    assert not (tmp_path / "venv").exists()
    output = run("bash", *script, "/bin/false", cwd=tmp_path, ok=False, **bare)
    assert "needs Python 3.10 or newer; /bin/false is not" in output


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_make_removes_no_environment_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "pyvenv.cfg").touch()
    output = run("bash", ROOT / ".ci" / "make-venv", tmp_path / "theirs", sys.executable, cwd=tmp_path, ok=False)
    assert "theirs exists and was not made by this script" in output
    assert (tmp_path / "theirs" / "pyvenv.cfg").exists()


# The sources and the module that they make


def test_csrc_includes_no_torch_header() -> None:
    assert len(csrc()) > 5
    for path in csrc():
        assert not re.search(r"#\s*include\s*[<\"](torch|ATen|c10)/", path.read_text(encoding="utf-8")), path.name


@pytest.fixture
def compiled() -> ModuleType:
    found = extension()
    if found.module is None:
        pytest.skip(str(found.reason))
    return found.module


def test_module_imports_without_pytorch_and_without_a_driver(compiled: ModuleType) -> None:
    code = "import sys, mosa_kernels._C; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    if shutil.which("ldd"):
        libraries = subprocess.run(["ldd", str(compiled.__file__)], capture_output=True, text=True).stdout
        assert not re.search(r"libcudart|libcuda\.|libtorch|libc10", libraries), libraries


def test_module_says_what_it_was_built_for(compiled: ModuleType) -> None:
    info = compiled.build_info
    assert info["version"] == __version__
    assert re.match(r"(GNU|Clang|AppleClang) \d+\.", info["compiler"])
    cuobjdump = shutil.which("cuobjdump") or "/usr/local/cuda/bin/cuobjdump"
    if not info["cuda_toolkit"]:
        assert info["cuda_architectures"] == ""
    elif Path(cuobjdump).is_file():
        listing = subprocess.run([cuobjdump, "-lelf", "-lptx", compiled.__file__], capture_output=True, text=True)
        code = set(re.findall(r"sm_(\d+)\.cubin", listing.stdout))
        assert code == {name.removesuffix("-real") for name in info["cuda_architectures"].split() if "real" in name}


# Whole installations


def run(*command: object, cwd: Path, ok: bool = True, **environment: str) -> str:
    """Runs a command; returns stdout and stderr. The caller's settings of the build are left out."""
    settings = ("MOSA_", "CUDA_HOME", "CUDA_PATH", "CXX", "TORCH_CUDA_ARCH_LIST", "PYTHONPATH")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(settings)}
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=inherited | environment, capture_output=True, text=True
    )
    output = result.stdout + result.stderr
    assert (result.returncode == 0) is ok, output
    return output


def copy_sources(target: Path) -> Path:
    """What a fresh clone holds."""
    if (ROOT / ".git").exists():
        listing = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT)
        for name in listing.splitlines():
            if (ROOT / name).is_file():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, target / name)
    else:
        ignored = (ROOT / ".gitignore").read_text().split()
        leave = shutil.ignore_patterns(*(Path(name).name for name in ignored))
        shutil.copytree(ROOT, target, ignore=leave, dirs_exist_ok=True)
    return target


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    copied = copy_sources(tmp_path / "sources")
    tables = copied / "mosa_kernels" / "assets" / "choice"  # where those of GPUs lie, once there are any
    tables.mkdir(exist_ok=True)
    (tables / "nvidia-imaginary.json").write_text("{}\n")
    return copied


@pytest.fixture
def poisoned(tmp_path: Path) -> str:
    """A folder for PYTHONPATH whose `torch` cannot be imported: a build that tries to fails."""
    (tmp_path / "poisoned").mkdir()
    (tmp_path / "poisoned" / "torch.py").write_text("raise ImportError('the build imports PyTorch')\n")
    return str(tmp_path / "poisoned")


def install(what: Path, target: Path, *options: str, ok: bool = True, **environment: str) -> str:
    """`pip install --no-build-isolation` of a source tree or sdist into a folder."""
    pip = (sys.executable, "-m", "pip", "install", "-v", "--no-index", "--no-build-isolation", "--no-deps")
    return run(*pip, *options, "--target", target, what, cwd=what.parent, ok=ok, **environment)


@pytest.fixture
def quick(tmp_path: Path) -> str:
    """A C++ compiler for builds whose code is tested elsewhere: 20 s in place of 61 s of one core."""
    compiler = tmp_path / "quick" / "c++"
    compiler.parent.mkdir()
    found = next(name for name in COMPILERS if shutil.which(name))
    compiler.write_text(f'#!/bin/sh\nexec {shutil.which(found)} "$@" -O0\n')
    compiler.chmod(0o755)
    return str(compiler)


NO_EDITABLE = """
import sys
editable = lambda finder: getattr(finder, "__module__", "").startswith("__editable__")
sys.meta_path[:] = [finder for finder in sys.meta_path if not editable(finder)]
"""


def ask(target: Path, code: str, tmp_path: Path) -> str:
    """Runs code against the installation in `target`, far from the clone and from an editable installation of it."""
    return run(sys.executable, "-c", NO_EDITABLE + code, cwd=tmp_path, PYTHONPATH=str(target)).strip()


REPORT = """
import json, torch, mosa_kernels
from mosa_kernels.backends.merge import MergeInput
from mosa_kernels.cli.doctor import examine
from mosa_kernels.functional.merge import merge_adapters
one = MergeInput(torch.ones(2, 3), None, torch.ones(3, 2), None, scale=3.0)
assert merge_adapters([one])[0].w_up.eq(3).all()
print(json.dumps({"file": mosa_kernels.__file__, **examine()}))
"""


def report_of(target: Path, tmp_path: Path) -> dict:
    report = json.loads(ask(target, REPORT, tmp_path).splitlines()[-1])
    assert report["file"].startswith(str(target))
    assert report["problems"] == []
    return report


COMPILERS = (os.environ.get("CXX", "c++").split()[0], "g++", "clang++")
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler")


@pytest.fixture
def sdist(sources: Path, poisoned: str, tmp_path: Path) -> Path:
    command = (sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path)
    run(*command, cwd=sources, PYTHONPATH=poisoned)
    (made,) = tmp_path.glob("*.tar.gz")
    return made


@pytest.mark.packaging
def test_sdist_holds_what_a_clone_does_and_make_runs_in_it(sources: Path, sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / f"mosa_kernels-{__version__}"
    held, needed = ({str(path.relative_to(root)) for path in files(root)} for root in (unpacked, sources))
    needed = {name for name in needed if ".egg-info" not in name}
    assert needed <= held, needed - held
    assert not [name for name in held if name.endswith(".so") or "_build.json" in name]
    assert "Classifier: License :: OSI Approved :: Apache Software License" in (unpacked / "PKG-INFO").read_text()
    assert os.access(unpacked / ".ci" / "make-venv", os.X_OK)
    if shutil.which("make"):
        for goal in ("demo", "test"):
            run("make", "--dry-run", goal, cwd=unpacked)


def files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


@needs_compiler
@pytest.mark.packaging
def test_sdist_installs(sources: Path, sdist: Path, poisoned: str, quick: str, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    install(sdist, target, MOSA_CUDA="0", CXX=quick, PYTHONPATH=poisoned)
    report = report_of(target, tmp_path)
    assert report["compiled"]["cpp"] is True
    assert report["compiled"]["cuda"] == "the CUDA kernels were not built: left out on request (MOSA_CUDA=0)"
    assert {path.name for path in (target / "mosa_kernels").iterdir()} >= {"py.typed", "_build.json"}
    data = [path for path in package_data(sources) if not (target / path).is_file()]
    assert not data, data
    help_text = run(target / "bin" / "mosa-kernels", "--help", cwd=tmp_path, PYTHONPATH=str(target))
    assert "doctor" in help_text


def package_data(sources: Path) -> list[Path]:
    found = (sources / "mosa_kernels").rglob("*")
    return [path.relative_to(sources) for path in found if path.suffix in (".json", ".safetensors")]


@needs_compiler
@pytest.mark.packaging
def test_isolated_install_in_a_new_environment(sources: Path, tmp_path: Path) -> None:
    """`pip install .` as a user types it; its build tools come from the package index."""
    scratch = tmp_path / "venv"
    try:
        venv.create(scratch, with_pip=True)
    except subprocess.CalledProcessError:
        pytest.skip("this Python lacks ensurepip")
    probe = (scratch / "bin" / "pip", "download", "--no-deps", "--dest", tmp_path, "pybind11")
    if subprocess.run([str(part) for part in probe], capture_output=True).returncode != 0:
        pytest.skip("no package index can be reached, so no isolated build")
    run(scratch / "bin" / "pip", "install", "--no-deps", sources, cwd=tmp_path, **NO_CUDA_HOME)
    code = "from mosa_kernels._extension import extension; e = extension(); print(e.module is not None, e.cuda_reason)"
    answer = run(scratch / "bin" / "python", "-c", code, cwd=tmp_path)
    assert answer.startswith("True the CUDA kernels were not built: CUDA_HOME is /nowhere"), answer


@needs_compiler
@pytest.mark.packaging
def test_cuda_is_built_without_a_gpu_for_the_architectures_asked_for(sources: Path, quick: str, tmp_path: Path) -> None:
    try:
        nvcc = build.find_nvcc(os.environ)
        newest = build.supported_architectures(nvcc)[-1]
    except build.MissingError as reason:
        pytest.skip(str(reason))
    target, asked = tmp_path / "installed", f"8.0+PTX {newest // 10}.{newest % 10}"
    # What is compiled is tested elsewhere; -O0 takes three times as long.
    known = "--Ofast-compile" in run(nvcc, "--help", cwd=tmp_path)
    flags = "--Ofast-compile=max" if known else "-Xcicc -O0 -Xptxas -O0"
    asks = {"MOSA_CUDA": "1", "TORCH_CUDA_ARCH_LIST": asked, "CUDA_VISIBLE_DEVICES": ""}
    install(sources, target, CXX=quick, NVCC_APPEND_FLAGS=flags, **asks)
    compiled = report_of(target, tmp_path)["compiled"]
    assert compiled["cuda"] is True
    assert compiled["cuda_architectures"] == ["80-real", "80-virtual", f"{newest}-real"]


@pytest.mark.packaging
def test_no_compiler_leaves_a_working_install_that_says_so(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sh").symlink_to("/bin/sh")
    target = tmp_path / "installed"
    output = install(sources, target, PATH=str(tmp_path / "bin"), **NO_CUDA_HOME)
    assert "WARNING: mosa_kernels._C was not built: no C++ compiler was found" in output
    assert not list((target / "mosa_kernels").glob("_C*"))
    compiled = report_of(target, tmp_path)["compiled"]
    assert compiled["cpp"].startswith("mosa_kernels._C was not built: no C++ compiler was found (looked for c++, g++")
    assert "apt install g++" in compiled["cpp"]


@pytest.mark.packaging
def test_mosa_cpp_0_leaves_the_module_out_and_warns_of_nothing(sources: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    output = install(sources, target, MOSA_CPP="0")
    assert "WARNING" not in output
    assert not list((target / "mosa_kernels").glob("_C*"))
    compiled = report_of(target, tmp_path)["compiled"]
    assert compiled["cpp"] == "mosa_kernels._C was not built: left out on request (MOSA_CPP=0)"


@pytest.mark.packaging
def test_mosa_cuda_1_without_nvcc_is_an_error(sources: Path, tmp_path: Path) -> None:
    output = install(sources, tmp_path / "installed", ok=False, MOSA_CUDA="1", **NO_CUDA_HOME)
    assert "MOSA_CUDA=1 asks for the CUDA kernels, but CUDA_HOME is /nowhere, where bin/nvcc was not found" in output


@needs_compiler
@pytest.mark.packaging
def test_a_cuda_compiler_that_fails_is_an_error_only_where_cuda_is_a_must(
    sources: Path, quick: str, tmp_path: Path
) -> None:
    make_nvcc(tmp_path / "cuda", "80 90")
    broken = {"CUDA_HOME": str(tmp_path / "cuda"), "CXX": quick}
    output = install(sources, tmp_path / "must", ok=False, MOSA_CUDA="1", **broken)
    assert re.search(r"error: the build with \S+/cuda/bin/nvcc failed; see the output above", output)
    output = install(sources, tmp_path / "may", **broken)
    assert re.search(r"WARNING: the build with \S+/cuda/bin/nvcc failed; building without it", output)
    compiled = report_of(tmp_path / "may", tmp_path)["compiled"]
    assert compiled["cpp"] is True
    assert re.search(r"the CUDA kernels were not built: the build with \S+ failed", compiled["cuda"])


@needs_compiler
@pytest.mark.packaging
def test_a_build_that_fails_keeps_no_module_of_an_earlier_one(sources: Path, tmp_path: Path) -> None:
    """In place, as developers build: strict stops, otherwise the package falls back and the old module goes."""
    package = sources / "mosa_kernels"
    old = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    old.write_bytes(b"from an earlier build")
    with (sources / "CMakeLists.txt").open("a", encoding="utf-8") as cmake:
        cmake.write('message(FATAL_ERROR "broken on purpose")\n')
    command = (sys.executable, "setup.py", "build_ext", "--inplace")
    output = run(*command, cwd=sources, ok=False, MOSA_STRICT="1", MOSA_CUDA="0")
    assert "mosa_kernels._C was not built: the build failed" in output
    output = run(*command, cwd=sources, MOSA_CUDA="0")
    assert "WARNING: mosa_kernels._C was not built: the build failed" in output
    assert not old.exists()
    assert json.loads((package / "_build.json").read_text())["native"] == "the build failed; see its output"
