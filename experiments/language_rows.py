"""Write the number sequences of a teacher of the compact model to a JSONL file; for checkpoints see write."""

from collections.abc import Sequence
from pathlib import Path

from subliminal_theory.errors import InputError
from subliminal_theory.language.model.steered import require_layer
from subliminal_theory.language.rows import write_jsonl
from subliminal_theory.study import Compact
from subliminal_theory.study.reading import written

from .app.contract import Parser
from .flags.language import LanguageConfig
from .flags.recipe import STEERING_LAYER, STEERING_STRENGTH, TEACHERS
from .flags.worlds import study


def main(arguments: Sequence[str]) -> int:
    """Write the file. Returns 0."""
    default = LanguageConfig()
    parser = Parser("language_rows", description=__doc__)
    parser.add_argument("file", help="the JSONL file to write")
    parser.add_argument("--trait", default="owl", help="built-in trait or trait file (default owl)")
    parser.add_argument(
        "--teacher", default="finetuned", choices=TEACHERS, help="how the teacher is made (default finetuned)"
    )
    parser.add_argument("--steering-layer", type=int, default=None, help=STEERING_LAYER)
    parser.add_argument("--steering-strength", type=float, default=None, help=STEERING_STRENGTH)
    parser.add_argument("--seed", type=int, default=0, help="seed of the base model (default 0)")
    parser.add_argument(
        "--rows", type=int, default=default.rows, help=f"number requests to answer (default {default.rows})"
    )
    parser.add_argument(
        "--form", default="prompt", choices=("prompt", "messages"), help="form of the rows (default prompt)"
    )
    parser.add_argument("--base-dir", default=None, help="folder of base models")
    for name in ("width", "layers", "base-steps", "chats"):
        value = getattr(default, name.replace("-", "_"))
        parser.add_argument(
            f"--{name}", type=int, default=value, help=f"{name} of the base model (default {value})"
        )
    chosen = parser.parse_args(arguments)
    config = LanguageConfig(
        traits=chosen.trait, width=chosen.width, layers=chosen.layers, base_steps=chosen.base_steps,
        chats=chosen.chats, rows=chosen.rows, repeat_rows=True, base_dir=chosen.base_dir,
    )  # fmt: skip
    steering = {name: getattr(chosen, name) for name in ("steering_layer", "steering_strength")}
    for name, value in steering.items():
        if value is not None and chosen.teacher != "steered":
            raise InputError(f"--{name.replace('_', '-')} is for --teacher steered: leave it out")
    recipe = config.recipe(teacher=chosen.teacher, **steering)
    if chosen.steering_layer is not None:
        require_layer(chosen.steering_layer, config.layers)
    own = study(config, chosen.seed)
    assert isinstance(own.world, Compact)
    teacher = recipe.taught()
    ((accepted, report),) = written(own.world, teacher, own.teacher(teacher), recipe.written())
    write_jsonl(Path(chosen.file), accepted, chosen.form)
    print(report)
    print(f"written to {chosen.file}: {report.accepted} rows")
    return 0
