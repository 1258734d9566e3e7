"""Images, video and audio: decoding, resizing, encoding, downloading."""
