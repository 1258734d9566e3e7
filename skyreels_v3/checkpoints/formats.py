"""Recognizing how files store weights: plain, or quantized in one of the published formats. No torch.

The headers of the files are enough: names, types and shapes of the tensors, and the metadata. Supported are

- float8 or int8 matrices with a scale for the matrix or for each row: our own, ComfyUI's and ModelOpt's
  (`weight_scale`), and ComfyUI's older ones (`scale_weight`). Scales of activations are not needed;
- float8 matrices that were merely cast;
- GGUF files.

A quantized matrix without its scale, or a scale without its matrix, would yield noise without any other error. So every
key that only quantized files have must match a matrix, or the file is refused with that key.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skyreels_v3.checkpoints.files import open_safetensors
from skyreels_v3.checkpoints.gguf import read_gguf
from skyreels_v3.errors import CheckpointError, format_value
from skyreels_v3.media.files import giga
from skyreels_v3.memory.policy import SCALE

REMEDY = "give scaled FP8, a GGUF file, or weights in bfloat16 and --quant fp8 to quantize them"
GGUF, CAST = "GGUF", "FP8"  # names of formats
FLOAT8 = ("F8_E4M3", "F8_E5M2")
SCALED = (*FLOAT8, "I8")  # types of matrices with scales
PLAIN = ("F64", "F32", "F16", "BF16")  # of weights that are not quantized, and of scales
PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # of all keys in repackaged transformers
# Keys of unsupported formats, and the names of these
REFUSED = (
    (r".+\.weight_scale_2", "NVFP4"),
    (r".+\.pre_quant_scale", "AWQ"),
    (r".+\.weight_scale_inv", "FP8 scaled by blocks"),
    (r".+\.(?:wscales|wzeros|wtscale|wcscales|smooth_factor(?:_orig)?)", "nunchaku's SVDQuant"),
    (r".+\.(?:qweight|qzeros|g_idx)", "4-bit integers"),
    (r".+\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+|SCB)", "bitsandbytes' format"),
)
MARKER = re.compile(r"(?:.+\.)?scaled_fp8")  # in ComfyUI's older files: there are scales
WEIGHT_SCALE = re.compile(rf"(.+)\.(?:scale_weight|{SCALE})")
INPUT_SCALE = re.compile(r"(.+)\.(?:scale_input|input_scale)")
LAYER_SETTINGS = re.compile(r"(.+)\.comfy_quant")  # a JSON object as bytes
HEADER_SETTINGS = "_quantization_metadata"  # of all layers, in the metadata
MAX_SETTINGS_BYTES = 1 << 16
# A layer's settings: supported formats and their matrix types; unsupported formats; allowed entries
LAYER_FORMATS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int8_tensorwise": "I8"}
FORMAT_NAMES = {"nvfp4": "NVFP4", "mxfp8": "MXFP8", "awq_w4a16": "AWQ", "svdquant_w4a4": "nunchaku's SVDQuant"}
LAYER_ENTRIES = ("format", "full_precision_matrix_mult", "convrot", "convrot_groupsize")


@dataclass(frozen=True)
class Stored:
    """The type and the shape of a tensor in a file."""

    kind: str
    shape: tuple[int, ...]


@dataclass
class Header:
    """The headers of a model's files.

    Attributes:
        tensors: by their keys.
        settings: of quantized layers, if the files have them.
    """

    tensors: dict[str, Stored] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """The format of a model's weights.

    Attributes:
        name: for users, such as "scaled FP8"; empty if nothing is quantized.
        kinds: the types of its tensors, that of most weights first.
        scales: key of a quantized matrix -> key of its scale.
        unused: keys that are not weights.
        ours: whether it is the format that --save_quantized writes.
    """

    name: str
    kinds: tuple[str, ...]
    scales: Mapping[str, str]
    unused: frozenset[str]
    ours: bool

    @property
    def is_quantized(self) -> bool:
        """Whether matrices stay as they are in the files."""
        return not {*self.kinds} <= {*PLAIN}


def read_format(files: Sequence[Path]) -> Format:
    """The format of the weights in a model's files; raises CheckpointError if it is unsupported."""
    header = Header()
    for file in files:
        if file.suffix in (".safetensors", ".gguf"):  # others hold no quantized weights
            read_header(file, header)
    return recognize(header, files[0] if len(files) == 1 else files[0].parent)


def describe(files: Sequence[Path]) -> str:
    """What a model's files hold, in a few words."""
    made, size = read_format(files), giga(sum(file.stat().st_size for file in files))
    return f"{f'{made.name} ' if made.name else ''}({', '.join(made.kinds)}), {size}"


def read_header(file: Path, header: Header) -> None:
    """Add the header of a safetensors or GGUF file to `header`."""
    if file.suffix == ".gguf":
        header.tensors |= {key: Stored(made.kind, made.shape) for key, made in read_gguf(file).items()}
        return
    with open_safetensors(file) as handle:
        for key in handle.keys():  # noqa: SIM118  not a mapping
            part = handle.get_slice(key)
            stored = header.tensors[key] = Stored(part.get_dtype(), tuple(part.get_shape()))
            if (match := LAYER_SETTINGS.fullmatch(key)) is not None:
                small = stored.kind == "U8" and len(stored.shape) == 1 and stored.shape[0] <= MAX_SETTINGS_BYTES
                content = handle.get_tensor(key).tobytes() if small else b""
                header.settings[match[1]] = parse_settings(content, f"{file}: {format_value(key)}")
        content = (handle.metadata() or {}).get(HEADER_SETTINGS)
    if content is not None:
        source = f"{file}: {HEADER_SETTINGS} in its header"
        layers = parse_settings(content, source).get("layers")
        if not isinstance(layers, dict):
            raise CheckpointError(f"{source} has no layers; {REMEDY}")
        header.settings |= layers


def parse_settings(content: bytes | str, source: str) -> dict[str, Any]:
    """Parse the JSON object in a setting; raises CheckpointError if it is not one."""
    try:
        made = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is not JSON ({error}); {REMEDY}") from error
    if not isinstance(made, dict):
        raise CheckpointError(f"{source} is not a JSON object; {REMEDY}")
    return made


def recognize(header: Header, source: Path) -> Format:
    """The format of a model's weights; raises CheckpointError if it is unsupported or incomplete."""
    tensors = header.tensors
    declared = {layer: check_settings(layer, settings, source) for layer, settings in header.settings.items()}
    for pattern, name in REFUSED:
        for key in tensors:
            if re.fullmatch(pattern, key):
                raise refusal(source, name, key)
    scales: dict[str, str] = {}
    unused: set[str] = set()
    for key, stored in tensors.items():
        if MARKER.fullmatch(key) or LAYER_SETTINGS.fullmatch(key):
            unused.add(key)
        elif (match := WEIGHT_SCALE.fullmatch(key) or INPUT_SCALE.fullmatch(key)) is not None:
            weight = f"{match[1]}.weight"
            if weight not in tensors or tensors[weight].kind not in SCALED:
                raise left_over(source, key)
            if INPUT_SCALE.fullmatch(key):
                unused.add(key)
                continue
            if weight in scales:
                raise left_over(source, key)
            check_scale(key, stored, tensors[weight], source)
            scales[weight] = key
    for layer, kind in declared.items():
        weight = next((key for prefix in ("", *PREFIXES) if (key := f"{prefix}{layer}.weight") in tensors), "")
        if weight not in scales or tensors[weight].kind != kind:
            raise left_over(source, f"the settings of {layer}")
    for key, stored in tensors.items():
        if (scales or unused) and stored.kind in SCALED and len(stored.shape) == 2 and key not in scales:
            raise CheckpointError(f"{source}: {format_value(key)} is quantized, but its scale is missing; {REMEDY}")
    elements: Counter[str] = Counter()
    for key in tensors.keys() - {*scales.values(), *unused}:
        elements[tensors[key].kind] += math.prod(tensors[key].shape)
    kinds = tuple(kind for kind, _ in elements.most_common())
    name = "scaled INT8" if "I8" in kinds else "scaled FP8" if scales else CAST if {*FLOAT8} & {*kinds} else ""
    by_rows = (
        scale.endswith(f".{SCALE}") and tensors[scale].shape == tensors[key].shape[:1] for key, scale in scales.items()
    )
    ours = bool(scales) and all(by_rows) and not unused and not declared
    return Format(GGUF if source.suffix == ".gguf" else name, kinds, scales, frozenset(unused), ours)


def check_settings(layer: str, settings: object, source: Path) -> str:
    """The matrix type in a quantized layer's settings; raises CheckpointError if they are unsupported."""
    if not isinstance(settings, dict):
        raise left_over(source, f"the settings of {layer}")
    name = str(settings.get("format"))
    if name not in LAYER_FORMATS:
        raise refusal(source, FORMAT_NAMES.get(name, format_value(name)), layer)
    if settings.get("convrot"):
        raise refusal(source, "rotated INT8 (convrot)", layer)
    if unknown := settings.keys() - {*LAYER_ENTRIES}:
        raise left_over(source, f"{min(unknown)} in the settings of {layer}")
    return LAYER_FORMATS[name]


def check_scale(key: str, scale: Stored, weight: Stored, source: Path) -> None:
    """Raise CheckpointError unless there is one scale for the matrix, or one for each of its rows."""
    rows = weight.shape[:1]
    if scale.kind in ("F8_E8M0", "U8"):
        raise refusal(source, "MXFP8", key)
    if len(weight.shape) != 2 or scale.kind not in PLAIN or scale.shape not in ((), (1,), (1, 1), rows, (*rows, 1)):
        raise refusal(source, "a format scaled neither as a whole nor by rows", f"{key} {list(scale.shape)}")


def refusal(source: Path, name: str, key: str) -> CheckpointError:
    return CheckpointError(f"{source} holds weights in {name} ({format_value(key)}), which is not supported; {REMEDY}")


def left_over(source: Path, key: str) -> CheckpointError:
    return CheckpointError(f"{source}: {format_value(key)} belongs to no weight quantized that way; {REMEDY}")
