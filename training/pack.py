#!/usr/bin/env python3
"""Packs trained weights into skyreels_v3/weights, from where `--model_id tiny` unpacks them.

python3 training/pack.py --weights DIR

Checkpoints are first written in the published layouts; a pack stores each distinct tensor once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402  needs the path above
from diffusers import FlowMatchEulerDiscreteScheduler  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from skyreels_v3.checkpoints.tiny import LAYOUTS, WEIGHTS  # noqa: E402
from skyreels_v3.tasks import TaskSpec, task_spec  # noqa: E402
from skyreels_v3.wan import key_maps  # noqa: E402
from training import encoders, layouts, networks, sound  # noqa: E402
from training.run import TRANSFORMERS  # noqa: E402

TASKS = {  # a task of each checkpoint -> the name of its transformer in training
    "reference_to_video": "video",
    "single_shot_extension": "video",
    "talking_avatar": "talking_avatar",
    "t2v": "t2v",
    "i2v": "i2v",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=Path, required=True, help="folder with what training/train.py wrote")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder of the packs")
    options = parser.parse_args()
    for family in dict.fromkeys(TRANSFORMERS.values()):
        source = options.weights / f"{family}.safetensors"
        if not source.is_file():  # trained alone
            continue
        with safe_open(source, framework="pt") as trained:
            lacking = {name for name, of in TRANSFORMERS.items() if of == family} - models_in(trained.keys())
        if lacking:
            parser.error(f"--weights {options.weights}: {source.name} lacks {', '.join(sorted(lacking))}; train it too")
        pack(source, options.out / source.name)


def models_in(names: Iterable[str]) -> set[str]:
    """The models that tensors belong to."""
    return {name.split(".")[0] for name in names}


def pack(source: Path, target: Path) -> None:
    """Write the pack of one family's checkpoints from its trained weights."""
    stored = load_file(source)
    names = {digest(tensor): name for name, tensor in stored.items()}
    written: dict[str, dict[str, Any]] = {}
    for task, name in TASKS.items():
        spec = task_spec(task)
        if spec.family != target.stem or name not in models_in(stored):
            continue
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / Path(spec.model_id).name
            write(stored, spec, name, root)
            files = written[root.name] = {}
            for file in sorted(path for path in root.rglob("*") if path.is_file()):
                path = str(file.relative_to(root))
                if file.suffix not in (".safetensors", ".pth"):
                    files[path] = file.read_text(encoding="utf-8")
                    continue
                files[path] = {}
                for key, tensor in tensors_of(file):
                    known = names.setdefault(digest(tensor), f"{path}:{key}")
                    stored.setdefault(known, tensor)
                    files[path][key] = known, [*tensor.shape]
    target.parent.mkdir(exist_ok=True)
    save_file(stored, target, metadata={LAYOUTS: json.dumps(written)})


def tensors_of(file: Path) -> Iterator[tuple[str, Tensor]]:
    found = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    for key, tensor in found.items():
        yield key, tensor.contiguous()


def digest(tensor: Tensor) -> tuple[str, int, str]:
    """A key that is equal for tensors with the same values, whatever their shape."""
    return str(tensor.dtype), tensor.numel(), hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


# Checkpoints


def write(tensors: Mapping[str, Tensor], task: TaskSpec, name: str, root: Path) -> None:
    """Write the checkpoint of a task to a new folder, with float16 weights."""
    vae = filled(networks.build_vae(task.family), tensors, "vae")
    transformer = filled(networks.build_transformer(name), tensors, name)
    root.mkdir(parents=True)
    if task.family == "hunyuan":
        write_hunyuan(root, transformer, vae)
    elif task.layout == "diffusers":
        transformer.save_pretrained(root / "transformer")
        vae.save_pretrained(root / "vae")
        layouts.save(encoders.umt5_module().half(), root / "text_encoder")
        encoders.write_umt5_tokenizer(root / "tokenizer")
    else:
        write_native(root, task, transformer, vae)


def filled(module: Any, tensors: Mapping[str, Tensor], place: str) -> Any:
    """A module with the weights under its prefix, in float16."""
    part = {key.removeprefix(f"{place}."): value for key, value in tensors.items() if key.startswith(f"{place}.")}
    wanted = {name for name, _ in module.named_parameters()}
    assert part.keys() == wanted, f"{place}: {sorted(part.keys() ^ wanted)[:3]}"
    module.load_state_dict(part, strict=False)
    return module.half()


def write_native(root: Path, task: TaskSpec, transformer: Any, vae: nn.Module) -> None:
    """Write the native layout: of video extension, whose tasks share a transformer here, or of the avatar."""
    avatar = "input_audio" in task.inputs
    for name in (".",) if avatar else ("transformer", "shot_transformer"):
        layouts.write_native_transformer(root / name, transformer)
    torch.save(layouts.native(layouts.weights(vae), key_maps.NATIVE_VAE), root / key_maps.NATIVE_VAE_FILE)
    text_encoder = layouts.weights(encoders.umt5_module().half())
    torch.save(layouts.native(text_encoder, key_maps.NATIVE_TEXT_ENCODER), root / key_maps.NATIVE_TEXT_ENCODER_FILE)
    encoders.write_umt5_tokenizer(root / key_maps.NATIVE_TOKENIZER)
    if avatar:
        image_encoder = layouts.random_image_encoder().half()
        layouts.write_native_image_encoder(root / key_maps.NATIVE_IMAGE_ENCODER_FILE, image_encoder)
        layouts.save(sound.audio_module().half(), root / key_maps.AUDIO_ENCODER)


def write_hunyuan(root: Path, transformer: Any, vae: Any) -> None:
    """Write V1's layout, with HunyuanVideo's components in the transformer's folder."""
    transformer.save_pretrained(root)
    vae.save_pretrained(root / "vae")
    layouts.save(encoders.llama_module().half(), root / "text_encoder")
    layouts.save(layouts.random_clip().half(), root / "text_encoder_2")
    FlowMatchEulerDiscreteScheduler(**layouts.SCHEDULER).save_pretrained(root / "scheduler")
    layouts.write_llama_tokenizer(root / "tokenizer", encoders.llama_pieces())
    layouts.write_clip_tokenizer(root / "tokenizer_2")


if __name__ == "__main__":
    main()
