"""Suggestions for unknown flags and values: the names that other tools use, and typos.

The scripts of Wan and HunyuanVideo, diffusers and ComfyUI have other names for the same things. A known name leads to
our flag, with the value in our notation; any other name only to a flag that is nearly spelled like it. No suggestion is
better than a flag with another meaning.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection

from skyreels_v3.errors import format_value
from skyreels_v3.tasks import TASK_NAMES

MAX_WORD = 100  # characters that are compared
CUTOFF = 0.8  # difflib's ratio for one wrong letter among five
SEE_HELP = "see --help"
SIZE = re.compile(r"(\d{1,6}) *[*xX:,] *(\d{1,6})")  # width first, as everywhere
# our flag, or what else to do: the names that other tools have for it. {} is the value
SYNONYMS = {
    "--prompt {}": "positive positive_prompt text caption",
    "--negative_prompt {}": "n_prompt neg_prompt negative sample_neg_prompt",
    "--image {}": "image_path img img_path first_frame start_image init_image i2v_image_path",
    "--ref_imgs {}": "ref_img ref_image ref_images src_ref_images reference_image reference_images",
    "--input_video {}": "video video_path src_video source_video clip",
    "--input_audio {}": "audio audio_path audio_file wav wav_path speech",
    "--duration {}": "seconds video_seconds",
    "--num_frames {}": "frame_num frames frame_count n_frames num_frame video_length video_frames length infer_frames",
    "--height and --width": "size video_size image_size",
    "--fps {}": "frame_rate framerate frames_per_second sample_fps",
    "--seed {}": "base_seed noise_seed random_seed manual_seed",
    "--num_inference_steps {}": "sample_steps sampling_steps steps num_steps infer_steps inference_steps n_steps",
    "--shift {}": "sample_shift flow_shift time_shift timestep_shift",
    "--guidance_scale {}": "sample_guide_scale guide_scale cfg cfg_scale guidance true_cfg_scale",
    "--embedded_guidance_scale {}": "embedded_cfg_scale",
    "--cache fbcache": "teacache use_teacache enable_teacache teacache_thresh rel_l1_thresh magcache use_magcache",
    "--model_id {}": "model model_path model_dir model_name ckpt ckpt_dir ckpt_path checkpoint unet_name dit_weight",
    "--lora {}": "loras lora_path lora_dir lora_weights lora_name",
    "--lora FILE:{}": "lora_scale lora_weight lora_strength lora_alpha",
    "--device cpu": "cpu use_cpu",
    "--dtype {}": "torch_dtype precision weight_dtype",
    "--dtype bfloat16": "bf16 use_bf16 fp16 use_fp16 half",
    "--offload": "offload_model cpu_offload use_cpu_offload model_cpu_offload enable_model_cpu_offload",
    "--memory stream": "sequential_cpu_offload enable_sequential_cpu_offload group_offload novram",
    "--memory resident": "highvram gpu_only",
    "--low_vram": "lowvram low_memory",
    "--stream_blocks, the number of resident blocks": "blocks_to_swap block_swap",
    "--quant fp8": "fp8 use_fp8 quantize quantization",
    "--compile": "torch_compile use_compile",
    "--use_usp --shard_weights": "dit_fsdp use_fsdp fsdp",
    "--use_usp": "usp use_xdit sequence_parallel",
    "--gpu_num {}": "gpus num_gpus n_gpus ngpus nproc_per_node num_processes world_size",
    "--ulysses_degree {}": "ulysses_size ulysses ulysses_parallel_degree",
    "--ring_degree {}": "ring_size ring_parallel_degree",
    "--cfg_degree {}": "cfg_size cfg_parallel_size",
    "--output {}": "save_file save_path output_path output_file output_name outfile out filename",
    "--outdir {}": "output_dir out_dir save_dir output_folder",
    "--video_num {}": "num_videos num_videos_per_prompt num_samples num_outputs batch_size batch_count",
    "--jobs FILE.jsonl": "prompt_file batch batch_file",
    "set CUDA_VISIBLE_DEVICES={} before the command": "gpu gpu_id gpu_ids device_id cuda_device",
    "leave it out: text encoders and VAE are offloaded and tiled where memory is short": "t5_cpu t5_fsdp vae_tiling",
    "leave it out: weights are loaded in --dtype": "convert_model_dtype",
    "leave it out: prompts are used as they are": "use_prompt_extend prompt_extend_method prompt_extend_model",
    "leave it out: each task has the scheduler that its model was trained for": "sample_solver sampler scheduler",
    "nothing is ever overwritten; give another --output": "overwrite force yes",
}
REMEDIES = {word: remedy for remedy, words in SYNONYMS.items() for word in words.split()}
VALUES = {"gpu": "cuda", "bf16": "bfloat16", "fp32": "float32", "fp16": "", "float16": ""}  # "": not the nearest word
TASKS = {name: name for name in TASK_NAMES} | {
    **{"r2v": "reference_to_video", "a2v": "talking_avatar", "s2v": "talking_avatar", "v2v": "single_shot_extension"},
    **{"text_to_video": "t2v", "image_to_video": "i2v"},
}


def suggest_flag(word: str, value: str, flags: Collection[str]) -> str:
    """What to do instead of giving an unknown flag.

    Args:
        word: the flag that was given.
        value: its value, "" if it had none.
        flags: the names of our flags.
    """
    first, _, rest = word.partition(" ")
    if rest and first.strip("-") in flags:
        return f'put quotes around the value only: {first} "{format_value(rest)}"'
    word = word[:MAX_WORD].strip("-").replace("-", "_").lower()
    if word in ("task", "mode"):
        return f"give --task_type {suggest_task(value)}".strip()
    if "size" in word and (sides := as_size(value)):
        return f"give {sides}"
    if remedy := REMEDIES.get(word):
        if "{}" not in remedy and value.lower() in ("false", "0", "no"):
            return "leave it out"
        value = f'"{format_value(value)}"' if re.search(r"\s", value) else format_value(value)
        return f"{'give ' if remedy.startswith('-') else ''}{remedy.replace('{}', value)}".strip()
    begun = [name for name in flags if name.startswith(word)] if len(word) > 2 else []
    close = begun if len(begun) == 1 else difflib.get_close_matches(word, flags, 1, CUTOFF)
    return f"did you mean --{close[0]}?" if close else SEE_HELP


def suggest_value(flag: str, value: str, choices: Collection[str]) -> str:
    """What to add to the list of choices for a value that is none of them; may be ""."""
    if flag == "resolution" and (sides := as_size(value)):
        return f", or {sides}"
    if flag == "resolution" and re.fullmatch(r"1080[pP]?|1440[pP]?|2160[pP]?|[24][kK]", value):
        return ", or --height and --width for other sizes"
    if flag == "device" and (number := re.fullmatch(r"cuda:(\d{1,2})", value)):
        return f"; to choose a GPU set CUDA_VISIBLE_DEVICES={number[1]}"
    folded = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(value[:MAX_WORD].lower(), folded, 1, CUTOFF)
    meant = VALUES.get(value.lower(), folded[close[0]] if close else "")
    meant = (suggest_task(value) if flag == "task_type" else "") or meant
    return f"; did you mean {meant}?" if meant else ""


def suggest_task(value: str) -> str:
    """The task for a name such as Wan's t2v-14B, "" for none."""
    name = value.lower().replace("-", "_")
    return TASKS.get(name) or TASKS.get(name.split("_")[0], "")


def as_size(value: str) -> str:
    """Our flags for a size such as 832*480, "" for anything else."""
    sides = SIZE.fullmatch(value.strip())
    return f"--height {sides[2]} --width {sides[1]}" if sides else ""
