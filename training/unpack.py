#!/usr/bin/env python3
"""Makes checkpoints of the trained weights, in the published layouts, so that `--model_id FOLDER` takes them.

python3 training/unpack.py --weights DIR --task reference_to_video --out FOLDER
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402  needs the path above
from diffusers import FlowMatchEulerDiscreteScheduler  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from skyreels_v3.checkpoints.tiny import SIZES, save, weights  # noqa: E402
from skyreels_v3.hunyuan import tiny as hunyuan_tiny  # noqa: E402
from skyreels_v3.wan import key_maps, tiny  # noqa: E402
from training import encoders, networks, sound  # noqa: E402
from training.train import TRANSFORMERS  # noqa: E402

TASKS = {
    "reference_to_video": "reference_to_video",
    "single_shot_extension": "video_extension",
    "shot_switching_extension": "video_extension",
    "talking_avatar": "talking_avatar",
    "t2v": "t2v",
    "i2v": "i2v",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=Path, required=True, help="folder with v3.safetensors and v1.safetensors")
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the checkpoint")
    options = parser.parse_args()
    unpack(options.weights, options.task, options.out)


def unpack(source: Path, task: str, root: Path) -> None:
    """The checkpoint of a task in a new folder, of float16 weights."""
    version = TRANSFORMERS[TASKS[task]]
    tensors = load_file(source / f"{version}.safetensors")
    vae = filled(networks.build_vae(version), tensors, "vae")
    transformer = filled(networks.build_transformer(TASKS[task]), tensors, TASKS[task])
    root.mkdir(parents=True)
    if version == "v1":
        write_hunyuan(root, transformer, vae)
    elif task == "reference_to_video":
        write_reference(root, transformer, vae)
    elif task == "talking_avatar":
        tiny.write_native_transformer(root, transformer)
        write_native_parts(root, vae)
        tiny.write_image_encoder(root / key_maps.NATIVE_IMAGE_ENCODER_FILE)
        save(sound.audio_module(), root / key_maps.AUDIO_ENCODER)
    else:
        for name in ("transformer", "shot_transformer"):
            tiny.write_native_transformer(root / name, transformer)
        write_native_parts(root, vae)


def filled(module: Any, tensors: Mapping[str, Tensor], place: str) -> Any:
    """A network with its part of the weights, in float16."""
    part = {key.removeprefix(f"{place}."): value for key, value in tensors.items() if key.startswith(f"{place}.")}
    wanted = {name for name, _ in module.named_parameters()}
    assert part.keys() == wanted, f"{place}: {sorted(part.keys() ^ wanted)[:3]}"
    module.load_state_dict(part, strict=False)
    return module.half()


def write_reference(root: Path, transformer: Any, vae: Any) -> None:
    """The diffusers layout."""
    transformer.save_pretrained(root / "transformer")
    vae.save_pretrained(root / "vae")
    save(encoders.umt5_module().half(), root / "text_encoder")
    encoders.write_umt5_tokenizer(root / "tokenizer")


def write_native_parts(root: Path, vae: nn.Module) -> None:
    """What the native layouts share: VAE, text encoder and tokenizer."""
    torch.save(tiny.native(weights(vae), key_maps.NATIVE_VAE), root / key_maps.NATIVE_VAE_FILE)
    text_encoder = weights(encoders.umt5_module().half())
    torch.save(tiny.native(text_encoder, key_maps.NATIVE_TEXT_ENCODER), root / key_maps.NATIVE_TEXT_ENCODER_FILE)
    encoders.write_umt5_tokenizer(root / key_maps.NATIVE_TOKENIZER)


def write_hunyuan(root: Path, transformer: Any, vae: Any) -> None:
    """V1's layout, with HunyuanVideo's parts in the transformer's folder."""
    transformer.save_pretrained(root)
    vae.save_pretrained(root / "vae")
    save(encoders.llama_module().half(), root / "text_encoder")
    save(hunyuan_tiny.random_clip(), root / "text_encoder_2")
    FlowMatchEulerDiscreteScheduler(**SIZES["hunyuan"]["scheduler"]).save_pretrained(root / "scheduler")
    encoders.write_words_tokenizer(root / "tokenizer")
    hunyuan_tiny.write_clip_tokenizer(root / "tokenizer_2")


if __name__ == "__main__":
    main()
