"""What every test starts from: one thread, and a work folder that is not the learner's."""

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
