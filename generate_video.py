#!/usr/bin/env python3
"""Make videos with the SkyReels models: `python3 generate_video.py --help`. The same as `skyreels generate`."""

from skyreels_v3.__main__ import generate

if __name__ == "__main__":
    generate()
