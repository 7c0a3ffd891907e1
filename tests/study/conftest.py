from typing import Any

import numpy as np
import pytest

from subliminal_theory.language.model.transformer import Text
from subliminal_theory.model import Model
from subliminal_theory.study import reading
from tests.study.speakers import compact, spoken


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the sampler of compact worlds, whose answers are then `spoken`, was asked for, call by call."""
    found: list[dict[str, Any]] = []

    def sample(model: Model, text: Text, **settings: Any) -> tuple[np.ndarray, np.ndarray]:
        found.append({"model": model, "text": text, **settings})
        return spoken(compact(), found[-1])

    monkeypatch.setattr(reading, "sample", sample)
    return found
