// Runs a gfcompile bundle (--target android-arm64) through its C API, gfrt.h: see README.md here.
package org.example.classifier

import com.sun.jna.Library
import com.sun.jna.Memory
import com.sun.jna.Native
import com.sun.jna.Pointer
import com.sun.jna.ptr.PointerByReference
import java.io.File
import org.json.JSONObject

/** What is used of gfrt.h, by its names; its size_t is a Long on 64-bit Android. */
interface GfrtApi : Library {
    fun gfrt_last_error(): String
    fun gfrt_open(bundle: String, flags: Int, model: PointerByReference): Int
    fun gfrt_close(model: Pointer)
    fun gfrt_normalize_u8(
        model: Pointer, index: Long, pixels: ByteArray, pixels_size: Long, input: Pointer,
        input_size: Long): Int
    fun gfrt_context_create(model: Pointer, threads: Int, context: PointerByReference): Int
    fun gfrt_context_destroy(context: Pointer)
    fun gfrt_run(
        context: Pointer, inputs: Array<Pointer>, input_sizes: LongArray, outputs: Array<Pointer>,
        output_sizes: LongArray): Int
}

/** The model in the folder [bundle], for one thread at a time; its library is one of the app's. */
class Gfrt(bundle: File, threads: Int = 4) : AutoCloseable {
    private val manifest = JSONObject(File(bundle, "manifest.json").readText())
    private val library = manifest.getString("library").removeSurrounding("lib", ".so")
    private val api = Native.load(library, GfrtApi::class.java)
    private val model = created { api.gfrt_open(bundle.path, 0, it) }
    private val context = created { api.gfrt_context_create(model, threads, it) }
    private val input = tensor("inputs")
    private val output = tensor("outputs")

    /** The logits of an image of the model's size: red, green and blue, a byte each, by rows. */
    fun run(pixels: ByteArray): FloatArray {
        check(api.gfrt_normalize_u8(model, 0, pixels, pixels.size.toLong(), input, input.size()))
        check(api.gfrt_run(
            context, arrayOf(input), longArrayOf(input.size()), arrayOf(output),
            longArrayOf(output.size())))
        return output.getFloatArray(0, (output.size() / 4).toInt())
    }

    override fun close() {
        api.gfrt_context_destroy(context)
        api.gfrt_close(model)
    }

    private fun tensor(which: String): Memory {
        val shape = manifest.getJSONArray(which).getJSONObject(0).getJSONArray("shape")
        return Memory((0 until shape.length()).fold(4L) { bytes, i -> bytes * shape.getInt(i) })
    }

    private fun created(create: (PointerByReference) -> Int): Pointer =
        PointerByReference().also { check(create(it)) }.value

    private fun check(status: Int) = check(status == 0) { api.gfrt_last_error() }
}
