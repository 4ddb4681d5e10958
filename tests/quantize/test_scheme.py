import json
import subprocess
import sys

import pytest

from gfcompile.quantize import QuantScheme
from gfcompile.quantize.scheme import TensorScheme
from gfcompile.runtime.errors import UserError


def test_weights_leave_out_minus_128_and_activations_use_it() -> None:
    scheme = QuantScheme()
    assert (scheme.weight.low, scheme.weight.high) == (-127, 127)
    assert (scheme.activation.low, scheme.activation.high) == (-128, 127)


def test_the_dict_is_json_and_the_same_for_equal_schemes() -> None:
    one = QuantScheme(ops=frozenset(["linear", "patch_conv2d"]), keep_float=("head",))
    other = QuantScheme(ops=frozenset(["patch_conv2d", "linear"]), keep_float=("head",))
    assert json.dumps(one.to_dict()) == json.dumps(other.to_dict())
    assert json.loads(json.dumps(one.to_dict()))["weight"]["per_channel"] is True


def test_keep_float_takes_names_and_wildcards() -> None:
    scheme = QuantScheme(keep_float=("head", "blocks.*.fc2"))
    assert scheme.keeps_float("head")
    assert scheme.keeps_float("blocks.11.mlp.fc2")
    assert not scheme.keeps_float("blocks.11.mlp.fc1")
    assert not scheme.keeps_float("blocks.0.head")


def test_impossible_integer_ranges_are_refused() -> None:
    with pytest.raises(UserError, match="span zero"):
        TensorScheme(low=1, high=255, symmetric=False, per_channel=False)
    with pytest.raises(UserError, match="not symmetric"):
        TensorScheme(low=-128, high=127, symmetric=True, per_channel=True)


def test_the_scheme_alone_does_not_load_torch() -> None:
    program = (
        "import sys; from gfcompile.quantize import QuantScheme; QuantScheme();"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
