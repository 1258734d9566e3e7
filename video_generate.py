#!/usr/bin/env python3
"""SkyReels V1's command, by its old name: generate_video.py with t2v as the default task."""

import sys

if __name__ == "__main__":
    try:
        from skyreels_v3.main import main
    except KeyboardInterrupt:  # before there is a handler
        sys.exit(130)
    from skyreels_v3.parallel.processes import exit_process

    exit_process(main(sys.argv[1:], default_task="t2v"))
