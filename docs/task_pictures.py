"""Makes the pictures of tasks/*.md: python docs/task_pictures.py [TASK ...]

Runs each page's command with the built-in model; frames of its video become tasks/TASK.webp.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.frames import row_of  # noqa: E402
from docs.page_commands import commands_of  # noqa: E402
from skyreels_v3.tasks import TASK_NAMES  # noqa: E402

TASKS = ROOT / "docs" / "tasks"
FRAMES, QUALITY = 6, 90


def main() -> None:
    for task in sys.argv[1:] or TASK_NAMES:
        (command,) = (each for each in commands_of(TASKS / f"{task}.md") if "--model_id tiny" in each)
        with tempfile.TemporaryDirectory() as folder:
            video = Path(folder, "video.mp4")
            subprocess.run([sys.executable, *shlex.split(command)[1:], "--output", str(video)], cwd=ROOT, check=True)
            row_of(video, FRAMES).save(TASKS / f"{task}.webp", quality=QUALITY, method=6)


if __name__ == "__main__":
    main()
