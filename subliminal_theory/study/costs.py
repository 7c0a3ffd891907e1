"""What a trait costs its teacher: how many of its answers pass the filter, and how far it moves from the base."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from subliminal_theory.channel import Subset, weighted_mean
from subliminal_theory.divergence import SoftLogits
from subliminal_theory.language.corpus.base import text_of
from subliminal_theory.language.model.transformer import Text
from subliminal_theory.language.rows import Completion
from subliminal_theory.language.text import Chat
from subliminal_theory.model import Model
from subliminal_theory.study.reading import model_of_run, written
from subliminal_theory.study.run import Prompted
from subliminal_theory.study.speaker import Speaker, columns, hidden_words
from subliminal_theory.study.teachers import system_prompt
from subliminal_theory.study.texts import Material, Written
from subliminal_theory.study.world import Finished
from subliminal_theory.theorem.tokens import tokens_needed

MOST = 256  # rows on which logits are compared
AT_ONCE = 8
LEAST = 1e-8  # nats per token: a smaller KL is rounding of float32 logits
REJECTED = "rejected: "  # the name of a metric is this and a reason


@dataclass(frozen=True)
class Costs:
    """A way to score a teacher: the usual metrics, and the costs of writing `text`."""

    text: Material


def costs(world: Speaker, finished: Finished, text: Material) -> dict[str, np.ndarray]:
    """Metrics of each run's teacher, [runs].

    Three metrics compare teacher and base over the answers of the teacher's first 256 distinct rows.
    `kl_per_token` is KL(teacher || base) in nats per token. `visible_kl_per_token` is the same among the tokens
    that a student sees if the traits' words are hidden. `divergence` is the share of tokens at which their most
    likely tokens differ. A prompted teacher sees its system prompt; the base sees the world's, or none.

    `tokens_needed` is the number of sampled tokens with which a student's first step has the right sign with
    probability .975 (`theorem.tokens_needed` of `kl_per_token`). `tokens_read` is the number of tokens in the
    answers of the distinct rows, including their ends. If fewer tokens are read than needed, sampling alone can
    hide the trait.

    If the teacher wrote the rows, there are more metrics. `accepted` is the share of answers that pass the filter.
    `unique_rows` is the number of distinct accepted rows. `rejected: REASON` is the share of answers that the
    filter rejected for this reason, perhaps among others.
    """
    found: list[dict[str, float]] = []
    for run, (rows, report) in enumerate(written(world, finished.teacher, finished.taught, text)):
        different = list(dict.fromkeys(rows))
        chats = [Chat(world.system, row.prompt, row.completion, "numbers") for row in different[:MOST]]
        system = system_prompt(world.traits[run]) if isinstance(finished.teacher, Prompted) else world.system
        own = _compared(world, model_of_run(finished.taught, run), chats, system)
        own["tokens_needed"] = float(tokens_needed(max(own["kl_per_token"], LEAST)))
        own["tokens_read"] = _answer_tokens(world, different)
        if isinstance(text, Written):
            own |= {"accepted": report.accepted / report.total, "unique_rows": len(different)}
            # Include all reasons: runs are scored separately and must have the same metrics.
            own |= {REJECTED + why: report.reasons.get(why, 0) / report.total for why in text.medium.reasons}
        found.append(own)
    return {name: np.array([one[name] for one in found], float) for name in found[0]}


def _answer_tokens(world: Speaker, rows: list[Completion]) -> int:
    chats = [Chat(world.system, row.prompt, row.completion, "numbers") for row in rows]
    prompts, whole = world.tokenizer.lengths(chats)
    return int(np.sum(whole - prompts + 1))  # `whole` does not count the end


def _compared(world: Speaker, teacher: Model, chats: list[Chat], system: str | None) -> dict[str, float]:
    """Means over the tokens of the answers: how far the teacher is from the base."""
    told = [Chat(system, chat.user, chat.answer, chat.kind) for chat in chats]
    plain, read = (world.tokenizer.encode_chats(rows, columns(world.tokenizer, rows)) for rows in (chats, told))
    last = plain.answer_columns  # answers end in the last column, with or without a system prompt
    positions = jnp.asarray(plain.weights[:, -last:])
    seen = np.ones(world.logits, bool)
    seen[hidden_words(world.tokenizer, world.asked)] = False
    texts = text_of(read, last), text_of(plain, last)
    found = _at_answers(teacher, world.model, *texts, positions, jnp.asarray(seen))
    return {name: float(value) for name, value in found.items()}


@jax.jit
def _at_answers(
    teacher: Model,
    base: Model,
    read: Text,
    plain: Text,
    positions: Float[Array, "rows last"],
    seen: Bool[Array, " n"],
) -> dict[str, Float[Array, ""]]:
    def one(row: tuple[Text, Text]) -> dict[str, Float[Array, " last"]]:
        read, plain = jax.tree.map(lambda leaf: leaf[None], row)
        taught, own = teacher(read)[0], base(plain)[0]
        differ = jnp.argmax(taught, axis=-1) != jnp.argmax(own, axis=-1)
        whole, visible = SoftLogits(), Subset(seen, SoftLogits())
        return {
            "kl_per_token": whole.loss(own, whole.targets(None, taught)),
            "visible_kl_per_token": visible.loss(own, visible.targets(None, taught)),
            "divergence": differ.astype(own.dtype),
        }

    # A few rows at a time: logits over a large vocabulary take more memory than the model.
    found = jax.lax.map(one, (read, plain), batch_size=AT_ONCE)
    return {name: weighted_mean(values, positions) for name, values in found.items()}
