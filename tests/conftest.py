import importlib.util
import os
import signal
from collections.abc import Callable, Generator, Iterator

import pytest
import torch

# The tensors of the tests are small: a second thread costs more than it brings, and the processes of
# pytest-xdist would take each other's cores.
torch.set_num_threads(1)

# Without a GPU the Triton kernels run in triton's interpreter. Before anything imports triton, whose functions are
# interpreted or compiled for good.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import settings

    # The same examples in every run, and no deadline: the first call of an op pays for its set-up.
    settings.register_profile("project", derandomize=True, deadline=None, database=None)
    settings.load_profile("project")


def pytest_addoption(parser: pytest.Parser) -> None:
    if importlib.util.find_spec("pytest_timeout") is None:
        parser.addini(
            "timeout", "without the plugin (on a bare machine with a GPU) the setting is known and void"
        )


@pytest.fixture(autouse=True)
def _same_random_numbers_in_any_order() -> None:
    torch.manual_seed(0)


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[], None]]:
    """Press Ctrl-C; the test runner's own handling is put back."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Under CI a browser test that is skipped has failed: nobody would see that it never ran."""
    report = yield
    skipped = report.skipped and not hasattr(report, "wasxfail")
    if skipped and item.get_closest_marker("browser") and os.environ.get("CI") == "true":
        report.outcome = "failed"
        report.longrepr = f"skipped under CI, where browser tests must run: {report.longrepr}"
    return report
