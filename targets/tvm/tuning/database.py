"""The tuning database: for kernels on targets, choices that were found better than the rules'.

    {"format": "gfcompile tuning", "version": 1, "entries": [
      {"kernel": "Dense(m=196, n=1536, k=384, gelu=True)", "target": "aarch64 cortex-a76 sdot",
       "schedule": "cpu_dense/2", "choice": {"rows": 7, "vectors": 3, ...},
       "how": "static", "unit": "instructions", "cost": 3.1e7, "default_cost": 3.3e7,
       "trials": 40, "device": "qemu cortex-a76"}, ...]}

A file is read as if an enemy had written it: an entry only takes effect if its choice is in the
design space of the kernel that it is for, so that the worst one can do is to make a kernel slow.
What takes no effect, as schedules have changed since or for another reason, is told: `left_out`.
"""

import dataclasses
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from gfcompile.runtime.errors import UserError
from gfcompile.targets.target import Cpu, Gpu
from gfcompile.targets.tvm.choices import (
    Choice,
    device_key,
    kernel_key,
    parse_choice,
    space_of,
)
from gfcompile.targets.tvm.kernel import Generic, Kernel
from gfcompile.targets.tvm.levels import Tuned
from gfcompile.targets.tvm.schedules.generic import GeneratedSchedule

How = Literal["measured", "static"]
Unit = Literal["ms", "instructions", "cycles"]

_FORMAT, _VERSION = "gfcompile tuning", 1
_MOST_BYTES = 32 << 20
Key = tuple[str, str, str]

# Why an entry takes no effect.
_OUTSIDE = "with a choice outside the kernel's design space"
_OTHER_VERSION = "for another version of the kernel's schedule"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One finding.

    Attributes:
        kernel, target, schedule: what it is for; see `choices`.
        choice: a value of the schedule's design space, as a JSON object.
        how: whether it was measured on a device or estimated without one.
        unit, cost, default_cost: of one call, and of one call as the schedule's rule has it.
        trials: how many candidates it is the best of.
        device: on what, in words.
    """

    kernel: str
    target: str
    schedule: str
    choice: Mapping[str, object]
    how: How
    unit: Unit
    cost: float
    default_cost: float
    trials: int
    device: str

    def __post_init__(self) -> None:
        """Raises ValueError for what cannot be, whoever made it."""
        texts = (self.kernel, self.target, self.schedule, self.device)
        if not all(isinstance(text, str) and 0 < len(text) <= 500 for text in texts):
            raise ValueError("kernel, target, schedule and device are texts")
        if not isinstance(self.choice, Mapping):
            raise ValueError("choice is a JSON object")
        if self.how not in get_args(How) or self.unit not in get_args(Unit):
            raise ValueError(f"how is {' or '.join(get_args(How))}, unit one of {get_args(Unit)}")
        for number in (self.cost, self.default_cost, self.trials):
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise ValueError("cost, default_cost and trials are numbers")
            if not 0 <= number <= sys.float_info.max:  # an integer may be larger; NaN is not
                raise ValueError("cost, default_cost and trials are finite and not negative")

    @property
    def key(self) -> Key:
        return self.kernel, self.target, self.schedule


class Database:
    """Entries by kernel, target and schedule; at most one for each.

    Args:
        entries: of several for the same, the last one counts.
        source: where they are from, for messages.
    """

    def __init__(self, entries: Iterable[Entry] = (), source: str = "the tuning database") -> None:
        self._entries = {entry.key: entry for entry in entries}
        self._source = source

    @property
    def entries(self) -> tuple[Entry, ...]:
        return tuple(self._entries[key] for key in sorted(self._entries))

    def find(self, kernel: Kernel, device: Cpu | Gpu) -> Entry | None:
        """The entry for `kernel` as its schedule on `device` is now."""
        space = space_of(kernel, device)
        if space is None:
            return None
        return self._entries.get((kernel_key(kernel), device_key(device), space.schedule))

    def tuned(self, kernels: Iterable[Kernel], device: Cpu | Gpu) -> Mapping[Kernel, Tuned]:
        """Of `kernels`, those that have an entry with a choice that they have as well."""
        found = {}
        for kernel in kernels:
            entry = self.find(kernel, device)
            choice = None if entry is None else _choice(entry, kernel, device)
            if entry is not None and choice is not None:
                found[kernel] = Tuned(choice=choice, how=entry.how)
        return found

    def left_out(self, kernels: Iterable[Kernel], device: Cpu | Gpu) -> Mapping[Key, str]:
        """Entries for `kernels` on `device` that take no effect, and why; see `describe`.

        Of a kernel for which another entry does take effect there are none; nor of one whose
        schedule leaves no choice here, as another CPU's may.
        """
        kernels = list(kernels)
        tuned = self.tuned(kernels, device)
        schedules = {
            kernel_key(kernel): space.schedule
            for kernel in kernels
            if kernel not in tuned and (space := space_of(kernel, device)) is not None
        }
        return {
            entry.key: _OUTSIDE if entry.schedule == schedules[entry.kernel] else _OTHER_VERSION
            for entry in self._entries.values()
            if entry.target == device_key(device) and entry.kernel in schedules
        }

    def describe(self, left_out: Mapping[Key, str]) -> str:
        """What `left_out` found, of one device or of several together, in one line."""
        counts = Counter(left_out.values())
        reasons = ", ".join(f"{count} {why}" for why, count in sorted(counts.items()))
        return (
            f"{self._source}: entries left out: {reasons}; their kernels are compiled as if there "
            "were none; tune again"
        )

    def add(self, entry: Entry) -> None:
        """Adds `entry`, in place of one for the same."""
        self._entries[entry.key] = entry

    def drop_left_out(self, kernel: Kernel, device: Cpu | Gpu) -> None:
        """Removes what takes no effect of the entries for `kernel`, which is tuned again."""
        for key in self.left_out([kernel], device):
            del self._entries[key]

    def save(self, path: Path) -> None:
        """Writes the database: the file is the old one or the new one, never half of it."""
        # A line for each entry: what a tuning changed shows in a diff.
        entries = ",\n".join(
            json.dumps(dataclasses.asdict(entry), sort_keys=True) for entry in self.entries
        )
        head = f'"format": {json.dumps(_FORMAT)}, "version": {_VERSION}'
        text = f'{{{head}, "entries": [\n{entries}\n]}}'
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def _choice(entry: Entry, kernel: Kernel, device: Cpu | Gpu) -> Choice | None:
    """The entry's choice; None if `kernel` has no such choice on `device`."""
    try:
        choice = parse_choice(kernel, device, entry.choice)
        if isinstance(kernel, Generic) and isinstance(choice, GeneratedSchedule):
            choice.apply(kernel.func)
    except ValueError:
        return None
    return choice


def load(path: Path) -> Database:
    """The database in a file.

    Raises:
        UserError: the file cannot be read, or is no tuning database.
    """
    try:
        size = path.stat().st_size
        text = path.read_text(encoding="utf-8") if size <= _MOST_BYTES else None
    except OSError as error:
        raise UserError(f"--tuning-db {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--tuning-db {path}: it is not text in UTF-8") from error
    if text is None:
        raise UserError(f"--tuning-db {path}: {size} bytes are more than any tuning database has")
    return parse(text, str(path))


def parse(text: str, source: str) -> Database:
    """The database that `text` is.

    Raises:
        UserError: it is none; the message names `source`.
    """
    try:
        document: Any = json.loads(text)
        if not isinstance(document, dict) or document.get("format") != _FORMAT:
            raise ValueError(f'it does not say "format": "{_FORMAT}"')
        if document.get("version") != _VERSION:
            raise ValueError(f"version {document.get('version')!r} is not {_VERSION}")
        entries = document.get("entries")
        if not isinstance(entries, list):
            raise ValueError("entries is not a list")
        return Database([_entry(values) for values in entries], source)
    except (ValueError, RecursionError) as error:  # json's own errors are ValueErrors
        raise UserError(f"{source} is not a tuning database of this version: {error}") from error


def _entry(values: object) -> Entry:
    fields = {field.name for field in dataclasses.fields(Entry)}
    if not isinstance(values, dict) or set(values) != fields:
        raise ValueError(f"an entry has the fields {', '.join(sorted(fields))} and no others")
    return Entry(**values)


def shipped() -> Database:
    """What gfcompile brings along."""
    entries: list[Entry] = []
    for file in sorted(
        resources.files("gfcompile.targets.tvm.tuned").iterdir(), key=lambda file: file.name
    ):
        if file.name.endswith(".json"):
            entries += parse(file.read_text(encoding="utf-8"), file.name).entries
    return Database(entries, "the tuning database that gfcompile ships")
