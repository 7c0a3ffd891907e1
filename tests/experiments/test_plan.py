"""What `plan` says, against what the compiler counts and what a mesh splits."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from experiments import plan
from experiments.app import command as command_line
from subliminal_theory.channel import SampledToken, SoftLogits, imitation_loss
from subliminal_theory.errors import InputError
from subliminal_theory.language.hub.checkpoint import skeleton
from subliminal_theory.language.hub.families import Family, read_family
from subliminal_theory.language.model.config import TransformerConfig
from subliminal_theory.language.model.lora import add_lora
from subliminal_theory.parallel import spec_of
from subliminal_theory.language.model.transformer import Text
from tests.experiments.commands import fails
from tests.golden.make_families import FILE

GOLDEN = json.loads(FILE.read_text())
Capture = pytest.CaptureFixture[str]
GATED = TransformerConfig(
    vocabulary=1000, layers=4, width=256, heads=4, kv_heads=2, head_width=64, mlp_width=768, tied=False
)
PLAIN = dataclasses.replace(GATED, gated=False, parallel=True, tied=True, norm="layer", kv_heads=4)
QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "max_position_embeddings": 4096,
    "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
QWEN_SIZE = 494_032_768  # parameters, as published


def job_of(
    config: TransformerConfig, rows: int = 8, length: int = 128, rank: int = 0, soft: bool = True
) -> plan.Job:
    return plan.make_job(Family("test", config, {}), (rows, length), rank, soft, False, None)


def lowered(job: plan.Job) -> Any:
    """Loss and gradient of a job's student, as the compiler gets them, in float32."""
    student = teacher = skeleton(Family("test", job.config, {}))
    if job.rank:
        lora = (["layers/*/kernel"], job.rank, 1.0, jax.random.key(0))
        student = jax.eval_shape(lambda model: add_lora(model, *lora), student)
    shape = (job.rows, job.length)
    text = Text(jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape[:1], jnp.int32))

    def step(student: Any, teacher: Any, text: Any, tokens: Any, weights: Any) -> Any:
        channel = SoftLogits() if job.soft else SampledToken()
        targets = channel.targets(None, teacher(text)) if job.soft else tokens
        return jax.value_and_grad(
            lambda params: imitation_loss(channel, student.with_params(params)(text), targets, weights)
        )(student.params)

    return jax.jit(step).lower(student, teacher, text, text.tokens, jax.ShapeDtypeStruct(shape, jnp.float32))


@pytest.mark.parametrize("config", [GATED, PLAIN])
@pytest.mark.parametrize(("rank", "soft"), [(0, True), (0, False), (8, False)])
def test_operations_are_what_the_compiler_counts(config: TransformerConfig, rank: int, soft: bool) -> None:
    job = job_of(config, rank=rank, soft=soft)
    assert lowered(job).cost_analysis()["flops"] == pytest.approx(plan.operations(job), rel=0.02)


def test_factors_spare_the_gradients_of_matrices() -> None:
    """A third of the products, but for those with the factors themselves."""
    whole, low = (plan.operations(job_of(GATED, rank=rank, soft=False)) for rank in (0, 8))
    matrices = 4 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 768) + 1000 * 256
    sides = 4 * (2 * (256 + 256) + 2 * (256 + 128) + 3 * (256 + 768))
    first = 256 * 256 + 2 * 256 * 128
    assert whole - low == 8 * 128 * (2 * (matrices + first) - 6 * 8 * sides)


def test_recomputing_adds_a_forward_pass_of_the_blocks() -> None:
    kept = job_of(PLAIN, soft=False)
    added = plan.operations(dataclasses.replace(kept, recomputed=True)) - plan.operations(kept)
    whole = plan.operations(job_of(PLAIN)) - plan.operations(kept)
    head = 2 * 1000 * 256 * kept.tokens
    assert added == whole - head


def test_a_block_keeps_what_the_compiler_keeps() -> None:
    """Of two models that differ in depth alone, in float32."""
    jobs = [job_of(dataclasses.replace(GATED, layers=layers), soft=False) for layers in (2, 4)]
    two, four = (lowered(job).compile().memory_analysis().temp_size_in_bytes for job in jobs)
    assert (four - two) / 2 / jobs[0].tokens == pytest.approx(plan.block_bytes(GATED, 128, number=4), rel=0.05)


@pytest.mark.parametrize("soft", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_logits_are_as_many_as_the_compiler_makes(soft: bool) -> None:
    """Of two models that differ in their vocabulary alone."""
    flat = dataclasses.replace(GATED, layers=1, width=32, heads=1, kv_heads=1, mlp_width=32)
    jobs = [job_of(dataclasses.replace(flat, vocabulary=vocabulary), soft=soft) for vocabulary in (2000, 4000)]
    few, many = (lowered(job).compile().memory_analysis().temp_size_in_bytes for job in jobs)
    assert many - few == pytest.approx(plan.logit_bytes(jobs[0], plan.make_abstract(1, 1, 1)), rel=0.1)


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1)])
def test_weights_are_split_as_on_a_mesh(name: str, sizes: tuple[int, int, int], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GOLDEN[name]["config"]))
    family, mesh = read_family(tmp_path), plan.make_abstract(*sizes)
    job = plan.make_job(family, (8, 16), 0, False, False, None)
    leaves = jax.tree_util.tree_leaves_with_path(skeleton(family).params)
    held = 0
    for path, leaf in leaves:
        at = jax.tree_util.keystr(path, simple=True, separator="/")
        held += math.prod(NamedSharding(mesh, spec_of(at, leaf.shape, mesh)).shard_shape(leaf.shape))
    found = plan.memory(job, mesh)
    assert job.parameters == sum(math.prod(leaf.shape) for _, leaf in leaves)
    assert found["master weights, float32"] == found["gradients, float32"] == 4 * held
    assert found["weights to compute with, bfloat16"] == 2 * held
    assert found["state of Adam, float32"] == 8 * held
    assert plan.memory(dataclasses.replace(job, soft=True), mesh)["teacher's weights, bfloat16"] == 2 * held


def test_factors_have_the_sizes_of_those_of_a_model() -> None:
    job = job_of(GATED, rank=8, soft=False)
    lora = (["layers/*/kernel"], 8, 1.0, jax.random.key(0))
    model = jax.eval_shape(lambda model: add_lora(model, *lora), skeleton(Family("test", GATED, {})))
    count = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    found = plan.memory(job, plan.make_abstract(1, 1, 1))
    assert found["low-rank factors, float32"] == 4 * count
    assert found["state of Adam, float32"] == 8 * count
    assert found["frozen weights, bfloat16"] == 2 * job.parameters


def test_activations_and_logits() -> None:
    job, alone = job_of(GATED), plan.make_abstract(1, 1, 1)
    assert plan.logit_bytes(job, alone) == 8 * 128 * 1000 * 4 * 5
    assert plan.logit_bytes(job, plan.make_abstract(2, 2, 2)) == 8 * 128 * 1000 * 4 * 5 / 8
    assert plan.logit_bytes(dataclasses.replace(job, chunk=64, soft=False), alone) == 64 * 1000 * 4 * 2
    kept, recomputed = (plan.activation_bytes(job, alone, again) for again in (False, True))
    assert kept - recomputed == 3 * 8 * 128 * (plan.block_bytes(GATED, 128) - 2 * 256) - (
        8 * 128 * 2 * 256 - 512 * 1024
    )
    assert plan.activation_bytes(job, plan.make_abstract(2, 4, 1), False) == kept / 8
    assert plan.gathered_bytes(job, plan.make_abstract(8, 1, 1)) == 0
    assert plan.gathered_bytes(job, plan.make_abstract(1, 8, 1)) == 2 * job.parameters
    block = 2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 768
    assert plan.gathered_bytes(dataclasses.replace(job, recomputed=True), plan.make_abstract(1, 8, 1)) == 2 * block


# --- the command


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    return tmp_path


def printed(capsys: Capture, *arguments: object) -> str:
    assert command_line.main(["plan", *map(str, arguments)]) == 0
    output, errors = capsys.readouterr()
    assert not errors
    return output


def entry(output: str, name: str) -> list[float]:
    (line,) = [line for line in output.splitlines() if line.startswith(f"  {name}  ")]
    return [float(text) for text in re.findall(r"[\d.]+", line.removeprefix(f"  {name}  "))][-2:]


def test_table_of_one_device(qwen: Path, capsys: Capture) -> None:
    output = printed(capsys, "--base", qwen, "--channel", "sampled")
    assert output.startswith(f"Qwen2ForCausalLM: {QWEN_SIZE:,} parameters; everything trained\n")
    assert "\n16 rows x 512 tokens a step\nmesh: data 1 x fsdp 1 x tensor 1\n" in output
    for name, each in (("master weights, float32", 4), ("gradients, float32", 4), ("state of Adam, float32", 8)):
        assert entry(output, name) == [pytest.approx(each * QWEN_SIZE / 2**30, abs=6e-4)] * 2
    assert entry(output, "logits") == [pytest.approx(16 * 512 * 151936 * 4 * 2 / 2**30, abs=6e-4)] * 2
    # 6 N tokens, N = all parameters (the head is the embedding), and attention.
    token = 6 * QWEN_SIZE + 3 * 4 * 24 * 896 * 512
    (operations, each) = re.findall(r"([\d.e+]+) operations a step, ([\d.e+]+) a token", output)[0]
    assert float(each) == pytest.approx(token, rel=2e-3)
    assert float(operations) == pytest.approx(token * 16 * 512, rel=2e-3)
    seconds = float(re.findall(r"([\d.]+) s for 1M tokens", output)[0])
    assert seconds == pytest.approx(1e6 * token / (0.45 * 989e12), rel=1e-2)


def test_devices_share(qwen: Path, capsys: Capture) -> None:
    output = printed(capsys, "--base", qwen, "--devices", 8)
    assert "mesh: data 1 x fsdp 8 x tensor 1\n" in output
    whole, each = entry(output, "master weights, float32")
    assert each == pytest.approx(whole / 8, rel=0.01)
    alone = printed(capsys, "--base", qwen)
    (eight, one) = (float(re.findall(r"([\d.]+) s for 1M", text)[0]) for text in (output, alone))
    assert one == pytest.approx(8 * eight, rel=0.02)
    twice = printed(capsys, "--base", qwen, "--flops", 2 * plan.SHARE * plan.PEAK)
    assert float(re.findall(r"([\d.]+) s for 1M", twice)[0]) == pytest.approx(one / 2, rel=0.01)


@pytest.mark.parametrize(
    ("devices", "tokens", "mesh"),
    [(16, "16x512", (1, 16, 1)), (2, "1*512", (1, 1, 2)), (14, "2x512", (1, 2, 7)), (28, "16x256", (1, 4, 7))],
)
def test_tensor_is_split_where_rows_are_too_few(
    devices: int, tokens: str, mesh: tuple[int, int, int], qwen: Path, capsys: Capture
) -> None:
    output = printed(capsys, "--base", qwen, "--devices", devices, "--tokens", tokens)
    assert f"mesh: data {mesh[0]} x fsdp {mesh[1]} x tensor {mesh[2]}\n" in output


def test_factors_take_less(qwen: Path, capsys: Capture) -> None:
    full, lora = (printed(capsys, "--base", qwen, "--rank", rank) for rank in (0, 8))
    assert "low-rank factors of rank 8 trained" in lora
    assert entry(lora, "total")[0] < entry(full, "total")[0] - 10 * QWEN_SIZE / 2**30
    lean = printed(capsys, "--base", qwen, "--rank", 8, "--activations", "recomputed", "--chunk", 1024)
    assert entry(lean, "total")[0] < entry(lora, "total")[0] / 4
    kept = re.findall(r"activations kept would take ([\d.]+) on each", lean)[0]
    assert float(kept) == entry(lora, "activations, kept")[0]


def advised(capsys: Capture, *arguments: object) -> str:
    found = fails(capsys, "plan", *arguments)
    assert re.match(r".* needs [\d.]+ GiB a device, ", found)
    return found


def test_says_how_many_devices_would_do(qwen: Path, capsys: Capture) -> None:
    """And they do, where fewer do not."""
    base = ("--base", qwen)
    found, need = advised(capsys, *base, "--memory", 20), entry(printed(capsys, *base), "total")[0]
    start = f"{qwen} needs {need:.1f} GiB a device, 1 device has 20: use at least "
    count = int(re.fullmatch(re.escape(start) + r"(\d+) devices or fewer --tokens", found)[1])  # type: ignore[index]
    assert count > 2
    printed(capsys, *base, "--memory", 20, "--devices", count)
    for fewer in range(2, count):
        with pytest.raises(InputError, match=r"cannot share|devices have 20: use at least"):
            plan.main([*map(str, base), "--memory", "20", "--devices", str(fewer)])


def test_says_which_flags_would_do(qwen: Path, capsys: Capture) -> None:
    base = ("--base", qwen, "--tokens", "16x128")
    full, lora, lean = (
        entry(printed(capsys, *base, *flags), "total")[0]
        for flags in ((), ("--rank", 16), ("--rank", 16, "--activations", "recomputed"))
    )
    assert lean < lora < full
    for room, flags in ((lora, "--rank 16"), (lean, "--rank 16 --activations recomputed")):
        found = advised(capsys, *base, "--memory", room + 0.01)
        assert found.endswith(f" devices or {flags}")
        printed(capsys, *base, "--memory", room + 0.01, *flags.split())
    assert advised(capsys, *base, "--memory", lean - 0.01).endswith(" devices or fewer --tokens")
    assert advised(capsys, *base, "--memory", 0.01).endswith(": use fewer --tokens")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--devices 0", "--devices must be above 0 and finite, got 0"),
        ("--memory nan", "--memory must be above 0 and finite, got nan"),
        ("--chunk -1", "--chunk must be above 0 and finite, got -1"),
        ("--tokens 16", "--tokens takes ROWSxLENGTH such as 16x512, got '16'"),
        ("--tokens 0x5", "--tokens takes ROWSxLENGTH such as 16x512, got '0x5'"),
        ("--tokens 1x5000", "--tokens: rows of 5000 exceed the model's context of 4096"),
        ("--rank 129", "--rank must be from 0 (train everything) to 128, got 129"),
        ("--rank -1", "--rank must be from 0 (train everything) to 128, got -1"),
        ("--devices 3", "--devices 3 cannot share 16 rows and 14 heads evenly: take a number that divides 16, or"),
        ("--channel loud", "argument --channel: invalid choice: 'loud'"),
    ],
)
def test_refuses(arguments: str, message: str, qwen: Path, capsys: Capture) -> None:
    assert fails(capsys, "plan", "--base", qwen, *arguments.split()).startswith(message)


def test_refuses_what_is_no_checkpoint(tmp_path: Path, capsys: Capture) -> None:
    assert fails(capsys, "plan").startswith("the following arguments are required: --base")
    assert fails(capsys, "plan", "--base", tmp_path / "no").startswith(f"{tmp_path / 'no'} is no folder: ")
    assert fails(capsys, "plan", "--base", tmp_path).startswith(f"cannot read {tmp_path / 'config.json'} (")
