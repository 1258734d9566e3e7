#!/usr/bin/env python3
"""Make videos with the SkyReels models: `python3 generate_video.py --help`. The same as `skyreels generate`."""

import sys

from skyreels_v3.main import main
from skyreels_v3.parallel.processes import exit_process

if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
