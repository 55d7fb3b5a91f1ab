"""One Prefect server for all tests of the flows, in a temporary home."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

import flows  # noqa: F401  (before prefect: it says what this project wants of Prefect's settings)

if TYPE_CHECKING:
    from pipelines.recipe import Recipe


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A server over a temporary database; without the heartbeat, which costs a second a flow, and without events: the
    thread that sends them lives on in this process, and its connection draws from `random` beside other tests."""
    from prefect.events.clients import NullEventsClient
    from prefect.events.worker import EventsWorker
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, PREFECT_HOME, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    home = tmp_path_factory.mktemp("prefect-home")
    EventsWorker.set_client_override(NullEventsClient)
    with (
        temporary_settings({PREFECT_HOME: home, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),
        prefect_test_harness(server_startup_timeout=120),
    ):
        yield
    EventsWorker.set_client_override(None)


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory: pytest.TempPathFactory, make_recipe: Callable[..., "Recipe"]) -> Callable[..., str]:
    """The recipe of `make_recipe` as a file, without a `train` section."""

    def write(*overrides: str) -> str:
        file: Path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
        file.write_text(yaml.safe_dump(make_recipe(*overrides).resolved()))
        return str(file)

    return write
