// Runs a gfcompile bundle (--target tflite --input uint8-image) on Android: see README.md here.
package org.example.classifier

import android.content.Context
import android.graphics.Bitmap
import android.os.SystemClock
import java.io.FileInputStream
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.channels.FileChannel
import kotlin.math.exp
import org.json.JSONObject
import org.tensorflow.lite.Interpreter

/** What the files, keys and tensors of a bundle are called. */
object Name {
    const val MANIFEST = "manifest.json"
    const val LABELS = "labels.txt"
    const val LIBRARY = "library"
    const val TRANSFORM = "transform"
    const val IMAGE_SIZE = "image_size"
    const val RESIZE = "resize"
    const val SIGNATURE = "serving_default"
    const val IMAGE = "image"
    const val LOGITS = "logits"
}

data class Guess(val label: String, val probability: Float)

/** The bundle in [folder] of the app's assets, stored there uncompressed. */
class Classifier(private val context: Context, private val folder: String, threads: Int = 4) :
    AutoCloseable {
    private val manifest = JSONObject(text(Name.MANIFEST))
    private val side = manifest.getJSONObject(Name.TRANSFORM).getInt(Name.IMAGE_SIZE)
    private val resize = manifest.getJSONObject(Name.TRANSFORM).getInt(Name.RESIZE)
    private val labels = runCatching { text(Name.LABELS).lines() }.getOrDefault(emptyList())
    private val interpreter =
        Interpreter(model(), Interpreter.Options().setNumThreads(threads))
    private val classes = interpreter.getOutputTensorFromSignature(Name.LOGITS, Name.SIGNATURE)
        .shape().last()

    /** The likeliest classes of an image, and the milliseconds that the model took. */
    fun classify(image: Bitmap, top: Int = 5): Pair<List<Guess>, Double> {
        val pixels = pixels(image)
        val logits = arrayOf(FloatArray(classes))
        val start = SystemClock.elapsedRealtimeNanos()
        interpreter.runSignature(
            mapOf(Name.IMAGE to pixels), mapOf(Name.LOGITS to logits), Name.SIGNATURE)
        val milliseconds = (SystemClock.elapsedRealtimeNanos() - start) / 1e6
        val largest = logits[0].max()
        val powers = logits[0].map { exp(it - largest) }
        val sum = powers.sum()
        val best = powers.indices.sortedByDescending { powers[it] }.take(top)
        val guesses = best.map { Guess(labels.getOrElse(it) { i -> "class $i" }, powers[it] / sum) }
        return guesses to milliseconds
    }

    override fun close() = interpreter.close()

    /** The square that the model was trained to see, as bytes of red, green and blue. */
    private fun pixels(image: Bitmap): ByteBuffer {
        val edge = minOf(image.width, image.height) * side / resize
        val square = Bitmap.createBitmap(
            image, (image.width - edge) / 2, (image.height - edge) / 2, edge, edge)
        val scaled = Bitmap.createScaledBitmap(square, side, side, true)
        val colors = IntArray(side * side)
        scaled.getPixels(colors, 0, side, 0, 0, side, side)
        val bytes = ByteBuffer.allocateDirect(3 * colors.size).order(ByteOrder.nativeOrder())
        for (color in colors) {
            bytes.put((color shr 16).toByte()).put((color shr 8).toByte()).put(color.toByte())
        }
        bytes.rewind()
        return bytes
    }

    private fun model(): ByteBuffer =
        context.assets.openFd("$folder/${manifest.getString(Name.LIBRARY)}").use { file ->
            FileInputStream(file.fileDescriptor).channel.map(
                FileChannel.MapMode.READ_ONLY, file.startOffset, file.declaredLength)
        }

    private fun text(name: String): String =
        context.assets.open("$folder/$name").bufferedReader().use { it.readText().trimEnd() }
}
