"""Android phones and tablets of 64 bits, by what their smallest core can execute.

One bundle runs on every phone; what `gfcompile targets` prints are the figures of one such phone.
The kernel tells a process of those instructions alone that every core has.
"""

from dataclasses import replace

from gfcompile.targets.arm64 import (
    ARMV8,
    ARMV8_DOTPROD,
    ARMV8_FLOAT16,
    ARMV8_I8MM,
    INT8_BEST,
    in_one_library,
)
from gfcompile.targets.raspberry_pi import INT8_SDOT
from gfcompile.targets.target import Target, register_target

_API = 21  # Android 5
_LEAST, *_BETTER = (
    replace(cpu, android_api=_API) for cpu in in_one_library(ARMV8, ARMV8_DOTPROD, ARMV8_I8MM)
)
_FLOAT16 = tuple(replace(cpu, android_api=_API) for cpu in in_one_library(ARMV8_FLOAT16))

ANDROID_ARM64 = register_target(
    Target(
        name="android-arm64",
        description="any 64-bit phone, by its best of NEON, sdot, smmla (a Snapdragon 625)",
        cpu=_LEAST,
        levels=tuple(_BETTER),
        float16_levels=_FLOAT16,
        bandwidth_gb_s=7.5,  # 32 bit at 1866 MT/s
        int8_compute=INT8_BEST,
        int8_note="a quarter of the weights' memory; sdot and smmla where the phone has them",
    )
)
ANDROID_ARM64_DOTPROD = register_target(
    Target(
        name="android-arm64-dotprod",
        description="phones from about 2018 on, whose cores have sdot; figures of a Snapdragon 855",
        cpu=replace(ARMV8_DOTPROD, android_api=_API),
        float16_levels=_FLOAT16,
        bandwidth_gb_s=34.1,  # 64 bit at 4266 MT/s
        int8_compute=INT8_SDOT,
        int8_note="a quarter of the weights' memory; products at up to four times fp32's rate",
    )
)
