// A photo in, five classes and a time out.
package org.example.classifier

import android.graphics.ImageDecoder
import android.net.Uri
import android.os.Bundle
import android.widget.TextView
import androidx.activity.ComponentActivity
import androidx.activity.result.PickVisualMediaRequest
import androidx.activity.result.contract.ActivityResultContracts.PickVisualMedia

class MainActivity : ComponentActivity() {
    private lateinit var view: TextView
    private val classifier by lazy { Classifier(this, "bundle") }
    private val pick = registerForActivityResult(PickVisualMedia()) { it?.let(::show) }

    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        view = TextView(this).apply {
            text = "Tap to choose a photo"
            setOnClickListener { pick.launch(PickVisualMediaRequest(PickVisualMedia.ImageOnly)) }
        }
        setContentView(view)
    }

    private fun show(photo: Uri) {
        // The decoder turns the image upright; pixels are read, so not into the GPU's memory.
        val source = ImageDecoder.createSource(contentResolver, photo)
        val image = ImageDecoder.decodeBitmap(source) { decoder, _, _ ->
            decoder.allocator = ImageDecoder.ALLOCATOR_SOFTWARE
        }
        classifier.classify(image)  // the first run allocates
        val (guesses, milliseconds) = classifier.classify(image)
        val lines = guesses.map { "%.1f%%  %s".format(100 * it.probability, it.label) }
        view.text = (lines + "%.2f ms".format(milliseconds)).joinToString("\n")
    }
}
