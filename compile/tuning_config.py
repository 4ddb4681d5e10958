"""What `gfcompile tune` is asked for."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from gfcompile.compile.emission import RequestedPrecision
from gfcompile.compile.models import KeepRatio

DEFAULT_TRIALS = 200


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """What to tune, and where.

    Attributes:
        model, target, precision, image_size, num_classes, keep_ratio, batch: as for
            `CompileConfig`; weights are random, for speed does not depend on them.
        device: an address, see `devices.ADDRESSES`; under "qemu:CPU" instructions are counted, an
            estimate. None for local where this machine runs the target's code, and an estimate
            elsewhere.
        trials, minutes: when to stop; without either, after DEFAULT_TRIALS.
        database: the file that findings are added to; None for one named after the target.
    """

    model: str
    target: str
    precision: RequestedPrecision = "float32"
    image_size: int | None = None
    num_classes: int | None = None
    keep_ratio: KeepRatio | None = None
    batch: int = 1
    device: str | None = None
    trials: int | None = None
    minutes: float | None = None
    database: Path | None = None
    seed: int = 0

    @property
    def path(self) -> Path:
        return self.database or Path(f"tuning-{self.target}.json")

    @property
    def next_command(self) -> str:
        """The compilation of the very kernels that were tuned; other sizes have others."""
        ratios = [self.keep_ratio] if isinstance(self.keep_ratio, float) else self.keep_ratio
        given = {
            "--image-size": self.image_size,
            "--num-classes": self.num_classes,
            "--keep-ratio": None if ratios is None else ",".join(map(str, ratios)),
            "--batch": self.batch if self.batch > 1 else None,
            "--tuning-db": self.path,
        }
        options = [
            part
            for name, value in given.items()
            if value is not None
            for part in (name, str(value))
        ]
        flags = {"int8": ["--int8"], "float16": ["--fp16"], "float32": []}[self.precision]
        model = ["--model", self.model, "--target", self.target, *flags]
        return shlex.join(["gfcompile", *model, *options])
