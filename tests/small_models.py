"""Models that compile in a second, one plain and one pyramid."""

from torch import nn

from gfcompile.compile.models import gfnet
from gfcompile.compile.models.gfnet_specs import GFNetSpec
from gfcompile.compile.models.spec import Paper

SPEC = GFNetSpec(
    name="gfnet_small",
    family="gfnet",
    paper=Paper(title="none", arxiv="0"),
    image_size=64,
    num_classes=10,
    patch_size=8,
    dims=(48,),
    depths=(2,),
)
PYRAMID = GFNetSpec(
    name="gfnet_h_small",
    family="gfnet",
    paper=Paper(title="none", arxiv="0"),
    image_size=64,
    num_classes=10,
    patch_size=4,
    dims=(16, 32),
    depths=(1, 2),
)


def build(spec: GFNetSpec) -> nn.Module:
    return gfnet.build(spec, gfnet.random_weights(spec, seed=0))
