"""The gradient-step theorem and its extensions, for any differentiable function."""

from subliminal_theory.theorem.certificate import Certificate, certificate
from subliminal_theory.theorem.conditions import Conditions, covers
from subliminal_theory.theorem.contraction import Contraction, Sharpness, contraction, displacement, sharpness
from subliminal_theory.theorem.filtered import (
    AnswerScores,
    FilteredEstimate,
    FilteredSignal,
    Measured,
    answer_log_law,
    answer_scores,
    drawn_answers,
    every_answer,
    filtered_answers,
    filtered_rows,
)
from subliminal_theory.theorem.one_step import Report, check
from subliminal_theory.theorem.prompts import Alignment, Shift, prompt_alignment, prompt_shift
from subliminal_theory.theorem.small_steps import SmallSteps, how_small
from subliminal_theory.theorem.tokens import (
    StepSignal,
    TokenSignal,
    compare_tokens,
    sign_probability,
    step_tokens,
    tokens_needed,
)

__all__ = [
    "Alignment",
    "AnswerScores",
    "Certificate",
    "Conditions",
    "Contraction",
    "FilteredEstimate",
    "FilteredSignal",
    "Measured",
    "Report",
    "Sharpness",
    "Shift",
    "SmallSteps",
    "StepSignal",
    "TokenSignal",
    "answer_log_law",
    "answer_scores",
    "certificate",
    "check",
    "compare_tokens",
    "contraction",
    "covers",
    "displacement",
    "drawn_answers",
    "every_answer",
    "filtered_answers",
    "filtered_rows",
    "how_small",
    "prompt_alignment",
    "prompt_shift",
    "sharpness",
    "sign_probability",
    "step_tokens",
    "tokens_needed",
]
