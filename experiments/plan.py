"""The memory and time that training a checkpoint's model takes on N devices; no weights are read.

An estimate from config.json for computing in bfloat16, with Adam on float32 master weights or low-rank factors. Of
the meshes of `subliminal_theory.parallel` it takes the first that fits, `fsdp` before `tensor`.
Libraries, fragmentation and communication come on top.
"""

import argparse
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
from jax.sharding import AbstractMesh

from subliminal_theory.errors import InputError
from subliminal_theory.language.hub.checkpoint import skeleton
from subliminal_theory.language.hub.families import Family, read_family
from subliminal_theory.language.model.config import TransformerConfig
from subliminal_theory.model import path_name
from subliminal_theory.parallel import AXES, spec_of

from .app.contract import Parser

GIB = 2**30
# Dense bfloat16 operations a second in the data sheet of an H100 SXM, and the share of them that is assumed.
PEAK, SHARE = 989e12, 0.45
MOST_DEVICES, ADVISED_RANK = 1024, 16  # that an advice names
CHANNELS = ("soft", "sampled")
ACTIVATIONS = ("kept", "recomputed")


@dataclass(frozen=True)
class Group:
    """Parameters of one shape that have a rule of sharding in common."""

    name: str
    shape: tuple[int, ...]
    count: int

    @property
    def size(self) -> int:
        """Numbers in all of them."""
        return self.count * math.prod(self.shape)

    @property
    def adapted(self) -> bool:
        """Whether low-rank training gives them factors: the matrices of the blocks."""
        return self.name.startswith("layers/") and len(self.shape) == 2

    def split(self, mesh: AbstractMesh) -> float:
        """Numbers on each device."""
        ways = 1
        for axes in spec_of(self.name, self.shape, mesh):
            ways *= math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))
        return self.size / ways

    def factors(self, rank: int) -> tuple["Group", "Group"]:
        """A [inputs, rank] and B [rank, outputs] of each matrix."""
        inputs, outputs = self.shape
        a, b = (
            Group(f"{self.name}/a", (inputs, rank), self.count),
            Group(f"{self.name}/b", (rank, outputs), self.count),
        )
        return a, b


def groups_of(family: Family) -> list[Group]:
    """All parameters of a family's model, those of all blocks together."""
    config = family.config
    one_block = replace(config, layers=1, windowed=config.windowed[:1])  # all blocks have the same shapes
    leaves = jax.tree_util.tree_leaves_with_path(skeleton(replace(family, config=one_block)).params)
    named = [(path_name(path), leaf.shape) for path, leaf in leaves]
    return [Group(name, shape, config.layers if name.startswith("layers/") else 1) for name, shape in named]


@dataclass(frozen=True)
class Job:
    """What is trained, on what.

    Attributes:
        config, groups: of the model.
        rows, length: of a step's batch, in rows and in tokens of each.
        rank: of low-rank factors on all matrices of the blocks; 0 trains everything.
        soft: whether the teacher computes beside the student, else its tokens were sampled before.
        recomputed: whether a block's activations are computed again in the backward pass, else kept.
        chunk: positions on a device whose logits are there at once; all if None.
    """

    config: TransformerConfig
    groups: tuple[Group, ...]
    rows: int
    length: int
    rank: int = 0
    soft: bool = True
    recomputed: bool = False
    chunk: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.rows * self.length

    @property
    def parameters(self) -> int:
        """Numbers in the model."""
        return sum(group.size for group in self.groups)

    @property
    def most_rank(self) -> int:
        """The smallest side of a matrix that gets factors."""
        return min(min(group.shape) for group in self.groups if group.adapted)


def make_job(
    family: Family, tokens: tuple[int, int], rank: int, soft: bool, recomputed: bool, chunk: int | None
) -> Job:
    """A job, checked.

    Raises:
        InputError: rows longer than the context, or a rank that the smallest matrix does not have.
    """
    rows, length = tokens
    groups = tuple(groups_of(family))
    if length > family.config.context:
        raise InputError(f"--tokens: rows of {length} exceed the model's context of {family.config.context}")
    job = Job(family.config, groups, rows, length, rank, soft, recomputed, chunk)
    if not 0 <= rank <= job.most_rank:
        raise InputError(f"--rank must be from 0 (train everything) to {job.most_rank}, got {rank}")
    return job


# --- memory


def block_bytes(config: TransformerConfig, length: int, tensor: int = 1, number: int = 2) -> float:
    """Bytes a token that one block keeps for its backward pass, numbers of `number` bytes.

    number * (5 width + (2 queries + 2 keys + m mlp_width) / tensor) + (8 + number) heads length / tensor: the
    residual stream and the norms' outputs, queries, keys, values and what they mix, m = 5 (gated) or 3 of the MLP,
    and three tables of attention's shares, two of them in float32. Norms behind add 2 widths, a cap of the scores
    four tables. In float32 on a CPU the compiler keeps 0.95 to 1.13 of it, in models of six shapes.
    """
    queries, keys = config.heads * config.head_width, config.kv_heads * config.head_width
    hidden = (5 if config.gated else 3) * config.mlp_width
    linear = (7 if config.post_norm else 5) * config.width + (2 * queries + 2 * keys + hidden) / tensor
    table = 8 + number + (0 if config.attention_cap is None else 16)
    return number * linear + table * config.heads * length / tensor


def activation_bytes(job: Job, mesh: AbstractMesh, recomputed: bool, number: int = 2) -> float:
    """Bytes of activations on a device when the backward pass begins.

    All of `block_bytes` for each block, or of one block besides the residual stream before each.
    """
    tokens = job.tokens / (mesh.shape["data"] * mesh.shape["fsdp"])
    one, stream = block_bytes(job.config, job.length, mesh.shape["tensor"], number), number * job.config.width
    layers = job.config.layers
    return tokens * (layers * stream + one if recomputed else layers * one + stream)


def logit_bytes(job: Job, mesh: AbstractMesh) -> float:
    """Bytes of float32 logits on a device, which has two tables of them at once, or five with a teacher's.

    So many does the compiler make for a CPU; for accelerators it may join some.
    """
    tokens = job.tokens / (mesh.shape["data"] * mesh.shape["fsdp"])
    at_once = min(tokens, job.chunk or tokens)
    return at_once * job.config.vocabulary / mesh.shape["tensor"] * 4 * (5 if job.soft else 2)


def gathered_bytes(job: Job, mesh: AbstractMesh) -> float:
    """Bytes of bfloat16 matrices that a device has put together from the shares of others.

    Kept for the backward pass with the activations, else those of one block or one table at a time.
    """
    if mesh.shape["fsdp"] == 1:
        return 0.0
    whole = make_abstract(1, 1, mesh.shape["tensor"])
    sizes = {group: group.split(whole) for group in job.groups}
    block = sum(size / job.config.layers for group, size in sizes.items() if group.adapted)
    table = max(size for group, size in sizes.items() if not group.adapted)
    return 2 * (max(block, table) if job.recomputed else sum(sizes.values()))


def make_abstract(*sizes: int) -> AbstractMesh:
    """A mesh without devices."""
    return AbstractMesh(sizes, AXES)


def memory(job: Job, mesh: AbstractMesh) -> dict[str, float]:
    """Bytes on a device, by what they hold."""
    held = sum(group.split(mesh) for group in job.groups)
    adapted = [group for group in job.groups if group.adapted]
    if job.rank:
        factors = sum(factor.split(mesh) for group in adapted for factor in group.factors(job.rank))
        found = {
            "frozen weights, bfloat16": 2 * held,
            "low-rank factors, float32": 4 * factors,
            "gradients, float32": 4 * factors,
            "state of Adam, float32": 8 * factors,
        }
    else:
        found = {
            "master weights, float32": 4 * held,
            "weights to compute with, bfloat16": 2 * held,
            "gradients, float32": 4 * held,
            "state of Adam, float32": 8 * held,
        }
    if job.soft:
        found["teacher's weights, bfloat16"] = 2 * held
    found["matrices gathered from shares"] = gathered_bytes(job, mesh)
    found[f"activations, {ACTIVATIONS[job.recomputed]}"] = activation_bytes(job, mesh, job.recomputed)
    found["logits"] = logit_bytes(job, mesh)
    return found


def meshes(job: Job, devices: int) -> Iterator[AbstractMesh]:
    """The meshes of so many devices that can share out rows and heads evenly: those of a small `tensor` first.

    Of those of one `tensor` the largest `fsdp` is first: it saves memory, and `data` does not.
    """
    for tensor in (size for size in range(1, devices + 1) if devices % size == 0):
        rest = devices // tensor
        if job.config.heads % tensor == 0 and job.rows % rest == 0:
            yield from (
                make_abstract(rest // size, size, tensor) for size in range(rest, 0, -1) if rest % size == 0
            )


def best_mesh(job: Job, devices: int, room: float) -> tuple[AbstractMesh | None, float]:
    """The first mesh on which a job fits into `room` bytes a device, and the least bytes of any.

    Raises:
        InputError: no mesh can share out the rows and heads.
    """
    least = math.inf
    for mesh in meshes(job, devices):
        needed = sum(memory(job, mesh).values())
        least = min(least, needed)
        if needed <= room:
            return mesh, needed
    if least == math.inf:
        raise InputError(
            f"--devices {devices} cannot share {job.rows} rows and {job.config.heads} heads evenly: take a number "
            f"that divides {job.rows}, or other rows in --tokens"
        )
    return None, least


def require_room(job: Job, where: Path, devices: int, room: float) -> AbstractMesh:
    """The mesh on which a job fits.

    Raises:
        InputError: there is none; says how many devices would do.
    """
    mesh, least = best_mesh(job, devices, room)
    if mesh is not None:
        return mesh
    advice = _enough(job, devices, room) + _leaner(job, devices, room)
    have = "1 device has" if devices == 1 else f"{devices} devices have"
    raise InputError(
        f"{where} needs {least / GIB:.1f} GiB a device, {have} {room / GIB:.4g}: use {' or '.join(advice)}"
    )


def _enough(job: Job, devices: int, room: float) -> list[str]:
    """The least number of devices that would do, if there is one."""
    for count in range(devices + 1, MOST_DEVICES + 1):
        if any(sum(memory(job, mesh).values()) <= room for mesh in meshes(job, count)):
            return [f"at least {count} devices"]
    return []


def _leaner(job: Job, devices: int, room: float) -> list[str]:
    """Flags with which as many devices would do, those that change the least; fewer tokens if there are none."""
    rank = job.rank or min(ADVISED_RANK, job.most_rank)
    others = {
        f"--rank {rank}": replace(job, rank=rank),
        "--activations recomputed": replace(job, recomputed=True),
        f"--rank {rank} --activations recomputed": replace(job, rank=rank, recomputed=True),
    }
    fitting = [flags for flags, other in others.items() if best_mesh(other, devices, room)[0] is not None]
    return fitting[:1] or ["fewer --tokens"]


# --- time


def operations(job: Job) -> float:
    """Floating-point operations of a step.

    With M the numbers in all matrices that multiply (the embedding counts if it is the output matrix too), L those
    in the blocks, and A = 4 layers heads head_width length the products of attention, a token takes F = 2 M + A
    forward and 2 F backward: 6 M + 3 A. Recomputed activations add 2 L + A, a teacher F. Low-rank factors spare
    the gradients of matrices, which leaves 4 M + 3 A, and that of what the first block reads; they themselves add
    6 r (inputs + outputs) for each matrix.
    """
    config = job.config
    blocks = sum(group.size for group in job.groups if group.adapted)
    matrices = blocks + config.vocabulary * config.width
    attention = 4 * config.layers * config.heads * config.head_width * job.length
    forward = 2 * matrices + attention
    readers = ("query", "key", "value", *(("gate", "up") if config.parallel else ()))
    first = sum(math.prod(g.shape) for g in job.groups if g.adapted and g.name.split("/")[-2] in readers)
    token = forward + 2 * forward - (2 * (matrices + first) if job.rank else 0)
    token += 6 * sum(factor.size for group in job.groups if group.adapted for factor in group.factors(job.rank))
    token += 2 * blocks + attention if job.recomputed else 0
    token += forward if job.soft else 0
    return float(token) * job.tokens


# --- the command


def main(arguments: Sequence[str]) -> int:
    """Print the estimate; 0 if it fits."""
    chosen = _parser().parse_args(arguments)
    for name in ("devices", "memory", "flops", "chunk"):
        value = getattr(chosen, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--{name} must be above 0 and finite, got {value}")
    family = read_family(chosen.base)
    soft, recomputed = chosen.channel == "soft", chosen.activations == "recomputed"
    job = make_job(family, _tokens(chosen.tokens), chosen.rank, soft, recomputed, chosen.chunk)
    mesh = require_room(job, chosen.base, chosen.devices, chosen.memory * GIB)
    print(report(job, family.architecture, mesh, chosen.memory, chosen.flops))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser("plan", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--base", type=Path, required=True, help="folder with the config.json of a checkpoint")
    add("--devices", type=int, default=1, help="how many there are (default 1)")
    add("--memory", type=float, default=80.0, help="of a device, in GiB (default 80)")
    add("--tokens", default="16x512", help="rows of a step x tokens of a row (default 16x512)")
    add("--rank", type=int, default=0, help="of low-rank factors on all matrices of blocks (default 0: none)")
    channel = (
        "soft: the teacher computes beside the student; sampled: its tokens were sampled before (default soft)"
    )
    add("--channel", choices=CHANNELS, default="soft", help=channel)
    add("--activations", choices=ACTIVATIONS, default="kept", help="for the backward pass (default kept)")
    add("--chunk", type=int, default=None, help="positions whose logits a device has at once (default all)")
    speed = f"operations a second that a device reaches (default {100 * SHARE:g}%% of {PEAK:.3g})"
    add("--flops", type=float, default=SHARE * PEAK, help=speed)
    return parser


def _tokens(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9][0-9]{0,8})[x*]([1-9][0-9]{0,8})", text)
    if not found:
        raise InputError(f"--tokens takes ROWSxLENGTH such as 16x512, got {text!r}")
    return int(found[1]), int(found[2])


def report(job: Job, architecture: str, mesh: AbstractMesh, room: float, flops: float) -> str:
    """The table of an estimate, `room` in GiB."""
    alone, here = memory(job, make_abstract(1, 1, 1)), memory(job, mesh)
    trained = f"low-rank factors of rank {job.rank}" if job.rank else "everything"
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    devices = math.prod(mesh.shape.values())
    other = activation_bytes(job, mesh, not job.recomputed)
    seconds = operations(job) / job.tokens * 1e6 / (devices * flops)
    lines = [
        f"{architecture}: {job.parameters:,} parameters; {trained} trained",
        f"{job.rows} rows x {job.length} tokens a step",
        f"mesh: {sizes}",
        f"{'GiB':36} {'one device':>12} {'each of ' + str(devices):>12}",
        *(f"  {name:34} {alone[name] / GIB:12.3f} {size / GIB:12.3f}" for name, size in here.items()),
        f"  {'total':34} {sum(alone.values()) / GIB:12.3f} {sum(here.values()) / GIB:12.3f}   of {room:g}",
        f"  (activations {ACTIVATIONS[not job.recomputed]} would take {other / GIB:.3f} on each)",
        f"{operations(job):.3e} operations a step, {operations(job) / job.tokens:.3e} a token",
        f"{seconds:.3g} s for 1M tokens at {flops:.3g} operations a second on each device, an assumption",
    ]
    return "\n".join(lines)
