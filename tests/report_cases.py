"""A manifest and a result with everything that a report shows, made by hand."""

import math
from dataclasses import replace
from typing import Any

import numpy as np

from gfcompile.runtime.bundle import FileEntry, Manifest, Precision, TensorSpec
from gfcompile.runtime.report import Picture
from gfcompile.runtime.results import (
    TIMER_WHOLE,
    BoardState,
    Budget,
    BundleIdentity,
    Caution,
    CoreState,
    DeviceReport,
    KernelTime,
    Latencies,
    Numbers,
    Protocol,
    ValidationResult,
    Verdict,
)

# name, calls, flops, bytes, arithmetic, instructions' time
KERNELS = (
    ("dense_196x1536x384_i8_gelu_i8", 12, 231_211_008, 978_448, "int8", 466.8),
    ("dft_filter_1x14x14x384_f16", 12, 4_558_848, 775_488, "float32", 60.2),
    ("layer_norm_196x384_eps1e_06", 13, 602_112, 605_184, "float32", 7.5),
    ("token_mean_1x196x384_i8", 1, 75_264, 301_456, "float32", 0.95),
)


def manifest(**changes: Any) -> Manifest:
    """Of an int8 bundle that prunes; a real one has no filters beside pruning."""
    made = Manifest(
        created_by="gfcompile 0.1.0",
        model="gfnet_xs",
        target="raspberry-pi-4",
        precision=Precision(requested="int8", storage="int8 products", compute="smull, sadalp"),
        arch="aarch64",
        inputs=(TensorSpec(name="image", dtype="float32", shape=(1, 3, 224, 224)),),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=(1, 1000)),),
        weights="random (seed 0)",
        notes=("weights are random (seed 0)", "int8 on raspberry-pi-4: a quarter of the memory"),
        ledger=(
            _entry("traced", "torch", 4.8e-7, 126.8, tolerance=5.9e-4),
            _entry("quantized", "traced", 0.0159, 36.3),
            _entry("artifact", "quantized", 0.0, None, how="qemu", tokens_kept=[1.0, 0.985])
            | {"int8": {"equal": 0.99999, "values": 18_667_008, "max_steps": 1}},
        ),
        filters=tuple(
            {"name": f"blocks.{i}.filter", "h": 14, "w": 14, "c": 384, "form": "dft"}
            for i in range(12)
        ),
        kernels=tuple(
            {
                "name": name,
                "calls": calls,
                "flops": flops,
                "bytes": size,
                "arithmetic": arithmetic,
                "issue_us": issue,
            }
            for name, calls, flops, size, arithmetic, issue in KERNELS
        ),
        versions={"torch": "2.13.0+cpu", "numpy": "2.4.6"},
        files={
            "weights.bin": FileEntry(sha256="0" * 64, size_bytes=17_000_000),
            "plan.bin": FileEntry(sha256="1" * 64, size_bytes=40_000),
            "golden/image.u8": FileEntry(sha256="2" * 64, size_bytes=150_528),
        },
        extra={
            "peaks": {
                "float32_gflops": 14.4,
                "float16_gflops": 14.4,
                "int8_gops": 28.8,
                "bandwidth_gb_s": 12.8,
                "cores": 4,
                "call_us": 0.0,
            },
            "layers": [
                {
                    "name": f"blocks.{i}.mlp.fc1",
                    "activation_sqnr_db": 36.0 + i,
                    "weight_sqnr_db": 42.0,
                    "clipped_fraction": 4e-5,
                }
                for i in range(12)
            ],
            "kept_float": [{"name": "score_predictor.0", "reason": "near-ties flip tokens"}],
            "arena_bytes": 978_432,
            "arena_lower_bound_bytes": 931_840,
        },
    )
    return replace(made, **changes)


def _entry(stage: str, against: str, error: float, sqnr: float | None, **more: Any) -> Any:
    values = {
        "stage": stage,
        "against": against,
        "images": 4,
        "max_abs_error": error,
        "sqnr_db": sqnr,
        "top1_agreement": 1.0,
        "how": "ONNX Runtime",
        "tolerance": None,
        "int8": None,
        "tokens_kept": [],
    }
    return values | more


def samples(count: int = 1200) -> list[float]:
    """Microseconds around 12 ms; the device slows down towards the end."""
    generator = np.random.default_rng(0)
    noise = generator.gamma(2.0, 80.0, count)
    warm = 600 / (1 + np.exp(-(np.arange(count) - 0.7 * count) / (0.03 * count)))
    return [round(float(v), 1) for v in 12_000 + noise + warm]


def result(**changes: Any) -> ValidationResult:
    """Of a validation that passed."""
    times = Latencies.of(samples())
    cores = tuple(
        CoreState(index=i, mhz=1500.0, max_mhz=1800.0, governor="ondemand") for i in (0, 1)
    )
    before = BoardState(cores=cores, temperatures_c={"cpu": 48.2}, load_1min=0.4)
    made = ValidationResult(
        date="2026-11-21T11:30:00+00:00",
        bundle=BundleIdentity(
            name="gfnet_xs-raspberry-pi-4-int8",
            model="gfnet_xs",
            target="raspberry-pi-4",
            kind="gfrt",
            requested="int8",
            storage="int8 products",
            compute="smull, sadalp",
            weights="random (seed 0)",
            arch="aarch64",
            size_bytes=17_190_528,
            manifest_sha256="ab" * 32,
        ),
        device=DeviceReport(
            url="ssh://pi@shelf",
            kind="ssh",
            name="Raspberry Pi 4",
            arch="aarch64",
            cpu_model="Cortex-A72",
            processor="cpu",
            memory_mb=3900.0,
            versions={"kernel": "6.6.51"},
            before=before,
            after=replace(before, temperatures_c={"cpu": 71.5}, throttling=("under-voltage",)),
        ),
        budget=Budget(max_latency_ms=14.0),
        verdict=Verdict(passed=True, reasons=("met: p90 12.8 ms, 14 ms is the budget",)),
        numbers=Numbers(
            reference="the compiled graph",
            inferences=8,
            top1_agreement=1.0,
            max_abs_error=0.0054,
            sqnr_db=43.6,
            tolerance=0.04,
            within=True,
        ),
        protocol=Protocol(
            tool="gfbench 1.0",
            rule="single-stream",
            timer=TIMER_WHOLE,
            threads=1,
            pinned_cpus=(3,),
            warmup="until the median was stable",
            warmup_runs=40,
            stable=True,
            runs=len(samples()),
            duration_s=math.fsum(samples()) / 1e6,
        ),
        latencies=times,
        load_ms=12.2,
        first_inference_ms=15.1,
        peak_memory_mb=34.5,
        kernels=tuple(
            KernelTime(
                label=f"node{i}",
                kernel=name,
                median_us=0.9 * issue,
                flops=flops,
                bytes=size,
                arithmetic="int8" if arithmetic == "int8" else "float32",
            )
            for name, calls, flops, size, arithmetic, issue in KERNELS
            for i in range(calls)
        ),
        cautions=(Caution(text="the governor is ondemand", fix="sudo cpupower ..."),),
        commands=("gfcompile validate gfnet_xs-raspberry-pi-4-int8 --device ssh://pi@shelf",),
        versions={"gfcompile": "0.1.0"},
    )
    return replace(made, **changes)


def picture() -> Picture:
    """A gradient, and three stages that keep ever fewer of 4 x 4 patches."""
    ramp = np.linspace(0, 255, 32).astype(np.uint8)
    pixels = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], np.uint8(90)), axis=-1)
    return Picture(
        pixels=np.ascontiguousarray(pixels),
        top=(("tabby cat", 0.71), ("tiger cat", 0.2)),
        source="cat.jpg",
        computed_by="the bundle, on this machine",
        kept=(tuple(range(0, 16, 2)), (0, 4, 8), (4,)),
        patches=16,
    )
