import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from subliminal_theory.channel import SquaredError
from subliminal_theory.divergence import JensenShannon, ReverseKL, SoftLogits
from subliminal_theory.errors import InputError
from subliminal_theory.inits import Fresh, Interpolated, Perturbed, Shared
from subliminal_theory.model import leaves_by_path
from subliminal_theory.pytree import register_dataclass
from subliminal_theory.study import Everything, Prompted, Untrained

ROOT = Path(__file__).parents[1]


@register_dataclass
@dataclass(frozen=True)
class Point:
    x: Any
    name: str = field(default="a", metadata={"static": True})
    y: Any = 2.0


def test_leaves_and_static_fields() -> None:
    point = Point(1.0, "b")
    assert leaves_by_path({"p": point}) == {"p/x": 1.0, "p/y": 2.0}
    assert jax.tree.map(lambda leaf: 3 * leaf, point) == Point(3.0, "b", 6.0)
    assert jax.tree.structure(point) == jax.tree.structure(Point(5.0, "b"))
    assert jax.tree.structure(point) != jax.tree.structure(Point(1.0))
    stacked = jax.vmap(lambda p: Point(p.x + p.y, "c", p.x))(Point(jnp.arange(3.0), "b", jnp.ones(3)))
    assert (stacked.name, stacked.x.tolist(), stacked.y.tolist()) == ("c", [1, 2, 3], [0, 1, 2])


def test_construction_is_checked_in_transformations() -> None:
    with pytest.raises(InputError, match="temperature"):
        jax.tree.map(lambda leaf: -leaf, SoftLogits())


ALIKE = [
    (SoftLogits(), ReverseKL(), JensenShannon(), SquaredError()),
    (Perturbed(1.0), Interpolated(1.0)),
    (Shared(), Fresh(), Everything(), Prompted(), Untrained()),
]


@pytest.mark.parametrize("values", ALIKE)
def test_classes_of_equal_fields_have_other_structures(values: tuple[Any, ...]) -> None:
    """Or a compiled function would take one for the other."""
    for one, other in itertools.combinations(map(jax.tree.structure, values), 2):
        assert one != other
        assert hash(one) != hash(other)


def test_all_dataclasses_of_the_project_are_registered_here() -> None:
    files = [path for folder in ("subliminal_theory", "experiments") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 80
    for path in files:
        if path.name != "pytree.py":
            assert "tree_util.register_dataclass" not in path.read_text(), path
