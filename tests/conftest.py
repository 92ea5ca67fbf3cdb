"""Set-up that every test shares: the same threads and seed everywhere, the real model, the shared data."""

from pathlib import Path

import pytest
import setuptools  # noqa: F401  # inductor does so in a test, where a warning would break it half-way
import torch

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data():
    """The folder of data beside the repository; most checkouts have none."""
    folder = Path(__file__).parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no shared data in {folder}")
    return folder


@pytest.fixture(scope="session")
def smollm2():
    """The real model and its tokenizer, loaded once. Deep-copy the model before changing it: this is checked."""
    from secateur.models.load import load

    model, tokenizer = load("smollm2", dtype="float32")  # bf16 is emulated on many processors
    before = _fingerprint(model)
    yield model, tokenizer
    assert _fingerprint(model) == before, "a test has changed the model that all tests share"


@pytest.fixture(scope="session")
def refuser(tmp_path_factory):
    """A tiny chat model that refuses what has a marker word in it, with prompts and a text in its words."""
    import refusing

    return refusing.ground(tmp_path_factory.mktemp("refuser"))


def _fingerprint(model):
    return [p.detach().abs().sum(dtype=torch.float32).item() for p in model.parameters()]
