// Runs a gfcompile bundle (--target coreml) on iPhone, iPad or Mac: see README.md here.
import CoreGraphics
import CoreML
import Foundation

/// What the files and features of a bundle are called.
enum Name {
    static let manifest = "manifest.json"
    static let image = "image"
    static let probabilities = "classLabel_probs"
}

struct Manifest: Decodable {
    struct Transform: Decodable {
        let image_size: Int
        let resize: Int
    }
    let library: String
    let transform: Transform
}

struct Guess: Identifiable {
    let id: String
    let probability: Double
}

final class Classifier {
    private let model: MLModel
    private let transform: Manifest.Transform
    private let constraint: MLImageConstraint

    /// - Parameter folder: the bundle, as gfcompile wrote it.
    init(folder: URL, computeUnits: MLComputeUnits = .all) async throws {
        let text = try Data(contentsOf: folder.appendingPathComponent(Name.manifest))
        let manifest = try JSONDecoder().decode(Manifest.self, from: text)
        let package = folder.appendingPathComponent(manifest.library)
        let configuration = MLModelConfiguration()
        configuration.computeUnits = computeUnits
        model = try MLModel(
            contentsOf: try await MLModel.compileModel(at: package), configuration: configuration)
        transform = manifest.transform
        constraint = model.modelDescription.inputDescriptionsByName[Name.image]!.imageConstraint!
    }

    /// The likeliest classes of an image, and how long the model took.
    func classify(_ image: CGImage, top: Int = 5) throws -> ([Guess], milliseconds: Double) {
        let pixels = try MLFeatureValue(cgImage: centre(of: image), constraint: constraint)
        let input = try MLDictionaryFeatureProvider(dictionary: [Name.image: pixels])
        let start = DispatchTime.now()
        let output = try model.prediction(from: input)
        let nanoseconds = DispatchTime.now().uptimeNanoseconds - start.uptimeNanoseconds
        let found = output.featureValue(for: Name.probabilities)!.dictionaryValue
        let guesses = found.map { Guess(id: "\($0.key)", probability: $0.value.doubleValue) }
        let best = guesses.sorted { $0.probability > $1.probability }.prefix(top)
        return (Array(best), Double(nanoseconds) / 1e6)
    }

    /// The square that the model was trained to see; Core ML resizes it.
    private func centre(of image: CGImage) -> CGImage {
        let short = min(image.width, image.height)
        let side = short * transform.image_size / transform.resize
        let square = CGRect(
            x: (image.width - side) / 2, y: (image.height - side) / 2, width: side, height: side)
        return image.cropping(to: square)!
    }
}
