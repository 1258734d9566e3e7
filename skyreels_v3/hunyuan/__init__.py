"""SkyReels V1, a fine-tuned HunyuanVideo."""
