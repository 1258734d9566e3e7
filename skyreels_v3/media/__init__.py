"""Pictures, clips and where they come from: decoding, resizing, encoding, downloads. Free of torch."""
