"""`python -m skyreels_v3`: the `skyreels` command. Also started by its path, in each process of a multi-GPU run."""

import os
import sys

if not __package__:  # started by path: Python has put the package's own folder on sys.path
    folder = os.path.dirname(os.path.realpath(__file__))
    sys.path = [os.path.dirname(folder), *(entry for entry in sys.path if entry != folder)]

if __name__ == "__main__":
    try:
        from skyreels_v3.main import console_script
    except KeyboardInterrupt:  # before there is a handler
        sys.exit(130)
    console_script()
