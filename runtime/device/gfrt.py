"""Runs a gfcompile bundle: one file over ctypes for Python 3.6 and up.

It needs the standard library alone; NumPy is used where it is installed.

    import gfrt

    with gfrt.Model("bundle") as model, model.context() as context:
        (logits,) = context.run(model.normalize_u8(rgb_bytes))
        print(gfrt.top_classes(logits, 5))
"""

# ruff: noqa: UP006, UP035 - boards with JetPack 4.6 have Python 3.6, so nothing newer is used.

import contextlib
import ctypes
import hashlib
import json
import math
import mmap
import os
import platform
import threading
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple

MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = 1
LABELS_NAME = "labels.txt"

_HUGE_PAGE = 2 << 20
MAX_THREADS = 256  # as gfrt_cpu.c has it
_MANIFEST_LIMIT = 64 << 20


class GfrtError(Exception):
    """A bundle that cannot be loaded or run: one line that says why and what to do."""


# ---- bundles ----


def read_manifest(bundle: str) -> Dict[str, Any]:
    """manifest.json of the bundle in folder `bundle`, its format known to this file."""
    path = Path(bundle) / MANIFEST_NAME
    try:
        size = _size(path)
        if size > _MANIFEST_LIMIT:
            raise GfrtError(f"{path} is damaged: {size} bytes are too many; copy the bundle again")
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        reason = "it has no manifest.json" if Path(bundle).is_dir() else "there is no such folder"
        raise GfrtError(f"{bundle} is not a bundle: {reason}") from None
    except OSError as error:
        raise GfrtError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise GfrtError(f"{path} is damaged: {error}; copy the bundle again") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if not isinstance(manifest, dict) or not isinstance(version, int):
        raise GfrtError(f"{path} is not a gfcompile manifest")
    if version > MANIFEST_FORMAT:
        raise GfrtError(
            f"{bundle} was written by a newer gfcompile (format {version}, this one reads up to "
            f"{MANIFEST_FORMAT}): upgrade gfcompile"
        )
    return manifest


def check_bundle(bundle: str, local: bool = True) -> Dict[str, Any]:
    """The manifest, after every file was found with the size and hash that it gives.

    `local` says that the bundle is to run here, so that it must be for this architecture.
    """
    manifest = read_manifest(bundle)
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise GfrtError(f"{Path(bundle) / MANIFEST_NAME} is damaged: it lists no files")
    arch = manifest.get("arch", "any")
    if local and arch not in ("any", platform.machine()):
        here = platform.machine()
        # QEMU has no GPU.
        emulated = arch == "aarch64" and manifest.get("device") != "cuda"
        hint = "use --device qemu or copy it to the board" if emulated else "copy it there"
        raise GfrtError(f"the bundle is for {arch}, this machine is {here}: {hint}")
    for name in sorted(files):
        _check_file(Path(bundle), name, files[name])
    return manifest


def read_labels(bundle: str) -> List[str]:
    """The name of each class; none where the bundle has no labels.txt."""
    path = Path(bundle) / LABELS_NAME
    if not path.is_file():
        return []
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def _check_file(bundle: Path, name: str, entry: Any) -> None:
    parts = name.split("/")
    if "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise GfrtError(f"{MANIFEST_NAME} names a file outside the bundle: {name!r}")
    try:
        want_size, want_hash = int(entry["size_bytes"]), str(entry["sha256"])
    except (KeyError, TypeError, ValueError, OverflowError):  # the last one by infinity
        raise GfrtError(f"{MANIFEST_NAME} is damaged at file {name!r}") from None
    path = bundle.joinpath(*parts)
    try:
        if bundle.resolve() not in path.resolve().parents:
            raise GfrtError(f"{path} links to a file outside the bundle")
        size = _size(path)
        if size != want_size:
            raise GfrtError(
                f"{path} has {size} bytes instead of {want_size}: copy the bundle again"
            )
        digest = _digest(path, size)
    except FileNotFoundError:
        raise GfrtError(f"{path} is missing: copy the bundle again") from None
    except OSError as error:
        raise GfrtError(f"{path} cannot be read: {error.strerror}") from error
    except RuntimeError:  # before Python 3.13, by links that lead to each other
        raise GfrtError(f"{path} cannot be read: it links to itself") from None
    except ValueError:  # there is less of it to map
        raise GfrtError(f"{path} was cut short just now: copy the bundle again") from None
    if digest != want_hash:
        raise GfrtError(
            f"{path} was changed: its sha256 is {digest[:16]}..., the manifest says "
            f"{want_hash[:16]}...: copy the bundle again"
        )


def _size(path: Path) -> int:
    """The size of a file or folder; refused is what may never begin or end, a pipe or a device."""
    size = path.stat().st_size
    if not path.is_file() and not path.is_dir():
        raise GfrtError(f"{path} is no file: copy the bundle again")
    return size


def _digest(path: Path, size: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size < _HUGE_PAGE:
            digest.update(file.read())
        else:
            # The library maps what is read here. It stays in memory in pieces as large as it is
            # read in, and a mapping of small ones may take twice as long to compute with.
            with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as mapped:
                if hasattr(mmap, "MADV_HUGEPAGE"):  # not before Python 3.8, nor without Linux
                    with contextlib.suppress(OSError):  # a kernel that has none
                        mapped.madvise(mmap.MADV_HUGEPAGE)
                digest.update(mapped)
    return digest.hexdigest()


# ---- the library ----

_VERIFY = 1  # GFRT_VERIFY
DTYPES = ("float32", "int8", "uint8", "int32", "uint16", "int64", "bool", "int16", "float16")
# Of the struct module; a memoryview has no float16, so without NumPy its bits are shown.
_FORMATS = ("f", "b", "B", "i", "H", "q", "?", "h", "H")


class _Info(ctypes.Structure):
    """gfrt_tensor_info"""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("dtype", ctypes.c_int),
        ("ndim", ctypes.c_int32),
        ("shape", ctypes.c_int64 * 6),
        ("size_bytes", ctypes.c_size_t),
        ("scale", ctypes.c_float),
        ("zero_point", ctypes.c_int32),
        ("storage_offset", ctypes.c_int32),
    ]


class _Profile(ctypes.Structure):
    """gfrt_step_profile"""

    _fields_ = [
        ("kernel", ctypes.c_char_p),
        ("label", ctypes.c_char_p),
        ("calls", ctypes.c_uint64),
        ("seconds", ctypes.c_double),
    ]


_OBSERVER = ctypes.CFUNCTYPE(
    None,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_char_p,
    ctypes.POINTER(_Info),
    ctypes.c_void_p,
)
_POINTERS = ctypes.POINTER(ctypes.c_void_p)
_SIZES = ctypes.POINTER(ctypes.c_size_t)
_INT, _SIZE, _POINTER, _TEXT = ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_char_p
_SIGNATURES = {
    "version": (_TEXT, ()),
    "last_error": (_TEXT, ()),
    "open": (_INT, (_TEXT, ctypes.c_uint32, _POINTERS)),
    "close": (None, (_POINTER,)),
    "device": (_TEXT, (_POINTER,)),
    "input_count": (_SIZE, (_POINTER,)),
    "output_count": (_SIZE, (_POINTER,)),
    "input_info": (_INT, (_POINTER, _SIZE, ctypes.POINTER(_Info))),
    "output_info": (_INT, (_POINTER, _SIZE, ctypes.POINTER(_Info))),
    "normalize_u8": (_INT, (_POINTER, _SIZE, _POINTER, _SIZE, _POINTER, _SIZE)),
    "context_create": (_INT, (_POINTER, ctypes.c_uint32, _POINTERS)),
    "context_destroy": (None, (_POINTER,)),
    "run": (_INT, (_POINTER, _POINTERS, _SIZES, _POINTERS, _SIZES)),
    "set_observer": (_INT, (_POINTER, _OBSERVER, _POINTER)),
    "profile_enable": (_INT, (_POINTER, _INT)),
    "step_count": (_SIZE, (_POINTER,)),
    "profile_get": (_INT, (_POINTER, _SIZE, ctypes.POINTER(_Profile))),
}  # type: Dict[str, Tuple[Any, Tuple[Any, ...]]]


class _Library:
    """The functions of gfrt.h in one shared library."""

    def __init__(self, path: Path) -> None:
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise GfrtError(f"{path} cannot be loaded: {error}") from None
        self._functions = {}
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, "gfrt_" + name, None)
            if function is None:
                raise GfrtError(f"{path} is not a gfrt library: it has no gfrt_{name}")
            function.restype, function.argtypes = result, arguments
            self._functions[name] = function

    def __getattr__(self, name: str) -> Any:
        return self._functions[name]

    def check(self, status: int) -> None:
        if status != 0:
            raise GfrtError(self.last_error().decode(errors="replace"))


# ---- models ----


class TensorInfo(NamedTuple):
    """A tensor; real = (stored - storage_offset - zero_point) * scale, unless scale is 0."""

    name: str
    dtype: str
    shape: Tuple[int, ...]
    size_bytes: int
    scale: float
    zero_point: int
    storage_offset: int


class StepProfile(NamedTuple):
    """How long one step took, in all the calls since the profile was enabled."""

    kernel: str
    label: str
    calls: int
    seconds: float


class TraceRecord(NamedTuple):
    """A tensor that a step wrote."""

    step: int
    label: str
    tensor: TensorInfo
    data: bytes


class Model:
    """A bundle, opened: share it between threads, and give each thread a context of its own.

    Raises:
        GfrtError: the bundle is damaged, or cannot run here.
    """

    def __init__(self, bundle: str, verify: bool = True) -> None:
        bundle = str(bundle)
        self._handle = ctypes.c_void_p()
        self.manifest = check_bundle(bundle) if verify else read_manifest(bundle)
        library, files = self.manifest.get("library"), self.manifest.get("files")
        listed = isinstance(files, dict) and isinstance(library, str) and library in files
        if not isinstance(library, str) or not listed or "/" in library:
            raise GfrtError(f"{bundle} has no library that gfrt could load")
        self._library = _Library(Path(bundle).resolve() / library)
        self._library.check(self._library.open(os.fsencode(bundle), 0, ctypes.byref(self._handle)))
        self.device = self._library.device(self._handle).decode()  # type: str
        count = self._library.input_count(self._handle)
        self.inputs = [self._info(self._library.input_info, i) for i in range(count)]
        count = self._library.output_count(self._handle)
        self.outputs = [self._info(self._library.output_info, i) for i in range(count)]

    def _info(self, function: Any, index: int) -> TensorInfo:
        info = _Info()
        self._library.check(function(self._handle, index, ctypes.byref(info)))
        return _tensor_info(info)

    def context(self, threads: int = 1) -> "Context":
        """What one thread needs to run the model; 0 threads are one for each big CPU."""
        return Context(self, threads)

    def normalize_u8(self, pixels: Any, index: int = 0) -> Any:
        """8-bit RGB pixels, height x width x 3, as the input that the model was trained on.

        Where that takes several images, their pixels come one after the other.
        """
        handle, info = self._opened(), self.inputs[index]
        source, source_size, _keep = _address(pixels)
        values = bytearray(info.size_bytes)
        target = (ctypes.c_char * len(values)).from_buffer(values)
        self._library.check(
            self._library.normalize_u8(
                handle, index, source, source_size, ctypes.addressof(target), len(values)
            )
        )
        return _as_array(values, info)

    def close(self) -> None:
        """Frees the model; its contexts go on until they are closed themselves."""
        handle, self._handle = self._handle, ctypes.c_void_p()
        if handle:
            self._library.close(handle)

    def _opened(self) -> ctypes.c_void_p:
        if not self._handle:
            raise GfrtError("the model is closed")
        return self._handle

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *_exception: Any) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()


class Context:
    """One thread's use of a model; see Model.context."""

    def __init__(self, model: Model, threads: int) -> None:
        self._handle = ctypes.c_void_p()
        self._running = threading.Lock()  # ctypes lets other threads go on during a call
        self._library = model._library
        handle = model._opened()
        if not 0 <= threads <= MAX_THREADS:
            raise GfrtError(
                f"{threads} threads: give 1 to {MAX_THREADS}, or 0 for one for each big CPU"
            )
        self.inputs, self.outputs = model.inputs, model.outputs
        self._steps = self._library.step_count(handle)
        # Between two inferences every line of this program has left the caches: a call makes as
        # little as it can.
        self._input_pointers = ctypes.c_void_p * len(self.inputs)
        self._input_sizes = ctypes.c_size_t * len(self.inputs)
        self._output_pointers = ctypes.c_void_p * len(self.outputs)
        sizes = [info.size_bytes for info in self.outputs]
        self._output_sizes = (ctypes.c_size_t * len(sizes))(*sizes)
        self._targets = [ctypes.c_char * size for size in sizes]
        self._library.check(
            self._library.context_create(handle, threads, ctypes.byref(self._handle))
        )

    def run(self, *inputs: Any) -> List[Any]:
        """The outputs: NumPy arrays, or memoryviews where there is no NumPy.

        Each input is an array of the input's shape and dtype, or a buffer of its bytes.
        """
        self._begin()
        try:
            return self._run(inputs)
        finally:
            self._running.release()

    def observe(self, inputs: Sequence[Any], function: Callable[[TraceRecord], None]) -> List[Any]:
        """Runs the model and calls `function` with each tensor that a step wrote, in order."""
        failures = []  # type: List[BaseException]

        def observer(_user: Any, step: int, label: bytes, info: Any, data: int) -> None:
            try:
                tensor = _tensor_info(info.contents)
                values = ctypes.string_at(data, tensor.size_bytes)
                function(TraceRecord(step, label.decode(errors="replace"), tensor, values))
            except BaseException as error:  # ctypes would print it and go on
                failures.append(error)

        callback = _OBSERVER(observer)
        self._begin()
        try:
            self._library.check(self._library.set_observer(self._handle, callback, None))
            try:
                outputs = self._run(inputs)
            finally:
                self._library.set_observer(self._handle, _OBSERVER(), None)
        finally:
            self._running.release()
        if failures:
            raise failures[0]
        return outputs

    def _begin(self) -> None:
        """Takes the lock, which whoever calls this gives back."""
        if not self._running.acquire(False):
            raise GfrtError("another thread is running this context: create one context per thread")
        if not self._handle:
            self._running.release()
            raise GfrtError("the context is closed")

    def _run(self, inputs: Sequence[Any]) -> List[Any]:
        if len(inputs) != len(self.inputs):
            raise GfrtError(f"the model has {len(self.inputs)} inputs, got {len(inputs)}")
        for info, data in zip(self.inputs, inputs):  # noqa: B905 - `strict` came with 3.10
            _check_array(info, data)
        sources = [_address(data) for data in inputs]
        results = [bytearray(info.size_bytes) for info in self.outputs]
        targets = [kind.from_buffer(results[i]) for i, kind in enumerate(self._targets)]
        self._library.check(
            self._library.run(
                self._handle,
                self._input_pointers(*[address for address, _, _ in sources]),
                self._input_sizes(*[size for _, size, _ in sources]),
                self._output_pointers(*map(ctypes.addressof, targets)),
                self._output_sizes,
            )
        )
        return [_as_array(results[i], info) for i, info in enumerate(self.outputs)]

    def enable_profile(self, enable: bool = True) -> None:
        """Starts a profile from zero, or stops it."""
        self._begin()
        try:
            self._library.check(self._library.profile_enable(self._handle, int(enable)))
        finally:
            self._running.release()

    def profile(self) -> List[StepProfile]:
        """Time spent in each step since the profile was enabled."""
        self._begin()
        try:
            return [self._step_profile(step) for step in range(self._steps)]
        finally:
            self._running.release()

    def _step_profile(self, step: int) -> StepProfile:
        entry = _Profile()
        self._library.check(self._library.profile_get(self._handle, step, ctypes.byref(entry)))
        kernel, label = (text.decode(errors="replace") for text in (entry.kernel, entry.label))
        return StepProfile(kernel, label, entry.calls, entry.seconds)

    def close(self) -> None:
        """Frees the activations and threads.

        Raises:
            GfrtError: another thread is running the context, or its observer asks for this.
        """
        if not self._running.acquire(False):
            raise GfrtError("the context is running: close it once that has ended")
        try:
            self._free()
        finally:
            self._running.release()

    def _free(self) -> None:
        handle, self._handle = self._handle, ctypes.c_void_p()
        if handle:
            self._library.context_destroy(handle)

    def __enter__(self) -> "Context":
        return self

    def __exit__(self, *_exception: Any) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._free()  # nobody is left who could run it


def per_image(logits: Any) -> List[Any]:
    """The logits of each image that the model took at once."""
    values = _flat(logits)
    size = len(values) // logits.shape[0]
    return [values[start : start + size] for start in range(0, len(values), size)]


def top_classes(logits: Any, count: int = 5) -> List[Tuple[int, float]]:
    """The `count` likeliest classes of one image and their softmax probabilities."""
    values = [float(value) for value in _flat(logits)]
    highest = max(values)
    weights = [math.exp(value - highest) for value in values]
    total = math.fsum(weights)
    order = sorted(range(len(values)), key=lambda i: (-weights[i], i))
    return [(i, weights[i] / total) for i in order[:count]]


# ---- arrays and buffers ----


def _numpy() -> Any:
    try:
        import numpy
    except ImportError:
        return None
    return numpy


def _tensor_info(info: _Info) -> TensorInfo:
    return TensorInfo(
        info.name.decode(errors="replace"),
        DTYPES[info.dtype],
        tuple(info.shape[: info.ndim]),
        info.size_bytes,
        info.scale,
        info.zero_point,
        info.storage_offset,
    )


def _check_array(info: TensorInfo, data: Any) -> None:
    if not hasattr(data, "dtype"):
        return  # a plain buffer: the library checks its size
    fits = data.dtype == info.dtype or str(data.dtype) == info.dtype
    if not fits or tuple(data.shape) != info.shape:
        raise GfrtError(
            f"input {info.name} is {info.dtype} {info.shape}, got {data.dtype} {tuple(data.shape)}"
        )


def _address(data: Any) -> Tuple[int, int, Any]:
    """Where the bytes of `data` lie, how many they are, and what keeps them there."""
    if hasattr(data, "dtype"):
        array = data if data.flags.c_contiguous else data.copy(order="C")
        return array.__array_interface__["data"][0], array.nbytes, array
    view = memoryview(data)
    if view.readonly or not view.c_contiguous:
        copy = ctypes.create_string_buffer(view.tobytes(), view.nbytes)
        return ctypes.addressof(copy), view.nbytes, copy
    buffer = (ctypes.c_char * view.nbytes).from_buffer(view)
    return ctypes.addressof(buffer), view.nbytes, buffer


def _as_array(data: bytearray, info: TensorInfo) -> Any:
    numpy = _numpy()
    if numpy is not None:
        return numpy.frombuffer(data, info.dtype).reshape(info.shape)
    view = memoryview(data)  # type: Any
    return view.cast(_FORMATS[DTYPES.index(info.dtype)], info.shape)


def _flat(values: Any) -> Any:
    if isinstance(values, memoryview):
        plain = values.cast("B")  # type: Any
        return plain.cast(values.format)
    return values.reshape(-1) if hasattr(values, "reshape") else values
