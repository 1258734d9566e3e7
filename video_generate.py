#!/usr/bin/env python3
"""SkyReels V1's command, by its old name: the same as generate_video.py."""

import sys

from generate_video import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
