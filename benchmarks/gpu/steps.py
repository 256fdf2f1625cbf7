"""The steps of a GPU run, the most important first. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

PYTEST = ("-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-v", "--tb=short", "-rfE",
          "-o", "faulthandler_timeout=50", "--maxfail=25")  # fmt: skip
KINDS = ("memcheck", "synccheck", "racecheck", "initcheck")
DETECTION = ("-m", "benchmarks.bench_detection", "--out", "{out}")


@dataclass(frozen=True)
class Step:
    """One command with a limit.

    Attributes:
        name: Name of the step and of its results folder.
        limit: Time limit in seconds.
        command: Arguments of Python, or of `program`. "{out}" is replaced by the results folder,
            "{resume}" by `--resume` when a run is continued.
        dry: The same on a CPU.
        program: Program to run instead of Python; if missing, the step is reported as skipped.
        needed: If it fails, the run ends.
        environment: Environment variables of this step.
    """

    name: str
    limit: int
    command: tuple[str, ...]
    dry: tuple[str, ...] = ()
    program: str = ""
    needed: bool = False
    environment: tuple[tuple[str, str], ...] = ()


def _measure(name: str, limit: int, *operators: str) -> Step:
    start = ("-m", "benchmarks.run", *operators, "--no-compile", "{resume}", "--out", "{out}")
    seconds = str(max(5, (limit - 12) // len(operators)))
    return Step(
        name,
        limit,
        (*start, "--device", "cuda", "--seconds", seconds),
        dry=(*start, "--device", "cpu", "--dry-run"),
    )


def _sanitize(tool: str) -> Step:
    arguments = ("--tool", tool, "--error-exitcode", "9", "{python}", "tests/gpu/sanitize.py")
    return Step(
        tool,
        60,
        arguments,
        program="compute-sanitizer",
        environment=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
    )


_BUILD = ("setup.py", "-q", "build_ext", "--inplace")
_SMOKE = ("-c", "from gradsafe import doctor; raise SystemExit(doctor.run())")
# Tests run in eight processes of one thread; one test compares what all others of its process ran.
_PARALLEL = ("-n", "8", "--dist", "load")
_ONE_THREAD = (("OMP_NUM_THREADS", "1"),)
_PATHS = "tests/gpu/test_benchmark_paths.py"
_SUITE = (*PYTEST, *_PARALLEL, "tests/gpu", "--ignore", _PATHS, "--durations=5",
          "--junitxml={out}/junit.xml")  # fmt: skip
_OPS = (*PYTEST, *_PARALLEL, "tests/ops", "-m", "gpu", "--junitxml={out}/junit.xml")
_ONE_PROCESS = (*PYTEST, "tests/gpu/test_operators.py", "tests/gpu/test_kl_cuda.py",
                "tests/gpu/test_gpu_cosine_topk.py", "tests/gpu/test_surgery_on_gpu.py", _PATHS,
                "--junitxml={out}/junit.xml")  # fmt: skip
STEPS = (
    Step("build", 240, _BUILD, _BUILD, needed=True),
    Step("smoke", 45, _SMOKE, _SMOKE),
    Step("quick", 45, ("benchmarks/gpu/quick.py", "{out}/quick_cuda.csv")),
    Step("suite", 120, _SUITE, _SUITE, environment=_ONE_THREAD),
    Step("ops", 60, _OPS, _OPS, environment=_ONE_THREAD),
    _measure("wgrad", 40, "wgrad_moments"),
    _measure("grouped", 45, "grouped_wgrad_moments"),
    _measure("moments", 40, "moments"),
    _measure("kl", 40, "kl_divergence"),
    _measure("surgery", 80, "surgery", "surgery_adamw", "subspace_surgery"),
    _measure("cosine", 45, "cosine_topk"),
    Step(
        "detection",
        120,
        (*DETECTION, "--size", "7B", "--tokens", "100", "--dtype", "bfloat16", "--device", "cuda"),
        dry=(*DETECTION, "--size", "tiny", "--tokens", "8"),
    ),
    *(_sanitize(tool) for tool in KINDS),
    Step("paths", 150, _ONE_PROCESS, _ONE_PROCESS),
    Step(  # against torch.compile too, if there is time left
        "compiled",
        120,
        ("-m", "benchmarks.run", "moments", "kl_divergence", "wgrad_moments", "--device", "cuda",
         "--seconds", "40", "{resume}", "--out", "{out}"),
    ),
)  # fmt: skip
