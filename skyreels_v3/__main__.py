"""Entry points of `python -m skyreels_v3` (same as `skyreels`), generate_video.py and video_generate.py.

Multi-GPU runs also start this file by its path, in each process.
"""

import os
import sys
from types import ModuleType

if not __package__:  # started by path: Python put the package's own folder on sys.path
    folder = os.path.dirname(os.path.realpath(__file__))
    sys.path = [os.path.dirname(folder), *(entry for entry in sys.path if entry != folder)]


def import_main() -> ModuleType:
    """Import main.py, which takes a while; Ctrl-C exits with 130 here as it does later."""
    try:
        from skyreels_v3 import main
    except KeyboardInterrupt:  # no signal handler is installed yet
        sys.exit(130)
    return main


def skyreels() -> None:
    """Entry point of the installed `skyreels` command."""
    main = import_main()
    main.processes.exit_process(main.run_command(sys.argv[1:]))


def generate(default_task: str | None = None) -> None:
    """Entry point of a checkout's scripts."""
    main = import_main()
    main.processes.exit_process(main.main(sys.argv[1:], default_task))


if __name__ == "__main__":
    skyreels()
