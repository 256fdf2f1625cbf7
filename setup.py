"""Builds the extension module `gradsafe._C` with CMake and ninja. No network, no guessing.

Environment:
    GRADSAFE_BACKEND     default: build nothing; the operators run as their plain definitions
    GRADSAFE_CUDA        auto (default: CUDA kernels if nvcc is found), on (fail without nvcc), off
    GRADSAFE_CUDA_ARCHS  CMake architectures, e.g. "80-real;90"; else TORCH_CUDA_ARCH_LIST is used
    MAX_JOBS             parallel compile jobs
    CMAKE_BUILD_TYPE     Release (default), RelWithDebInfo, Debug
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# 8.6 and 8.9 run the code for 8.0; what is newer than 12.0 compiles the last one from PTX.
DEFAULT_ARCHS = "80-real;90-real;100-real;120"


def cuda_architectures() -> str:
    """Architectures in CMake's notation; never those of a GPU that happens to be plugged in."""
    if archs := os.environ.get("GRADSAFE_CUDA_ARCHS"):
        return archs
    torch_list = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not torch_list:
        return DEFAULT_ARCHS
    archs = []
    for entry in torch_list.replace(";", " ").split():
        number = entry.removesuffix("+PTX").replace(".", "")
        archs.append(number if entry.endswith("+PTX") else f"{number}-real")
    return ";".join(archs)


def parallel_jobs(cuda: bool) -> int:
    """MAX_JOBS, else one job per core, limited by 4 GB of memory per nvcc."""
    if jobs := os.environ.get("MAX_JOBS"):
        return max(1, int(jobs))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    jobs = max(1, cores or 1)
    if cuda and hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        jobs = max(1, min(jobs, memory // (4 << 30)))
    return jobs


def find_tool(name: str, isolated: bool) -> str:
    """Path of cmake or ninja: that of this environment, else of PATH, where pip puts its own."""
    folders = [] if isolated else [str(Path(sys.executable).parent)]
    folders.append(os.environ.get("PATH", os.defpath))
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        raise SystemExit(
            f"gradsafe: building needs {name!r}. Run `pip install .` (isolated build), or "
            f"`pip install {name}` and then `pip install --no-build-isolation .`"
        )
    return found


def is_stale(build: Path, torch_dir: Path, torch_version: str) -> bool:
    """Whether CMake's cache is of another checkout or torch, or names files that are gone.

    The latter is so in every isolated build but the first: its tools lie in a temporary folder.
    """
    cache = build / "CMakeCache.txt"
    if not cache.is_file():
        return build.exists()  # half a configuration
    lines = cache.read_text(encoding="utf-8", errors="replace").splitlines()
    entries = [line.partition("=") for line in lines if not line.startswith(("#", "//"))]
    tools = [v for name, _, v in entries if name.endswith(":FILEPATH") and os.path.isabs(v)]
    values = {name.partition(":")[0]: value for name, _, value in entries}
    expected = {
        "CMAKE_HOME_DIRECTORY": str(ROOT),
        "GRADSAFE_TORCH_DIR": str(torch_dir),
        "GRADSAFE_TORCH_VERSION": torch_version,
    }
    return any(values.get(name) != value for name, value in expected.items()) or not all(
        map(os.path.exists, [*tools, values.get("CMAKE_COMMAND", "")])
    )


class BuildExtension(build_ext):
    """Configures and builds with CMake; the module lands where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:  # noqa: D102
        try:
            import pybind11
            import torch
        except ModuleNotFoundError as error:
            raise SystemExit(
                f"gradsafe: building needs {error.name!r} in this environment. Run "
                "`pip install .` (isolated build), or `pip install torch pybind11 cmake ninja` "
                "and then `pip install --no-build-isolation .`"
            ) from error
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        torch_dir = Path(torch.__file__).resolve().parent
        isolated = not torch_dir.is_relative_to(Path(sys.prefix).resolve())
        cmake, ninja = find_tool("cmake", isolated), find_tool("ninja", isolated)
        build = self.cmake_folder(torch_dir, isolated)
        if is_stale(build, torch_dir, torch.__version__):
            shutil.rmtree(build, ignore_errors=True)
        build.mkdir(parents=True, exist_ok=True)
        cuda = os.environ.get("GRADSAFE_CUDA", "auto").lower()
        if cuda not in ("auto", "on", "off"):
            raise SystemExit(f"gradsafe: GRADSAFE_CUDA={cuda!r}: expected auto, on or off")
        nvcc = shutil.which("nvcc")
        self.warn_about_cuda_versions(torch, cuda, nvcc)
        subprocess.run(
            [
                cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build),
                f"-DCMAKE_MAKE_PROGRAM:FILEPATH={ninja}",
                f"-DCMAKE_BUILD_TYPE={os.environ.get('CMAKE_BUILD_TYPE', 'Release')}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DGRADSAFE_TORCH_DIR={torch_dir}",
                f"-DGRADSAFE_TORCH_VERSION={torch.__version__}",
                f"-DGRADSAFE_CUDA={cuda}",
                f"-DGRADSAFE_CUDA_ARCHS={cuda_architectures()}",
                f"-DGRADSAFE_OUTPUT_DIR={output}",
            ],
            check=True,
        )  # fmt: skip
        jobs = parallel_jobs(cuda=cuda != "off" and nvcc is not None)
        subprocess.run([cmake, "--build", str(build), "--parallel", str(jobs)], check=True)

    def cmake_folder(self, torch_dir: Path, isolated: bool) -> Path:
        """Kept between builds of one environment; throw-away for pip's isolated environments."""
        if isolated:
            return Path(self.build_temp).resolve() / "cmake"
        tag = hashlib.sha256(f"{sys.executable}:{torch_dir}".encode()).hexdigest()[:8]
        return ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{tag}"

    @staticmethod
    def warn_about_cuda_versions(torch, cuda: str, nvcc: str | None) -> None:
        """A torch for another CUDA major works (static runtime), given a recent enough driver."""
        if cuda == "off" or nvcc is None or torch.version.cuda is None:
            return
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
        release = text.stdout.split("release ")[-1].split(",")[0]
        if release.split(".")[0] != torch.version.cuda.split(".")[0]:
            print(
                f"gradsafe: warning: nvcc {release} and torch's CUDA {torch.version.cuda} differ "
                "in their major version; the GPU driver must support the newer one",
                file=sys.stderr,
            )


setup(
    ext_modules=(
        []
        if os.environ.get("GRADSAFE_BACKEND") == "default"
        else [Extension("gradsafe._C", sources=[])]
    ),
    cmdclass={"build_ext": BuildExtension},
)
