"""Lives are made once per session, and only the wanted ones: training takes a fifth of a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from life.lives import Life


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Life]:
    from life.lives import live

    made: dict[str, Life] = {}

    def get(name: str) -> Life:
        if name not in made:
            made[name] = live(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture
def life(request: pytest.FixtureRequest, lived: Callable[[str], Life]) -> Life:
    return lived(request.param)
