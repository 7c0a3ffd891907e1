import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subliminal_theory.channel import SquaredError
from subliminal_theory.distill import distill
from subliminal_theory.errors import InputError
from subliminal_theory.model import Model
from subliminal_theory.source import Buckets, Examples, batch_shapes, epoch_order, with_batch

epoch_order_jit = jax.jit(epoch_order, static_argnums=(1, 2, 3))
SHAPES = [(12, 4), (10, 4), (3, 5), (1, 1)]  # divisible, a rest, less than a batch, one example


@pytest.mark.slow
@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.sampled_from(SHAPES))
def test_epoch_order_visits_every_example_once(seed: int, shape: tuple[int, int]) -> None:
    examples, batch_size = shape
    per_epoch = -(-examples // batch_size)
    index, weights = epoch_order_jit(jax.random.key(seed), examples, batch_size, 3 * per_epoch)
    assert index.shape == weights.shape == (3 * per_epoch, batch_size)
    assert set(np.unique(weights)) <= {0, 1}
    for epoch in range(3):
        steps = slice(epoch * per_epoch, (epoch + 1) * per_epoch)
        seen = np.asarray(index[steps])[np.asarray(weights[steps]) > 0]
        assert sorted(seen) == list(range(examples))
        assert np.asarray(weights[steps])[:-1].all()  # only the last batch is padded,
        assert (np.diff(weights[steps][-1]) <= 0).all()  # at its end


@pytest.mark.slow
def test_epoch_order_is_of_the_key() -> None:
    first, _ = epoch_order_jit(jax.random.key(0), 50, 10, 10)
    again, _ = epoch_order_jit(jax.random.key(0), 50, 10, 10)
    other, _ = epoch_order_jit(jax.random.key(1), 50, 10, 10)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first[:5] != first[5:]).any()


@pytest.mark.slow
def test_epoch_order_prefix() -> None:
    """A longer run begins as a shorter one does."""
    long = epoch_order_jit(jax.random.key(0), 10, 4, 8)
    for steps in (1, 5):
        for a, b in zip(epoch_order_jit(jax.random.key(0), 10, 4, steps), long, strict=True):
            np.testing.assert_array_equal(a, b[:steps])


def test_epoch_order_is_uniform() -> None:
    """Each of 3 examples comes first in about a third of 3,000 epochs (5 standard errors)."""
    index, _ = epoch_order_jit(jax.random.key(0), 3, 3, 3000)
    counts = np.bincount(index[:, 0], minlength=3)
    assert (abs(counts - 1000) < 5 * np.sqrt(3000 * 2 / 9)).all()


@pytest.mark.slow
def test_examples_gather() -> None:
    inputs = {"a": np.arange(10), "b": np.arange(20).reshape(10, 2)}
    source = Examples(inputs, 4, labels=np.arange(10) * 3, targets=np.arange(10) * 5, prepare=lambda x: x["b"] / 2)
    index, weights = source.schedule(jax.random.key(0), 3)
    for step in range(3):
        batch = source.batch(jax.random.key(0), (index[step], weights[step]))
        chosen = np.asarray(index[step])
        np.testing.assert_array_equal(batch.inputs, inputs["b"][chosen] / 2)
        np.testing.assert_array_equal(batch.labels, chosen * 3)
        np.testing.assert_array_equal(batch.targets, chosen * 5)
        np.testing.assert_array_equal(batch.weights, weights[step])


@pytest.mark.slow
def test_without_labels() -> None:
    source = Examples(np.arange(10), 4, labels=np.arange(10), targets=np.arange(10))
    student = source.without_labels()
    for a, b in zip(student.schedule(jax.random.key(0), 5), source.schedule(jax.random.key(0), 5), strict=True):
        np.testing.assert_array_equal(a, b)
    entry = (jnp.arange(4), jnp.ones(4))
    assert student.batch(jax.random.key(0), entry).labels is None
    np.testing.assert_array_equal(student.batch(jax.random.key(0), entry).targets, np.arange(4))
    np.testing.assert_array_equal(source.batch(jax.random.key(0), entry).labels, np.arange(4))


@pytest.mark.parametrize("batch_size", [0, -3])
def test_bad_batch_size(batch_size: int) -> None:
    with pytest.raises(InputError, match=f"^Examples: batch_size must be at least 1, got {batch_size}$"):
        Examples(np.zeros(3), batch_size)


@pytest.mark.parametrize(
    "arguments",
    [
        {"inputs": np.zeros(3), "labels": np.zeros(4)},
        {"inputs": np.zeros((3, 2)), "targets": np.zeros(4)},
        {"inputs": (np.zeros(3), np.zeros(4))},
    ],
)
def test_different_numbers(arguments) -> None:
    with pytest.raises(
        InputError, match=r"^Examples: inputs, labels, targets and positions differ in number: \[3, 4\]$"
    ):
        Examples(**arguments, batch_size=1)


def test_no_examples() -> None:
    with pytest.raises(InputError, match="no example"):
        Examples(np.zeros((0, 4)), 2)


# --- weights of positions

POSITIONS = np.random.default_rng(0).uniform(0.5, 1, (10, 3)).astype(np.float32)


def test_positions_weigh() -> None:
    source = Examples(np.arange(10), 4, positions=POSITIONS)
    index, rows = source.schedule(jax.random.key(0), 3)
    for step in range(3):
        batch = source.batch(jax.random.key(0), (index[step], rows[step]))
        by_hand = np.stack(
            [
                weight * POSITIONS[row]
                for row, weight in zip(*map(np.asarray, (index[step], rows[step])), strict=True)
            ]
        )
        np.testing.assert_array_equal(batch.weights, by_hand)
        np.testing.assert_array_equal(batch.inputs, index[step])
    assert batch.weights[:2].all()
    np.testing.assert_array_equal(batch.weights[2:], np.zeros((2, 3)))  # 10 = 4 + 4 + 2


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(), (3,), (3, 2)])
def test_positions_of_any_rank(shape: tuple[int, ...]) -> None:
    positions = np.arange(2.0, 4.0).reshape(2, *[1] * len(shape)) * np.ones(shape)
    source = Examples(np.zeros(2), 2, positions=positions)
    batch = source.batch(jax.random.key(0), (jnp.array([1, 0]), jnp.array([0.5, 1.0])))
    assert batch.weights.shape == (2, *shape)
    np.testing.assert_array_equal(batch.weights.reshape(2, -1)[:, 0], [1.5, 2.0])


def test_positions_under_vmap() -> None:
    """Each of an ensemble weighs by its own positions; the batch size says how many rows of each."""
    stacked = np.stack([POSITIONS, 2 * POSITIONS])
    sources = Examples(np.zeros((2, 10, 5)), 4, positions=stacked)
    keys = jnp.stack([jax.random.key(0), jax.random.key(1)])

    def last(source: Examples, key: jax.Array):
        index, weights = (leaf[2] for leaf in source.schedule(key, 3))
        return index, source.batch(key, (index, weights)).weights

    indices, weights = jax.jit(jax.vmap(last))(sources, keys)
    for index, found, own in zip(indices, weights, stacked, strict=True):
        np.testing.assert_array_equal(found, np.array([1, 1, 0, 0])[:, None] * own[index])


def test_positions_stay_with_a_student() -> None:
    student = Examples(np.arange(10), 4, labels=np.arange(10), positions=POSITIONS).without_labels()
    batch = student.batch(jax.random.key(0), (jnp.arange(4), jnp.ones(4)))
    np.testing.assert_array_equal(batch.weights, POSITIONS[:4])


def test_another_number_of_positions() -> None:
    with pytest.raises(
        InputError, match=r"^Examples: inputs, labels, targets and positions differ in number: \[9, 10\]$"
    ):
        Examples(np.zeros(9), 2, positions=POSITIONS)


# --- buckets


def rows(counts: tuple[int, ...], batch_size: int) -> Buckets:
    """Parts of different widths; every row holds its own number."""
    numbers = np.split(np.arange(sum(counts), dtype=np.float32), np.cumsum(counts)[:-1])
    return Buckets(
        tuple(
            Examples(np.repeat(own[:, None], width, 1), batch_size, targets=own, positions=np.ones(len(own)))
            for width, own in enumerate(numbers, 2)
        )
    )


@pytest.mark.slow
@settings(max_examples=20)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.sampled_from((1, 5, 9)), min_size=1, max_size=3),  # few shapes: each is compiled
    st.sampled_from((1, 4)),
)
def test_an_epoch_of_buckets_has_every_row_once(seed: int, counts: list[int], batch_size: int) -> None:
    source, key = rows(tuple(counts), batch_size), jax.random.key(seed)
    per_epoch = sum(-(-count // batch_size) for count in counts)
    which, index, weights = source.schedule(key, 2 * per_epoch)
    for epoch in range(2):
        seen = []
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            batch = source.parts[int(which[step])].batch(key, (index[step], weights[step]))
            seen += np.asarray(batch.targets)[np.asarray(batch.weights) > 0].tolist()
        assert sorted(seen) == list(range(sum(counts)))


@pytest.mark.slow
def test_buckets_are_mixed() -> None:
    source = rows((40, 40), 4)
    orders = [np.asarray(source.schedule(jax.random.key(seed), 40)[0]) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(orders[0], orders[1])
    assert (orders[0] != orders[2]).any()
    assert (orders[0][:20] != orders[0][20:]).any()
    assert len(set(orders[0][:5].tolist())) == 2


@pytest.mark.slow
def test_a_step_computes_in_the_shape_of_its_part() -> None:
    source, key = rows((3, 5), 2), jax.random.key(0)
    widths = []

    def use(batch) -> jax.Array:
        widths.append(batch.inputs.shape)
        return jnp.sum(batch.inputs * batch.weights[:, None])

    @jax.jit
    def sums(source, key):
        return jax.lax.map(lambda entry: with_batch(source, key, entry, use), source.schedule(key, 5))

    found = sums(source, key)
    assert sorted(set(widths)) == [(2, 2), (2, 3)]
    np.testing.assert_allclose(found.sum(), 2 * (0 + 1 + 2) + 3 * (3 + 4 + 5 + 6 + 7))
    assert batch_shapes(source).inputs.shape == (2, 3)


@pytest.mark.slow
def test_a_run_over_buckets() -> None:
    """Losses of an epoch, each of the rows of one batch by hand."""
    source = rows((2, 3), 2)
    student = Model(lambda params, x: (params * x).mean(1, keepdims=True), jnp.float32(0.5))
    targeted = Buckets(
        tuple(Examples(p.inputs, 2, targets=p.targets[:, None], positions=p.positions) for p in source.parts)
    )
    run = jax.jit(lambda s: distill(s, None, SquaredError(), targeted, optax.sgd(0.0), 3, key=jax.random.key(0)))(
        student
    )
    short = np.mean([(0.5 * x) ** 2 for x in (0, 1)])
    # The longer part has a batch of two rows and one of the row that is left.
    batches = [
        sorted([short, np.mean([(0.5 * x) ** 2 for x in (2, 3, 4) if x != alone]), (0.5 * alone) ** 2])
        for alone in (2, 3, 4)
    ]
    assert any(np.allclose(np.sort(run.losses), expected) for expected in batches)


def test_buckets_refused() -> None:
    with pytest.raises(InputError, match=r"^Buckets: give parts of one batch size, got none$"):
        Buckets(())
    with pytest.raises(InputError, match=r"^Buckets: give parts of one batch size, got \[2, 3\]$"):
        Buckets((Examples(np.zeros((4, 1)), 2), Examples(np.zeros((4, 1)), 3)))
    with pytest.raises(InputError, match=r"^Buckets: some parts have labels and some have none$"):
        Buckets((Examples(np.zeros((4, 1)), 2), Examples(np.zeros((4, 1)), 2, labels=np.zeros(4))))
