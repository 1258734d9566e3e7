"""One file per task: conditions, segments, denoising, decoding, as a stream of frames."""
