#!/usr/bin/env python3
"""Generate videos with the SkyReels models, like `skyreels generate`; see `python3 generate_video.py --help`."""

from skyreels_v3.__main__ import generate

if __name__ == "__main__":
    generate()
