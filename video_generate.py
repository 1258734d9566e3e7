#!/usr/bin/env python3
"""SkyReels V1's command, by its old name: generate_video.py with t2v as the default task."""

import sys

from skyreels_v3.main import main
from skyreels_v3.parallel.processes import exit_process

if __name__ == "__main__":
    exit_process(main(sys.argv[1:], default_task="t2v"))
