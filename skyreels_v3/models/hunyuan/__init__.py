"""HunyuanVideo, the networks that SkyReels V1 is made of."""
