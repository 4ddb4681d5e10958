"""Toy bundles, made once per test run."""

from pathlib import Path

import pytest
from toy_bundle import Toy, build_toy, toy_object


@pytest.fixture(scope="session")
def toy_kernels_x86(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_object("x86_64", tmp_path_factory.mktemp("objects"))


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory, toy_kernels_x86: Path) -> Toy:
    """A bundle for this machine."""
    return build_toy(tmp_path_factory.mktemp("toy") / "toy", toy_kernels_x86, "x86_64")


@pytest.fixture(scope="session")
def other_toy(tmp_path_factory: pytest.TempPathFactory, toy_kernels_x86: Path) -> Toy:
    """A second one, with other weights and a library of its own."""
    folder = tmp_path_factory.mktemp("other") / "other"
    return build_toy(folder, toy_kernels_x86, "x86_64", name="other", seed=1)


@pytest.fixture(scope="session")
def arm_toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """The same bundle as `toy`, for arm64."""
    objects = tmp_path_factory.mktemp("arm-objects")
    return build_toy(objects / "toy", toy_object("aarch64", objects), "aarch64")
