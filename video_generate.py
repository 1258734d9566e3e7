#!/usr/bin/env python3
"""SkyReels V1's command, by its old name: the same as generate_video.py, and t2v where no task is named."""

import sys

from generate_video import main
from skyreels_v3.parallel.processes import leave

if __name__ == "__main__":
    leave(main(sys.argv[1:], default_task="t2v"))
