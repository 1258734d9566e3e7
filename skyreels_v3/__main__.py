"""Where the commands start: `python -m skyreels_v3` (which is `skyreels`), generate_video.py and video_generate.py.

This file is also started by its path, in each process of a multi-GPU run.
"""

import os
import sys
from types import ModuleType

if not __package__:  # started by path: Python has put the package's own folder on sys.path
    folder = os.path.dirname(os.path.realpath(__file__))
    sys.path = [os.path.dirname(folder), *(entry for entry in sys.path if entry != folder)]


def import_main() -> ModuleType:
    """main.py, which takes a while to import; Ctrl-C ends that like everything later."""
    try:
        from skyreels_v3 import main
    except KeyboardInterrupt:  # before there is a handler
        sys.exit(130)
    return main


def skyreels() -> None:
    """What the installed `skyreels` runs."""
    main = import_main()
    main.processes.exit_process(main.run_command(sys.argv[1:]))


def generate(default_task: str | None = None) -> None:
    """What the scripts of a checkout run."""
    main = import_main()
    main.processes.exit_process(main.main(sys.argv[1:], default_task))


if __name__ == "__main__":
    skyreels()
