"""Weights in groups, however a schedule packs them, are codes of four bits and factors."""

import numpy as np
import pytest

from gfcompile.quantize.int4 import fits_int4
from gfcompile.targets.host import host_target
from gfcompile.targets.target import Target, find_target
from gfcompile.targets.tvm.grouped import GroupedRows, find_rows
from gfcompile.targets.tvm.kernel import Array, Dense
from gfcompile.targets.tvm.schedule import act_storage, schedule

TARGETS = (
    "x86-64",
    "x86-64-v3",
    "x86-64-v4",
    "arm64",
    "raspberry-pi-3",
    "raspberry-pi-4",
    "raspberry-pi-5",
    "jetson-tx2",
    "jetson-orin",
)


def weights(k: int, n: int, group_size: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    factors = rng.integers(1, 19, (-(-k // group_size), n)).repeat(group_size, axis=0)[:k]
    return (rng.integers(-7, 8, (k, n)) * factors).astype(np.int8)


def expanded(codes: np.ndarray, factors: np.ndarray, rows: GroupedRows) -> np.ndarray:
    """As the C runtime does it, byte by byte."""
    flat, found = factors.reshape(-1).tolist(), codes.tolist()
    runs = rows.row_bytes // rows.run
    groups = -(-rows.rows // rows.shared)
    for at in range(len(found)):
        panel, row = divmod(at // rows.row_bytes, rows.rows)
        group = panel * groups + row // rows.shared
        found[at] *= flat[group * runs + at % rows.row_bytes // rows.run]
    return np.array(found, np.int8)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(
    ("k", "n", "groups"), [(64, 96, 1), (80, 32, 1), (48, 10, 1), (32, 16, 1), (64, 120, 3)]
)
@pytest.mark.parametrize("group_size", [16, 32])
def test_every_schedules_packing_is_rows_of_groups(
    name: str, k: int, n: int, groups: int, group_size: int
) -> None:
    target = find_target(name)
    assert isinstance(target, Target)
    out = "int8" if groups > 1 else "float32"
    kernel = Dense(m=49, n=n, k=k, x="int8", out=out, out_groups=groups)  # type: ignore[arg-type]
    pack = schedule(kernel, target, act_storage(target)).pack.get("w")

    def packed(w: Array) -> Array:
        return w if pack is None else pack({"w": w})

    rows = find_rows(packed, k, n, group_size)
    assert rows is not None
    values = np.ascontiguousarray(packed(weights(k, n, group_size))).view(np.int8).reshape(-1)
    split = rows.split(values)
    assert split is not None
    codes, factors = split
    assert fits_int4(codes)
    # Weights for several levels of ARM lie in panels of 16 k, each with factors of its own.
    shared = min(group_size, k, 16 if name == "arm64" else k)
    assert factors.size <= 1.01 * values.size / shared + n
    assert np.array_equal(expanded(codes, factors, rows), values)


def test_what_is_no_such_weight_has_no_codes() -> None:
    target = host_target()
    kernel = Dense(m=49, n=32, k=64, x="int8")
    pack = schedule(kernel, target, act_storage(target)).pack["w"]
    rows = find_rows(lambda w: pack({"w": w}), 64, 32, 16)
    assert rows is not None
    values = np.random.default_rng(0).integers(-127, 128, (64, 32)).astype(np.int8)
    assert rows.split(np.ascontiguousarray(pack({"w": values})).view(np.int8).reshape(-1)) is None


def test_an_order_without_rows_is_not_taken_for_one() -> None:
    order = np.random.default_rng(0).permutation(64 * 32)
    assert find_rows(lambda w: w.reshape(-1)[order], 64, 32, 16) is None
    # Rows that go on along k further than a group does.
    assert find_rows(lambda w: np.ascontiguousarray(w.T), 64, 32, 16) is None
