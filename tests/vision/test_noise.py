import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from subliminal_theory.errors import InputError
from subliminal_theory.vision.noise import LAWS, NoiseImages

KEY = jax.random.key(3)


def batch(source: NoiseImages, numbers, key=KEY) -> np.ndarray:
    numbers = jnp.asarray(numbers)
    return np.asarray(make(source, key, numbers))


@jax.jit
def make(source: NoiseImages, key, numbers):
    return source.batch(key, (numbers, jnp.ones(numbers.shape))).inputs


def pixels(law: str) -> np.ndarray:
    return batch(NoiseImages((28, 28), 100, law=law), np.arange(100)).ravel()


@pytest.mark.slow
@pytest.mark.parametrize("law", ["uniform", "uniform_8bit"])
def test_image_depends_on_key_and_number_only(law: str) -> None:
    shape = (4, 3)
    wide = batch(NoiseImages(shape, 8, images=8, law=law), np.arange(8))
    assert wide.shape == (8, *shape)
    assert wide.dtype == np.float32
    source = NoiseImages(shape, 3, images=1000 if law == "uniform_8bit" else None, law=law)
    np.testing.assert_array_equal(batch(source, [5, 0, 5]), wide[[5, 0, 5]])
    np.testing.assert_array_equal(jax.jit(source.image)(KEY, jnp.asarray(6)), wide[6])
    assert len(np.unique(wide.reshape(8, -1), axis=0)) == 8
    other = NoiseImages(shape, 8, images=8, law=law)
    assert (batch(other, np.arange(8), jax.random.key(4)) != wide).any((1, 2)).all()


@pytest.mark.parametrize("law", ["uniform", "uniform_8bit"])
def test_pixels_are_uniform(law: str) -> None:
    x = pixels(law).astype(float)
    assert -1 <= x.min() < -0.99
    assert 0.99 < x.max() < 1
    step = (
        2 / 256 if law == "uniform_8bit" else 0
    )  # a grid of this step lies half a step low and is a little narrower
    mean, variance = -step / 2, (1 - (step / 2) ** 2) / 3
    assert abs(x.mean() - mean) < 4 * np.sqrt(variance / x.size)
    assert abs(x.var() - variance) < 4 * np.sqrt((1 / 5 - 1 / 9) / x.size)
    counts = np.histogram(x, 64, (-1, 1))[0]
    assert stats.chisquare(counts).pvalue > 1e-3


def test_pixels_are_independent() -> None:
    images = batch(NoiseImages((28, 28), 100), np.arange(100)).reshape(100, -1)
    bound = 4 / np.sqrt(images.size)
    assert abs(np.corrcoef(images[:-1].ravel(), images[1:].ravel())[0, 1]) < bound
    assert abs(np.corrcoef(images[:, :-1].ravel(), images[:, 1:].ravel())[0, 1]) < bound


def test_eight_bit_levels() -> None:
    levels = (pixels("uniform_8bit").astype(float) + 1) * 128
    np.testing.assert_array_equal(np.unique(levels), np.arange(256))


def test_full_resolution() -> None:
    assert len(np.unique(pixels("uniform"))) > 0.98 * 78_400


def test_never_repeating() -> None:
    source = NoiseImages((5,), 4)
    numbers, weights = source.schedule(KEY, 6)
    np.testing.assert_array_equal(numbers, np.arange(24).reshape(6, 4))
    np.testing.assert_array_equal(weights, np.ones((6, 4)))
    images = np.concatenate([batch(source, row) for row in numbers])
    assert len(np.unique(images, axis=0)) == 24


def test_fixed_set_is_permuted_each_epoch() -> None:
    source = NoiseImages((5,), 4, images=10)
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


def test_unknown_law() -> None:
    with pytest.raises(InputError, match=r"^NoiseImages: unknown law 'pink'; there are uniform, uniform_8bit, "):
        NoiseImages((4,), 2, law="pink")


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
def test_every_law_has_the_mean_and_variance_of_the_uniform(law: str) -> None:
    x = batch(NoiseImages((28, 28), 400, law=law), np.arange(400)).reshape(400, -1).astype(float)
    # As many independent pixels as an image has at least: 49 blocks.
    assert abs(x.mean()) < 4 * np.sqrt(1 / 3 / (400 * 49)) + 1 / 256
    assert abs(x.var() - 1 / 3) < 4 * np.sqrt(2 / 9 / (400 * 49)) + 1e-4


def test_blocks() -> None:
    images = batch(NoiseImages((10, 9), 50, law="blocks"), np.arange(50))
    for row, column in np.ndindex(3, 3):
        block = images[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        assert (block == block[:, :1, :1]).all()
    assert len(np.unique(images)) == 50 * 9


def test_blurred_pixels_are_correlated_as_the_filter_says() -> None:
    x = batch(NoiseImages((28, 28), 2000, law="blurred"), np.arange(2000)).astype(float)
    f = np.exp(-0.5 * np.arange(-8, 9) ** 2)
    for distance in (1, 2, 4):
        expected = (f[distance:] * f[:-distance]).sum() / (f**2).sum()
        measured = 3 * np.mean(x * np.roll(x, distance, axis=1))
        assert measured == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(("images", "batch_size"), [(0, 2), (-1, 2), (5, 0), (None, -1)])
def test_bad_counts(images: int | None, batch_size: int) -> None:
    expected = f"^NoiseImages: images and batch_size must be at least 1, got {images}, {batch_size}$"
    with pytest.raises(InputError, match=expected):
        NoiseImages((4,), batch_size, images=images)
