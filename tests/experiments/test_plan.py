"""What `plan` says, against what the compiler counts, what is in memory and what a mesh splits."""

import dataclasses
import gc
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
from subliminal_theory.language.corpus.base import token_loss
from subliminal_theory.language.hub.checkpoint import skeleton
from subliminal_theory.language.hub.families import Family, read_family
from subliminal_theory.language.model import config as shapes
from subliminal_theory.language.model.config import TransformerConfig
from subliminal_theory.language.model.lora import add_lora
from subliminal_theory.language.model.transformer import Text
from subliminal_theory.model import Model, leaves_by_path
from subliminal_theory.parallel import spec_of
from subliminal_theory.source import Examples
from subliminal_theory.study import Computation, Job, LowRank, Optimizer, PerRun, Run, Study, stages
from subliminal_theory.study.run import MATRICES
from subliminal_theory.study.starts import started
from tests.experiments.commands import fails
from tests.golden.make_families import FILE
from tests.language.checkpoints import write_checkpoint
from tests.study.speakers import OAK, OWL, ROWS, SOFT, TEACHER, checkpoint, student

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


def job_of(config: TransformerConfig, rows: int = 8, length: int = 128, **settings: Any) -> plan.Job:
    return plan.make_job(Family("test", config, {}), (rows, length), **settings)


def with_factors(model: Model, rank: int) -> Model:
    return jax.eval_shape(lambda model: add_lora(model, MATRICES, rank, 1.0, jax.random.key(0)), model)


def lowered(job: plan.Job, remat: bool = True) -> Any:
    """Loss and gradient of a job's student, as the compiler gets them, in float32."""
    teacher = skeleton(Family("test", job.config, {}), remat)
    own, shape = with_factors(teacher, job.rank) if job.rank else teacher, (job.rows, job.length)
    text = Text(jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape[:1], jnp.int32))

    def step(student: Any, teacher: Any, text: Any, tokens: Any, weights: Any) -> Any:
        channel = SoftLogits() if job.soft else SampledToken()
        targets = channel.targets(None, teacher(text)) if job.soft else tokens
        return jax.value_and_grad(
            lambda params: imitation_loss(channel, student.with_params(params)(text), targets, weights)
        )(student.params)

    weights = jax.ShapeDtypeStruct(shape, jnp.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "FEW", job.config.layers)  # the compiler counts the body of a loop once
        return jax.jit(step).lower(own, teacher, text, text.tokens, weights)


@pytest.mark.slow
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
    assert whole - low == 8 * 128 * (2 * (matrices + first) - 8 * 8 * sides)


def test_a_block_keeps_what_the_compiler_keeps() -> None:
    """Of two models that differ in depth alone, in float32."""
    jobs = [job_of(dataclasses.replace(GATED, layers=layers), soft=False) for layers in (2, 4)]
    two, four = (lowered(job, remat=False).compile().memory_analysis().temp_size_in_bytes for job in jobs)
    assert (four - two) / 2 / jobs[0].tokens == pytest.approx(plan.block_bytes(GATED, 128, number=4), rel=0.05)


@pytest.mark.parametrize("soft", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_logits_are_as_many_as_the_compiler_makes(soft: bool) -> None:
    """Of two models that differ in their vocabulary alone."""
    flat = dataclasses.replace(GATED, layers=1, width=32, heads=1, kv_heads=1, mlp_width=32)
    jobs = [job_of(dataclasses.replace(flat, vocabulary=vocabulary), soft=soft) for vocabulary in (2000, 4000)]
    few, many = (lowered(job).compile().memory_analysis().temp_size_in_bytes for job in jobs)
    assert many - few == pytest.approx(plan.logit_bytes(jobs[0], 1), rel=0.1)


# --- the run that is made


def training_bytes(job: plan.Job, teaches: bool) -> float:
    """What the compiled program of the study takes for a teacher or a student, and what else is in memory."""
    base, runs = skeleton(Family("test", job.config, {}), remat=True), (1, 4 * job.rows, job.length)
    tokens, positions = (jax.ShapeDtypeStruct(runs, dtype) for dtype in (jnp.int32, jnp.float32))
    text = Text(tokens, jax.ShapeDtypeStruct(runs[:2], jnp.int32))
    labels, targets = tokens if teaches else None, None if teaches or job.soft else tokens
    source = PerRun(Examples(text, job.rows, labels=labels, targets=targets, positions=positions))
    keys = jax.eval_shape(lambda: jax.random.key(0)[None])
    taught = Model(base.apply, jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), base.params))
    own = student(trains=LowRank(job.rank) if job.rank else None)
    model = taught if teaches else jax.eval_shape(lambda base, keys: started(base, own, keys), base, keys)
    channel = SoftLogits() if job.soft else SampledToken()
    seen, loss = (taught if job.soft else None, channel), None
    if teaches:
        seen, loss = (None, None), token_loss
    rest = Job(model.with_params(None), source, Optimizer(jnp.float32(1e-3), clip=1.0), 4, *seen, loss)
    how = Computation(shared=True, sequential=True, stacked=False, chunk=job.chunk)
    found = stages._train.lower(model.params, rest, keys, stops=(4,), how=how).compile().memory_analysis()
    others = job.parameters * 4 * ((job.rank == 0 or teaches) + (not teaches and not job.soft))
    return found.argument_size_in_bytes + found.temp_size_in_bytes + others


@pytest.mark.parametrize(
    ("rank", "soft"), [(0, True), (8, True), pytest.param(0, False, marks=pytest.mark.slow), (8, False)]
)
def test_a_student_takes_what_is_said(rank: int, soft: bool) -> None:
    """The base, the teacher, what trains and what training takes, in float32, where rows are few."""
    job = job_of(GATED, 2, 32, rank=rank, soft=soft)
    assert training_bytes(job, False) == pytest.approx(sum(plan.memory(job, 1)["student"].values()), rel=0.15)


def test_a_teacher_takes_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "LESSONS", 2)
    job = job_of(GATED, 2, plan.LESSON)
    assert training_bytes(job, True) == pytest.approx(sum(plan.memory(job, 1)["teacher"].values()), rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_parameters_in_memory_are_those_that_are_said(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the students of a small checkpoint's two traits train."""
    there = jax.live_arrays()  # of other tests; held, so that no new array takes their identity
    others = set(map(id, there))
    folder = write_checkpoint(tmp_path / "tiny", layers=1)
    world, counts = checkpoint(folder, OWL, OAK), []
    trains = LowRank(rank) if rank else None
    one = student(SOFT, ROWS, rows=16, trains=trains)
    models = (world.model, started(world.model, one, world.at(0).keys("start")))
    shapes = {leaf.shape[-2:] for model in models for leaf in jax.tree.leaves(model.all_params) if leaf.ndim > 1}
    train = stages._train

    def counted(*given: Any, **more: Any) -> Any:
        gc.collect()
        alive = [leaf for leaf in jax.live_arrays() if id(leaf) not in others and not leaf.is_deleted()]
        alive = [leaf for leaf in alive if leaf.shape[-2:] in shapes]
        counts.append(sum(leaf.nbytes for leaf in alive))
        return train(*given, **more)

    del models
    monkeypatch.setattr(stages, "_train", counted)
    Study(world).run(
        {"soft": Run(TEACHER, one), "sampled": Run(TEACHER, student(text=ROWS, rows=16, trains=trains))}
    )
    said = plan.memory(plan.make_job(read_family(folder), (8, 64), rank=rank), 1)["student"]
    expected = sum(said[name] for name in ("base, float32", "teacher, float32", "what trains, float32"))
    assert max(counts) == pytest.approx(expected, rel=0.05)


# --- what a mesh splits


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("devices", [2, 8])
def test_weights_are_split_as_on_a_mesh(name: str, devices: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GOLDEN[name]["config"]))
    family, mesh = read_family(tmp_path), jax.sharding.AbstractMesh((1, devices, 1), plan.AXES)
    job, held = plan.make_job(family, (8, 16), compute="bfloat16"), 0
    leaves = leaves_by_path(skeleton(family).params)
    for at, leaf in leaves.items():
        held += math.prod(NamedSharding(mesh, spec_of(at, leaf.shape, mesh)).shard_shape(leaf.shape))
    assert job.parameters == sum(math.prod(leaf.shape) for leaf in leaves.values())
    teacher, own = plan.memory(job, devices).values()
    assert {own[f"{what}, float32"] for what in ("base", "teacher", "what trains")} == {4 * held}
    assert own["gradients and clipped ones, float32"] == own["state of Adam, float32"] == 8 * held
    assert own["weights to compute with, bfloat16"] == 2 * teacher["weights to compute with, bfloat16"] == 4 * held
    sampled = plan.memory(dataclasses.replace(job, soft=False, taught=False), devices)
    assert sampled.keys() == {"student"}
    assert sampled["student"]["teacher, float32"] == 0
    assert sampled["student"]["weights to compute with, bfloat16"] == 2 * held


def test_factors_have_the_sizes_of_those_of_a_model() -> None:
    count = sum(leaf.size for leaf in jax.tree.leaves(with_factors(skeleton(Family("", GATED, {})), 8).params))
    job = job_of(GATED, rank=8)
    found = plan.memory(job, 1)["student"]
    assert found["what trains, float32"] == 4 * count
    assert found["state of Adam, float32"] == 8 * count
    assert found["base, float32"] == found["teacher, float32"] == 4 * job.parameters


def test_activations_and_logits() -> None:
    job = job_of(GATED)
    assert plan.logit_bytes(job, 1) == 8 * 128 * 1000 * 4 * 5 == 8 * plan.logit_bytes(job, 8)
    assert plan.logit_bytes(dataclasses.replace(job, chunk=64, soft=False), 1) == 64 * 1000 * 4 * 2
    assert (job.chunk, job_of(dataclasses.replace(GATED, vocabulary=100_000)).chunk) == (None, 1024)
    wide, narrow = (plan.activation_bytes(dataclasses.replace(job, compute=c), 1) for c in plan.COMPUTE)
    assert wide == 8 * 128 * (4 * 4 * 256 + plan.block_bytes(GATED, 128, number=4))
    assert narrow == 8 * 128 * (4 * 2 * 256 + plan.block_bytes(GATED, 128, number=2))
    assert plan.activation_bytes(job, 8) == wide / 8
    assert plan.gathered_bytes(job, 1) == 0
    assert plan.gathered_bytes(job, 8) == 4 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 768)


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
    """GiB in the step of the teacher, if it is fine-tuned, and of a student."""
    (line,) = [line for line in output.splitlines() if line.startswith(f"  {name}  ")]
    return [float(text) for text in re.findall(r"\d+\.\d+", line.removeprefix(f"  {name}  "))]


def test_table(qwen: Path, capsys: Capture) -> None:
    output = printed(capsys, "--base", qwen, "--channel", "sampled", "--chunk", 16 * 512)
    assert output.startswith(f"Qwen2ForCausalLM: {QWEN_SIZE:,} parameters; everything trained")
    assert "\n16 rows x 512 tokens a step, on 1 device\n" in output
    for name, each in (
        ("base, float32", 4),
        ("gradients and clipped ones, float32", 8),
        ("state of Adam, float32", 8),
    ):
        assert entry(output, name) == [pytest.approx(each * QWEN_SIZE / 2**30, abs=6e-4)] * 2
    assert entry(output, "teacher, float32") == [0, pytest.approx(4 * QWEN_SIZE / 2**30, abs=6e-4)]
    assert entry(output, "logits")[1] == pytest.approx(16 * 512 * 151936 * 4 * 2 / 2**30, abs=6e-4)
    # 6 N tokens, N = all parameters (the head is the embedding), attention, and blocks that compute again.
    blocks, down = QWEN_SIZE - 151936 * 896, 24 * 896 * 4864
    token = 6 * QWEN_SIZE + 4 * 4 * 24 * 896 * 512 + 2 * (blocks - down)
    (operations, each) = re.findall(r"([\d.e+]+) operations a step of a student, ([\d.e+]+) a token", output)[0]
    assert float(each) == pytest.approx(token, rel=2e-3)
    assert float(operations) == pytest.approx(token * 16 * 512, rel=2e-3)
    seconds = float(re.findall(r"([\d.]+) s for 1M tokens", output)[0])
    assert seconds == pytest.approx(1e6 * token / (0.45 * 989e12), rel=1e-2)


def test_devices_share(qwen: Path, capsys: Capture) -> None:
    eight, alone = (printed(capsys, "--base", qwen, *more) for more in (("--shards", 8), ()))
    for name in ("base, float32", "state of Adam, float32", "activations"):
        assert entry(eight, name)[1] == pytest.approx(entry(alone, name)[1] / 8, rel=0.01)
    assert entry(eight, "activations")[0] == entry(alone, "activations")[0]  # of lessons, which are few
    assert entry(eight, "matrices gathered from shares")[1] > 0
    shared, one = (float(re.findall(r"([\d.]+) s for 1M", text)[0]) for text in (eight, alone))
    assert one == pytest.approx(8 * shared, rel=0.02)
    twice = printed(capsys, "--base", qwen, "--flops", 2 * plan.SHARE * plan.PEAK)
    assert float(re.findall(r"([\d.]+) s for 1M", twice)[0]) == pytest.approx(one / 2, rel=0.01)


def test_what_takes_less(qwen: Path, capsys: Capture) -> None:
    full, lora, bare, narrow = (
        printed(capsys, "--base", qwen, *more.split())
        for more in ("", "--rank 8", "--rank 8 --teacher prompted --channel sampled", "--compute bfloat16")
    )
    assert "low-rank factors of rank 8 trained" in lora
    assert entry(lora, "total")[1] < entry(full, "total")[1] - 19 * QWEN_SIZE / 2**30
    assert entry(lora, "total")[0] == entry(full, "total")[0]
    (alone,) = entry(bare, "total")
    assert alone < entry(lora, "total")[1] - 4 * QWEN_SIZE / 2**30
    assert entry(narrow, "activations")[1] < 0.8 * entry(full, "activations")[1]


def test_says_how_many_devices_would_do(qwen: Path, capsys: Capture) -> None:
    """And they do, where fewer do not."""
    base = ("--base", qwen)
    found, need = fails(capsys, "plan", *base, "--memory", 8), max(entry(printed(capsys, *base), "total"))
    start = f"{qwen} needs {need:.1f} GiB a device, 1 device has 8: use at least "
    count = int(re.fullmatch(re.escape(start) + r"(\d+) devices or .*", found)[1])  # type: ignore[index]
    assert count > 1
    printed(capsys, *base, "--memory", 8, "--devices", count)
    for fewer in range(2, count):
        with pytest.raises(InputError, match=r"cannot share|devices have 8: use at least"):
            plan.main([*map(str, base), "--memory", "8", "--devices", str(fewer)])


def test_says_which_flags_would_do(qwen: Path, capsys: Capture) -> None:
    base = ("--base", qwen, "--tokens", "16x128")
    full, lora, bare = (
        max(entry(printed(capsys, *base, *flags.split()), "total"))
        for flags in ("", "--rank 16", f"--rank 16 {plan.PROMPTED}")
    )
    assert bare < lora < full
    for room, flags in ((lora, "--rank 16"), (lora - 0.1, f"--rank 16 {plan.PROMPTED}")):
        found = fails(capsys, "plan", *base, "--memory", room + 0.01)
        assert found.endswith(f" or {flags}")
        printed(capsys, *base, "--memory", room + 0.01, *flags.split())
    assert fails(capsys, "plan", *base, "--memory", bare - 0.01).endswith(" devices or fewer --tokens")
    assert fails(capsys, "plan", *base, "--memory", 0.01).endswith(": use fewer --tokens")


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
        ("--devices 3", "--devices 3 cannot share 16 rows evenly: take a number that divides 16, or"),
        ("--channel loud", "argument --channel: invalid choice: 'loud'"),
        ("--compute int8", "argument --compute: invalid choice: 'int8'"),
    ],
)
def test_refuses(arguments: str, message: str, qwen: Path, capsys: Capture) -> None:
    assert fails(capsys, "plan", "--base", qwen, *arguments.split()).startswith(message)


def test_refuses_what_is_no_checkpoint(tmp_path: Path, capsys: Capture) -> None:
    assert "--base" in fails(capsys, "plan")
    assert fails(capsys, "plan", "--base", tmp_path / "no").startswith(f"{tmp_path / 'no'} is not a folder: ")
    assert fails(capsys, "plan", "--base", tmp_path).startswith(f"cannot read {tmp_path / 'config.json'} (")
