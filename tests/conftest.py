"""Fixtures. `--device cuda` runs the tests that take `device`, on GPU tensors, and no others; the default is cpu."""

import inspect
import time

import garbage
import progress
import pytest
import ranks


def pytest_addoption(parser):
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where the tensors of the ops live")
    parser.addoption("--fault-table", help="where test_fault_table.py leaves what it has observed (JSON)")


def pytest_configure(config):
    config.addinivalue_line("markers", "preload(*modules): what its ranks import, and takes seconds")
    config.addinivalue_line("markers", "packaging: builds a wheel of the project")
    config.addinivalue_line("markers", "cuda: has no meaning on the CPU")
    progress.watch(config)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--device") == "cpu":
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs --device cuda"))
        return
    other = [item for item in items if "device" not in inspect.signature(item.function).parameters]
    config.hook.pytest_deselected(items=other)
    items[:] = [item for item in items if item not in other]


def pytest_collection_finish(session):
    garbage.begin()
    if session.config.getoption("--device") == "cuda":
        return  # what is imported may look for GPUs, which a process that is forked from it could not use any more
    marks = [mark for item in session.items for mark in item.iter_markers("preload")]
    ranks.preload(*dict.fromkeys(module for mark in marks for module in mark.args))


def pytest_generate_tests(metafunc):
    # A backend is named after the device it serves; `reference` serves any.
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", [metafunc.config.getoption("--device"), "reference"])


@pytest.fixture(scope="session")
def device(request) -> str:
    return request.config.getoption("--device")


@pytest.fixture(scope="session")
def pools(device):
    """pools(world_size): the pool that tests of this world size share; a new one when the last one lost a rank."""
    made = {}

    def get(world_size: int) -> ranks.Pool:
        if world_size not in made or not made[world_size].alive:
            if world_size in made:
                made[world_size].close()
            made[world_size] = ranks.Pool(world_size, device)
        return made[world_size]

    yield get
    for pool in made.values():
        pool.close()


@pytest.fixture(scope="module")
def kept(request):
    """A folder for what follows from its name alone, and takes long to make: one that is not touched is deleted."""
    begin, folder = time.time(), request.config.cache.mkdir(request.module.__name__)
    yield folder
    for path in folder.iterdir():
        if path.stat().st_mtime < begin:
            path.unlink(missing_ok=True)


@pytest.fixture
def pool(pools, world_size):
    return pools(world_size)


@pytest.fixture
def fresh_pool(device, world_size):
    """A pool for one test: for those that kill, stop or confuse ranks."""
    with ranks.Pool(world_size, device) as made:
        yield made
