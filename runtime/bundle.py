"""What a bundle says about itself: manifest.json, read and checked before anything is run."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

from gfcompile.runtime.device import gfrt
from gfcompile.runtime.errors import BundleError
from gfcompile.runtime.records import from_json

FORMAT_VERSION = gfrt.MANIFEST_FORMAT
MANIFEST_NAME = gfrt.MANIFEST_NAME


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of a bundle."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What was asked for, what is stored, and what the products are computed in."""

    requested: str
    storage: str
    compute: str


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """An input or output: real value = (stored - zero_point) * scale where scale is not 0.

    Attributes:
        layout: order of an image's axes.
        pixels: it takes an image's pixels as they are; otherwise normalized.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    scale: float = 0.0
    zero_point: int = 0
    layout: Literal["nchw", "nhwc"] = "nchw"
    pixels: bool = False


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """manifest.json: a typed core, and `extra` for whatever else a stage has to say.

    Attributes:
        kind: which runtime runs it: "gfrt" is the C runtime of this project, "tflite" is LiteRT,
            "coreml" is Core ML.
        device: where the kernels run.
        arch: of the library, as `uname -m` says it; "any" where there is none.
        library: file name of the library (kind "gfrt") or of the model ("tflite", "coreml").
        cpu_features: what the kernels need of the CPU, as /proc/cpuinfo spells it.
        compute_capability: of the GPU that the kernels were assembled for.
        inputs, outputs: in the order in which a run takes and gives them.
        transform: how an image becomes the input (`Transform.to_dict`).
        weights: where they come from: "random (seed 0)", "checkpoint NAME sha256:...".
        notes: each thing that is not as the user might think: random weights, stand-in
            calibration data, a layer left in float.
        ledger, filters, kernels: one record each per stage, filter layer and kernel.
        versions: of the packages that took part.
        files: every file of the bundle but manifest.json itself, by its path in it.
    """

    created_by: str
    model: str
    target: str
    precision: Precision
    arch: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: str
    kind: str = "gfrt"
    device: Literal["cpu", "cuda"] = "cpu"
    library: str = ""
    cpu_features: tuple[str, ...] = ()
    compute_capability: tuple[int, int] | None = None
    transform: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    ledger: tuple[Mapping[str, Any], ...] = ()
    filters: tuple[Mapping[str, Any], ...] = ()
    kernels: tuple[Mapping[str, Any], ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def batch(self) -> int:
        """How many images one inference takes: the first size of its input."""
        return self.inputs[0].shape[0] if self.inputs and self.inputs[0].shape else 1

    def to_dict(self) -> dict[str, Any]:
        """What json.dump takes; the format version comes first, for people."""
        values = asdict(self)
        return {"format_version": values.pop("format_version"), **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; keys that this version does not know go to `extra`.

        Raises:
            BundleError: a key is missing or holds something else than it should.
        """
        known = {f.name for f in fields(cls)}
        unknown = {key: value for key, value in values.items() if key not in known}
        try:
            manifest = from_json(cls, values)
            for spec in (*manifest.inputs, *manifest.outputs):
                _check_tensor(spec)
        except ValueError as error:
            raise BundleError(
                f"{MANIFEST_NAME} is damaged or was not written by gfcompile: {error}"
            ) from error
        return replace(manifest, extra={**manifest.extra, **unknown})


def _check_tensor(spec: TensorSpec) -> None:
    if spec.dtype not in gfrt.DTYPES:
        raise ValueError(f"{spec.dtype!r} is no dtype")
    if not all(size >= 1 for size in spec.shape):
        raise ValueError(f"{spec.shape} is no shape")


def read_manifest(bundle: Path) -> Manifest:
    """The manifest of the bundle in folder `bundle`; the other files are not looked at.

    Raises:
        BundleError: no bundle, a damaged manifest, or one of a newer format.
    """
    try:
        return Manifest.from_dict(gfrt.read_manifest(str(bundle)))
    except gfrt.GfrtError as error:
        raise BundleError(str(error)) from None


def check_bundle(bundle: Path, *, local: bool = True) -> Manifest:
    """The manifest of `bundle`, after every file was found whole.

    Args:
        local: whether it is to run on this machine, so that its architecture must be this one.

    Raises:
        BundleError: no bundle; a file missing, truncated or changed; another architecture.
    """
    try:
        values = gfrt.check_bundle(str(bundle), local=local)
    except gfrt.GfrtError as error:
        raise BundleError(str(error)) from None
    return Manifest.from_dict(values)


def check_tensors(
    manifest: Manifest,
    inputs: Sequence[gfrt.TensorInfo],
    outputs: Sequence[gfrt.TensorInfo],
) -> None:
    """Refuses a manifest that tells of other tensors than the model's: of other batches, say.

    Raises:
        BundleError: it does.
    """
    for specs, infos in ((manifest.inputs, inputs), (manifest.outputs, outputs)):
        told = [(spec.dtype, spec.shape) for spec in specs]
        if told != [(info.dtype, info.shape) for info in infos]:
            raise BundleError(
                f"{MANIFEST_NAME} and the model do not belong together: copy the bundle again"
            )


def model_file(bundle: Path, manifest: Manifest) -> Path:
    """The file or folder that another's runtime loads: of those that `check_bundle` looks at.

    Raises:
        BundleError: the manifest names something else.
    """
    name = manifest.library
    if not name or not any(f"{file}/".startswith(f"{name}/") for file in manifest.files):
        raise BundleError(f"{bundle} has no model {name!r} among its files: copy the bundle again")
    return bundle / name
