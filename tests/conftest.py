"""What all tests share: compiled programs, 64-bit mode on request, hypothesis's profile, and CPU times on request."""

import collections
import gc
import os
import tempfile
import threading

import hypothesis
import pytest

# Everything runs on the CPU, whatever is installed beside it. With this JAX looks for no driver and no TPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Traces make many objects and few cycles: looking for cycles as often as Python does takes a seventh of the time.
gc.set_threshold(500_000)

# Read when JAX is imported, here and in the processes that tests start.
os.environ |= {
    # Tests ask what goes where, not how fast.
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    # What one worker or process has compiled the others read, however small it is.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    # No test asks for the lines of Python that a program was traced from, which are ten frames to each operation.
    "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
}
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _folder = tempfile.TemporaryDirectory(prefix="jaxpack-tests-")  # gone when the first process ends
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _folder.name

import jax  # noqa: E402

pytest.register_assert_rewrite("contract")

# Two devices, so that shard_map has something to shard over.
jax.config.update("jax_num_cpu_devices", 2)

# An example may compile a program, so there is no deadline, and no more examples than find what they look for.
hypothesis.settings.register_profile("jaxpack", deadline=None, max_examples=20)
hypothesis.settings.load_profile("jaxpack")


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Forgets the programs of a file: each takes memory mappings, and XLA dies where Linux gives no more (65,530)."""
    yield
    jax.clear_caches()
    vars(_CONTEXTS).clear()


@pytest.fixture
def x64():
    """Runs the test in float64."""
    with jax.enable_x64(True):
        yield


# Compiled without optimisation tests take two thirds of the time, and by XLA's older code generator for fusions, in one
# piece, a third of that. JAX has no public switch for the latter two.
CHEAP_OPTIONS = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
_PROGRAMS = {"cheap": True}  # whether these options apply, which change what XLA fuses


def _is_known(name, value):
    """Whether this version of XLA has an option."""
    try:
        jax.jit(lambda: 0).lower().compile({name: value})
    except jax.errors.JaxRuntimeError:
        return False
    return True


def _compile_cheaply():
    """Makes programs compile with the options that XLA knows, unless a test is marked `optimized`.

    A JAX without this private function compiles as it does otherwise, which takes longer.
    """
    try:
        from jax._src import compiler
    except ImportError:
        return
    if not hasattr(compiler, "get_compile_options"):
        return
    known = {name: value for name, value in CHEAP_OPTIONS.items() if _is_known(name, value)}
    original = compiler.get_compile_options

    def get_compile_options(*args, **options):
        overrides = (known if _PROGRAMS["cheap"] else {}) | (options.pop("env_options_overrides", None) or {})
        return original(*args, **options | {"env_options_overrides": overrides})

    compiler.get_compile_options = get_compile_options


_compile_cheaply()

_CONTEXTS = threading.local()  # the MLIR context of each thread, until the end of a file


def _share_contexts():
    """Lowers all programs of a thread in one MLIR context, as JAX does from 0.11 or 0.12 on.

    Before, it makes one for each program, whose dialects take 3 ms to load: a sixth of what a small program takes.
    """
    try:
        from jax._src.interpreters import mlir
    except ImportError:
        return
    if not hasattr(mlir, "make_ir_context") or hasattr(mlir, "_thread_local_context"):
        return
    original = mlir.make_ir_context

    def make_ir_context():
        if not hasattr(_CONTEXTS, "mlir"):
            _CONTEXTS.mlir = original()
        return _CONTEXTS.mlir

    mlir.make_ir_context = make_ir_context


_share_contexts()


@pytest.fixture(autouse=True)
def _optimized(request):
    """Compiles as users do where a test is marked so: equality with references, NaN in slack, compiled programs.

    With `optimized(code=False)` only the program is as users have it, which takes half the time.
    """
    mark = request.node.get_closest_marker("optimized")
    if mark is None:
        yield
        return
    _PROGRAMS["cheap"] = False
    jax.config.update("jax_disable_most_optimizations", not mark.kwargs.get("code", True))
    yield
    _PROGRAMS["cheap"] = True
    jax.config.update("jax_disable_most_optimizations", True)


def pytest_addoption(parser):
    parser.addoption("--cpu-times", action="store_true", help="print the CPU seconds of each folder of tests")


def _cpu_seconds():
    """CPU seconds of this process so far, all its threads and the processes that it has waited for included."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


_REPORTED = [0.0]  # those up to the last report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Puts the CPU seconds since the last report into a report, which a worker sends to the first process."""
    report = yield
    now = _cpu_seconds()
    report.user_properties = [*report.user_properties, ("cpu_seconds", now - _REPORTED[0])]
    _REPORTED[0] = now
    return report


def pytest_terminal_summary(terminalreporter, config):
    """Prints the CPU seconds of each folder. The first report of a worker has those of its imports and collection."""
    if not config.getoption("--cpu-times"):
        return
    seconds: collections.Counter[str] = collections.Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            spent = dict(getattr(report, "user_properties", [])).get("cpu_seconds", 0.0)
            seconds["/".join(getattr(report, "nodeid", "").split("::")[0].split("/")[:2])] += spent
    terminalreporter.section("CPU seconds")
    for folder, spent in seconds.most_common():
        if spent >= 1:
            terminalreporter.write_line(f"{spent:7.0f}  {folder}")
    terminalreporter.write_line(f"{sum(seconds.values()):7.0f}  in all")
