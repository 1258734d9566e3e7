"""What a user did that cannot work, said in one line.

A `UserError` names the flag, the value and the way out; the command line prints it and exits with 2. Everything else
that goes wrong is a bug or the machine's fault and exits with 1.
"""

from __future__ import annotations


class UserError(Exception):
    """A request that cannot be carried out as it stands.

    Args:
        flag: the command line flag at fault, such as `--ref_imgs`.
        message: the value that was given, what is wrong with it and what to give instead.
    """

    def __init__(self, flag: str, message: str) -> None:
        super().__init__(f"{flag}: {message}")
        self.flag = flag


class CheckpointError(UserError):
    """A checkpoint file that is missing, damaged or not what its model needs; names the file and the keys."""

    def __init__(self, message: str) -> None:
        super().__init__("--model_id", message)
