"""Model files for phones, and for whatever else has their runtimes."""

from gfcompile.targets.target import ModelFormat, register_target

TFLITE_XNNPACK = register_target(
    ModelFormat(
        name="tflite-xnnpack",
        description="TFLite for LiteRT on CPUs (Android, Linux), through the XNNPACK delegate",
        emitter="tflite",
        int8_compute="int8 x int8 -> int32 in XNNPACK, the rest float32",
        int8_note="a quarter of the weights' memory; products at the rate of the CPU's int8",
    )
)
TFLITE_INT_ONLY = register_target(
    ModelFormat(
        name="tflite-int-only",
        description="TFLite for accelerators that take integer operators alone",
        emitter="tflite",
        integer_only=True,
        int8_compute="int8 x int8 -> int32 products, everything else in integers too",
        int8_note="is needed there: normalization, GELU and filters are quantized as well",
    )
)
COREML = register_target(
    ModelFormat(
        name="coreml",
        description="Core ML on iPhone, iPad and Mac: CPU, GPU and Neural Engine",
        emitter="coreml",
        int8_compute="int8 values, multiplied by whichever unit Core ML chooses; the rest float16",
        int8_note="half the weights' memory of float16; activations in int8 from iOS 17",
    )
)
