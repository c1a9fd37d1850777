import pytest

from browser import Browser, missing


@pytest.fixture(scope="module")
def browser():
    if reason := missing():
        pytest.skip(reason)
    one = Browser()
    yield one
    one.close()
