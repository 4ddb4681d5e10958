"""One module per kind of artifact: from an `EmissionRequest` to a verified `Emission`."""
