"""SkyReels V1: HunyuanVideo, trained further."""
