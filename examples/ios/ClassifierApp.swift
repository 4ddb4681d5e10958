// A photo in, five classes and a time out.
import PhotosUI
import SwiftUI

@main
struct ClassifierApp: App {
    var body: some Scene {
        WindowGroup { ContentView() }
    }
}

struct ContentView: View {
    @State private var item: PhotosPickerItem?
    @State private var guesses: [Guess] = []
    @State private var status = "Choose a photo"

    var body: some View {
        List {
            PhotosPicker(status, selection: $item, matching: .images)
            ForEach(guesses) { guess in
                LabeledContent(guess.id, value: guess.probability, format: .percent)
            }
        }
        .onChange(of: item) { Task { await classify() } }
    }

    private func classify() async {
        do {
            guard let data = try await item?.loadTransferable(type: Data.self),
                let image = UIImage(data: data)?.upright
            else { return }
            // The bundle is a folder reference of the Xcode project, named "bundle".
            let folder = Bundle.main.url(forResource: "bundle", withExtension: nil)!
            let classifier = try await Classifier(folder: folder)
            _ = try classifier.classify(image)  // the first prediction loads the model
            let (found, milliseconds) = try classifier.classify(image)
            guesses = found
            status = String(format: "%.2f ms; choose another photo", milliseconds)
        } catch {
            status = "\(error)"
        }
    }
}

extension UIImage {
    /// The pixels as they are meant to be seen: cameras store how the phone was held.
    var upright: CGImage? {
        UIGraphicsImageRenderer(size: size).image { _ in draw(at: .zero) }.cgImage
    }
}
