"""A bundle of four small kernels with all that a real one has, made in a second, for tests.

The model: an image (1, 3, 8, 8), seen as x (24, 8);
    scaled = x * gain;  mixed = scaled @ mix;  coded = uint8 codes of mixed;  logits = column sums.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gfcompile.runtime.bundle import FileEntry, Manifest, Precision, TensorSpec
from gfcompile.runtime.device import gfrt
from gfcompile.runtime.golden import views
from gfcompile.targets.target import Cpu
from gfcompile.targets.tvm.link import link_bench, link_library, link_static_bench
from gfcompile.targets.tvm.plan import Plan, PlanIO, PlanStep, PlanTensor, serialize

Arch = Literal["x86_64", "aarch64"]
Array = npt.NDArray[Any]

RUNTIME = Path(gfrt.__file__).parent
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KERNELS = ("toy_scale", "toy_mix", "toy_encode", "toy_sum")
SCALE, OFFSET = 1 / 16, 128
# A code next to a rounding tie may be one step off, in a few of 24 rows.
TIE = 4 * SCALE


def toy_cpu(arch: Arch) -> Cpu:
    return Cpu(
        arch=arch,
        mcpu="x86-64-v2" if arch == "x86_64" else "cortex-a57",
        vector_bytes=16,
        vector_registers=16,
        int8_dot=None,
        cores=2,
        clock_ghz=2.0,
        fp32_gflops=1.0,
        int8_gops=1.0,
    )


def toy_kernels() -> dict[str, Any]:
    """The TIR functions by name."""
    from tvm.script import tirx as T

    @T.prim_func(s_tir=True)
    def toy_scale(
        x: T.Buffer((24, 8), "float32"),
        gain: T.Buffer((24, 8), "float32"),
        y: T.Buffer((24, 8), "float32"),
    ):
        T.func_attr({"tirx.noalias": True, "global_symbol": "toy_scale"})
        for i in T.serial(24):
            for j in T.vectorized(8):
                y[i, j] = x[i, j] * gain[i, j]

    @T.prim_func(s_tir=True)
    def toy_mix(
        x: T.Buffer((24, 8), "float32"),
        mix: T.Buffer((8, 16), "float32"),
        y: T.Buffer((24, 16), "float32"),
    ):
        T.func_attr({"tirx.noalias": True, "global_symbol": "toy_mix"})
        for i in T.parallel(24):
            for j in T.serial(16):
                y[i, j] = T.float32(0)
                for k in T.serial(8):
                    y[i, j] = y[i, j] + x[i, k] * mix[k, j]

    @T.prim_func(s_tir=True)
    def toy_encode(x: T.Buffer((24, 16), "float32"), y: T.Buffer((24, 16), "uint8")):
        T.func_attr({"tirx.noalias": True, "global_symbol": "toy_encode"})
        # Scratch that the kernel asks its caller for: 24 * 16 floats are too many for the stack.
        scratch = T.alloc_buffer((24, 16), "float32")
        for i in T.parallel(24):
            for j in T.serial(16):
                scratch[i, j] = T.max(
                    T.min(T.round(x[i, j] * T.float32(16)), T.float32(127)), T.float32(-128)
                )
        for i in T.parallel(24):
            for j in T.serial(16):
                y[i, j] = T.cast(scratch[i, j] + T.float32(128), "uint8")

    @T.prim_func(s_tir=True)
    def toy_sum(x: T.Buffer((24, 16), "uint8"), y: T.Buffer((1, 16), "float32")):
        T.func_attr({"tirx.noalias": True, "global_symbol": "toy_sum"})
        for j in T.serial(16):
            y[0, j] = T.float32(0)
            for i in T.serial(24):
                y[0, j] = y[0, j] + (T.cast(x[i, j], "float32") - T.float32(128)) / T.float32(16)

    return {
        "toy_scale": toy_scale,
        "toy_mix": toy_mix,
        "toy_encode": toy_encode,
        "toy_sum": toy_sum,
    }


def toy_object(arch: Arch, folder: Path, cpu: Cpu | None = None) -> Path:
    """The kernels as an object file."""
    import tvm

    cpu = cpu or toy_cpu(arch)
    target = tvm.target.Target({"kind": "llvm", "mtriple": cpu.llvm_triple, "mcpu": cpu.mcpu})
    path = folder / f"toy-{arch}.o"
    module = tvm.compile(tvm.IRModule(toy_kernels()), target=target).mod
    module.write_to_file(str(path), "o")
    return path


def toy_weights(seed: int) -> tuple[Array, Array]:
    """gain (24, 8) and mix (8, 16)."""
    generator = np.random.default_rng(seed)
    return (
        generator.standard_normal((24, 8), np.float32),
        generator.standard_normal((8, 16), np.float32),
    )


def toy_reference(image: Array, seed: int = 0) -> dict[str, Array]:
    """What each step should write, in float64 but for the codes."""
    gain, mix = toy_weights(seed)
    scaled = image.reshape(24, 8).astype(np.float64) * gain
    mixed = scaled @ mix
    coded = np.clip(np.rint(mixed / SCALE), -128, 127).astype(np.int8)
    return {
        "scaled": scaled,
        "mixed": mixed,
        "coded": coded,
        "logits": coded.astype(np.float64).sum(axis=0, keepdims=True) * SCALE,
    }


def toy_plan(arch: Arch, *, library: str, library_id: str, weights: bytes) -> Plan:
    """The plan of the model; tensors that are not needed at the same time share memory."""
    tensors = (
        PlanTensor(name="image", dtype="float32", shape=(1, 3, 8, 8), offset=0),
        PlanTensor(name="image.rows", dtype="float32", shape=(24, 8), offset=0),
        PlanTensor(name="gain", dtype="float32", shape=(24, 8), space="weights", offset=0),
        PlanTensor(name="mix", dtype="float32", shape=(8, 16), space="weights", offset=768),
        PlanTensor(name="scaled", dtype="float32", shape=(24, 8), offset=768),
        PlanTensor(name="mixed", dtype="float32", shape=(24, 16), offset=1536),
        PlanTensor(
            name="coded",
            dtype="uint8",
            shape=(24, 16),
            offset=0,
            scale=SCALE,
            storage_offset=OFFSET,
        ),
        PlanTensor(name="logits", dtype="float32", shape=(1, 16), offset=768),
    )
    steps = (
        PlanStep(kernel="toy_scale", label="stem.scale", args=(1, 2, 4), outputs=(4,)),
        PlanStep(kernel="toy_mix", label="stem.mix", args=(4, 3, 5), outputs=(5,)),
        PlanStep(kernel="toy_encode", label="stem.encode", args=(5, 6), outputs=(6,)),
        PlanStep(kernel="toy_sum", label="head", args=(6, 7), outputs=(7,)),
    )
    return Plan(
        arch=arch,
        library=library,
        library_id=library_id,
        tensors=tensors,
        steps=steps,
        inputs=(PlanIO(name="image", tensor=0, mean=MEAN, std=STD),),
        outputs=(PlanIO(name="logits", tensor=7),),
        arena_bytes=3072,
        workspace_bytes=24 * 16 * 4,
        weights_bytes=len(weights),
        weights_sha256=hashlib.sha256(weights).hexdigest(),
    )


@dataclass(frozen=True, kw_only=True)
class Toy:
    """A toy bundle: its folder and the plan in it."""

    folder: Path
    plan: Plan

    @property
    def library(self) -> Path:
        return self.folder / self.plan.library

    def copy(self, folder: Path) -> "Toy":
        """A copy to damage."""
        shutil.copytree(self.folder, folder)
        return Toy(folder=folder, plan=self.plan)

    def with_plan(self, folder: Path, **changes: Any) -> "Toy":
        """A copy whose plan differs in `changes`; its manifest agrees with it."""
        toy = Toy(folder=self.copy(folder).folder, plan=replace(self.plan, **changes))
        (folder / "plan.bin").write_bytes(serialize(toy.plan))
        write_manifest(toy)
        return toy


def write_manifest(toy: Toy, **changes: Any) -> None:
    """manifest.json for the files that are there."""
    files = {
        path.relative_to(toy.folder).as_posix(): FileEntry(
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(), size_bytes=path.stat().st_size
        )
        for path in sorted(toy.folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }
    manifest = Manifest(
        created_by="tests",
        model="toy",
        target="toy",
        precision=Precision(requested="int8", storage="float32", compute="float32"),
        arch=toy.plan.arch,
        inputs=(TensorSpec(name="image", dtype="float32", shape=(1, 3, 8, 8)),),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=(1, 16)),),
        weights="random (seed 0)",
        device=toy.plan.device,
        library=toy.plan.library,
        transform={
            "image_size": 8,
            "resize": 9,
            "interpolation": "bicubic",
            "mean": MEAN,
            "std": STD,
        },
        files=files,
    )
    values = {**manifest.to_dict(), **changes}
    (toy.folder / "manifest.json").write_text(json.dumps(values, indent=1))


def build_toy(
    folder: Path,
    kernels: Path,
    arch: Arch,
    *,
    name: str = "toy",
    seed: int = 0,
    cpu: Cpu | None = None,
) -> Toy:
    """Writes a bundle into the new folder `folder`; `kernels` is what `toy_object` made."""
    cpu = cpu or toy_cpu(arch)
    folder.mkdir()
    gain, mix = toy_weights(seed)
    weights = gain.tobytes() + mix.tobytes()
    (folder / "weights.bin").write_bytes(weights)
    library = f"lib{name}.so"
    library_id = hashlib.sha256(name.encode()).hexdigest()[:16]
    plan = toy_plan(arch, library=library, library_id=library_id, weights=weights)
    (folder / "plan.bin").write_bytes(serialize(plan))
    link_library([kernels], KERNELS, cpu, folder / library, library_id=library_id)
    if cpu.android_api is None:
        link_bench(cpu, folder / "gfbench")
    else:
        link_static_bench([kernels], KERNELS, cpu, folder / "gfbench", library_id=library_id)
    for file in ("gfrt.h", "gfrt.py"):
        shutil.copy(RUNTIME / file, folder)
    toy = Toy(folder=folder, plan=plan)
    write_manifest(toy)
    return toy


def add_golden(toy: Toy, *, tolerance: float = TIE, ledger: bool = True) -> Toy:
    """The toy with golden data by NumPy: an image, and the logits of its views."""
    image = np.random.default_rng(7).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    folder = toy.folder / "golden"
    folder.mkdir()
    (folder / "image.u8").write_bytes(image.tobytes())
    rows = []
    for view in views(image):
        values = (view.astype(np.float32) / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
        rows.append(toy_reference(values.transpose(2, 0, 1)[None])["logits"])
    (folder / "views.f32").write_bytes(np.concatenate(rows).astype("<f4").tobytes())
    entry = {"stage": "artifact", "tolerance": tolerance, "int8": None}
    write_manifest(toy, ledger=[entry] if ledger else [])
    return toy


def with_gfbench(toy: Toy, script: str) -> Toy:
    """The toy with a shell script in the place of its gfbench."""
    (toy.folder / "gfbench").write_text(f"#!/bin/sh\n{script}\n")
    (toy.folder / "gfbench").chmod(0o755)
    manifest = json.loads((toy.folder / "manifest.json").read_text())
    write_manifest(toy, ledger=manifest["ledger"])
    return toy


def toy_images(count: int = 1, seed: int = 5) -> Array:
    """Images (count, 3, 8, 8) like normalized ones."""
    return np.random.default_rng(seed).standard_normal((count, 3, 8, 8), np.float32)
