"""What deciding which patches to keep adds to a model: names, shapes and cost. No torch."""

from gfcompile.compile.models.spec import Paper, Shapes

SPARSIFICATION_PAPER = Paper(
    title="Dynamic Spatial Sparsification for Efficient Vision Transformers and "
    "Convolutional Neural Networks",
    arxiv="2207.01580",
)
# Of the four stages of a pyramid, the deep one: most of the blocks, 14x14 patches.
PRUNED_STAGE = 2


def linear_shapes(name: str, rows: int, columns: int, *, bias: bool = True) -> Shapes:
    """The entries of a linear layer from `columns` to `rows` channels."""
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (rows, columns)}
    if bias:
        shapes[f"{name}.bias"] = (rows,)
    return shapes


def norm_shapes(name: str, dim: int) -> Shapes:
    """The entries of a layer norm."""
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def predictor_shapes(name: str, dim: int, *, pointwise: bool = False) -> Shapes:
    """The entries of one score predictor.

    Args:
        pointwise: whether its linear layers are stored as 1x1 convolutions.
    """
    shapes = {
        **norm_shapes(f"{name}.in_conv.0", dim),
        **linear_shapes(f"{name}.in_conv.1", dim, dim),
        **linear_shapes(f"{name}.out_conv.0", dim // 2, dim),
        **linear_shapes(f"{name}.out_conv.2", dim // 4, dim // 2),
        **linear_shapes(f"{name}.out_conv.4", 2, dim // 4),
    }
    if pointwise:
        return {key: (*s, 1, 1) if len(s) == 2 else s for key, s in shapes.items()}
    return shapes


def predictor_macs(dim: int, patches: int) -> int:
    """Multiply-accumulates of one score predictor as it is compiled (compile/prune.py)."""
    half, quarter = dim // 2, dim // 4
    return patches * (dim * dim + half * half + half * quarter + quarter) + half * half


def sparse_ratios(keep_ratio: float = 0.7) -> tuple[float, float, float]:
    """Shares that take the full path where the others take a cheaper one: a fifth less each time.

    Subtracted as the reference does: 0.7 - 0.2 is a hair below a half in binary, so that of 196
    patches 97 are kept, not 98.
    """
    return keep_ratio, keep_ratio - 0.2, keep_ratio - 0.4
