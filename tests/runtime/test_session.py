"""A bundle loaded on the host: results, traces, profiles, threads, and each way to fail."""

import threading
from pathlib import Path

import numpy as np
import pytest
from toy_bundle import Toy, toy_images, toy_reference, write_manifest

from gfcompile.runtime import load
from gfcompile.runtime.errors import BundleError, DeviceError, UserError
from gfcompile.runtime.session import Session
from gfcompile.targets.tvm.plan import seal
from tools import need, need_arm64_sysroot


def close_to_reference(trace: dict[str, np.ndarray], image: np.ndarray, seed: int = 0) -> None:
    reference = toy_reference(image, seed)
    assert set(trace) == set(reference)
    # Eight float32 products summed: at most 8 roundings of the largest sum of magnitudes, < 32.
    for name in ("scaled", "mixed"):
        np.testing.assert_allclose(trace[name], reference[name], rtol=0, atol=8 * 32 * 2**-24)
    # A code may be a step off where a product lies next to a rounding tie.
    assert trace["coded"].dtype == np.int8
    assert np.abs(trace["coded"].astype(int) - reference["coded"]).max() <= 1
    # Sums of multiples of 1/16 below 2**8 are exact in float32.
    exact = trace["coded"].astype(np.float64).sum(axis=0, keepdims=True) / 16
    np.testing.assert_array_equal(trace["logits"], exact)


def test_a_session_gives_what_numpy_gives(toy: Toy) -> None:
    image = toy_images()
    with load(toy.folder) as session:
        trace = session.trace(image)
        close_to_reference(trace, image)
        np.testing.assert_array_equal(session.run(image), trace["logits"])
        assert session.device_name == "cpu"


def test_the_same_by_gfbench(toy: Toy) -> None:
    images = toy_images(3)
    with load(toy.folder) as local, load(toy.folder, device="process") as process:
        np.testing.assert_array_equal(process.run(images), local.run(images))
        mine, theirs = local.trace(images), process.trace(images)
        assert list(mine) == list(theirs)
        for name in mine:
            np.testing.assert_array_equal(mine[name], theirs[name])


@pytest.mark.parametrize("threads", [1, 3])
def test_an_arm64_bundle_under_qemu_gives_what_numpy_gives(arm_toy: Toy, threads: int) -> None:
    need("qemu-aarch64")
    need_arm64_sysroot()
    images = toy_images(2)
    with load(arm_toy.folder, device="qemu", threads=threads) as session:
        for i in range(2):
            close_to_reference(session.trace(images[i : i + 1]), images[i])
        assert session.run(images).shape == (2, 16)
        assert session.benchmark(runs=2).median_ms > 0


def test_every_number_of_threads_gives_the_same_bits(toy: Toy) -> None:
    images = toy_images(4)
    with load(toy.folder) as session:
        expected = session.trace(images)
    for threads in (0, 2, 3, 5, 24, 40):
        with load(toy.folder, threads=threads) as session:
            for _ in range(20):
                trace = session.trace(images)
                for name, values in expected.items():
                    np.testing.assert_array_equal(trace[name], values)


def in_huge_pages() -> set[tuple[int, int, str]]:
    """Start, size and file of the memory that this process asks huge pages for."""
    found = set()
    start, size, file = 0, 0, ""
    for line in Path("/proc/self/smaps").read_text(errors="replace").splitlines():
        words = line.split()
        if words[0] == "VmFlags:" and "hg" in words:
            found.add((start, size, file))
        elif not words[0].endswith(":"):
            start, end = (int(word, 16) for word in words[0].split("-"))
            size, file = end - start, words[5] if len(words) > 5 else ""
    return found


def test_memory_is_in_huge_pages_where_it_fills_a_good_part_of_one(
    toy: Toy, tmp_path: Path
) -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel has no transparent huge pages")
    huge = 2 << 20
    larger = toy.with_plan(tmp_path / "larger", arena_bytes=huge // 2)
    before = in_huge_pages()
    image = toy_images()
    with load(toy.folder) as small, load(larger.folder) as large:
        added = in_huge_pages() - before
        files = {file for _, _, file in added if file}
        assert files == {str(each.folder.resolve() / "weights.bin") for each in (toy, larger)}
        assert [(start % huge, size) for start, size, file in added if not file] == [(0, huge)]
        np.testing.assert_array_equal(large.run(image), small.run(image))


def test_several_threads_run_a_session_each(toy: Toy, other_toy: Toy) -> None:
    """Two models in one process, eight contexts, at the same time."""
    images = toy_images(8)
    failures: list[BaseException] = []
    sessions = [load(t.folder, threads=1 + i % 2) for i in range(4) for t in (toy, other_toy)]

    def work(session: Session, image: np.ndarray, seed: int) -> None:
        try:
            for _ in range(50):
                close_to_reference(session.trace(image), image, seed)
        except BaseException as error:
            failures.append(error)

    threads = [
        threading.Thread(target=work, args=(session, images[i : i + 1], i % 2))
        for i, session in enumerate(sessions)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for session in sessions:
        session.close()
    assert not failures


@pytest.mark.parametrize("device", ["local", "process"])
def test_the_profile_names_every_step(toy: Toy, device: str) -> None:
    with load(toy.folder, device=device) as session:
        profile = session.profile(runs=7)
        assert [step.label for step in profile] == ["stem.scale", "stem.mix", "stem.encode", "head"]
        assert [step.kernel for step in profile] == [s.kernel for s in toy.plan.steps]
        assert all(step.calls == 7 and 0 < step.seconds < 1 for step in profile)
        latency = session.benchmark(runs=5)
        assert 0 < latency.min_ms <= latency.median_ms <= latency.p90_ms < 1000


@pytest.mark.parametrize("device", ["local", "process"])
def test_names_in_no_encoding_are_shown_as_far_as_they_go(
    toy: Toy, tmp_path: Path, device: str
) -> None:
    copy = toy.copy(tmp_path / "toy")
    data = (copy.folder / "plan.bin").read_bytes()
    for name in (b"stem.mix", b"mixed", b"logits"):
        data = data.replace(name + b"\0", b"\xff" + name[1:] + b"\0")
    (copy.folder / "plan.bin").write_bytes(seal(data))
    (copy.folder / "labels.txt").write_bytes(b"\xfflabel\n" * 16)
    write_manifest(copy)
    with load(copy.folder, device=device) as session:
        assert session.profile(runs=1)[1].label == "\N{REPLACEMENT CHARACTER}tem.mix"
        assert "\N{REPLACEMENT CHARACTER}ixed" in session.trace(toy_images())
        (top,) = session.classify(np.zeros((8, 8, 3), np.uint8), top=1)
        assert top[1] == "\N{REPLACEMENT CHARACTER}label"


def test_an_image_is_classified(toy: Toy, tmp_path: Path) -> None:
    from PIL import Image

    from gfcompile.runtime.images import Transform, normalize

    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    toy = toy.copy(tmp_path / "toy")
    labels = [f"label {i}" for i in range(16)]
    (toy.folder / "labels.txt").write_text("\n".join(labels) + "\n")
    Image.fromarray(pixels).resize((20, 30)).save(tmp_path / "image.png")
    with load(toy.folder) as session:
        assert session.manifest.transform is not None
        transform = Transform.from_dict(dict(session.manifest.transform))
        logits = session.run(normalize(pixels, transform)).astype(np.float64)[0]
        probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        result = session.classify(pixels, top=3)
        assert [index for index, _, _ in result] == list(np.argsort(-logits, kind="stable")[:3])
        for index, label, probability in result:
            assert label == f"label {index}"
            assert probability == pytest.approx(probabilities[index])
        assert len(session.classify(tmp_path / "image.png")) == 5


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((1, 3, 8, 8)), "is float32, got float64"),
        (np.zeros((1, 3, 8, 9), np.float32), "has the shape"),
        (np.zeros((0, 3, 8, 8), np.float32), "has the shape"),
        (np.zeros((3, 8, 8), np.float32), "has the shape"),
    ],
)
def test_a_wrong_input_is_refused(toy: Toy, array: np.ndarray, reason: str) -> None:
    with load(toy.folder) as session, pytest.raises(UserError, match=reason):
        session.run(array)


def test_an_array_of_any_memory_layout_is_taken(toy: Toy) -> None:
    image = toy_images()
    with load(toy.folder) as session:
        expected = session.run(image)
        np.testing.assert_array_equal(session.run(np.asfortranarray(image)), expected)
        readonly = image.copy()
        readonly.flags.writeable = False
        np.testing.assert_array_equal(session.run(readonly), expected)


def test_an_unknown_device_is_refused(toy: Toy) -> None:
    with pytest.raises(UserError, match=r"unknown device 'moon'.*local, process, qemu"):
        load(toy.folder, device="moon")  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [-1, 257])
def test_too_many_threads_are_a_wrong_argument_not_a_wrong_bundle(toy: Toy, threads: int) -> None:
    with pytest.raises(UserError, match=f"{threads} threads: give 1 to 256, or 0"):
        load(toy.folder, threads=threads)


def test_what_is_asked_of_a_closed_session_is_a_device_error(toy: Toy) -> None:
    with load(toy.folder) as session:
        image = toy_images()
    for use in (session.run, session.trace, session.profile):
        with pytest.raises(DeviceError, match="the context is closed"):
            use(image)
    session.close()


def test_an_x86_bundle_is_not_for_qemu(toy: Toy) -> None:
    with pytest.raises(DeviceError, match="runs arm64 bundles, this one is for x86_64"):
        load(toy.folder, device="qemu")


def test_missing_qemu_is_said(arm_toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(DeviceError, match="apt-get install qemu-user libc6-arm64-cross"):
        load(arm_toy.folder, device="qemu")


def test_a_kernel_that_refuses_its_arguments_is_named(toy: Toy, tmp_path: Path) -> None:
    """TVM's kernels check shapes and types themselves; their message reaches the user."""
    tensors = list(toy.plan.tensors)
    tensors[4] = type(tensors[4])(name="scaled", dtype="float32", shape=(24, 7), offset=768)
    broken = toy.with_plan(tmp_path / "toy", tensors=tuple(tensors))
    for device in ("local", "process"):
        with (
            load(broken.folder, device=device) as session,  # type: ignore[arg-type]
            pytest.raises(DeviceError, match=r"kernel toy_scale \(stem\.scale\) failed.*compact"),
        ):
            session.run(toy_images())


def test_a_kernel_without_its_scratch_is_named(toy: Toy, tmp_path: Path) -> None:
    small = toy.with_plan(tmp_path / "toy", workspace_bytes=0)
    with (
        load(small.folder) as session,
        pytest.raises(DeviceError, match=r"toy_encode \(stem\.encode\).*1536 bytes of scratch"),
    ):
        session.run(toy_images())


def test_a_cpu_without_a_feature_is_named(toy: Toy, tmp_path: Path) -> None:
    needy = toy.with_plan(tmp_path / "toy", cpu_features=("sse4_2", "avx99"))
    with pytest.raises(BundleError, match="this CPU lacks avx99"):
        load(needy.folder)
    fine = toy.with_plan(tmp_path / "fine", cpu_features=("ssse3", "sse4_2", "popcnt"))
    load(fine.folder).close()


def test_a_library_of_another_bundle_is_noticed(toy: Toy, other_toy: Toy, tmp_path: Path) -> None:
    """Same file names, contents mixed up: the identifier in the plan tells."""
    from toy_bundle import write_manifest

    mixed = toy.copy(tmp_path / "toy")
    mixed.library.write_bytes(other_toy.library.read_bytes())
    write_manifest(mixed)
    with pytest.raises(BundleError, match="do not belong together"):
        load(mixed.folder)
