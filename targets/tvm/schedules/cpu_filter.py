"""The global filter on a CPU, each form as one kernel over blocks of channels.

A block is one or a few vectors of channels, and everything about its grid happens while the grid
is in cache: no transpose and no complex product ever becomes a pass over memory of its own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script import tirx as T

from gfcompile.targets.spectral import cosine_matrix, sine_matrix
from gfcompile.targets.target import Cpu
from gfcompile.targets.tvm.kernel import (
    CHANNEL_BLOCK,
    ActStorage,
    Array,
    CircularFilter,
    DftFilter,
    Scheduled,
    Step,
)
from gfcompile.targets.tvm.schedules.cpu_dense import LINE_BYTES, prefetch_line
from gfcompile.targets.tvm.schedules.cpu_tiling import (
    apart,
    ceil_div,
    fitting_lanes,
    span,
    splat,
    tile_rows,
)
from gfcompile.targets.tvm.schedules.math import half_to_float
from gfcompile.targets.tvm.schedules.params import keep_params

Expr = Any  # tvm.tirx.Expr, or a number where TVM accepts one
Index = tuple[Expr, ...]


@dataclass(frozen=True, kw_only=True)
class _Blocks:
    """How the channels of (batch, h, w, c) are cut into tasks.

    Attributes:
        lanes: channels of a vector.
        vectors: vectors of a block.
        channels: c; the last block overlaps the one before it where blocks do not divide c.
        per_image: blocks per image.
        tasks: blocks in all.
        workers: slices of the tasks that may run in parallel. Each has scratch of its own and
            uses it again for every task, so that the scratch stays in cache.
    """

    lanes: int
    vectors: int
    channels: int
    per_image: int
    tasks: int
    workers: int

    @property
    def width(self) -> int:
        return self.lanes * self.vectors

    @property
    def tasks_per_worker(self) -> int:
        return ceil_div(self.tasks, self.workers)

    def start(self, block: Expr) -> Expr:
        """The first channel of a block."""
        return T.min(block * self.width, self.channels - self.width)

    def packed(self, name: str) -> Callable[[Mapping[str, Array]], Array]:
        """Lays the constant `name`, (h, k, c), out as (per_image, h, k, width), to be streamed."""
        last = self.channels - self.width
        starts = [min(i * self.width, last) for i in range(self.per_image)]

        def pack(raw: Mapping[str, Array]) -> Array:
            constant = raw[name]
            if constant.dtype == np.float16:
                constant = constant.view(np.uint16)
            return np.stack([constant[..., s : s + self.width] for s in starts])

        return pack


def _cut(batch: int, c: int, vectors: int, cpu: Cpu, lanes: int = 0) -> _Blocks:
    lanes = fitting_lanes(c, lanes or cpu.float_lanes)
    vectors = min(vectors, c // lanes)
    per_image = ceil_div(c, lanes * vectors)
    tasks = batch * per_image
    return _Blocks(
        lanes=lanes,
        vectors=vectors,
        channels=c,
        per_image=per_image,
        tasks=tasks,
        workers=min(cpu.cores, tasks),
    )


def _stored(k_dtype: str) -> str:
    return "uint16" if k_dtype == "float16" else "float32"


# The DFT of n real values splits into an even half, n // 2 + 1 cosine sums over x[j] + x[n - j],
# and an odd half, (n - 1) // 2 sine sums over x[j] - x[n - j]. Where n is even, each splits again,
# since cosines and sines at n/2 - j are those at j, with a sign that alternates along frequencies:
# 50 products for n = 14, instead of 196 or more. Along both axes, the h x w values of a channel
# become h x w sums cc, cs, sc, ss (cosine or sine along h, then along w), all of them real.
#
# With X+ the spectrum at (u, k) and X- at (h - u, k),
#     X+ = (cc - ss) - i (cs + sc)        X- = (cc + ss) - i (cs - sc)
# and the filtered spectrum Y = K X goes back with, summed over u and h - u,
#     cc = Re Y+ + Re Y-    ss = Re Y- - Re Y+    cs = -Im Y+ - Im Y-    sc = Im Y- - Im Y+.
# Where u is 0 or h/2, there is no sc and no ss; where k is 0 or w/2, no cs and no ss.
# Such sums stand for two or one terms of the whole spectrum instead of four.


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One of the square matrices that a DFT splits into: sums of `count` terms, as many of them.

    Attributes:
        first: of its terms, among those of all parts.
        sums: where its first sum is in the half spectrum, cosine sums before sine sums.
        step: from one of its sums to the next one.
    """

    first: int
    count: int
    sums: int
    step: int

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.count)


def _parts(n: int) -> tuple[_Part, ...]:
    """Cosine sums, then sine sums; of an even n those of even and of odd place apart."""
    even, odd = n // 2 + 1, (n - 1) // 2
    counts = (even, odd) if n % 2 else ((even + 1) // 2, even // 2, (odd + 1) // 2, odd // 2)
    places = (0, even) if n % 2 else (0, 1, even, even + 1)
    step = 1 if n % 2 else 2
    firsts = [sum(counts[:i]) for i in range(len(counts))]
    return tuple(
        _Part(first=first, count=count, sums=place, step=step)
        for first, count, place in zip(firsts, counts, places, strict=True)
        if count
    )


def _bases(n: int, *, inverse: bool, mirrored: bool = False) -> Array:
    """The matrices of all parts, one below the other: [from, to].

    Args:
        n: the length.
        inverse: from sums to terms.
        mirrored: whether a frequency counts twice that the half spectrum holds for two.
    """
    even, odd = n // 2 + 1, (n - 1) // 2
    cosines, sines = cosine_matrix(n).copy(), sine_matrix(n).copy()  # [place, frequency]
    if mirrored:
        cosines[:, 1 : 1 + odd] *= 2
        sines *= 2
    parts = _parts(n)
    bases = np.zeros((n, max(part.count for part in parts)))
    for part in parts:
        whole, sums = (cosines, part.sums) if part.sums < even else (sines, part.sums - even)
        matrix = whole[: part.count, sums :: part.step][:, : part.count]
        bases[part.rows, : part.count] = matrix.T if inverse else matrix
    return bases.astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class FilterTile:
    """Registers of the small products; results are the same bits whatever it is.

    Attributes:
        rows: sums per column, at most.
        columns: vectors of channels that share a matrix element.
        vectors: of a block of channels; they are neighbouring columns and divide `columns`.
    """

    rows: int
    columns: int
    vectors: int


def _in_halves(kernel: DftFilter, cpu: Cpu) -> bool:
    return kernel.x == "float16" and cpu.float16


def _dft_tile(kernel: DftFilter, cpu: Cpu) -> FilterTile:
    """The fastest of seven or eight tiles on grids of 7 to 56.

    AVX-512 and AVX2 by time, NEON by instructions: 0.36 per multiply-add in the inner loop, which
    broadcasts matrix elements by lane. 14 x 14 x 384 takes 0.05 ms with AVX-512.
    """
    if _in_halves(kernel, cpu):  # blocks of 16 channels as elsewhere
        return FilterTile(rows=6, columns=4, vectors=2)
    if cpu.arch == "aarch64":
        return FilterTile(rows=6, columns=4, vectors=4)
    if cpu.vector_registers >= 32:
        return FilterTile(rows=8, columns=2, vectors=1)
    if cpu.vector_bytes == 16:  # blocks of 16 channels as on better x86, whose constants they share
        return FilterTile(rows=3, columns=4, vectors=4)
    return FilterTile(rows=6, columns=2, vectors=2)


def dft_filter_choices(kernel: DftFilter, cpu: Cpu) -> Sequence[FilterTile]:
    """Every tile that is worth measuring; the default one leads.

    None where transforms need no tiles. Blocks stay as wide as they are: constants are packed by
    them, and shared by several CPUs.
    """
    if _fits_registers(kernel, cpu):
        return ()
    default = _dft_tile(kernel, cpu)
    # Sums, and a vector of each column; what is longer than a part is no tile.
    most_rows = max(part.count for n in (kernel.h, kernel.w) for part in _parts(n))
    tiles = [
        FilterTile(rows=rows, columns=columns, vectors=default.vectors)
        for rows in range(1, most_rows + 1)
        for columns in (1, 2, 3, 4, 6, 8)
        if columns % default.vectors == 0
        and cpu.vector_registers // 3 <= rows * columns + columns < cpu.vector_registers
    ]
    return [default, *(tile for tile in tiles if tile != default)]


def schedule_dft_filter(
    kernel: DftFilter, cpu: Cpu, _storage: ActStorage, choice: FilterTile | None = None
) -> Scheduled:
    """The filter by separable real DFTs: along w, along h, times K, back along h, along w."""
    h, w, c = kernel.h, kernel.w, kernel.c
    tile = choice or _dft_tile(kernel, cpu)
    dtype = "float16" if _in_halves(kernel, cpu) else "float32"
    most_lanes = cpu.vector_bytes // np.dtype(dtype).itemsize
    blocks = _cut(kernel.batch, c, tile.vectors, cpu, most_lanes)
    vectors, lanes = blocks.vectors, blocks.lanes
    rows = min(h, tile.columns // tile.vectors)  # of the grid, transformed together
    # Transforms along h work in place, so their tiles must not overlap: the spectrum is padded.
    tiles = ceil_div(w * vectors, tile.columns)
    padded = tiles * tile.columns
    line = max(w * rows * vectors, h * tile.columns)
    spectrum_shape = (blocks.workers, apart(h, padded * lanes, dtype), padded, lanes)
    line_shape = (blocks.workers, apart(line, lanes, dtype), lanes)
    row_groups = ceil_div(h, rows)
    grid_shape: tuple[int, ...] = (kernel.batch, h, w, c)
    if kernel.in_blocks:
        assert blocks.width == CHANNEL_BLOCK, kernel
        grid_shape = (c // CHANNEL_BLOCK, kernel.batch, h, w, CHANNEL_BLOCK)
    k_shape = (blocks.per_image, h, w // 2 + 1, blocks.width)
    in_registers = _fits_registers(kernel, cpu)
    consts = {
        "w_bases": _bases(w, inverse=False),
        "w_bases_back": _bases(w, inverse=True),
        "h_bases": _bases(h, inverse=False),
        "h_bases_back": _bases(h, inverse=True, mirrored=True),
    }
    if in_registers:
        consts = {
            name: np.pad(bases, ((0, 0), (0, _LANES - bases.shape[1])))
            for name, bases in consts.items()
        }
    consts = {name: bases.astype(dtype) for name, bases in consts.items()}
    along_w = _RealDft(n=w, columns=rows * vectors, most_rows=tile.rows, lanes=lanes, dtype=dtype)
    along_h = _RealDft(n=h, columns=tile.columns, most_rows=tile.rows, lanes=lanes, dtype=dtype)

    def pixel(b: Expr, i: Expr, j: Expr, first: Expr, count: int) -> Index:
        """Where `count` channels of a pixel are, all of one block."""
        if kernel.in_blocks:
            return first // CHANNEL_BLOCK, b, i, j, span(first % CHANNEL_BLOCK, count)
        return b, i, j, span(first, count)

    def grid(buffer: Any, b: Expr, i: Expr, c0: Expr) -> "_View":
        """Columns are the vectors of `rows` rows of the image, positions go along w."""
        return _View(
            buffer,
            lambda j, v: pixel(b, i + v // vectors, j, c0 + v % vectors * lanes, lanes),
            dtype,
        )

    def spectrum_rows(buffer: Any, worker: Expr, i: Expr) -> "_View":
        return _View(
            buffer,
            lambda k, v: (worker, i + v // vectors, k * vectors + v % vectors, span(0, lanes)),
        )

    def spectrum_columns(buffer: Any, worker: Expr, g: Expr) -> "_View":
        return _View(buffer, lambda u, v: (worker, u, g * tile.columns + v, span(0, lanes)))

    def spectrum_parts(buffer: Any, worker: Expr, v: Expr) -> "_View":
        return _View(buffer, lambda u, k: (worker, u, k * vectors + v, span(0, lanes)))

    def ask_for_next(x: Any, b: Expr, i: Expr, c0: Expr, turn: Expr) -> None:
        """Asks for these rows of the next block: another core has half of them in its cache.

        Not for another worker's block, which is being written there.
        """
        is_mine = turn + 1 < blocks.tasks_per_worker
        with T.If(is_mine), T.Then(), T.serial(rows) as row, T.serial(w) as j:
            prefetch_line(x, list(pixel(b, i + row, j, c0 + blocks.width, 1)))

    def ask_for_constant(k: Any, block: Expr, i: Expr) -> None:
        """Asks for these rows of K, which are in no cache: the spectrum is there before them."""
        of_line = LINE_BYTES // np.dtype(str(k.dtype)).itemsize
        with T.serial(rows) as row, T.serial(ceil_div((w // 2 + 1) * blocks.width, of_line)) as at:
            prefetch_line(k, [block, i + row, 0, at * of_line])

    def forward_w(
        x: Any,
        k_re: Any,
        k_im: Any,
        spectrum: Any,
        bases: Any,
        line: Any,
        worker: Expr,
        b: Expr,
        block: Expr,
        turn: Expr,
    ) -> None:
        c0 = blocks.start(block)
        if in_registers:
            all_rows = _DftInRegisters(n=w, columns=h * vectors)
            all_rows.forward(grid(x, b, 0, c0), spectrum_rows(spectrum, worker, 0), bases)
            return
        with T.serial(row_groups) as g:
            i = T.bind(T.min(g * rows, h - rows))
            if cpu.arch == "x86_64":
                ask_for_next(x, b, i, c0, turn)
                ask_for_constant(k_re, block, i)
                ask_for_constant(k_im, block, i)
            source, target = grid(x, b, i, c0), spectrum_rows(spectrum, worker, i)
            along_w.forward(source, target, bases, along_w.part(line, worker))

    def inverse_w(
        spectrum: Any, y: Any, bases: Any, line: Any, worker: Expr, b: Expr, c0: Expr
    ) -> None:
        if in_registers:
            all_rows = _DftInRegisters(n=w, columns=h * vectors)
            all_rows.inverse(spectrum_rows(spectrum, worker, 0), grid(y, b, 0, c0), bases)
            return
        with T.serial(row_groups) as g:
            i = T.bind(T.min(g * rows, h - rows))
            source, target = spectrum_rows(spectrum, worker, i), grid(y, b, i, c0)
            along_w.inverse(source, target, bases, along_w.part(line, worker))

    def forward_h(spectrum: Any, bases: Any, line: Any, worker: Expr) -> None:
        if in_registers:
            columns = spectrum_columns(spectrum, worker, 0)
            _DftInRegisters(n=h, columns=w * vectors).forward(columns, columns, bases)
            return
        with T.serial(tiles) as g:
            columns = spectrum_columns(spectrum, worker, g)
            along_h.forward(columns, columns, bases, along_h.part(line, worker))

    def inverse_h(spectrum: Any, bases: Any, line: Any, worker: Expr) -> None:
        if in_registers:
            columns = spectrum_columns(spectrum, worker, 0)
            _DftInRegisters(n=h, columns=w * vectors).inverse(columns, columns, bases)
            return
        with T.serial(tiles) as g:
            columns = spectrum_columns(spectrum, worker, g)
            along_h.inverse(columns, columns, bases, along_h.part(line, worker))

    def constant(buffer: Any, block: Expr, v: Expr) -> Callable[[Expr, Expr], Expr]:
        if dtype == "float16" and kernel.k_dtype == "float16":
            in_vector = f"float16x{lanes}" if lanes > 1 else "float16"
            return lambda u, k: T.reinterpret(
                in_vector, buffer[block, u, k, span(v * lanes, lanes)]
            )
        return lambda u, k: _loaded(buffer, (block, u, k), v * lanes, lanes, kernel.k_dtype, cpu)

    @T.prim_func(s_tir=True)
    def dft_filter(
        x: T.Buffer(grid_shape, kernel.x),
        k_re: T.Buffer(k_shape, _stored(kernel.k_dtype)),
        k_im: T.Buffer(k_shape, _stored(kernel.k_dtype)),
        w_bases: T.Buffer(consts["w_bases"].shape, dtype),
        w_bases_back: T.Buffer(consts["w_bases_back"].shape, dtype),
        h_bases: T.Buffer(consts["h_bases"].shape, dtype),
        h_bases_back: T.Buffer(consts["h_bases_back"].shape, dtype),
        spectrum: T.Buffer(spectrum_shape, dtype),
        line: T.Buffer(line_shape, dtype),
        y: T.Buffer(grid_shape, "float32"),
    ):
        T.func_attr({"tirx.noalias": True})
        for worker in T.parallel(blocks.workers):
            for i, j in T.grid(h, padded - w * vectors):
                for lane in T.vectorized(lanes):
                    spectrum[worker, i, w * vectors + j, lane] = tirx.const(0, dtype)
            for turn in T.serial(blocks.tasks_per_worker):
                task: T.let = worker * blocks.tasks_per_worker + turn
                if task < blocks.tasks:
                    b: T.let = task // blocks.per_image
                    block: T.let = task % blocks.per_image
                    c0: T.let = blocks.start(block)
                    forward_w(x, k_re, k_im, spectrum, w_bases, line, worker, b, block, turn)
                    forward_h(spectrum, h_bases, line, worker)
                    for v in T.serial(vectors):
                        _multiply(
                            h,
                            w,
                            spectrum_parts(spectrum, worker, v),
                            constant(k_re, block, v),
                            constant(k_im, block, v),
                        )
                    inverse_h(spectrum, h_bases_back, line, worker)
                    inverse_w(spectrum, y, w_bases_back, line, worker, b, c0)

    # What is written of a block depends on all that was read of it. A line that another core wrote
    # so has to come but once.
    disjoint = c % blocks.width == 0
    temps = {"spectrum": (dtype, spectrum_shape), "line": (dtype, line_shape)}
    if in_registers:
        del temps["line"]
    args = ("x", "k_re", "k_im", *consts, *temps, "y")
    return Scheduled(
        steps=(Step(func=keep_params(dft_filter, args), args=args),),
        pack={name: blocks.packed(name) for name in ("k_re", "k_im")},
        temps=temps,
        consts=consts,
        in_place={"y": "x"} if disjoint else {},
    )


@dataclass(frozen=True)
class _View:
    """A buffer seen as positions by columns, each a vector: `at` gives the index of one.

    `dtype` is what values are computed in, where the buffer may have another one.
    """

    buffer: Any
    at: Callable[[Expr, Expr], Index]
    dtype: str = ""

    def load(self, position: Expr, column: Expr) -> Expr:
        return self._cast(self.buffer[self.at(position, column)], self.dtype)

    def store(self, position: Expr, column: Expr, value: Expr) -> None:
        value = self._cast(value, str(self.buffer.dtype))
        T.buffer_store(self.buffer, value, list(self.at(position, column)))

    def _cast(self, value: Expr, dtype: str) -> Expr:
        have, _, lanes = str(value.ty.dtype).partition("x")
        if not self.dtype or have == dtype:
            return value
        return T.Cast(f"{dtype}x{lanes}" if lanes else dtype, value)


@dataclass(frozen=True, kw_only=True)
class _RealDft:
    """Writes the statements of a real DFT of length n over `columns` vectors, and its inverse.

    A half spectrum holds its cosine sums, then its sine sums. Source and target may be the same
    view: what is between them lies in `terms`, scratch of n positions, part after part.
    """

    n: int
    columns: int
    most_rows: int
    lanes: int
    dtype: str

    def part(self, line: Any, worker: Expr) -> _View:
        """A worker's scratch."""
        return _View(line, lambda i, j: (worker, i * self.columns + j, span(0, self.lanes)))

    def forward(self, source: _View, target: _View, bases: Any, terms: _View) -> None:
        """target = half spectrum of source."""
        for positions, firsts, times in _orbits(self.n):
            with T.serial(times) as i:
                values = [self._row(source, p + step * i) for p, step in positions]
                made = [_butterflies(column) for column in zip(*values, strict=True)]
                for first, row in zip(firsts, zip(*made, strict=True), strict=True):
                    for j, value in enumerate(row):
                        terms.store(first + i, j, value)
        for part in _parts(self.n):
            self._product(
                part,
                lambda i, j, part=part: terms.load(part.first + i, j),
                lambda m, j, value, part=part: target.store(part.sums + part.step * m, j, value),
                bases,
            )

    def inverse(self, source: _View, target: _View, bases: Any, terms: _View) -> None:
        """target = the n values whose half spectrum, each sum weighted by its count, is source."""
        for part in _parts(self.n):
            self._product(
                part,
                lambda i, j, part=part: source.load(part.sums + part.step * i, j),
                lambda m, j, value, part=part: terms.store(part.first + m, j, value),
                bases,
            )
        for positions, firsts, times in _orbits(self.n):
            with T.serial(times) as i:
                values = [self._row(terms, first + i) for first in firsts]
                made = [_butterflies_back(column) for column in zip(*values, strict=True)]
                for (p, step), row in zip(positions, zip(*made, strict=True), strict=True):
                    for j, value in enumerate(row):
                        target.store(p + step * i, j, value)

    def _row(self, view: _View, position: Expr) -> list[Expr]:
        """All columns of a position: neighbours in memory, to be loaded together."""
        return [T.bind(view.load(position, j)) for j in range(self.columns)]

    def _product(
        self,
        part: _Part,
        load: Callable[[Expr, int], Expr],
        store: Callable[[Expr, int, Expr], None],
        bases: Any,
    ) -> None:
        """One part: stored[m] = sum over i of its matrix [i, m] times loaded[i]."""
        count = part.count
        rows = tile_rows(count, self.most_rows)
        with T.serial(ceil_div(count, rows)) as t:
            m = T.bind(T.min(t * rows, count - rows))
            # A buffer of 1 KB or more would be allocated at run time: one for each column is not.
            sums = [T.alloc_buffer((rows, self.lanes), self.dtype) for _ in range(self.columns)]
            tile = [
                (r, j, (r, span(0, self.lanes))) for r in range(rows) for j in range(self.columns)
            ]
            # From 0 on: a lone first product would be fused with one sum or another, as the tile
            # has it, and results would depend on that.
            for _, j, at in tile:
                T.buffer_store(sums[j], splat(0.0, self.lanes, self.dtype), list(at))
            with T.serial(count) as i:
                for r, j, at in tile:
                    term = bases[part.first + i, m + r] * load(i, j)
                    T.buffer_store(sums[j], sums[j][at] + term, list(at))
            for r, j, at in tile:
                store(m + r, j, sums[j][at])


_LANES = 4  # of NEON


@dataclass(frozen=True, kw_only=True)
class _DftInRegisters:
    """The same on NEON, a vector of columns after the other: nothing between is in memory.

    A matrix has at most 4 columns, so that a register holds a row of it, and a multiply-add takes
    a lane of it.
    """

    n: int
    columns: int

    def forward(self, source: _View, target: _View, bases: Any) -> None:
        """target = half spectrum of source."""
        rows = self._rows(bases)
        with T.serial(self.columns) as column:
            terms: dict[int, Expr] = {}
            for positions, firsts, times in _orbits(self.n):
                for i in range(times):
                    values = [T.bind(source.load(p + step * i, column)) for p, step in positions]
                    made = _butterflies(values)
                    terms |= {first + i: term for first, term in zip(firsts, made, strict=True)}
            for part in _parts(self.n):
                of_part = [terms[i] for i in range(self.n)[part.rows]]
                for m, total in enumerate(_sums(of_part, rows[part.rows])):
                    target.store(part.sums + part.step * m, column, total)

    def inverse(self, source: _View, target: _View, bases: Any) -> None:
        """target = the n values whose half spectrum, each sum weighted by its count, is source."""
        rows = self._rows(bases)
        with T.serial(self.columns) as column:
            terms: list[Expr] = []
            for part in _parts(self.n):
                values = [
                    T.bind(source.load(part.sums + part.step * i, column))
                    for i in range(part.count)
                ]
                terms += _sums(values, rows[part.rows])
            for positions, firsts, times in _orbits(self.n):
                for i in range(times):
                    made = _butterflies_back([terms[first + i] for first in firsts])
                    for (p, step), value in zip(positions, made, strict=True):
                        target.store(p + step * i, column, value)

    def _rows(self, bases: Any) -> list[Expr]:
        """The matrices of all parts, a register each row."""
        return [T.bind(bases.vload([i, 0], f"float32x{_LANES}")) for i in range(self.n)]


def _sums(terms: Sequence[Expr], rows: Sequence[Expr]) -> list[Expr]:
    """Each column of a square matrix, of which these are the rows, times the terms.

    Multiplied and added by name: LLVM might fuse the first two products with their sum either way.
    """
    dtype = f"float32x{_LANES}"
    sums = []
    for m in range(len(terms)):
        total = None
        for term, row in zip(terms, rows, strict=True):
            factor = T.Shuffle([row], [m] * _LANES)
            if total is None:
                total = T.bind(term * factor)
            else:
                fma = T.llvm_lookup_intrinsic_id("llvm.fma")
                total = T.bind(T.call_llvm_pure_intrin(fma, term, factor, total, dtype=dtype))
        sums.append(total)
    return sums


def _fits_registers(kernel: DftFilter, cpu: Cpu) -> bool:
    """Whether `_DftInRegisters` does the transforms."""
    most = max(part.count for n in (kernel.h, kernel.w) for part in _parts(n))
    in_float32 = cpu.arch == "aarch64" and kernel.x == "float32"
    return in_float32 and kernel.c >= _LANES and most <= _LANES


def _orbits(n: int) -> Iterator[tuple[list[tuple[int, int]], list[int], int]]:
    """Positions that are mirror images of each other, and where the terms lie they make.

    Each as (positions for i = 0, each with its step in i; places of their terms for i = 0; how
    many i). Terms come in the order of `_butterflies`.
    """
    half = n // 2
    if n % 2:
        cos, sin = 0, half + 1
        yield [(0, 1)], [cos], 1
        yield [(1, 1), (n - 1, -1)], [cos + 1, sin], half
        return
    even, odd = half + 1, half - 1  # cosine sums, sine sums
    cos, alternating_cos = 0, (even + 1) // 2
    sin, alternating_sin = even, even + (odd + 1) // 2
    yield [(0, 1), (half, 1)], [cos, alternating_cos], 1
    quarter = half // 2
    if half % 2 == 0:
        yield [(quarter, 1), (n - quarter, 1)], [cos + quarter, sin + quarter - 1], 1
    yield (
        [(1, 1), (n - 1, -1), (half - 1, -1), (half + 1, 1)],
        [cos + 1, alternating_cos + 1, sin, alternating_sin],
        odd // 2,
    )


def _butterflies(values: Sequence[Expr]) -> list[Expr]:
    """The terms of positions that mirror each other: one, two, or two and their mirror images.

    Of four, a, its image b, and c, d at half the length from them: a + b + c + d, a + b - c - d,
    a - b + c - d, a - b - c + d.
    """
    if len(values) == 1:
        return list(values)
    if len(values) == 2:
        a, b = values
        return [T.bind(a + b), T.bind(a - b)]
    a, b, c, d = values
    even, odd = T.bind(a + b), T.bind(a - b)
    even_image, odd_image = T.bind(c + d), T.bind(c - d)
    return [
        T.bind(even + even_image),
        T.bind(even - even_image),
        T.bind(odd + odd_image),
        T.bind(odd - odd_image),
    ]


def _butterflies_back(terms: Sequence[Expr]) -> list[Expr]:
    """The positions that terms in the order of `_butterflies` make, once they are weighted."""
    if len(terms) < 4:
        return _butterflies(terms)
    p, q, r, s = terms
    even, even_image = T.bind(p + q), T.bind(p - q)
    odd, odd_image = T.bind(r + s), T.bind(r - s)
    return [
        T.bind(even + odd),
        T.bind(even - odd),
        T.bind(even_image + odd_image),
        T.bind(even_image - odd_image),
    ]


def _multiply(
    h: int,
    w: int,
    spectrum: _View,
    k_re: Callable[[Expr, Expr], Expr],
    k_im: Callable[[Expr, Expr], Expr],
) -> None:
    """Writes Y = K X over one vector of the spectrum, in place: see the formulas above.

    Args:
        h, w: the grid.
        spectrum: positions along h by positions along w, each cosine sums before sine sums.
        k_re, k_im: the vector of K at (u, k).
    """
    cos, sin_u, sin_k = 1, h // 2 + 1, w // 2 + 1  # where the first pair of mirror images is
    u_edges = [0, h // 2] if h % 2 == 0 else [0]
    k_edges = [0, w // 2] if w % 2 == 0 else [0]
    for u in u_edges:
        for k in k_edges:
            spectrum.store(u, k, spectrum.load(u, k) * k_re(u, k))
        with T.serial((w - 1) // 2) as k:
            cc, cs = T.bind(spectrum.load(u, cos + k)), T.bind(spectrum.load(u, sin_k + k))
            re, im = _product((cc, cs), (k_re(u, cos + k), k_im(u, cos + k)))
            # The inverse along h counts an edge once, and this sum stands for k and w - k.
            spectrum.store(u, cos + k, re + re)
            spectrum.store(u, sin_k + k, im + im)
    with T.serial((h - 1) // 2) as u:
        for k in k_edges:
            cc, sc = T.bind(spectrum.load(cos + u, k)), T.bind(spectrum.load(sin_u + u, k))
            re, im = _product((cc, sc), (k_re(cos + u, k), k_im(cos + u, k)))
            spectrum.store(cos + u, k, re)
            spectrum.store(sin_u + u, k, im)
        with T.serial((w - 1) // 2) as k:
            cc = T.bind(spectrum.load(cos + u, cos + k))
            cs = T.bind(spectrum.load(cos + u, sin_k + k))
            sc = T.bind(spectrum.load(sin_u + u, cos + k))
            ss = T.bind(spectrum.load(sin_u + u, sin_k + k))
            above = k_re(cos + u, cos + k), k_im(cos + u, cos + k)
            below = k_re(h - 1 - u, cos + k), k_im(h - 1 - u, cos + k)
            re_above, im_above = _product((cc - ss, cs + sc), above)
            re_below, im_below = _product((cc + ss, cs - sc), below)
            spectrum.store(cos + u, cos + k, re_above + re_below)
            spectrum.store(sin_u + u, sin_k + k, re_below - re_above)
            spectrum.store(cos + u, sin_k + k, im_above + im_below)
            spectrum.store(sin_u + u, cos + k, im_above - im_below)


def _product(x: tuple[Expr, Expr], k: tuple[Expr, Expr]) -> tuple[Expr, Expr]:
    """(Re, -Im) of K X for X given as (Re, -Im) and K as (Re, Im), the order of the sums."""
    re, minus_im = T.bind(x[0]), T.bind(x[1])
    k_re, k_im = T.bind(k[0]), T.bind(k[1])
    return T.bind(k_re * re + k_im * minus_im), T.bind(k_re * minus_im - k_im * re)


def _loaded(buffer: Any, at: Index, first: Expr, lanes: int, k_dtype: str, cpu: Cpu) -> Expr:
    """The vector of a packed constant at (*at, first), as float32."""
    if k_dtype == "float32":
        return buffer[(*at, span(first, lanes))]
    if k_dtype == "int8":
        return T.Cast(
            f"float32x{lanes}" if lanes > 1 else "float32", buffer[(*at, span(first, lanes))]
        )
    if cpu.arch == "aarch64" and lanes > 1:  # every one of them has FCVTL
        half = T.reinterpret(f"float16x{lanes}", buffer[(*at, span(first, lanes))])
        return T.Cast(f"float32x{lanes}", half)
    widened = T.alloc_buffer((lanes,), "float32")
    with T.vectorized(lanes) as lane:
        T.buffer_store(widened, half_to_float(buffer[(*at, first + lane)]), [lane])
    return widened[span(0, lanes)]


def _float(value: Expr, lanes: int) -> Expr:
    return T.Cast(f"float32x{lanes}" if lanes > 1 else "float32", value)


_CACHE_LINE_BYTES = 64  # of channels in a block of the circular form

# Register tile of the circular form: outputs of a row, and taps of a row that share their loads.
_OUTPUTS, _TAPS = 14, 8


def schedule_circular_filter(kernel: CircularFilter, cpu: Cpu, storage: ActStorage) -> Scheduled:
    """The filter as a depthwise circular convolution.

    Each row is first laid out once around and once more, so that no tap has to wrap along w.
    Integers are widened to float32 there, which multiplies as many at a time as int32 and holds
    their sums exactly.
    """
    h, w, c = kernel.h, kernel.w, kernel.c
    blocks = _cut(kernel.batch, c, _CACHE_LINE_BYTES // cpu.vector_bytes, cpu)
    vectors, lanes = blocks.vectors, blocks.lanes
    wound_shape = (blocks.workers, vectors, apart(h, (2 * w - 1) * lanes), 2 * w - 1, lanes)
    taps_shape = (blocks.workers, vectors, apart(h, w * lanes), w, lanes)
    kernel_shape = (blocks.per_image, h, w, blocks.width)
    outputs = tile_rows(w, _OUTPUTS if cpu.vector_registers >= 32 else _OUTPUTS // 2)
    together = max(count for count in range(1, _TAPS + 1) if w % count == 0)
    lane = span(0, lanes)
    is_int8 = kernel.x == "int8"
    assert not is_int8 or CircularFilter.exact_in_float(h, w), kernel
    scales = c if is_int8 else 0
    k_dtype = "int8" if is_int8 else kernel.k_dtype

    def vector(c0: Expr, v: Expr) -> Expr:
        return span(c0 + v * lanes, lanes)

    def widened(value: Expr, zero_point: Any) -> Expr:
        if not is_int8:
            return value
        return _float(value, lanes) - splat(zero_point[0], lanes)

    def scaled(value: Expr, scale: Any, at: Expr) -> Expr:
        return value * scale[at] if is_int8 else value

    def accumulate(sums: Any, taps: Any, wound: Any, at: Index, q: Expr, first: Expr) -> None:
        """Adds the taps q ... q + together of a row to all the sums; `at` is the row of x."""
        worker, v, p, row = at
        for tap in range(together):
            for r in range(outputs):
                x = wound[worker, v, row, first + r - (q + tap) + w - 1, lane]
                value = sums[r, lane] + taps[worker, v, p, q + tap, lane] * x
                T.buffer_store(sums, value, [r, lane])

    @T.prim_func(s_tir=True)
    def circular_filter(
        x: T.Buffer((kernel.batch, h, w, c), storage.dtype if is_int8 else "float32"),
        weight: T.Buffer(kernel_shape, "int8" if is_int8 else _stored(kernel.k_dtype)),
        scale: T.Buffer((max(scales, 1),), "float32"),
        zero_point: T.Buffer((1,), "float32"),
        wound: T.Buffer(wound_shape, "float32"),
        taps: T.Buffer(taps_shape, "float32"),
        y: T.Buffer((kernel.batch, h, w, c), "float32"),
    ):
        T.func_attr({"tirx.noalias": True})
        for worker in T.parallel(blocks.workers):
            for turn in T.serial(blocks.tasks_per_worker):
                task: T.let = worker * blocks.tasks_per_worker + turn
                if task < blocks.tasks:
                    b: T.let = task // blocks.per_image
                    block: T.let = task % blocks.per_image
                    c0: T.let = blocks.start(block)
                    for i, j, v in T.grid(h, w, vectors):
                        taps[worker, v, i, j, lane] = _loaded(
                            weight, (block, i, j), v * lanes, lanes, k_dtype, cpu
                        )
                        wound[worker, v, i, w - 1 + j, lane] = widened(
                            x[b, i, j, vector(c0, v)], zero_point
                        )
                    for i, j, v in T.grid(h, w - 1, vectors):
                        wound[worker, v, i, j, lane] = widened(
                            x[b, i, 1 + j, vector(c0, v)], zero_point
                        )
                    for v, i, t in T.grid(vectors, h, ceil_div(w, outputs)):
                        first: T.let = T.min(t * outputs, w - outputs)
                        sums = T.alloc_buffer((outputs, lanes), "float32")
                        for r in T.unroll(outputs):
                            sums[r, lane] = splat(0.0, lanes)
                        for p, g in T.grid(h, w // together):
                            row: T.let = T.if_then_else(p <= i, i - p, i - p + h)
                            accumulate(sums, taps, wound, (worker, v, p, row), g * together, first)
                        for r in T.unroll(outputs):
                            y[b, i, first + r, vector(c0, v)] = scaled(
                                sums[r, lane], scale, vector(c0, v)
                            )

    pack = {"kernel": blocks.packed("kernel")}
    if is_int8:
        pack["zero_point"] = lambda raw: raw["zero_point"] + np.float32(storage.offset)
    scaling = ("scale", "zero_point") if is_int8 else ()
    func = keep_params(circular_filter, ("x", "weight", *scaling, "wound", "taps", "y"))
    return Scheduled(
        steps=(Step(func=func, args=("x", "kernel", *scaling, "wound", "taps", "y")),),
        pack=pack,
        temps={"wound": ("float32", wound_shape), "taps": ("float32", taps_shape)},
    )
