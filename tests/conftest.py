"""Set-up of the whole suite: shapes are checked at run time, random tests are the same on every run."""

import gc
import multiprocessing
import os
import signal
from types import SimpleNamespace

import jaxtyping

from tests.helpers.checked_shapes import only_with_shapes

# Before anything imports optprune: every shape in an annotation becomes an assertion.
jaxtyping.jaxtyped = only_with_shapes(jaxtyping.jaxtyped)
jaxtyping.install_import_hook(
    [
        "optprune.metric",
        "optprune.moments",
        "optprune.patterns",
        "optprune.problems",
        "optprune.solvers",
    ],
    "beartype.beartype",
)

# Before anything imports onnxruntime, which would write into the home directory.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, Phase, settings  # noqa: E402

SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=30, print_blob=True, suppress_health_check=SLOW_IS_FINE
)
settings.register_profile(
    "thorough", deadline=None, max_examples=1000, print_blob=True, suppress_health_check=SLOW_IS_FINE
)
# For planted faults: whether a test fails, and not by which least example.
settings.register_profile("unshrunk", settings.get_profile("ci"), phases=(Phase.explicit, Phase.reuse, Phase.generate))
settings.load_profile(os.environ.get("OPTPRUNE_HYPOTHESIS", "ci"))

# Matrices here are tiny: on a shared machine a second thread makes each factorisation several times slower. `make
# test-kernels` asks for one all the same.
torch.set_num_threads(int(os.environ.get("OPTPRUNE_THREADS", "1")))


def pytest_configure(config):
    """The device of the tests, which OPTPRUNE_TEST_DEVICE names: cpu, cuda, or one that is pretended on the CPU."""
    from optprune.errors import InputError
    from optprune.testing.strategies import VARIABLE, chosen_device
    from tests.helpers.pretend import NAME, set_up
    from tests.helpers.processor import ProcessorTime

    config.pluginmanager.register(ProcessorTime())
    # A background job of a shell ignores SIGINT, and optprune leaves it ignored.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.environ.get(VARIABLE) == NAME:
        set_up()
    try:
        chosen_device()
    except InputError as error:
        raise pytest.UsageError(str(error)) from None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark what only `make test-e2e` runs, before `-m` selects."""
    from tests.helpers.split import ROOMS, names_of, split

    if any(item.path.parent.name in ROOMS for item in items):
        split(items, names_of())


def pytest_collection_finish():
    """Leave modules and tests out of garbage collection, which would go through all of them every time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def warnings_are_errors_in_other_processes():
    """As pytest makes them here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONWARNINGS", "error")
        yield


@pytest.fixture(scope="session")
def reloads(warnings_are_errors_in_other_processes):
    from tests.helpers.warm_reloads import WarmReloads

    reloads = WarmReloads()
    yield reloads
    reloads.close()


@pytest.fixture(scope="session", autouse=True)
def the_reload_check_need_not_import_each_time(reloads):
    """But where the process is the subject, and in processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optprune.export.check.run_alongside", reloads)
        yield


@pytest.fixture(scope="session", autouse=True)
def workers_need_not_import_each_time(warnings_are_errors_in_other_processes):
    """Fork the workers of runs from a process with their imports, but in processes that tests start."""
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(["optprune.pruning.workers", "transformers.models.llama.modeling_llama"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optprune.pruning.workers.multiprocessing", SimpleNamespace(get_context=lambda _: forking))
        yield


@pytest.fixture
def real_reload_check(monkeypatch):
    """The reload check in a process that begins with nothing, as users have it."""
    from tests.helpers.warm_reloads import START

    monkeypatch.setattr("optprune.export.check.run_alongside", START)


@pytest.fixture
def as_users_run():
    """Without the run-time check of shapes, which would come before optprune's own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def attempted_model(tmp_path_factory):
    from tests.helpers.tiny_models import save_tiny, tiny_llama

    return save_tiny(tiny_llama(), tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def attempted_text(tmp_path_factory):
    from optprune.texts import demo_articles

    file = tmp_path_factory.mktemp("texts") / "articles.txt"
    file.write_text("\n\n".join(demo_articles("calibration")[:5]), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def demo():
    """The demo's model, which takes ten seconds to load: tests change copies."""
    import optprune

    return optprune.load_model("demo")


@pytest.fixture(scope="session")
def pruned_demo(tmp_path_factory):
    """The demo's model as recipes prune it, which takes minutes a recipe."""
    from tests.helpers.pruned_demo import PrunedDemo

    return PrunedDemo(tmp_path_factory.mktemp("pruned"))


@pytest.fixture(scope="session")
def torture(tmp_path_factory, warnings_are_errors_in_other_processes):
    """Small models, texts and runs, and a process that is forked for each command: fifteen seconds."""
    from tests.helpers.torture.suite import Suite

    suite = Suite(tmp_path_factory.mktemp("torture"))
    yield suite
    suite.close()


@pytest.fixture(scope="session")
def killing(torture):
    """Commands that are ended at a moment."""
    from tests.helpers.torture.killing import Killing

    return Killing(torture.folder / "kills", torture.stock, torture.children)


@pytest.fixture(scope="session")
def damaging(killing):
    """Runs that were killed, of which copies are damaged."""
    from tests.helpers.torture.damages import Damaging

    return Damaging(killing)


@pytest.fixture
def attempt(attempted_model, attempted_text, tmp_path, capsys):
    """A prune command that would work."""
    from tests.helpers.attempts import Attempt

    return Attempt(attempted_model, attempted_text, tmp_path, capsys)


@pytest.fixture
def no_weights(monkeypatch):
    """Loading weights is a failure: what is tested must be found before."""

    def load(*_, **__):
        pytest.fail("the weights were loaded before the cheap checks")

    monkeypatch.setattr("optprune.models.load_model", load)
