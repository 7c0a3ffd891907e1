"""Fetch the weights of a small published chat model, SmolLM2, for --checkpoint smollm2."""

from collections.abc import Sequence

from subliminal_theory.language.hub.weights import WEIGHTS, fetch

from .app.contract import Parser
from .flags.names import named_value


def main(arguments: Sequence[str]) -> int:
    """Fetch the weights, verify them and say where they are. Returns 0."""
    parser = Parser("weights", description=__doc__)
    parser.add_argument("name", nargs="?", default="smollm2", help="name of the weights (default smollm2)")
    name: str = parser.parse_args(arguments).name
    weights = named_value("weights", name, WEIGHTS)
    new = fetch(weights)
    print(f"{weights.path}: {'fetched' if new else 'there already'}, SHA-256 as published; --checkpoint {name}")
    return 0
