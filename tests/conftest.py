"""Fixtures that several test files share."""

from __future__ import annotations

import pytest

from datamodules.toy_world.questions import write_tokenizer
from datamodules.toy_world.release import Settings, generate


@pytest.fixture(scope="session")
def toy_settings():
    """A generated world small enough for tests; the nine training takes hold every planted defect."""
    counts = {"train_takes": 9, "val_takes": 2, "initialisation_takes": 6, "practice_takes": 4, "benchmark_takes": 8}
    return Settings(**counts, frame_counter=True)


@pytest.fixture(scope="session")
def toy_world(toy_settings, tmp_path_factory):
    """Folder of the world, made once per session: read it, or copy it and change the copy."""
    root = tmp_path_factory.mktemp("data") / "toy"
    generate(root, toy_settings, workers=2)
    return root


@pytest.fixture(scope="session")
def toy_tokenizer(tmp_path_factory):
    """Folder of the generated world's tokenizer, without the world."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder
