#!/usr/bin/env python3
"""Trains the small models within a time limit: both VAEs, then the transformers, each in its own process.

    python3 training/train.py --device cuda --minutes 10 --out DIR

DIR gets `wan.safetensors` and `hunyuan.safetensors`, float16, rewritten every few seconds, `log.txt`, and `sheet.png`
with frames of held-out scenes. `--resume DIR` continues from such weights; `--only NAME` trains one model; `--toy` is a
small test run of everything. `training/pack.py` packs the weights into the built-in model.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import multiprocessing
import os
import platform
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# The processes are forked, so that Python starts and textures are drawn only once. Forks cannot use CUDA if it has been
# initialized before; with these settings, libraries that check for a GPU do not initialize it.
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from training import drawing  # noqa: E402
from training.run import MODELS, TRANSFORMERS, VAES, Run, write_tensors  # noqa: E402
from training.transformer import TransformerTraining  # noqa: E402
from training.vae import VAETraining  # noqa: E402

WRITE_EVERY = 15  # seconds
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
logger = logging.getLogger("training")


def main() -> None:
    options = parse()
    start = time.time()
    options.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("skyreels_v3").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="training-") as folder:
        failed = train_all(options, Path(folder), start)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; {options.out / 'log.txt'} says why")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, log and sheet")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--minutes", type=float, default=4.5, help="time limit, including writing the results")
    parser.add_argument("--only", action="append", choices=MODELS, help="a model to train; may be repeated")
    parser.add_argument("--resume", type=Path, help="folder with weights to continue from")
    parser.add_argument(
        "--encoders", action="store_true", help="also continue the VAEs' encoders, which changes the latent space"
    )
    parser.add_argument("--toy", action="store_true", help="small pictures and banks: a smoke test")
    parser.add_argument(
        "--compile", action="store_true", help="compile the transformers' blocks, which pays off after 20 minutes"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads per process")
    options = parser.parse_args()
    for name in options.only or ():
        vae = f"vae_{MODELS[name]}"
        trained = options.resume and (options.resume / f"{MODELS[name]}.safetensors").is_file() and not options.encoders
        if name not in VAES and vae not in options.only and not trained:
            parser.error(f"--only {name}: needs a VAE; add --only {vae}, or --resume DIR without --encoders")
    return options


def train_all(options: argparse.Namespace, folder: Path, start: float) -> list[str]:
    """Run a process per model, and merge what they have written every few seconds; returns the names of failed ones."""
    anew = options.resume is None or options.encoders
    names = options.only or list(MODELS if anew else TRANSFORMERS)
    if options.resume is not None:
        take_apart(options.resume, folder, ready=not anew)
    keep_freed_memory()
    torch.set_num_threads(1)  # threads are not inherited by forked processes
    drawing.draw_everything()
    context = multiprocessing.get_context("fork")
    runs = [context.Process(target=train, args=(name, options, folder, start), name=name) for name in names]
    for run in runs:
        run.start()
    written = start
    while any(run.is_alive() for run in runs) and time.time() < start + 60 * options.minutes - 3:
        time.sleep(0.5)
        if time.time() - written > WRITE_EVERY:
            put_together(folder, options.out)
            written = time.time()
    for run in runs:
        run.terminate()
        run.join(timeout=5)
    put_together(folder, options.out)
    return [run.name for run in runs if run.exitcode not in (0, None, -signal.SIGTERM)]


def keep_freed_memory() -> None:
    """Let glibc keep freed memory: otherwise each large tensor needs fresh pages, which cost more time than its math.

    Drawing and encoding take half the time then, a step of a transformer 5 to 10 % less.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def train(name: str, options: argparse.Namespace, folder: Path, start: float) -> None:
    """Train one model; each log line begins with the seconds since the start and the model's name."""

    def stamp(record: logging.LogRecord) -> bool:
        record.seconds = time.time() - start
        return True

    for handler in (logging.StreamHandler(sys.stdout), logging.FileHandler(options.out / "log.txt")):
        handler.setFormatter(logging.Formatter(f"%(seconds)6.1f {name:18} %(message)s"))
        handler.addFilter(stamp)
        logging.getLogger().addHandler(handler)
    logger.setLevel(logging.INFO)
    torch.set_num_threads(options.threads)
    if options.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.cuda.set_stream(torch.cuda.Stream())  # graphs cannot be recorded on the default one
    torch.manual_seed(0)
    try:
        (VAETraining if name in VAES else TransformerTraining)(name, Run(options, folder, start)).train()
    except Exception:
        logger.exception("failed")
        raise


def put_together(folder: Path, out: Path) -> None:
    """Merge the existing parts into a file per family, and their pictures into one."""
    for family in VAES.values():
        tensors = {}
        for name, of in MODELS.items():
            part = folder / f"{name}.safetensors"
            if of == family and part.is_file():
                place = "vae" if name in VAES else name
                tensors |= {f"{place}.{key}": value for key, value in load_file(part).items()}
        if tensors:
            write_tensors(out / f"{family}.safetensors", tensors)
    pictures = [Image.open(file) for name in MODELS if (file := folder / f"{name}.png").is_file()]
    if pictures:
        sheet = Image.new("RGB", (max(each.width for each in pictures), sum(each.height for each in pictures)))
        top = 0
        for picture in pictures:
            sheet.paste(picture, (0, top))
            top += picture.height
        sheet.save(out / "sheet.tmp.png")
        (out / "sheet.tmp.png").replace(out / "sheet.png")


def take_apart(source: Path, folder: Path, ready: bool) -> None:
    """Split the weights of an earlier run into parts; if `ready`, mark its VAE encoders as done."""
    for family in VAES.values():
        file = source / f"{family}.safetensors"
        tensors = load_file(file) if file.is_file() else {}
        for name, of in MODELS.items():
            place = "vae." if name in VAES else f"{name}."
            part = {key.removeprefix(place): value for key, value in tensors.items() if key.startswith(place)}
            if of == family and part:
                write_tensors(folder / f"{name}.safetensors", part)
                if name in VAES and ready:
                    (folder / f"{name}.ready").touch()


if __name__ == "__main__":
    main()
