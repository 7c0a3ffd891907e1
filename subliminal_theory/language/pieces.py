"""The former names of resumable runs, until experiments/language_saves.py goes."""

from subliminal_theory.files import fingerprint as mark_of
from subliminal_theory.resumable import run_resumably as run_in_pieces

__all__ = ["mark_of", "run_in_pieces"]
