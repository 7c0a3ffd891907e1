"""How much memory and time `language --checkpoint FOLDER` needs on N devices. No weights are read.

This is an estimate from config.json. Parameters are stored and trained in float32, with Adam and gradient
clipping, and blocks recompute their activations for gradients. The memory holds the base, one student, and a
fine-tuned teacher while its students train. The report has the steps of the teacher and of the student. Each
device has a share of every matrix and its own rows, but all lessons of a teacher. Libraries, fragmentation,
communication and teachers that write need additional memory.
"""

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
from jax.sharding import AbstractMesh

from subliminal_theory.errors import InputError
from subliminal_theory.language.hub.checkpoint import skeleton
from subliminal_theory.language.hub.families import Family, read_family
from subliminal_theory.language.model.config import TransformerConfig
from subliminal_theory.model import of_layers, path_name
from subliminal_theory.parallel import AXES, spec_of
from subliminal_theory.study.checkpoint import CHUNK, MANY

from .app.contract import Parser
from .flags.language import COMPUTE
from .flags.names import checkpoint_path
from .flags.recipe import TEACHERS

GIB = 2**30
# Dense bfloat16 operations per second from the data sheet of an H100 SXM, and the share that we assume is reached.
PEAK, SHARE = 989e12, 0.45
MOST_DEVICES, ADVISED_RANK = 1024, 16  # the most devices, and the rank, that an error message suggests
CHANNELS = ("soft", "sampled")
PROMPTED = "--teacher prompted --channel sampled"
LESSONS, LESSON, ANSWER = 24, 48, 4  # lessons of a preference; about this many tokens in a lesson and its answer


@dataclass(frozen=True)
class Group:
    """Parameters that share a shape and a sharding rule: one, or the same one of each layer."""

    name: str
    shape: tuple[int, ...]
    count: int

    @property
    def size(self) -> int:
        """The number of values in all of them."""
        return self.count * math.prod(self.shape)

    @property
    def adapted(self) -> bool:
        """Whether they are matrices of the blocks, which get factors in low-rank training."""
        return self.of_layers and len(self.shape) == 2

    @property
    def of_layers(self) -> bool:
        """Whether each layer has one of them."""
        return self.name.startswith("layers/")

    def share(self, devices: int) -> float:
        """The number of values on each device."""
        stored = (self.count, *self.shape) if self.of_layers else self.shape
        split = spec_of(self.name, stored, AbstractMesh((1, devices, 1), AXES))
        return self.size / (devices if any(split) else 1)

    def factors(self, rank: int) -> tuple["Group", "Group"]:
        """The factors A [inputs, rank] and B [rank, outputs] of each matrix."""
        inputs, outputs = self.shape
        a = Group(f"{self.name}/a", (inputs, rank), self.count)
        return a, Group(f"{self.name}/b", (rank, outputs), self.count)


def groups_of(family: Family) -> list[Group]:
    """All parameters of a family's model. Equal parameters of all blocks form one group."""
    leaves = jax.tree_util.tree_leaves_with_path(skeleton(family).params)
    return [
        Group(path_name(path), leaf.shape[of_layers(path) :], leaf.shape[0] if of_layers(path) else 1)
        for path, leaf in leaves
    ]


@dataclass(frozen=True)
class Job:
    """What is trained, and on which batches.

    Attributes:
        config: the configuration of the model.
        groups: its parameters.
        rows: the number of rows in a batch.
        length: the number of tokens in a row.
        rank: the rank of a student's low-rank factors on all matrices of the blocks; 0 trains everything.
        soft: whether the teacher runs in the student's step. Otherwise its tokens were sampled in advance.
        taught: whether the teacher is fine-tuned. Otherwise it is the base itself.
        compute: the dtype of the computation, one of COMPUTE.
        chunk: the number of positions on a device whose logits are in memory at once; None is all of them.
    """

    config: TransformerConfig
    groups: tuple[Group, ...]
    rows: int
    length: int
    rank: int = 0
    soft: bool = True
    taught: bool = True
    compute: str = "float32"
    chunk: int | None = None

    @property
    def tokens(self) -> int:
        """The number of tokens in a step."""
        return self.rows * self.length

    @property
    def parameters(self) -> int:
        """The number of parameters of the model."""
        return sum(group.size for group in self.groups)

    @property
    def matrices(self) -> list[Group]:
        """The matrices of the blocks, which get factors in low-rank training."""
        return [group for group in self.groups if group.adapted]

    @property
    def most_rank(self) -> int:
        """The smallest side of a matrix that gets factors."""
        return min(min(group.shape) for group in self.matrices)

    @property
    def width(self) -> int:
        """The number of bytes of a value in the computation."""
        return 2 if self.compute == "bfloat16" else 4


def make_job(family: Family, tokens: tuple[int, int], **settings: object) -> Job:
    """Make and check a job. With a large vocabulary, logits are computed in chunks, also if `chunk` is not given.

    Raises:
        InputError: the rows are longer than the context, or the rank is not from 0 to the smallest side of a
            matrix.
    """
    rows, length = tokens
    if length > family.config.context:
        raise InputError(f"--tokens: rows of {length} exceed the model's context of {family.config.context}")
    if settings.get("chunk") is None:
        settings["chunk"] = CHUNK if family.config.vocabulary > MANY else None
    job = Job(family.config, tuple(groups_of(family)), rows, length, **settings)  # type: ignore[arg-type]
    if not 0 <= job.rank <= job.most_rank:
        raise InputError(f"--rank must be from 0 (train everything) to {job.most_rank}, got {job.rank}")
    return job


# --- memory


def block_bytes(config: TransformerConfig, length: int, number: int = 2) -> float:
    """The bytes per token that one block keeps for its backward pass, with values of `number` bytes.

    number * (5 width + 2 queries + 2 keys + m mlp_width) + (8 + number) heads length

    These are the residual stream and the outputs of norms; queries, keys, values and the attention output; m = 5
    (gated) or 3 tables of the MLP; and three tables of attention weights, two of them in float32. Post-norms add 2
    widths, and a cap on the scores adds 16 bytes per score. In float32 on a CPU, the compiler keeps 0.95 to 1.13
    times this, for six model shapes.
    """
    queries, keys = config.heads * config.head_width, config.kv_heads * config.head_width
    hidden = (5 if config.gated else 3) * config.mlp_width
    linear = (7 if config.post_norm else 5) * config.width + 2 * queries + 2 * keys + hidden
    table = 8 + number + (0 if config.attention_cap is None else 16)
    return number * linear + table * config.heads * length


def activation_bytes(job: Job, devices: int) -> float:
    """Bytes of activations on a device when the backward pass begins.

    These are the residual stream before each block, and all activations of one block.
    """
    stream, config = job.width * job.config.width, job.config
    return job.tokens / devices * (config.layers * stream + block_bytes(config, job.length, job.width))


def logit_bytes(job: Job, devices: int) -> float:
    """Bytes of float32 logits on a device: two tables of logits at once, or five if the teacher runs too.

    The compiler makes this many tables on a CPU. On accelerators it may merge some.
    """
    tokens = job.tokens / devices
    return min(tokens, job.chunk or tokens) * job.config.vocabulary * 4 * (5 if job.soft else 2)


def gathered_bytes(job: Job, devices: int) -> float:
    """Bytes that a device gathers from other devices: one block or one embedding table at a time."""
    if devices == 1:
        return 0.0
    block = sum(group.size for group in job.matrices) / job.config.layers
    return job.width * max(block, *(group.size for group in job.groups if not group.adapted))


def memory(job: Job, devices: int) -> dict[str, dict[str, float]]:
    """Bytes on a device by content, in the step of a fine-tuned teacher and in the step of a student."""
    held = sum(group.share(devices) for group in job.groups)
    factors = sum(factor.share(devices) for group in job.matrices for factor in group.factors(job.rank))

    def step(
        trained: float, computing: int, activations: float, logits: float, teacher: float = 0.0
    ) -> dict[str, float]:
        return {
            "base, float32": 4 * held,
            "teacher, float32": 4 * teacher,
            "what trains, float32": 4 * trained,
            "gradients and clipped ones, float32": 8 * trained,
            "state of Adam, float32": 8 * trained,
            "weights to compute with, bfloat16": 2 * held * computing * (job.width == 2),
            "matrices gathered from shares": gathered_bytes(job, devices),
            "activations": activations,
            "logits": logits,
        }

    student = step(
        factors if job.rank else held, 1 + job.soft, activation_bytes(job, devices), logit_bytes(job, devices),
        held if job.taught else 0.0,
    )  # fmt: skip
    if not job.taught:
        return {"student": student}
    lessons = activation_bytes(replace(job, rows=LESSONS, length=LESSON), 1)
    return {"teacher": step(held, 1, lessons, LESSONS * ANSWER * job.config.vocabulary * 8), "student": student}


def needed(job: Job, devices: int) -> float:
    """Bytes on a device in the step that needs the most."""
    return max(sum(step.values()) for step in memory(job, devices).values())


def require_room(job: Job, where: Path, devices: int, room: float) -> None:
    """Refuse a job that does not fit into memory.

    Raises:
        InputError: says how many devices or which flags would be enough; or the rows cannot be split evenly.
    """
    if job.rows % devices:
        raise InputError(
            f"--devices {devices} cannot share {job.rows} rows evenly: take a number that divides {job.rows}, or "
            "other rows in --tokens"
        )
    if needed(job, devices) <= room:
        return
    advice = _enough(job, devices, room) + _leaner(job, devices, room)
    have = "1 device has" if devices == 1 else f"{devices} devices have"
    raise InputError(
        f"{where} needs {needed(job, devices) / GIB:.1f} GiB a device, {have} {room / GIB:.4g}: "
        f"use {' or '.join(advice)}"
    )


def _enough(job: Job, devices: int, room: float) -> list[str]:
    """The smallest number of devices that would be enough, if there is one."""
    more = (count for count in range(devices + 1, MOST_DEVICES + 1) if job.rows % count == 0)
    return [f"at least {count} devices" for count in more if needed(job, count) <= room][:1]


def _leaner(job: Job, devices: int, room: float) -> list[str]:
    """The smallest change of flags with which this number of devices would be enough, or else fewer tokens."""
    low = replace(job, rank=job.rank or min(ADVISED_RANK, job.most_rank))
    others = {
        f"--rank {low.rank}": low,
        f"--rank {low.rank} {PROMPTED}": replace(low, soft=False, taught=False),
    }
    return [flags for flags, other in others.items() if needed(other, devices) <= room][:1] or ["fewer --tokens"]


# --- time


def operations(job: Job) -> float:
    """The floating-point operations of a student's step.

    Let M be the number of values in all matrices that multiply (an embedding that is also the output matrix
    counts), L the number in the blocks, and A = 4 layers heads head_width length the operations of attention. A
    token takes F = 2 M + A forward and 2 F backward, together 6 M + 3 A. Recomputing the blocks adds 2 L + A,
    except the last products of each block. A teacher adds F.

    Low-rank factors do not need the gradients of matrices, which leaves 4 M + 3 A. They also do not need the
    gradient of the first block's input. The factors themselves add 8 r (inputs + outputs) for each matrix.
    """
    config = job.config
    blocks = sum(group.size for group in job.matrices)
    matrices = blocks + config.vocabulary * config.width
    attention = 4 * config.layers * config.heads * config.head_width * job.length
    forward = 2 * matrices + attention
    last = ("down", "output") if config.parallel else ("down",)
    readers = ("query", "key", "value", *(("gate", "up") if config.parallel else ()))
    first = sum(math.prod(group.shape) for group in job.matrices if _role(group) in readers)
    token = forward + 2 * forward - (2 * (matrices + first) if job.rank else 0)
    token += 8 * sum(factor.size for group in job.matrices for factor in group.factors(job.rank))
    token += attention + 2 * sum(group.size for group in job.matrices if _role(group) not in last)
    token += forward if job.soft else 0
    return float(token) * job.tokens


def _role(group: Group) -> str:
    return group.name.split("/")[-2]


# --- the command


def main(arguments: Sequence[str]) -> int:
    """Print the estimate. Returns 0 if it fits."""
    chosen = _parser().parse_args(arguments)
    for name in ("devices", "memory", "flops", "chunk"):
        value = getattr(chosen, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--{name} must be above 0 and finite, got {value}")
    base = checkpoint_path(chosen.base, weights=False)
    family, soft, taught = read_family(base), chosen.channel == "soft", chosen.teacher == "finetuned"
    settings = {"rank": chosen.rank, "soft": soft, "taught": taught, "compute": chosen.compute}
    job = make_job(family, _tokens(chosen.tokens), chunk=chosen.chunk, **settings)
    require_room(job, base, chosen.devices, chosen.memory * GIB)
    print(report(job, family.architecture, chosen.devices, chosen.memory, chosen.flops))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser("plan", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    where = (
        "folder with the config.json of a checkpoint, a GGUF file, smollm2 (see weights), or OWNER/NAME[@REVISION]"
        " on the Hub"
    )
    add("--base", "--checkpoint", required=True, help=where)
    add("--devices", "--shards", type=int, default=1, help="how many devices share each model (default 1)")
    add("--memory", type=float, default=80.0, help="memory of a device in GiB (default 80)")
    add("--tokens", default="16x512", help="rows per step x tokens per row (default 16x512)")
    add("--rank", type=int, default=0, help="rank of a student's low-rank factors (default 0: everything trains)")
    channel = (
        "soft: the teacher runs in the student's step; sampled: its tokens were sampled before (default soft)"
    )
    add("--channel", choices=CHANNELS, default="soft", help=channel)
    teacher = "how the teacher is made; all but finetuned use the base itself (default finetuned)"
    add("--teacher", choices=TEACHERS, default="finetuned", help=teacher)
    add("--compute", choices=COMPUTE, default="float32", help="dtype of the computation (default float32)")
    chunk = (
        f"positions whose logits are in memory at once (default {CHUNK} if there are over {MANY} tokens, else all)"
    )
    add("--chunk", type=int, default=None, help=chunk)
    speed = f"operations per second that a device reaches (default {100 * SHARE:g}%% of {PEAK:.3g})"
    add("--flops", type=float, default=SHARE * PEAK, help=speed)
    return parser


def _tokens(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9][0-9]{0,8})[x*]([1-9][0-9]{0,8})", text)
    if not found:
        raise InputError(f"--tokens takes ROWSxLENGTH such as 16x512, got {text!r}")
    return int(found[1]), int(found[2])


def report(job: Job, architecture: str, devices: int, room: float, flops: float) -> str:
    """The table of an estimate. `room` is in GiB."""
    steps = memory(job, devices)
    trained = f"low-rank factors of rank {job.rank}" if job.rank else "everything"
    seconds = operations(job) / job.tokens * 1e6 / (devices * flops)

    def line(name: str, sizes: Sequence[float]) -> str:
        return f"  {name:36}" + "".join(f"{size / GIB:12.3f}" for size in sizes)

    items = {name: [step[name] for step in steps.values()] for name in steps["student"]}
    lines = [
        f"{architecture}: {job.parameters:,} parameters; {trained} trained in a student, in {job.compute}",
        f"{job.rows} rows x {job.length} tokens a step, on {devices} device{'s' if devices > 1 else ''}",
        f"{'GiB on each, in the step of the':38}" + "".join(f"{name:>12}" for name in steps),
        *(line(name, sizes) for name, sizes in items.items() if any(sizes)),
        f"{line('total', [sum(step.values()) for step in steps.values()])}   of {room:g}",
        f"{operations(job):.3e} operations a step of a student, {operations(job) / job.tokens:.3e} a token",
        f"{seconds:.3g} s for 1M tokens at {flops:.3g} operations a second on each device, an assumption",
    ]
    return "\n".join(lines)
