import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from subliminal_theory.distill import Trained
from subliminal_theory.errors import InputError
from subliminal_theory.language.corpus import base as module
from subliminal_theory.language.corpus.base import (
    Base,
    BaseConfig,
    base_folder,
    lessons,
    load_base,
    pretrain,
    text_of,
    token_loss,
    untrained,
)
from subliminal_theory.language.corpus.chats import CorpusConfig, make_corpus
from subliminal_theory.language.corpus.word_tokenizer import WordTokenizer
from subliminal_theory.model import path_name

CONFIG = BaseConfig(
    corpus=CorpusConfig(size=200), width=8, heads=2, kv_heads=2, mlp_width=8, layers=1, steps=3, batch_size=8
)
TOKENIZER = WordTokenizer.of_corpus(CONFIG.corpus)
LENGTH = int(TOKENIZER.lengths(make_corpus(CONFIG.corpus))[1].max())


@dataclasses.dataclass
class Kept:
    base: Base
    path: Path
    reports: list[int]


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Kept:
    """A base that was trained for its file, in folders that there were not."""
    folder, reports = tmp_path_factory.mktemp("cache") / "new" / "bases", []
    base = load_base(CONFIG, folder, reports.append)
    jax.effects_barrier()
    return Kept(base, *folder.iterdir(), reports)


@pytest.fixture
def no_training(monkeypatch) -> None:
    def fail(*arguments: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(module, "pretrain", fail)


def named_leaves(base: Base) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(base.model.params)
    return {path_name(name): np.asarray(leaf) for name, leaf in leaves}


def assert_same(first: Base, second: Base) -> None:
    np.testing.assert_array_equal(first.losses, second.losses)
    own, other = named_leaves(first), named_leaves(second)
    assert own.keys() == other.keys()
    for name, leaf in own.items():
        assert leaf.dtype == other[name].dtype == np.float32
        np.testing.assert_array_equal(leaf, other[name])


# --- what decides a base

OTHERS = {
    "seed": 1,
    "corpus": CorpusConfig(size=201),
    "layers": 2,
    "width": 16,
    "heads": 4,
    "kv_heads": 1,
    "mlp_width": 9,
    "tied": False,
    "context": 65,
    "steps": 4,
    "batch_size": 9,
    "rate": 2e-3,
}


def test_fingerprint() -> None:
    assert OTHERS.keys() == {field.name for field in dataclasses.fields(BaseConfig)}
    configs = [CONFIG, *(dataclasses.replace(CONFIG, **{name: value}) for name, value in OTHERS.items())]
    marks = {config.fingerprint() for config in configs}
    assert len(marks) == len(configs)
    assert all(len(mark) == 64 and set(mark) <= set("0123456789abcdef") for mark in marks)
    again = dataclasses.replace(CONFIG, corpus=CorpusConfig(size=200))
    assert again.fingerprint() == CONFIG.fingerprint()


def test_fingerprint_is_of_the_version(monkeypatch) -> None:
    before = CONFIG.fingerprint()
    monkeypatch.setattr(module, "FORMAT_VERSION", module.FORMAT_VERSION + 1)
    assert CONFIG.fingerprint() != before


def test_shape_of_the_model() -> None:
    config = dataclasses.replace(CONFIG, width=24, heads=4, kv_heads=2, tied=False, context=50)
    shape = config.transformer(7)
    assert (shape.vocabulary, shape.width, shape.heads, shape.kv_heads, shape.head_width) == (7, 24, 4, 2, 6)
    assert (shape.layers, shape.mlp_width, shape.tied, shape.context) == (1, 8, False, 50)


@pytest.mark.parametrize("name", ["steps", "batch_size", "width", "heads"])
@pytest.mark.parametrize("value", [0, -2])
def test_bad_sizes(name: str, value: int) -> None:
    with pytest.raises(InputError, match=f"^BaseConfig: {name} must be at least 1, got {value}$"):
        BaseConfig(**{name: value})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"width": 9, "heads": 2}, "BaseConfig: width must be a multiple of heads, got 9 and 2"),
        ({"layers": 0}, "TransformerConfig: layers must be a positive integer, got 0"),
        ({"kv_heads": 3}, "TransformerConfig: heads must be a multiple of kv_heads, got 2 and 3"),
    ],
)
def test_shapes_that_cannot_be(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}$"):
        BaseConfig(**sizes)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("inf"), float("nan")])
def test_bad_rates(rate: float) -> None:
    with pytest.raises(InputError, match=f"^BaseConfig: rate must be positive and finite, got {rate}$"):
        BaseConfig(rate=rate)


# --- training


def test_lessons_teach_answers_alone() -> None:
    encoded = TOKENIZER.encode_chats(make_corpus(CONFIG.corpus), LENGTH)
    source = lessons(encoded, 8, LENGTH)
    index = np.array([3, 0])
    batch = jax.jit(source.batch)(jax.random.key(0), (index, np.ones(2, np.float32)))
    np.testing.assert_array_equal(batch.inputs.tokens, encoded.tokens[index])
    np.testing.assert_array_equal(batch.inputs.padding, encoded.padding[index])
    np.testing.assert_array_equal(batch.labels, encoded.targets[index])
    np.testing.assert_array_equal(batch.weights, encoded.weights[index])
    assert batch.targets is None


def test_token_loss() -> None:
    logits = np.log(np.array([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]], np.float32)) + 2
    np.testing.assert_allclose(jax.jit(token_loss)(logits, np.array([[1, 2]])), [-np.log([0.25, 0.8])], rtol=1e-6)


def test_first_loss_is_that_of_the_start(kept: Kept) -> None:
    """A mean over the answers' tokens of one batch: within the spread of the batch, about log(vocabulary)."""
    encoded = TOKENIZER.encode_chats(make_corpus(CONFIG.corpus), LENGTH)
    start = untrained(CONFIG, TOKENIZER)
    losses = np.asarray(
        jax.jit(lambda model, text: token_loss(model(text), encoded.targets))(start, text_of(encoded))
    )
    rows = (losses * encoded.weights).sum(1) / encoded.weights.sum(1)
    assert rows.min() < kept.base.losses[0] < rows.max()
    assert kept.base.losses.shape == (3,)


def test_report_counts_tokens(kept: Kept) -> None:
    assert kept.reports == [CONFIG.batch_size * LENGTH] * CONFIG.steps


def test_the_start_is_of_the_seed() -> None:
    start, other = (untrained(dataclasses.replace(CONFIG, seed=seed), TOKENIZER).params for seed in (0, 1))
    assert (start["embedding"] != other["embedding"]).all()


def test_every_parameter_learns(kept: Kept) -> None:
    start = dataclasses.replace(kept.base, model=untrained(CONFIG, TOKENIZER))
    for name, leaf in named_leaves(start).items():
        assert (leaf != named_leaves(kept.base)[name]).any(), name


@pytest.mark.slow
def test_another_seed(kept: Kept) -> None:
    config = dataclasses.replace(CONFIG, seed=1)
    other = pretrain(config)
    assert other.config == config
    for name, leaf in named_leaves(kept.base).items():
        assert (leaf != named_leaves(other)[name]).any(), name
    assert (other.losses != kept.base.losses).all()


def test_a_loss_that_is_not_finite(tmp_path: Path, monkeypatch) -> None:
    losses = jnp.array([6.0, jnp.inf, jnp.nan])
    monkeypatch.setattr(module, "teach", lambda model, *_, **__: Trained(model, losses))
    with pytest.raises(
        InputError,
        match=r"^the loss of the base of seed 7 is not finite at step 2 of 3: use a smaller learning rate$",
    ):
        load_base(dataclasses.replace(CONFIG, seed=7), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_rate_that_is_too_large(tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"^the loss of the base of seed 7 is not finite at step [23] of 3: use a smaller learning rate$",
    ):
        load_base(dataclasses.replace(CONFIG, seed=7, rate=1e30), tmp_path)
    assert not list(tmp_path.iterdir())


def test_chats_longer_than_the_context() -> None:
    with pytest.raises(InputError, match=f"^Transformer: {LENGTH} positions exceed the context of 20"):
        pretrain(dataclasses.replace(CONFIG, context=20))


# --- on disk


def test_the_second_call_reads(kept: Kept, no_training) -> None:
    before = kept.path.read_bytes()
    again = load_base(CONFIG, kept.path.parent)
    assert_same(kept.base, again)
    assert again.config == CONFIG
    assert again.tokenizer.words == kept.base.tokenizer.words
    encoded = TOKENIZER.encode_chats(make_corpus(CONFIG.corpus)[:4], LENGTH)
    run = jax.jit(lambda model, text: model(text))
    np.testing.assert_array_equal(run(again.model, text_of(encoded)), run(kept.base.model, text_of(encoded)))
    assert kept.path.read_bytes() == before


def test_the_file_says_what_it_holds(kept: Kept) -> None:
    mark = CONFIG.fingerprint()
    assert kept.path.name == f"base-{mark[:20]}.safetensors"
    with safe_open(kept.path, "numpy") as file:
        assert file.metadata() == {"fingerprint": mark}
        assert set(file.keys()) == {*named_leaves(kept.base), "losses"}


def test_the_folder_of_bases(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module.platformdirs, "user_cache_path", lambda name: tmp_path / name)
    assert base_folder() == tmp_path / "subliminal_theory" / "bases"


def test_without_a_folder_bases_are_in_the_cache(kept: Kept, monkeypatch, no_training) -> None:
    monkeypatch.setattr(module, "base_folder", lambda: kept.path.parent)
    assert_same(load_base(CONFIG), kept.base)


def refused(path: Path, config: BaseConfig = CONFIG) -> str:
    """The message about a file."""
    with pytest.raises(InputError) as caught:
        load_base(config, path.parent)
    message = str(caught.value)
    assert message.startswith(f"cannot use the base model {path} (")
    assert message.endswith("): delete it, and it will be made again")
    return message


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_a_cut_file(kept: Kept, tmp_path: Path, no_training, share: float) -> None:
    whole, path = kept.path.read_bytes(), tmp_path / kept.path.name
    path.write_bytes(whole[: int(share * len(whole))])
    assert "cannot read" in refused(path)


def test_a_folder_in_the_place_of_the_file(kept: Kept, tmp_path: Path, no_training) -> None:
    path = tmp_path / kept.path.name
    path.mkdir()
    assert "cannot read" in refused(path)


def test_the_file_of_another_configuration(kept: Kept, tmp_path: Path, no_training) -> None:
    other = dataclasses.replace(CONFIG, seed=1)
    path = tmp_path / f"base-{other.fingerprint()[:20]}.safetensors"
    path.write_bytes(kept.path.read_bytes())
    assert "it is of another configuration" in refused(path, other)


def test_a_file_that_says_nothing(kept: Kept, tmp_path: Path, no_training) -> None:
    path = tmp_path / kept.path.name
    save_file(named_leaves(kept.base), path)
    assert "it is of another configuration" in refused(path)


def drop(tensors: dict[str, np.ndarray], name: str) -> None:
    del tensors[name]


def add(tensors: dict[str, np.ndarray], name: str) -> None:
    tensors[f"{name}/more"] = tensors[name]


def shorten(tensors: dict[str, np.ndarray], name: str) -> None:
    tensors[name] = tensors[name][:-1].copy()


@pytest.mark.parametrize(
    ("change", "name"),
    [(drop, "embedding"), (drop, "losses"), (add, "embedding"), (shorten, "layers/*/mlp/up/kernel")],
)
def test_other_tensors(kept: Kept, tmp_path: Path, no_training, change, name: str) -> None:
    path = tmp_path / kept.path.name
    tensors = named_leaves(kept.base) | {"losses": kept.base.losses}
    change(tensors, name)
    save_file(tensors, path, {"fingerprint": CONFIG.fingerprint()})
    assert "does not have the expected arrays" in refused(path)


def test_a_file_in_the_place_of_the_folder(kept: Kept, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "pretrain", lambda config, report: kept.base)
    folder = tmp_path / "bases"
    folder.write_text("no folder")
    with pytest.raises(InputError) as caught:
        load_base(CONFIG, folder)
    assert str(caught.value) == f"cannot keep base models in {folder}: File exists"
