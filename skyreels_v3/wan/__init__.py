"""SkyReels V3, with Wan 2.1's architecture."""
