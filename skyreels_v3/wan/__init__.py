"""SkyReels V3: Wan 2.1's architecture."""
