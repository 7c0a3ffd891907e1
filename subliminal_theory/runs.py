"""A run directory: the settings, results and provenance of a run. A killed run can resume.

config.json       the experiment and every setting
parts/NAME.json   the rows of one finished part, written atomically
answers.jsonl     if parts have any: answers to read, each with its question and the labels of its row
results.csv       all rows: condition, seed, metric, value, then the swept axes
summary.json      mean, 95% interval (`estimate.interval`) and n of runs, per condition, metric and axes
provenance.json   versions, device, commands and wall times
"""

import csv
import importlib
import io
import json
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

from subliminal_theory.errors import InputError
from subliminal_theory.estimate import Estimate, Runs, interval
from subliminal_theory.files import locked, write_atomically

FORMAT = 1
COLUMNS = ("condition", "seed", "metric", "value")
# Temporary files that `write_atomically` leaves when it is killed.
LEFTOVER = re.compile(r"\..+\.(json|jsonl|csv|png|pdf)\.\d+\.tmp")
# After this many seconds, no process can still be writing such a file.
OLD = 60
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Results:
    """The tidy rows of a run. Each row maps `COLUMNS` and the swept axes to their values.

    `replica` says what seeds are: bases, or seeds of one checkpoint.
    """

    rows: Sequence[Row]
    replica: str = "base"

    def values(self, **wanted: object) -> Sequence[float]:
        """Values of the rows that match all the given columns, in order. If all have a trait, these are `Runs`."""
        return self._runs(
            [row for row in self.rows if all(row.get(name) == value for name, value in wanted.items())]
        )

    def _runs(self, rows: Sequence[Row]) -> Sequence[float]:
        values = [row["value"] for row in rows]
        if not rows or not all(row.get("trait") for row in rows):
            return values
        traits, seeds = (tuple(row[name] for row in rows) for name in ("trait", "seed"))
        return Runs(tuple(values), traits, seeds, self.replica)

    def distinct(self, column: str) -> list[Any]:
        """The distinct entries of a column, in order of appearance."""
        return list(dict.fromkeys(row[column] for row in self.rows if column in row))

    def estimates(self) -> list[tuple[dict[str, Any], Estimate]]:
        """A 95% interval over runs for every condition, metric and setting of the axes.

        Raises:
            InputError: a trait of a group has no run on one of its bases.
        """
        groups: dict[tuple, list[Row]] = {}
        for row in self.rows:
            group = tuple((name, row[name]) for name in row if name not in ("seed", "trait", "value"))
            groups.setdefault(group, []).append(row)
        return [(dict(group), interval(self._runs(rows))) for group, rows in groups.items()]


def read_config(path: Path) -> dict[str, Any]:
    """The `config.json` of a run directory.

    Raises:
        InputError: the folder is not a run directory, or the file is damaged.
    """
    file = path / "config.json"
    config = _read_json(file, "choose another --out")
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise InputError(f"{file} is not from this program (format {FORMAT}); choose another --out")
    if not isinstance(config.get("experiment"), str) or not isinstance(config.get("config"), dict):
        raise InputError(f"{file} is damaged: choose another --out")
    return config


def read_provenance(path: Path) -> dict[str, Any]:
    """The `provenance.json` of a run directory. If the file does not exist yet, there are no invocations.

    Raises:
        InputError: the file is damaged.
    """
    file, advice = path / "provenance.json", "delete it and add --resume"
    if not file.exists():
        return {"invocations": []}
    provenance = _read_json(file, advice)
    if not isinstance(provenance, dict) or not isinstance(provenance.get("invocations"), list):
        raise InputError(f"{file} is damaged: {advice}")
    return provenance


def load_results(path: Path) -> Results:
    """The `results.csv` of a run directory.

    Raises:
        InputError: the file is missing or damaged.
    """
    file = path / "results.csv"
    try:
        with open(file, newline="", encoding="utf-8") as lines:
            reader = csv.DictReader(lines)
            table = list(reader)
        if not set(COLUMNS) <= set(reader.fieldnames or ()):
            raise ValueError("columns are missing")
        rows = [{**row, "seed": int(row["seed"]), "value": float(row["value"])} for row in table]
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise InputError(f"{file} is missing or damaged: run the experiment again with --resume") from error
    return Results(rows, _replica(path))


def _replica(path: Path) -> str:
    """What a seed of a run is. Seeds of a checkpoint share its weights."""
    settings = read_config(path)["config"] if (path / "config.json").exists() else {}
    return "seed" if settings.get("checkpoint") else "base"


class RunDirectory:
    """The folder of one run. Create it with `RunDirectory.open`."""

    def __init__(self, path: Path, parts: dict[str, dict[str, Any]] | None = None) -> None:
        self.path = path
        self._parts = parts or {}

    @classmethod
    def open(
        cls,
        path: Path,
        experiment: str,
        config: Mapping[str, Any],
        *,
        resume: bool,
        command: str,
    ) -> "RunDirectory":
        """Start a run in a new or empty folder, or resume a run with the same configuration.

        Several processes may open the same run; a lock lets one in at a time.

        Raises:
            InputError: the folder cannot be written, holds something else or a run with another configuration,
                holds this run without `resume`, or is damaged. The folder is then left unchanged.
        """
        wanted = json.loads(json.dumps({"format": FORMAT, "experiment": experiment, "config": config}))
        try:
            path.mkdir(parents=True, exist_ok=True)
            _require_mine(path, wanted, resume)
            (path / "parts").mkdir(exist_ok=True)
            with locked(path / "parts"):
                return cls._opened(path, wanted, resume, command)
        except OSError as error:
            raise InputError(f"cannot use output folder {path}: {error.strerror}; choose another --out") from error

    @classmethod
    def _opened(cls, path: Path, wanted: dict[str, Any], resume: bool, command: str) -> "RunDirectory":
        if _require_mine(path, wanted, resume):
            write_atomically(path / "config.json", _json(wanted))
        parts = {file.stem: _read_part(file) for file in sorted((path / "parts").glob("*.json"))}
        for leftover in [*path.glob(".*.tmp"), *path.glob("parts/.*.tmp")]:
            if LEFTOVER.fullmatch(leftover.name) and time.time() - leftover.stat().st_mtime > OLD:
                leftover.unlink(missing_ok=True)
        provenance = read_provenance(path)
        provenance["invocations"].append({"command": command, **environment()})
        # Write this now, so that a killed run also records the invocation that made its parts.
        write_atomically(path / "provenance.json", _json(provenance))
        return cls(path, parts)

    def finished(self, part: str) -> bool:
        """Whether a part's rows are stored."""
        return part in self._parts

    def collect(self, part: str) -> bool:
        """Whether a part is stored, perhaps by another process.

        Raises:
            InputError: the stored part is damaged.
        """
        file = self.path / "parts" / f"{part}.json"
        if not self.finished(part) and file.exists():
            self._parts[part] = _read_part(file)
        return self.finished(part)

    def save(self, part: str, rows: Sequence[Row], seconds: float) -> None:
        """Store a part atomically. A stored part is never computed again.

        A row that has an `answer` instead of a metric and a value goes to answers.jsonl.

        Raises:
            InputError: the disk is full or the folder cannot be written; earlier parts stay.
        """
        content: dict[str, Any] = {"rows": [dict(row) for row in rows if "answer" not in row], "seconds": seconds}
        if answers := [dict(row) for row in rows if "answer" in row]:
            content["answers"] = answers
        write_atomically(self.path / "parts" / f"{part}.json", _json(content))
        self._parts[part] = content

    def finish(self, order: Sequence[str]) -> Results:
        """Write results, summary and provenance from the stored parts, in the given order."""
        rows = [row for part in order for row in self._parts[part]["rows"]]
        axes = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in COLUMNS]
        table = io.StringIO()
        writer = csv.DictWriter(table, [*COLUMNS, *axes], restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.path / "results.csv", table.getvalue().encode())
        if answers := [row for part in order for row in self._parts[part].get("answers", [])]:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answers)
            write_atomically(self.path / "answers.jsonl", lines.encode())
        results = load_results(self.path)
        self.save_summary(results)
        with locked(self.path / "parts"):
            provenance = read_provenance(self.path)
            provenance["seconds"] = {part: round(self._parts[part]["seconds"], 3) for part in order}
            write_atomically(self.path / "provenance.json", _json(provenance))
        for claim in (self.path / "parts").glob("*.lock"):  # all parts are stored, so no process needs a lock
            claim.unlink(missing_ok=True)
        return results

    def save_summary(self, results: Results) -> None:
        """Write summary.json.

        Raises:
            InputError: as for `Results.estimates`.
        """
        summary = [
            {**group, "mean": _number(e.mean), "half_width_95": _number(e.half_width), "n": e.n}
            | ({"of": e.of} if e.of else {})
            for group, e in results.estimates()
        ]
        write_atomically(self.path / "summary.json", _json(summary))

    def save_figure(self, draw: Callable[[io.BytesIO, str], None]) -> None:
        """Store figure.png and figure.pdf. `draw(file, format)` renders one of them."""
        for kind in ("png", "pdf"):
            image = io.BytesIO()
            draw(image, kind)
            write_atomically(self.path / f"figure.{kind}", image.getvalue())


def environment() -> dict[str, Any]:
    """Versions, device and time, for provenance.json."""
    # Ask the imported packages for their versions: a source tree that is not installed has no metadata.
    packages = ("subliminal_theory", "jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: importlib.import_module(name).__version__ for name in packages},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def _commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def _require_mine(path: Path, wanted: dict[str, Any], resume: bool) -> bool:
    """Whether a folder has nothing to keep. Refuse a folder that holds anything but the wanted run."""
    files = [file for file in path.rglob("*") if file.is_file() and not file.name.endswith(".lock")]
    if all(LEFTOVER.fullmatch(file.name) for file in files):
        return True
    _require_same(path, wanted, resume)
    return False


def _require_same(path: Path, wanted: dict[str, Any], resume: bool) -> None:
    if not (path / "config.json").is_file():
        raise InputError(f"{path} is not empty and holds no run: choose another --out")
    found = read_config(path)
    if found["experiment"] != wanted["experiment"]:
        raise InputError(f"{path} holds a run of {found['experiment']!r}: choose another --out")
    old, new = found["config"], wanted["config"]
    changed = [f"{name}={old.get(name)!r}" for name in {**old, **new} if old.get(name) != new.get(name)]
    if changed:
        raise InputError(
            f"{path} holds a run with other settings ({', '.join(changed)}): repeat those or choose another --out"
        )
    if not resume:
        raise InputError(f"{path} already holds this run: add --resume to go on, or choose another --out")


def _read_part(file: Path) -> dict[str, Any]:
    advice = "delete it and add --resume to compute that part again"
    part = _read_json(file, advice)
    rows, seconds = (part.get("rows"), part.get("seconds")) if isinstance(part, dict) else (None, None)
    complete = isinstance(rows, list) and all(isinstance(row, dict) and set(COLUMNS) <= set(row) for row in rows)
    texts = isinstance(part, dict) and isinstance(part.get("answers", []), list)
    if not (complete and texts) or not isinstance(seconds, int | float):
        raise InputError(f"{file} is damaged: {advice}")
    return part


def _read_json(file: Path, advice: str) -> Any:
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{file} is missing: {file.parent} is not a run directory") from error
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{file} is damaged (no valid JSON): {advice}") from error


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
