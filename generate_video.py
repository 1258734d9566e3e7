#!/usr/bin/env python3
"""Make videos with the SkyReels models: `python3 generate_video.py --help`. The same as `skyreels generate`."""

import sys

if __name__ == "__main__":
    try:
        from skyreels_v3.main import main
    except KeyboardInterrupt:  # before there is a handler
        sys.exit(130)
    from skyreels_v3.parallel.processes import exit_process

    exit_process(main(sys.argv[1:]))
