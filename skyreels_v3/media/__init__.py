"""Pictures, clips, sounds and where they come from: decoding, resizing, encoding, downloads."""
