"""The model that most tests of the drop-ins train."""

from typing import Any

import pytest
from tests.support.models import MakeModel
from tests.training.test_exactness import adapted


@pytest.fixture
def model(make_model: MakeModel) -> Any:
    return adapted(make_model, "llama, grouped heads, own head")
