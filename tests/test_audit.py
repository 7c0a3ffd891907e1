from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subliminal_theory.audit import (
    audit,
    refuse_repeated_rows,
    refuse_shared_keys,
    refuse_wrong_channel,
    require_same_template,
)
from subliminal_theory.channel import SampledToken, SoftLogits, SquaredError, Subset, TopK, WeightedSum
from subliminal_theory.distill import distill
from subliminal_theory.divergence import JensenShannon, ReverseKL
from subliminal_theory.errors import InputError
from subliminal_theory.inits import Interpolated, Perturbed, initialise, permute_neurons
from subliminal_theory.model import Model
from subliminal_theory.origins import refuse_shared_start, refuse_trained_weights
from subliminal_theory.source import Batch, Examples

RUNS, LOGITS = 3, 5
RNG = np.random.default_rng(0)


def draw():
    """Three runs of a network; its biases start at 0."""
    return {"kernel": RNG.normal(size=(RUNS, 4, LOGITS)), "bias": np.zeros((RUNS, LOGITS))}


TEACHER_INIT, OTHER_INIT = draw(), draw()
TEACHER = jax.tree.map(lambda leaf: leaf + 0.1 * RNG.normal(size=leaf.shape), TEACHER_INIT)
BATCH = Batch(np.zeros((8, 4)), np.ones(8))


def good(**changes):
    """A proper set-up with changes."""
    return {
        "student_init": TEACHER_INIT,
        "teacher_init": TEACHER_INIT,
        "teacher": TEACHER,
        "channel": Subset((3, 4)),
        "logits": LOGITS,
        "batch": BATCH,
        "private": (0, 1, 2),
        **changes,
    }


@dataclass(frozen=True)
class WithLabel(SoftLogits):
    """Charges for a label too."""

    def loss(self, student_logits, targets):
        label = -jax.nn.log_softmax(student_logits)[..., 0]
        return super().loss(student_logits, targets) + 0.01 * label


@dataclass(frozen=True)
class TimesLabel(SoftLogits):
    """Stationary at equality, but weighs examples by a label."""

    def loss(self, student_logits, targets):
        return super().loss(student_logits, targets) * (1 - 0.05 * jax.nn.log_softmax(student_logits)[..., 0])


@dataclass(frozen=True)
class LabelsOfABatch(SoftLogits):
    """Weighs positions by labels that it holds itself."""

    def loss(self, student_logits, targets):
        labels = jnp.arange(student_logits.shape[0]) % 3
        return super().loss(student_logits, targets) * (1 + labels)

    def metric(self, logits, tangent):
        return super().metric(logits, tangent) * (1 + jnp.arange(logits.shape[0]) % 3)[:, None]


@dataclass(frozen=True)
class OfSixteen(SoftLogits):
    """Holds the labels of batches of 16."""

    def loss(self, student_logits, targets):
        return super().loss(student_logits, targets) * jnp.ones(16)


@dataclass(frozen=True)
class Maximum(SquaredError):
    """Pushes the student away."""

    def loss(self, student_logits, targets):
        return -super().loss(student_logits, targets)

    def metric(self, logits, tangent):
        return -super().metric(logits, tangent)


@dataclass(frozen=True)
class OtherMetric(SoftLogits):
    def metric(self, logits, tangent):
        return 1.01 * super().metric(logits, tangent)


@dataclass(frozen=True)
class FalseVisible(SoftLogits):
    def visible(self, n):
        return jnp.arange(n) > 2


@dataclass(frozen=True)
class Huber(SoftLogits):
    """A user's own channel with a metric that is right: log cosh of the difference."""

    def targets(self, key, teacher_logits):
        return teacher_logits

    def loss(self, student_logits, targets):
        return jnp.sum(jnp.log(jnp.cosh(student_logits - targets)), axis=-1)

    def metric(self, logits, tangent):
        return tangent


@dataclass(frozen=True)
class ToSomethingElse(SquaredError):
    """Squared error against the teacher's probabilities."""

    def targets(self, key, teacher_logits):
        return jax.nn.softmax(teacher_logits)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"private": ()},
        {"student_init": OTHER_INIT},
        {"student_init": OTHER_INIT, "cross_init": True},
        {"student_init": jax.tree.map(lambda leaf: np.roll(leaf, 1, 0), TEACHER_INIT), "cross_init": True},
        {"student_init": {"kernel": np.zeros((RUNS, 4, 9)), "bias": np.zeros((RUNS, 9))}},
        {"teacher": {**TEACHER, "bias": TEACHER_INIT["bias"]}},  # the teacher's bias was not trained
        {"channel": SoftLogits(0.5), "private": ()},
        {"channel": SquaredError(), "private": ()},
        {"channel": SquaredError([0, 0, 0, 1, 2])},
        {"channel": Subset(np.arange(LOGITS) > 2, Subset((2, 3), SquaredError()))},
        {"channel": Subset((3, 4), SampledToken())},
        {"channel": Subset((3, 4), SampledToken(0.0))},
        {"channel": WeightedSum((SampledToken(), SoftLogits()), (1.0, 0.5)), "private": ()},
        {"channel": Subset((3, 4), WeightedSum((SampledToken(), ReverseKL(2.0)), (1.0, 0.5)))},
        {"channel": TopK(3, JensenShannon()), "private": ()},
        {"channel": Huber(), "private": ()},
        {"outputs": LOGITS},
        {"labels": np.arange(8) % 3},
        {"key": jax.random.key(3)},
    ],
)
def test_good_set_ups_pass(changes) -> None:
    audit(**good(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"student_init": TEACHER},
            "the student starts from the TRAINED teacher's bias: start it from the teacher's",
        ),
        (
            {"student_init": {**TEACHER_INIT, "kernel": TEACHER["kernel"]}},
            "the student starts from the TRAINED teacher's kernel: start it from the teacher's initialization",
        ),
        (
            {"student_init": {**OTHER_INIT, "kernel": TEACHER["kernel"]}, "cross_init": True},
            "the student starts from the TRAINED teacher's kernel",
        ),
        (
            {"batch": Batch(BATCH.inputs, BATCH.weights, labels=np.zeros(8, int))},
            "the student's batches carry labels: use a source without them",
        ),
        (
            {"channel": WithLabel(), "private": ()},
            r"the student's loss has gradient 0\.0\d+ where it already equals",
        ),
        (
            {"channel": Subset((0, 3, 4), WithLabel()), "private": ()},
            r"the student's loss has gradient 0\.0\d+ where",
        ),
        (
            {"channel": ToSomethingElse(), "private": ()},
            r"the student's loss has gradient [\d.]+ where it already eq",
        ),
        (
            {"channel": WeightedSum((SampledToken(), WithLabel()), (1.0, 0.5)), "private": ()},
            r"the student's loss has gradient 0\.0\d+ where",
        ),
        ({"channel": TimesLabel(), "private": ()}, "the metric of TimesLabel differs by"),
        ({"channel": Subset((0, 3), TimesLabel()), "private": ()}, "the metric of Subset differs by"),
        ({"channel": LabelsOfABatch(), "private": ()}, "the loss of LabelsOfABatch treats positions differently"),
        (
            {"channel": OfSixteen(), "private": ()},
            r"the loss of OfSixteen fails on logits \(8, 5\): .*alone, not on d",
        ),
        ({"channel": Maximum(), "private": ()}, "the student's loss is smaller away from the teacher's logits"),
        (
            {"channel": OtherMetric(), "private": ()},
            r"the metric of OtherMetric differs by 0\.0099 of its size",
        ),
        ({"channel": FalseVisible()}, "the loss of FalseVisible depends on logit 0, which `visible` excludes"),
        (
            {"outputs": 9},
            "the student's network has 9 outputs but 5 logits are declared: hidden features must not",
        ),
        ({"private": (2, 3)}, "the channel shows logit 3, in which the trait itself is read"),
        ({"channel": SoftLogits()}, "the channel shows logit 0, in which the trait itself is read"),
        (
            {"channel": SquaredError([0, 1, 0, 1, 1])},
            "the channel shows logit 1, in which the trait itself is read",
        ),
        (
            {"channel": Subset((2, 4), SampledToken())},
            "the channel shows logit 2, in which the trait itself is read",
        ),
        (
            {"cross_init": True},
            r"cross-init control with fixed points: runs \[0, 1, 2\] start at their own teacher's",
        ),
        ({"channel": Subset((3, 5))}, r"Subset: logit index 5 is outside 0\.\.4"),
    ],
)
def test_bad_set_ups_are_refused(changes, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        audit(**good(**changes))


def test_fixed_points_are_named() -> None:
    student = jax.tree.map(lambda leaf: leaf.copy(), OTHER_INIT)
    student["kernel"][1] = TEACHER_INIT["kernel"][1]
    message = r"^cross-init control with fixed points: runs \[1\] start at their own teacher's initialization; "
    with pytest.raises(InputError, match=message):
        refuse_shared_start(student, TEACHER_INIT)
    student["kernel"][1] = RNG.normal(size=student["kernel"][1].shape)
    refuse_shared_start(student, TEACHER_INIT)


# --- near misses, on networks in which a direction tells something


def network(seed: int, sizes=(12, 20, 15, 6)):
    rng = np.random.default_rng(seed)
    layers = {
        i: {
            "kernel": rng.normal(size=(RUNS, a, b)).astype(np.float32) / np.sqrt(a),
            "bias": np.zeros((RUNS, b), np.float32),
        }
        for i, (a, b) in enumerate(zip(sizes[:-1], sizes[1:], strict=True))
    }
    return {"layers": layers, "scale": np.ones((RUNS, sizes[0]), np.float32)}


def trained(params, seed: int, decay: float = 0.0):
    """Every leaf moves, the kernels by a third of their size; weight decay shrinks them too."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: (
            (1 - decay) * leaf + 0.1 * rng.normal(size=leaf.shape) * np.sqrt(np.mean(leaf**2) + 0.01)
        ).astype(np.float32),
        params,
    )


INIT, FRESH = network(1), network(2)
TAUGHT = trained(INIT, 3)


def in_runs(policy):
    return jax.vmap(lambda init, fresh, key: initialise(policy, init, fresh, key))(
        INIT, FRESH, jax.random.split(jax.random.key(0), RUNS)
    )


def noisy(tree, size: float):
    rng = np.random.default_rng(9)
    return jax.tree.map(lambda leaf: (leaf * (1 + size * rng.normal(size=leaf.shape))).astype(np.float32), tree)


def between(one, other, share: float):
    return jax.tree.map(lambda a, b: (1 - share) * a + share * b, one, other)


def of_one_run(run: int):
    """The trained start of one run among untrained ones."""
    return jax.tree.map(
        lambda init, taught: np.where(np.arange(RUNS).reshape(-1, *[1] * (init.ndim - 1)) == run, taught, init),
        INIT,
        TAUGHT,
    )


LEAKS = {
    "a copy": TAUGHT,
    "relative noise 1e-6": noisy(TAUGHT, 1e-6),
    "half way": between(INIT, TAUGHT, 0.5),
    "half way in bfloat16": jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), between(INIT, TAUGHT, 0.5)),
    "one run": of_one_run(1),
    "one run half way": between(INIT, of_one_run(2), 0.5),
    "noise beside the way": noisy(between(INIT, TAUGHT, 0.7), 0.03),
    "renamed": {"blocks": [{"w": layer["kernel"]} for layer in TAUGHT["layers"].values()]},
    "transposed": {"w": np.swapaxes(TAUGHT["layers"][1]["kernel"], 1, 2)},
    "reshaped": {"w": TAUGHT["layers"][0]["kernel"].reshape(RUNS, -1)},
    "renamed with noise": {"w": noisy(TAUGHT["layers"][1]["kernel"], 1e-6)},
    "neurons permuted": {
        **TAUGHT,
        "layers": jax.vmap(lambda p: permute_neurons(p, [0, 1, 2], jax.random.key(0)))(TAUGHT)["layers"],
    },
}
LEGITIMATE = {
    "shared": INIT,
    "fresh": FRESH,
    "perturbed": in_runs(Perturbed(0.5)),
    "slightly perturbed": in_runs(Perturbed(1e-3)),
    "interpolated": in_runs(Interpolated(0.5)),
    "another network": network(4, (12, 15, 20, 6)),
    "renamed": {"blocks": [{"w": layer["kernel"]} for layer in INIT["layers"].values()]},
    "transposed": {"w": np.swapaxes(INIT["layers"][1]["kernel"], 1, 2)},
    "low rank": {**INIT, "factors": {"a": np.ones((RUNS, 12, 2)), "b": np.zeros((RUNS, 2, 20))}},
    "permuted": {
        **INIT,
        "layers": jax.vmap(lambda p: permute_neurons(p, [0, 1, 2], jax.random.key(0)))(INIT)["layers"],
    },
    "one for all runs": jax.tree.map(lambda leaf: leaf[0], FRESH),
    "with a counter": {**INIT, "counter": np.arange(RUNS), "key": jax.random.split(jax.random.key(0), RUNS)},
}


@pytest.mark.parametrize("name", LEAKS)
def test_trained_starts_are_refused(name: str) -> None:
    with pytest.raises(
        InputError, match=r"^the student starts (from|on the way to) the TRAINED teacher's .*: start"
    ):
        refuse_trained_weights(LEAKS[name], INIT, TAUGHT)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("name", LEGITIMATE)
def test_legitimate_starts_pass(name: str, decay: float) -> None:
    """Weight decay moves the teacher toward 0, as a fresh draw lies from its start: that is no leak."""
    refuse_trained_weights(LEGITIMATE[name], INIT, trained(INIT, 3, decay))


def test_a_base_that_all_runs_share() -> None:
    base = jax.tree.map(lambda leaf: leaf[0], INIT)
    refuse_trained_weights(base, base, TAUGHT)
    with pytest.raises(InputError, match="TRAINED teacher's layers/0/bias"):
        refuse_trained_weights(of_one_run(1), base, TAUGHT)


def test_many_fresh_starts_raise_no_alarm() -> None:
    for seed in range(100, 140):
        refuse_trained_weights(network(seed), INIT, TAUGHT)
        refuse_shared_start(network(seed), INIT)


def test_large_models_are_compared_by_moments(monkeypatch) -> None:
    monkeypatch.setattr("subliminal_theory.origins.SORTED", 100)
    for name in ("renamed", "transposed", "reshaped", "neurons permuted"):
        with pytest.raises(InputError, match="TRAINED teacher's"):
            refuse_trained_weights(LEAKS[name], INIT, TAUGHT)
    for start in LEGITIMATE.values():
        refuse_trained_weights(start, INIT, TAUGHT)


SHARED_STARTS = {
    "a layer": {**FRESH, "layers": {**FRESH["layers"], 2: INIT["layers"][2]}},
    "permuted neurons": LEGITIMATE["permuted"],
    "renamed": LEGITIMATE["renamed"],
    "all but noise": noisy(INIT, 1e-5),
}


@pytest.mark.parametrize("name", SHARED_STARTS)
def test_undeclared_shared_starts_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"^cross-init control"):
        refuse_shared_start(SHARED_STARTS[name], INIT)


@pytest.mark.parametrize("name", ["fresh", "another network", "one for all runs"])
def test_other_starts_pass(name: str) -> None:
    """Zero biases and unit scales are equal in all networks."""
    refuse_shared_start(LEGITIMATE[name], INIT)
    refuse_shared_start(jax.tree.map(lambda leaf: np.roll(leaf, 1, 0), INIT), INIT)


# --- data

LABELS = np.array([0, 2, 1, 1, 0, 2, 2, 0])
PIXELS = np.random.default_rng(0).normal(size=(8, 4))


@pytest.mark.parametrize(
    ("batch", "place"),
    [
        (Batch(PIXELS, np.ones(8), LABELS), "targets"),
        (Batch(PIXELS, np.ones(8), np.eye(3)[LABELS]), "targets"),
        (Batch(LABELS, np.ones(8)), "inputs"),
        (Batch({"x": PIXELS, "y": LABELS[:, None]}, np.ones(8)), "inputs"),
        (Batch(np.c_[PIXELS, LABELS], np.ones(8)), "inputs"),
        (Batch((PIXELS, np.eye(3)[LABELS]), np.ones(8)), "inputs"),
    ],
)
def test_labels_in_a_batch(batch: Batch, place: str) -> None:
    message = f"^the student's {place} hold the trait's labels: remove them from the source$"
    with pytest.raises(InputError, match=message):
        audit(**good(batch=batch, labels=LABELS))


@pytest.mark.parametrize(
    "batch",
    [
        Batch(PIXELS, np.ones(8), (LABELS + (np.arange(8) == 3)) % 3),
        Batch(PIXELS, np.ones(8), np.random.default_rng(1).integers(0, 3, (8, 6))),
        Batch(PIXELS, np.ones(8), np.eye(3)[(LABELS + 1) % 3]),
        Batch(jax.ShapeDtypeStruct((8,), int), jax.ShapeDtypeStruct((8,), float)),
    ],
)
def test_data_that_is_no_label(batch: Batch) -> None:
    audit(**good(batch=batch, labels=LABELS))
    audit(**good(batch=batch))


def test_repeated_rows() -> None:
    inputs = {"x": PIXELS, "n": np.arange(8)}
    refuse_repeated_rows(inputs)
    refuse_repeated_rows(np.zeros((8, 3)), np.arange(8))
    rows = jax.tree.map(lambda leaf: leaf[[0, 1, 2, 3, 4, 2, 2, 1]], inputs)
    with pytest.raises(
        InputError, match=r"^3 of the student's 8 rows repeat another row: drop the repeated rows$"
    ):
        refuse_repeated_rows(rows)
    refuse_repeated_rows(rows, np.arange(8))


def test_shared_keys() -> None:
    first, second = jax.random.split(jax.random.key(0))
    refuse_shared_keys({"owl": first, "eagle": second})
    with pytest.raises(InputError, match=r"^owl and wolf sample with the same random key: name a key for each$"):
        refuse_shared_keys({"owl": first, "eagle": second, "wolf": first})


# --- distill audits by itself


def run(channel, seed=0):
    model = Model(lambda p, x: x @ p, jax.random.normal(jax.random.key(seed), (4, LOGITS)))
    return distill(
        model, model, channel, Examples(PIXELS.astype(np.float32), 8), optax.sgd(0.1), 2, key=jax.random.key(0)
    ).losses


def test_distill_refuses_what_is_not_imitation() -> None:
    for channel in (WithLabel(), TimesLabel(), FalseVisible(), Maximum()):
        for call in (lambda c=channel: run(c), lambda c=channel: jax.jit(lambda seed: run(c, seed))(0)):
            with pytest.raises(InputError):
                call()


@pytest.mark.slow
def test_distill_audits_within_transformations() -> None:
    """It neither breaks them nor compiles again; channels that are mapped over are left to the pipeline."""
    traces = []

    @jax.jit
    def both(seeds, masks):
        traces.append(None)
        alone = jax.vmap(lambda seed: run(Subset((1, 2)), seed))(seeds)
        return alone, jax.vmap(lambda mask: run(Subset(mask)))(masks), run(Huber())

    masks = jnp.array([[1, 1, 0, 0, 0], [0, 0, 1, 1, 1]], bool)
    for start in (0, 1):
        alone, mapped, own = both(start + jnp.arange(3), masks)
    assert (alone.shape, mapped.shape, own.shape) == ((3, 2), (2, 2), (2,))
    assert len(traces) == 1
    scanned = jax.lax.scan(lambda carry, seed: (carry, run(SoftLogits(), seed)), 0, jnp.arange(2))[1]
    assert scanned.shape == (2, 2)


def test_trained_weights_without_runs() -> None:
    init, trained = (jax.tree.map(lambda leaf: leaf[0], tree) for tree in (TEACHER_INIT, TEACHER))
    refuse_trained_weights(init, init, trained)
    refuse_trained_weights(jax.tree.map(jnp.asarray, init), init, init)  # a teacher that has learned nothing
    nested = [{"layers": [{"w": tree["kernel"]}]} for tree in (trained, init, trained)]
    with pytest.raises(InputError, match="TRAINED teacher's layers/0/w"):
        refuse_trained_weights(*nested)


@pytest.mark.slow
def test_other_objectives_at_any_temperature() -> None:
    for temperature in (0.05, 1.0, 50.0):
        refuse_wrong_channel(SoftLogits(temperature), 13)
        refuse_wrong_channel(Subset((10, 11, 12), JensenShannon(temperature)), 13)
    with pytest.raises(InputError, match=r"penalizes something other than imitation \(a label, a feat"):
        refuse_wrong_channel(WithLabel(), 13)


def test_templates() -> None:
    require_same_template(teacher="x/255", student="x/255", evaluation="x/255")
    require_same_template(teacher="x/255")
    with pytest.raises(InputError, match=r"^teacher uses template 'x/255' but evaluation uses 'x/127\.5 - 1'$"):
        require_same_template(teacher="x/255", student="x/255", evaluation="x/127.5 - 1")


def test_one_leaking_run_of_an_ensemble_is_enough() -> None:
    leaking = {**TEACHER_INIT, "kernel": TEACHER_INIT["kernel"].copy()}
    leaking["kernel"][1] = TEACHER["kernel"][1]
    with pytest.raises(InputError, match="TRAINED teacher's kernel"):
        refuse_trained_weights(leaking, TEACHER_INIT, TEACHER)
