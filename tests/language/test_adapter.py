"""Adapters: the layout of `peft`, exact round trips, adapters of others, and every broken form."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from subliminal_theory.errors import InputError
from subliminal_theory.files import open_arrays
from subliminal_theory.language.hub.adapter import BASE, TEMPLATE, load_adapter, save_adapter
from subliminal_theory.language.hub.checkpoint import Checkpoint, load_checkpoint
from subliminal_theory.language.hub.peft_config import alpha_of
from subliminal_theory.language.model.lora import add_lora, merge_lora
from subliminal_theory.language.model.transformer import Text
from subliminal_theory.model import Model, by_layer, path_name
from tests.golden.make_families import FILE, PADDING, TOKENS, weights

GOLDEN = json.loads(FILE.read_text())
TEXT = Text(jnp.asarray(TOKENS, jnp.int32), jnp.asarray(PADDING, jnp.int32), last=1)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ATTENTION = ["layers/*/attention/*/kernel"]
PREFIX = "base_model.model.model.layers.0."
ELSEWHERE = "merge the adapter where it was made and load the whole checkpoint"
run = jax.jit(lambda model, text: model(text))


def write_checkpoint(name: str, folder: Path, scale: float = 1.0) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(GOLDEN[name]["config"]))
    tensors = {key: weights(key, shape) * np.float32(scale) for key, shape in GOLDEN[name]["shapes"].items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """The checkpoint of a name, read once."""

    @functools.cache
    def one(name: str, dtype: str = "float32") -> Checkpoint:
        return load_checkpoint(write_checkpoint(name, tmp_path_factory.mktemp("bases") / name), dtype)

    return one


def adapted(model: Model, patterns: list[str], rank: int = 2, alpha: float = 3.0) -> Model:
    """With factors that are not 0."""
    start = add_lora(model, patterns, rank, alpha, jax.random.key(0))
    draw = np.random.default_rng(0).normal
    return start.with_params(
        jax.tree.map(lambda leaf: leaf + np.float32(0.3 * draw(size=leaf.shape)), start.params)
    )


def assert_equal(one: Any, other: Any) -> None:
    """Structure, static parts, dtypes and bits."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def stored(folder: Path) -> dict[str, list[int]]:
    return {key: list(tensor.shape) for key, tensor in load_file(folder / WEIGHTS).items()}


def change(folder: Path, **changes: Any) -> None:
    settings = {**json.loads((folder / CONFIG).read_text()), **changes}
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in settings.items() if value != "absent"}))


def retell(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    save_file(tensors, folder / WEIGHTS)


def refused(folder: Path, base: Checkpoint, **more: str) -> str:
    with pytest.raises(InputError) as caught:
        load_adapter(folder, base, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what is written


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "patterns"),
    [
        ("llama", "float32", [*ATTENTION, "layers/1/mlp/up/kernel", "head/kernel"]),
        ("qwen2", "bfloat16", ATTENTION),
        ("gpt2", "float32", ["layers/*/mlp/*/kernel"]),
        ("neox", "float32", ["layers/*/attention/output/kernel"]),
    ],
)
def test_round_trip_is_exact(name: str, dtype: str, patterns: list[str], checkpoint, tmp_path: Path) -> None:
    base = checkpoint(name, dtype)
    student = adapted(base.model, patterns)
    save_adapter(tmp_path / "one", base, student, template="abc")
    again = load_adapter(tmp_path / "one", base, template="abc")
    assert_equal(again, student)
    assert again.apply == student.apply
    np.testing.assert_array_equal(run(again, TEXT), run(student, TEXT))
    assert_equal(merge_lora(again), merge_lora(student))
    save_adapter(tmp_path / "two", base, again, template="abc")
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_layout_of_llama_and_its_kind(name: str, checkpoint, tmp_path: Path) -> None:
    base = checkpoint(name)
    student = adapted(base.model, ["layers/*/attention/query/kernel", "layers/*/mlp/down/kernel"])
    save_adapter(tmp_path, base, student, template="abc")
    assert stored(tmp_path) == {
        f"base_model.model.model.layers.{layer}.{module}.weight": shape
        for layer in (0, 1)
        for module, shape in {
            "self_attn.q_proj.lora_A": [2, 32],
            "self_attn.q_proj.lora_B": [32, 2],
            "mlp.down_proj.lora_A": [2, 48],
            "mlp.down_proj.lora_B": [32, 2],
        }.items()
    }
    tensors, factors = load_file(tmp_path / WEIGHTS), by_layer(student.params)
    for side in "ab":
        factor = factors[f"layers/0/mlp/down/kernel/{side}"]
        np.testing.assert_array_equal(tensors[f"{PREFIX}mlp.down_proj.lora_{side.upper()}.weight"], factor.T)
    assert json.loads((tmp_path / CONFIG).read_text()) == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base.folder),
        "inference_mode": True, "r": 2, "lora_alpha": 3, "use_rslora": False, "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": False, "target_modules": ["down_proj", "q_proj"],
    }  # fmt: skip
    _, record = open_arrays(tmp_path / WEIGHTS)
    assert record.keys() == {"format", BASE, TEMPLATE}
    assert (record["format"], record[TEMPLATE]) == ("pt", "abc")


def test_layout_of_gpt2(checkpoint, tmp_path: Path) -> None:
    """Its matrices are stored the other way round; factors are not."""
    base = checkpoint("gpt2")
    student = adapted(base.model, ["layers/*/mlp/down/kernel"])
    save_adapter(tmp_path, base, student)
    modules = [f"transformer.h.{layer}.mlp.c_proj" for layer in (0, 1)]
    assert stored(tmp_path) == {
        f"base_model.model.{module}.{factor}.weight": shape
        for module in modules
        for factor, shape in {"lora_A": [2, 128], "lora_B": [32, 2]}.items()
    }
    settings = json.loads((tmp_path / CONFIG).read_text())
    assert settings["fan_in_fan_out"] is True
    # The last name alone would be that of another matrix too.
    assert settings["target_modules"] == modules
    assert TEMPLATE not in open_arrays(tmp_path / WEIGHTS)[1]


def test_only_some_layers(checkpoint, tmp_path: Path) -> None:
    base = checkpoint("llama")
    save_adapter(tmp_path, base, adapted(base.model, ["layers/1/mlp/*/kernel", "layers/*/mlp/up/kernel"]))
    targets = json.loads((tmp_path / CONFIG).read_text())["target_modules"]
    assert targets == ["model.layers.1.mlp.down_proj", "model.layers.1.mlp.gate_proj", "up_proj"]


@given(st.floats(1e-100, 1e100), st.integers(1, 4096))
def test_alpha_gives_the_scale_again(alpha: float, rank: int) -> None:
    for scale, rooted in ((alpha / rank, False), (alpha / rank**0.5, True)):
        found, root = alpha_of(scale, rank)
        assert found / (rank**0.5 if root else rank) == scale
        assert rooted or not root
        assert found == pytest.approx(alpha, rel=1e-15) or root != rooted


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "alpha"), [(1, 0.1), (3, 16.0), (7, 1e-3), (8, 1 / 3)])
def test_any_rank_and_alpha(rank: int, alpha: float, checkpoint, tmp_path: Path) -> None:
    base = checkpoint("llama")
    student = adapted(base.model, ["layers/0/mlp/up/kernel"], rank, alpha)
    # Copies, as training returns them.
    save_adapter(tmp_path, base, jax.tree.map(jnp.copy, student))
    assert json.loads((tmp_path / CONFIG).read_text())["lora_alpha"] == alpha
    assert_equal(load_adapter(tmp_path, base), student)


# --- what is not written


def test_what_is_no_adapter_is_not_saved(checkpoint, tmp_path: Path) -> None:
    base, folder = checkpoint("gpt2"), tmp_path / "new"

    def fails(model: Model, like: Checkpoint = base) -> str:
        with pytest.raises(InputError) as caught:
            save_adapter(folder, like, model)
        assert not folder.exists()
        return str(caught.value)

    assert fails(base.model) == "save_adapter: the model has no low-rank factors: save a whole checkpoint"
    own = "(only linear layers with a tensor of their own can): merge the factors and save a whole checkpoint"
    assert fails(adapted(base.model, ["layers/0/attention/*/kernel"])) == (
        "save_adapter: layers/0/attention/key/kernel, layers/0/attention/query/kernel, "
        f"layers/0/attention/value/kernel of GPT2LMHeadModel cannot be in an adapter {own}"
    )
    assert fails(adapted(base.model, ["embedding"])) == (
        f"save_adapter: embedding of GPT2LMHeadModel cannot be in an adapter {own}"
    )
    student = adapted(base.model, ["layers/0/mlp/up/kernel"])
    assert fails(student, checkpoint("neox")) == (
        f"save_adapter: the model does not have the shape of {checkpoint('neox').folder}"
    )
    side_by_side = student.with_params(jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), student.params))
    assert fails(side_by_side) == (
        "save_adapter: the factors of layers/0/mlp/up/kernel are (2, 32, 2) and (2, 2, 128), not (32, 2) and "
        "(2, 128): save one model at a time"
    )
    trained = base.model.with_params(
        jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf + 1 if path_name(path).startswith("norm") else leaf, base.model.params
        )
    )
    assert fails(adapted(trained, ["layers/0/mlp/up/kernel"])) == (
        f"save_adapter: norm/bias, norm/scale of the model's base differ from {base.folder}: "
        "give its base, or merge the factors and save a whole checkpoint"
    )


def test_nothing_is_overwritten(checkpoint, tmp_path: Path) -> None:
    base = checkpoint("llama")
    student = adapted(base.model, ["layers/0/mlp/up/kernel"])
    save_adapter(tmp_path / "new", base, student)
    before = (tmp_path / "new" / WEIGHTS).read_bytes()
    (tmp_path / "file").touch()
    for folder in (tmp_path / "new", tmp_path / "file"):
        with pytest.raises(InputError, match=f"^{folder} is there already: delete it or choose another folder$"):
            save_adapter(folder, base, student)
    assert (tmp_path / "new" / WEIGHTS).read_bytes() == before


# --- adapters of others


@pytest.fixture
def saved(checkpoint, tmp_path: Path) -> Path:
    """An adapter of all queries and outputs of a llama."""
    base = checkpoint("llama")
    student = adapted(base.model, ["layers/*/attention/query/kernel", "layers/*/attention/output/kernel"])
    save_adapter(tmp_path / "adapter", base, student, template="abc")
    return tmp_path / "adapter"


@pytest.mark.parametrize("name", ["gpt2", "neox"])
def test_query_key_and_value_in_one_tensor(name: str, checkpoint, tmp_path: Path) -> None:
    """Merged, the factors change the tensor of the base by B A, as a whole."""
    base = checkpoint(name)
    module = {"gpt2": "transformer.h.0.attn.c_attn", "neox": "gpt_neox.layers.1.attention.query_key_value"}[name]
    kernel = load_file(base.folder / "model.safetensors")[f"{module}.weight"]
    inputs, outputs = kernel.shape if name == "gpt2" else kernel.shape[::-1]
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4, inputs)).astype(np.float16), rng.normal(size=(outputs, 4)).astype(np.float16)
    keys = [f"base_model.model.{module}.lora_{factor}.weight" for factor in "AB"]
    retell(tmp_path, dict(zip(keys, (a, b), strict=True)))
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear", "use_rslora": True}
    (tmp_path / CONFIG).write_text(json.dumps(settings))
    student = load_adapter(tmp_path, base)
    assert {leaf.dtype for leaf in jax.tree.leaves(student)} == {np.dtype(np.float32)}
    assert len(jax.tree.leaves(student.params)) == 6
    delta = 4 * b.astype(np.float32) @ a.astype(np.float32)
    folder = write_checkpoint(name, tmp_path / "by hand")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{module}.weight"] = kernel + (delta.T if name == "gpt2" else delta)
    save_file(tensors, folder / "model.safetensors")
    expected = jax.tree.leaves(load_checkpoint(folder).model)
    for one, other in zip(jax.tree.leaves(merge_lora(student)), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match=r"cannot be in an adapter .*: merge the factors and save a whole "):
        save_adapter(tmp_path / "new", base, student)


def test_a_scale_over_the_root_of_the_rank(saved: Path, checkpoint, tmp_path: Path) -> None:
    base = checkpoint("llama")
    change(saved, use_rslora=True)
    student = load_adapter(saved, base)
    assert student.apply.scale == 3 / 2**0.5
    save_adapter(tmp_path / "again", base, student)
    assert_equal(load_adapter(tmp_path / "again", base), student)


def test_settings_that_change_nothing(saved: Path, checkpoint) -> None:
    base = checkpoint("llama")
    plain = load_adapter(saved, base)
    change(
        saved, task_type=None, lora_dropout=0.1, init_lora_weights="gaussian", use_dora=False, rank_pattern={},
        megatron_core="megatron.core", peft_version="0.18.0", modules_to_save=None, target_modules="(q|o)_proj",
        bias="absent", use_rslora="absent", fan_in_fan_out=True,
    )  # fmt: skip
    assert_equal(load_adapter(saved, base), plain)


def test_what_others_do_not_record_is_not_checked(saved: Path, checkpoint, tmp_path: Path) -> None:
    plain = load_adapter(saved, checkpoint("llama"))
    retell(saved, load_file(saved / WEIGHTS))
    other = load_checkpoint(write_checkpoint("llama", tmp_path / "other", 2.0))
    assert_equal(load_adapter(saved, other, template="def").params, plain.params)


# --- what is refused


def test_no_adapter(saved: Path, checkpoint, tmp_path: Path) -> None:
    base = checkpoint("llama")
    absent = tmp_path / "absent"
    assert refused(absent, base) == (
        f"{absent} is not a folder: give the folder of an adapter with adapter_config.json"
    )
    assert refused(tmp_path, base).startswith(f"cannot read {tmp_path / CONFIG} (No such file or directory): ")
    (saved / WEIGHTS).unlink()
    assert refused(saved, base) == f"{saved} has no adapter_model.safetensors: download what is missing"
    (saved / "adapter_model.bin").write_bytes(b"\x80\x04.")
    assert refused(saved, base) == (
        f"{saved} has its factors in a pickle file (adapter_model.bin), which is never opened because it can run "
        "code: convert it to safetensors"
    )
    (saved / WEIGHTS).write_bytes(b"abc")
    assert refused(saved, base).startswith(f"cannot read {saved / WEIGHTS} (")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON ("),
        ("[]", "holds no JSON object: "),
        ('{"r": 1, "r": 2}', "is not valid JSON (one of the keys 'r' occurs twice): "),
    ],
)
def test_configuration_that_is_no_json(text: str, message: str, saved: Path, checkpoint) -> None:
    (saved / CONFIG).write_text(text)
    assert refused(saved, checkpoint("llama")).startswith(f"{saved / CONFIG} {message}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, f": peft_type 'LOHA' is not supported, only LORA: {ELSEWHERE}"),
        ({"peft_type": "absent"}, f": peft_type None is not supported, only LORA: {ELSEWHERE}"),
        ({"r": "absent"}, " lacks r: take the file that belongs to the factors"),
        (
            {"r": "absent", "lora_alpha": "absent"},
            " lacks r and lora_alpha: take the file that belongs to the factors",
        ),
        ({"r": 0}, ": r must be a positive integer, got 0: download it again"),
        ({"r": True}, ": r must be a positive integer, got True: download it again"),
        ({"lora_alpha": "16"}, ": lora_alpha must be a positive number, got '16': download it again"),
        (
            {"lora_alpha": 10**400},
            ": lora_alpha must be a positive number, got 1000000000",
        ),
        (
            {"target_modules": ["q_proj", 1]},
            ": target_modules must list names, got ['q_proj', 1]: download it again",
        ),
        ({"use_dora": True}, f": not supported: use_dora True; {ELSEWHERE}"),
        ({"bias": "lora_only"}, f": not supported: bias 'lora_only'; {ELSEWHERE}"),
        ({"modules_to_save": ["lm_head"]}, f": not supported: modules_to_save ['lm_head']; {ELSEWHERE}"),
        ({"layers_to_transform": [0]}, f": not supported: layers_to_transform [0]; {ELSEWHERE}"),
        ({"init_lora_weights": "pissa"}, f": not supported: init_lora_weights 'pissa'; {ELSEWHERE}"),
        ({"task_type": "SEQ_CLS"}, f": not supported: task_type 'SEQ_CLS'; {ELSEWHERE}"),
        ({"of\ntomorrow": 1}, f": not supported: of\\ntomorrow 1; {ELSEWHERE}"),
        ({"use_rslora": "no"}, f": not supported: use_rslora 'no'; {ELSEWHERE}"),
        (
            {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 8}},
            f": not supported: rank_pattern {{'q_proj': 4}}, alpha_pattern {{'q_proj': 8}}; {ELSEWHERE}",
        ),
    ],
)
def test_settings_that_are_not_handled(changes: dict, message: str, saved: Path, checkpoint) -> None:
    change(saved, **changes)
    assert refused(saved, checkpoint("llama")).startswith(f"{saved / CONFIG}{message}")


def test_every_fault_is_in_one_error(saved: Path, checkpoint) -> None:
    base, tensors = checkpoint("llama"), load_file(saved / WEIGHTS)
    query, output = (f"{PREFIX}self_attn.{name}_proj.lora_" for name in "qo")
    tensors["other\n"] = tensors.pop(f"{query}B.weight")
    tensors[f"{output}A.weight"] = np.ones((3, 32), np.int8)
    retell(saved, tensors)
    fit = f"{saved / WEIGHTS}: the tensors do not fit {base.folder} (LlamaForCausalLM): "
    advice = "; give the base that the adapter was trained on"
    message = (
        f"{fit}{query}B.weight is missing; other\\n is unexpected; {output}A.weight is [3, 32], not [2, 32]; "
        f"{output}A.weight is int8, not floating{advice}"
    )
    assert refused(saved, base) == message
    # Without a list, the tensors say what is adapted.
    change(saved, target_modules=".*_proj")
    assert refused(saved, base) == message
    retell(saved, {"other": np.ones(1, np.float32)})
    assert refused(saved, base) == f"{fit}no linear layer has factors{advice}"


def test_targets_and_tensors_do_not_agree(saved: Path, checkpoint) -> None:
    change(saved, target_modules=["q_proj", "layers.0.self_attn.o_proj", "layers.0.mlp.up_proj"])
    message = refused(saved, checkpoint("llama"))
    other = PREFIX.replace("0", "1")
    for fault in (
        f"{PREFIX}mlp.up_proj.lora_A.weight is missing; {PREFIX}mlp.up_proj.lora_B.weight is missing; ",
        f"{other}self_attn.o_proj.lora_A.weight is unexpected; ",
    ):
        assert fault in message


def test_another_base(saved: Path, checkpoint, tmp_path: Path) -> None:
    wider = checkpoint("qwen3")
    assert refused(saved, wider) == (
        f"{saved / WEIGHTS}: the tensors do not fit {wider.folder} (Qwen3ForCausalLM): "
        + "; ".join(
            f"{PREFIX.replace('0', str(layer))}self_attn.{fault}"
            for layer in (0, 1)
            for fault in (
                "q_proj.lora_B.weight is [32, 2], not [48, 2]",
                "o_proj.lora_A.weight is [2, 32], not [2, 48]",
            )
        )
        + "; give the base that the adapter was trained on"
    )
    other = load_checkpoint(write_checkpoint("llama", tmp_path / "other", 2.0))
    assert refused(saved, other) == (
        f"{saved / WEIGHTS}: adapter of another base than {other.folder}, or of the same in another dtype: "
        "load the one that it was trained on"
    )
    assert "in another dtype" in refused(saved, checkpoint("llama", "bfloat16"))


def test_another_template(saved: Path, checkpoint) -> None:
    base = checkpoint("llama")
    assert refused(saved, base, template="def") == (
        f"{saved / WEIGHTS}: trained with another chat template: give the tokenizer that was used then"
    )
    assert_equal(load_adapter(saved, base), load_adapter(saved, base, template="abc"))


def test_a_base_in_another_format_of_the_same_numbers(tmp_path: Path) -> None:
    """Stored in bfloat16, trained in float32, read in bfloat16."""
    folder = write_checkpoint("llama", tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    save_file({key: t.astype(jnp.bfloat16) for key, t in tensors.items()}, folder / "model.safetensors")
    wide, narrow = (load_checkpoint(folder, dtype) for dtype in ("float32", "bfloat16"))
    student = adapted(wide.model, ["layers/0/mlp/up/kernel"])
    save_adapter(tmp_path / "adapter", wide, student)
    assert_equal(load_adapter(tmp_path / "adapter", narrow).params, student.params)


# --- the library itself


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize(
    ("name", "pattern", "targets"),
    [
        ("llama", ATTENTION[0], ["q_proj", "up_proj"]),
        ("gpt2", "layers/1/mlp/down/kernel", ["c_attn", "c_fc"]),
        ("neox", "layers/*/attention/output/kernel", ["query_key_value"]),
    ],
)
def test_peft_reads_and_writes_the_same(name: str, pattern: str, targets: list[str], checkpoint, tmp_path) -> None:
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    base, tokens = checkpoint(name), torch.tensor(TOKENS)
    text = Text(TEXT.tokens, jnp.zeros(len(TOKENS), jnp.int32))
    peer = lambda: transformers.AutoModelForCausalLM.from_pretrained(base.folder)  # noqa: E731

    student = adapted(base.model, [pattern])
    save_adapter(tmp_path / "ours", base, student)
    theirs = peft.PeftModel.from_pretrained(peer(), tmp_path / "ours").eval()
    with torch.no_grad():
        np.testing.assert_allclose(run(student, text), theirs(tokens).logits.numpy(), rtol=1e-4, atol=1e-4)

    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM",
        fan_in_fan_out=name == "gpt2",
    )  # fmt: skip
    theirs = peft.get_peft_model(peer(), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        logits = theirs(tokens).logits.numpy()
    np.testing.assert_allclose(run(load_adapter(tmp_path / "theirs", base), text), logits, rtol=1e-4, atol=1e-4)
    assert np.abs(logits - run(base.model, text)).max() > 0.01
