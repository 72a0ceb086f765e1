"""What every test starts from: one thread, and a work folder that is not the learner's."""

from functools import cache
from importlib import import_module

import pytest
import torch

torch.set_num_threads(1)  # two workers, two cores


@pytest.fixture(autouse=True, scope="session")
def work_folder(tmp_path_factory):
    """Progress of tests goes to a temporary folder, as that of notebooks does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIMISTRAL_WORK", str(tmp_path_factory.mktemp("work")))
        patch.setenv("MINIMISTRAL_TESTING", "1")
        yield


@pytest.fixture(autouse=True)
def nothing_passed_before(tmp_path_factory, monkeypatch):
    """Each test begins as a new learner: what another one passed or saved is not there."""
    fresh = cache(lambda: tmp_path_factory.mktemp("learner"))
    module = import_module("minimistral.course.progress")  # the package's `progress` is a function
    monkeypatch.setattr(module, "_temporary_folder", fresh)
