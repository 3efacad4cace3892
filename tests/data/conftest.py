"""What the tests of data share."""

import pytest

from swlora.hub import OFFLINE_VARIABLES


@pytest.fixture
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources as they are for a user who set nothing."""
    for name in ("SWLORA_E2E", *OFFLINE_VARIABLES):
        monkeypatch.delenv(name, raising=False)
