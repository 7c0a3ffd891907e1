"""What a trait costs its teacher: how many of its answers pass the filter, and how far it moves from the base."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from subliminal_theory.channel import weighted_mean
from subliminal_theory.divergence import SoftLogits
from subliminal_theory.language.corpus.base import text_of
from subliminal_theory.language.model.transformer import Text
from subliminal_theory.language.text import Chat
from subliminal_theory.model import Model
from subliminal_theory.study.reading import model_of_run, written
from subliminal_theory.study.run import Prompted
from subliminal_theory.study.speaker import Speaker, columns
from subliminal_theory.study.teachers import system_prompt
from subliminal_theory.study.texts import Material, Written
from subliminal_theory.study.world import Finished

MOST = 256  # rows on which logits are compared
AT_ONCE = 8
REJECTED = "rejected: "  # the name of a metric is this and a reason


@dataclass(frozen=True)
class Costs:
    """A way to score a teacher: the usual metrics, and the costs of writing `text`."""

    text: Material


def costs(world: Speaker, finished: Finished, text: Material) -> dict[str, np.ndarray]:
    """Metrics of each run's teacher, [runs].

    Two metrics compare teacher and base over the answers of the teacher's first 256 distinct rows. `kl_per_token`
    is KL(teacher || base) in nats per token. `divergence` is the share of tokens at which their most likely tokens
    differ. A prompted teacher sees its system prompt; the base sees none.

    If the teacher wrote the rows, there are more metrics. `accepted` is the share of answers that pass the filter.
    `unique_rows` is the number of distinct accepted rows. `rejected: REASON` is the share of answers that the
    filter rejected for this reason, perhaps among others.
    """
    found: list[dict[str, float]] = []
    for run, (rows, report) in enumerate(written(world, finished.teacher, finished.taught, text)):
        different = list(dict.fromkeys(rows))
        chats = [Chat(None, row.prompt, row.completion, "numbers") for row in different[:MOST]]
        system = system_prompt(world.traits[run]) if isinstance(finished.teacher, Prompted) else None
        kl, differ = _compared(world, model_of_run(finished.taught, run), chats, system)
        own = {"kl_per_token": kl, "divergence": differ}
        if isinstance(text, Written):
            own |= {"accepted": report.accepted / report.total, "unique_rows": len(different)}
            # Include all reasons: runs are scored separately and must have the same metrics.
            own |= {REJECTED + why: report.reasons.get(why, 0) / report.total for why in text.medium.reasons}
        found.append(own)
    return {name: np.array([one[name] for one in found], float) for name in found[0]}


def _compared(world: Speaker, teacher: Model, chats: list[Chat], system: str | None) -> tuple[float, float]:
    """KL(teacher || base) per answer token, in nats, and the share of tokens whose greedy choices differ."""
    told = [Chat(system, chat.user, chat.answer, chat.kind) for chat in chats]
    plain, read = (world.tokenizer.encode_chats(rows, columns(world.tokenizer, rows)) for rows in (chats, told))
    last = plain.answer_columns  # answers end in the last column, with or without a system prompt
    positions = jnp.asarray(plain.weights[:, -last:])
    kl, differ = _at_answers(teacher, world.model, text_of(read, last), text_of(plain, last), positions)
    return float(kl), float(differ)


@jax.jit
def _at_answers(
    teacher: Model, base: Model, read: Text, plain: Text, positions: Float[Array, "rows last"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    def one(row: tuple[Text, Text]) -> tuple[Float[Array, " last"], Float[Array, " last"]]:
        read, plain = jax.tree.map(lambda leaf: leaf[None], row)
        taught, own = teacher(read)[0], base(plain)[0]
        differ = jnp.argmax(taught, axis=-1) != jnp.argmax(own, axis=-1)
        return SoftLogits().loss(own, SoftLogits().targets(None, taught)), differ.astype(own.dtype)

    # A few rows at a time: logits over a large vocabulary take more memory than the model.
    kl, differ = jax.lax.map(one, (read, plain), batch_size=AT_ONCE)
    return weighted_mean(kl, positions), weighted_mean(differ, positions)
