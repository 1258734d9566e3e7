#!/usr/bin/env python3
"""SkyReels V1's script under its original name: generate_video.py with t2v as the default task."""

from skyreels_v3.__main__ import generate

if __name__ == "__main__":
    generate(default_task="t2v")
