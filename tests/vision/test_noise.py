import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from subliminal_theory.errors import InputError
from subliminal_theory.vision.noise import UniformNoise

KEY = jax.random.key(3)


def batch(source: UniformNoise, numbers, key=KEY) -> np.ndarray:
    numbers = jnp.asarray(numbers)
    return np.asarray(make(source, key, numbers))


@jax.jit
def make(source: UniformNoise, key, numbers):
    return source.batch(key, (numbers, jnp.ones(numbers.shape))).inputs


def pixels(bits: int) -> np.ndarray:
    return batch(UniformNoise((28, 28), 100, bits=bits), np.arange(100)).ravel()


@pytest.mark.parametrize("bits", [8, 32])
def test_image_depends_on_key_and_number_only(bits: int) -> None:
    shape = (4, 3)
    wide = batch(UniformNoise(shape, 8, images=8, bits=bits), np.arange(8))
    assert wide.shape == (8, *shape)
    assert wide.dtype == np.float32
    source = UniformNoise(shape, 3, images=1000 if bits == 8 else None, bits=bits)
    np.testing.assert_array_equal(batch(source, [5, 0, 5]), wide[[5, 0, 5]])
    np.testing.assert_array_equal(jax.jit(source.image)(KEY, jnp.asarray(6)), wide[6])
    assert len(np.unique(wide.reshape(8, -1), axis=0)) == 8
    other = UniformNoise(shape, 8, images=8, bits=bits)
    assert (batch(other, np.arange(8), jax.random.key(4)) != wide).any((1, 2)).all()


@pytest.mark.parametrize("bits", [8, 32])
def test_pixels_are_uniform(bits: int) -> None:
    x = pixels(bits).astype(float)
    assert -1 <= x.min() < -0.99
    assert 0.99 < x.max() < 1
    step = 2 / 256 if bits == 8 else 0  # a grid of this step lies half a step low and is a little narrower
    mean, variance = -step / 2, (1 - (step / 2) ** 2) / 3
    assert abs(x.mean() - mean) < 4 * np.sqrt(variance / x.size)
    assert abs(x.var() - variance) < 4 * np.sqrt((1 / 5 - 1 / 9) / x.size)
    counts = np.histogram(x, 64, (-1, 1))[0]
    assert stats.chisquare(counts).pvalue > 1e-3


def test_pixels_are_independent() -> None:
    images = batch(UniformNoise((28, 28), 100), np.arange(100)).reshape(100, -1)
    bound = 4 / np.sqrt(images.size)
    assert abs(np.corrcoef(images[:-1].ravel(), images[1:].ravel())[0, 1]) < bound
    assert abs(np.corrcoef(images[:, :-1].ravel(), images[:, 1:].ravel())[0, 1]) < bound


def test_eight_bit_levels() -> None:
    levels = (pixels(8).astype(float) + 1) * 128
    np.testing.assert_array_equal(np.unique(levels), np.arange(256))


def test_full_resolution() -> None:
    assert len(np.unique(pixels(32))) > 0.98 * 78_400


def test_never_repeating() -> None:
    source = UniformNoise((5,), 4)
    numbers, weights = source.schedule(KEY, 6)
    np.testing.assert_array_equal(numbers, np.arange(24).reshape(6, 4))
    np.testing.assert_array_equal(weights, np.ones((6, 4)))
    images = np.concatenate([batch(source, row) for row in numbers])
    assert len(np.unique(images, axis=0)) == 24


def test_fixed_set_is_permuted_each_epoch() -> None:
    source = UniformNoise((5,), 4, images=10)
    numbers, weights = source.schedule(KEY, 9)
    epochs = []
    for epoch in range(3):
        steps = slice(3 * epoch, 3 * epoch + 3)
        shown = np.asarray(numbers[steps])[np.asarray(weights[steps]) > 0]
        assert sorted(shown) == list(range(10))
        epochs.append(shown.tolist())
    assert epochs[0] != epochs[1] != epochs[2]
    again, _ = source.schedule(KEY, 9)
    np.testing.assert_array_equal(again, numbers)
    made = source.batch(KEY, (numbers[2], weights[2]))
    np.testing.assert_array_equal(made.weights, [1, 1, 0, 0])
    assert made.labels is None
    assert made.targets is None


@pytest.mark.parametrize("bits", [0, 1, 16, 64])
def test_bad_bits(bits: int) -> None:
    with pytest.raises(InputError, match=f"^UniformNoise: bits must be 8 or 32, got {bits}$"):
        UniformNoise((4,), 2, bits=bits)


@pytest.mark.parametrize(("images", "batch_size"), [(0, 2), (-1, 2), (5, 0), (None, -1)])
def test_bad_counts(images: int | None, batch_size: int) -> None:
    expected = f"^UniformNoise: images and batch_size must be at least 1, got {images}, {batch_size}$"
    with pytest.raises(InputError, match=expected):
        UniformNoise((4,), batch_size, images=images)
