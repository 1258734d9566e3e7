"""`skyreels convert`: converts a transformer of any supported format to diffusers' layout or to one native file."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from skyreels_v3.checkpoints.files import errors_about, weight_files
from skyreels_v3.checkpoints.hub import COMPONENTS, locate_file
from skyreels_v3.cli import Parser
from skyreels_v3.errors import UserError, format_value
from skyreels_v3.families import family_of
from skyreels_v3.media.files import check_writable
from skyreels_v3.tasks import DTYPES, TASK_NAMES, task_spec

SINGLE_FILE = ".safetensors"


def convert(argv: Sequence[str]) -> Path:
    """Run a command line; returns the new folder or file.

    Raises:
        UserError: the weights cannot be read, or the output cannot be written.
    """
    given = build_parser().parse_args(argv)
    task, output = task_spec(given.task_type), Path(os.path.expanduser(given.output))
    single = output.suffix == SINGLE_FILE
    if given.transformer is None and given.model_id is None:
        raise UserError("--transformer", "missing; give a file, or a checkpoint's folder as --model_id")
    if single and task.family != "wan":
        reason = f"{format_value(output)}: a single file with native names can be written for V3 only"
        raise UserError("--output", f"{reason}; give a folder")
    check_writable(output, "--output")
    file = None if given.transformer is None else locate_file(given.transformer, COMPONENTS["transformer"])
    if given.transformer is not None and file is None:
        raise UserError("--transformer", f"{format_value(given.transformer)} is not on this machine; download it first")

    import torch

    from skyreels_v3.checkpoints.save import save_transformer
    from skyreels_v3.memory.quantize import dequantize_layers
    from skyreels_v3.plan import build_on_meta

    dtype, files = getattr(torch, given.dtype), {} if file is None else {"transformer": file}
    with tempfile.TemporaryDirectory() as made, errors_about("--model_id" if file is None else "--transformer"):
        root = Path(os.path.expanduser(given.model_id or made))
        folder = root / task.transformer_folder
        if given.model_id is None:
            build_on_meta(task.family, task.transformer).save_config(folder)
        if not (folder / "config.json").is_file() or not (file or weight_files(folder)):
            raise UserError("--model_id", f"{folder} has no config.json, or no weights; give a checkpoint's folder")
        transformer = family_of(task).loaders(task, root, root, dtype, dtype, True, files)["transformer"]()
    dequantize_layers(transformer, dtype)
    return save_transformer(transformer, output, transformer.native_names if single else None)


def build_parser() -> Parser:
    """A parser of the flags, which have the same meaning as in `skyreels generate`."""
    parser = Parser(
        prog="skyreels convert",
        description="Convert a transformer from any supported format to a folder in diffusers' layout, or to one file.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--task_type", metavar="TASK", required=True, choices=TASK_NAMES, help=", ".join(TASK_NAMES))
    parser.add_argument("--transformer", metavar="FILE", help="safetensors or GGUF, quantized or not")
    parser.add_argument(
        "--model_id",
        metavar="FOLDER",
        help="checkpoint with the config, and with the weights unless --transformer is given",
    )
    parser.add_argument(
        "--output", metavar="PATH", required=True, help="a folder, or FILE.safetensors for one file with native names"
    )
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="dtype of the weights (default: bfloat16)")
    return parser
