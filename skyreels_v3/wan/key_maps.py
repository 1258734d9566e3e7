"""V3's checkpoints: file names, state dict keys (Wan-native or transformers') and accepted config values."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from skyreels_v3.checkpoints.files import read_sizes
from skyreels_v3.checkpoints.key_maps import IDENTITY, KeyMap, rename_layers
from skyreels_v3.errors import CheckpointError

TEXT_TOKENS = 512  # per prompt, including padding
TOKENS_AT_ONCE = 8192  # per chunk in blocks, outside attention: enough for each matmul to fill a large GPU

# Files of the native layout
NATIVE_VAE_FILE = "Wan2.1_VAE.pth"
NATIVE_TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
NATIVE_TOKENIZER = "google/umt5-xxl"
NATIVE_IMAGE_ENCODER_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
AUDIO_ENCODER = "chinese-wav2vec2-base"

# Wan-native transformer -> SkyReelsTransformer3DModel
_IMAGE_LAYERS = {"0": "norm1", "1": "ff.net.0.proj", "3": "ff.net.2", "4": "norm2"}
_AUDIO_LAYERS = {
    **{"proj1": "first_frame", "proj1_vf": "later_frames", "proj2": "shared", "proj3": "to_tokens", "norm": "norm"}
}
_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
_IMAGE_ATTENTION = {"k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}
_AUDIO_ATTENTION = {"q_linear": "to_q", "kv_linear": ("to_k", "to_v"), "proj": "to_out.0"}
_BLOCK_LAYERS = {"norm3": "norm2", "norm_x": "norm_audio", r"ffn\.0": "ffn.net.0.proj", r"ffn\.2": "ffn.net.2"}
_EMBEDDING = {"0": "linear_1", "2": "linear_2"}
NATIVE_TRANSFORMER: KeyMap = (
    *rename_layers("", "", {"patch_embedding": "patch_embedding", r"head\.head": "proj_out"}),
    *rename_layers("text_embedding.", "condition_embedder.text_embedder.", _EMBEDDING),
    *rename_layers("time_embedding.", "condition_embedder.time_embedder.", _EMBEDDING),
    *rename_layers("time_projection.", "condition_embedder.", {"1": "time_proj"}),
    *rename_layers("img_emb.proj.", "condition_embedder.image_embedder.", _IMAGE_LAYERS),
    *rename_layers("audio_proj.", "audio_projection.", _AUDIO_LAYERS),
    *rename_layers("blocks.#.self_attn.", "blocks.#.attn1.", _ATTENTION),
    *rename_layers("blocks.#.cross_attn.", "blocks.#.attn2.", _ATTENTION | _IMAGE_ATTENTION),
    *rename_layers("blocks.#.audio_cross_attn.", "blocks.#.attn_audio.", _AUDIO_ATTENTION),
    *rename_layers("blocks.#.", "blocks.#.", _BLOCK_LAYERS),
    (r"blocks\.(\d+)\.modulation", r"blocks.\1.scale_shift_table"),
    (r"head\.modulation", r"scale_shift_table"),
)

# Wan-native UMT5 encoder -> transformers' UMT5EncoderModel
_TEXT_LAYERS = {
    **{rf"attn\.{part}": f"0.SelfAttention.{part}" for part in "qkvo"},
    **{r"pos_embedding\.embedding": "0.SelfAttention.relative_attention_bias"},
    **{"norm1": "0.layer_norm", "norm2": "1.layer_norm", r"ffn\.gate\.0": "1.DenseReluDense.wi_0"},
    **{r"ffn\.fc1": "1.DenseReluDense.wi_1", r"ffn\.fc2": "1.DenseReluDense.wo"},
}
NATIVE_TEXT_ENCODER: KeyMap = (
    *rename_layers("", "", {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}),
    *rename_layers("blocks.#.", "encoder.block.#.layer.", _TEXT_LAYERS),
)

# transformers' own files may hold the tied token embedding once or twice
TRANSFORMERS_TEXT_ENCODER: KeyMap = (
    (r"encoder\.embed_tokens\.weight", r"shared.weight"),
    (r"spiece_model", None),  # the tokenizer, in ComfyUI's files
    *IDENTITY,
)

# Tensors whose shapes give the sizes of a UMT5 encoder, in both naming schemes
NATIVE_TEXT_SIZES = {
    **{"embedding": "token_embedding.weight", "positions": "blocks.0.pos_embedding.embedding.weight"},
    **{"query": "blocks.0.attn.q.weight", "hidden": "blocks.0.ffn.fc1.weight"},
}
TRANSFORMERS_TEXT_SIZES = {
    "embedding": "shared.weight",
    "positions": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "query": "encoder.block.0.layer.0.SelfAttention.q.weight",
    "hidden": "encoder.block.0.layer.1.DenseReluDense.wi_1.weight",
}

# Wan-native CLIP -> transformers' CLIPVisionModel; no task uses the text tower in the same file
_VISION_ATTENTION = {
    r"attn\.to_qkv": tuple(f"self_attn.{part}_proj" for part in "qkv"),
    r"attn\.proj": "self_attn.out_proj",
}
_VISION_LAYERS = {"norm1": "layer_norm1", "norm2": "layer_norm2", r"mlp\.0": "mlp.fc1", r"mlp\.2": "mlp.fc2"}
NATIVE_IMAGE_ENCODER: KeyMap = (
    (r"visual\.cls_embedding", r"embeddings.class_embedding"),
    (r"visual\.pos_embedding", r"embeddings.position_embedding.weight"),
    *rename_layers("visual.", "", {"pre_norm": "pre_layrnorm", "post_norm": "post_layernorm"}),
    *rename_layers("visual.", "embeddings.", {"patch_embedding": "patch_embedding"}),
    *rename_layers("visual.transformer.#.", "encoder.layers.#.", {**_VISION_ATTENTION, **_VISION_LAYERS}),
    (r"visual\.head|textual\..+|log_scale", None),
)

# transformers' wav2vec2 files: older ones name the weight norm differently and may have pretraining heads
_WEIGHT_NORM = "encoder.pos_conv_embed.conv.parametrizations.weight.original"
TRANSFORMERS_AUDIO_ENCODER: KeyMap = (
    (r"encoder\.pos_conv_embed\.conv\.weight_g", f"{_WEIGHT_NORM}0"),
    (r"encoder\.pos_conv_embed\.conv\.weight_v", f"{_WEIGHT_NORM}1"),
    (r"quantizer\..+|project_(?:hid|q)\..+", None),
    *IDENTITY,
)


def _native_vae() -> KeyMap:
    """Wan-native VAE -> diffusers' AutoencoderKLWan; the native file numbers layers across stages."""
    convolutions = {r"residual\.2": "conv1", r"residual\.6": "conv2", "shortcut": "conv_shortcut"}
    convolutions |= {r"resample\.1": "resample.1", "time_conv": "time_conv"}
    norms = {r"residual\.0": "norm1", r"residual\.3": "norm2"}
    ends = {"conv1": "conv_in", r"head\.0": "norm_out", r"head\.2": "conv_out", r"middle\.1": "mid_block.attentions.0"}
    blocks = {"middle.0.": "mid_block.resnets.0.", "middle.2.": "mid_block.resnets.1."}
    down = {f"downsamples.{number}.": f"down_blocks.{number}." for number in range(11)}
    # a stage is three residual blocks and an upsampler
    up = {}
    for number in range(15):
        stage, place = divmod(number, 4)
        up[f"upsamples.{number}."] = f"up_blocks.{stage}.{f'resnets.{place}' if place < 3 else 'upsamplers.0'}."
    pairs = rename_layers("", "", {"conv1": "quant_conv", "conv2": "post_quant_conv"})
    for part, samplers in (("encoder.", down), ("decoder.", up)):
        pairs += rename_layers(part, part, ends)
        for native, ours in (blocks | samplers).items():
            pairs += rename_layers(part + native, part + ours, convolutions | norms)
    return pairs


NATIVE_VAE: KeyMap = _native_vae()

# Wan-native config.json -> arguments of SkyReelsTransformer3DModel; `dim` is heads times head dim
NATIVE_SIZES = {
    **{
        "num_heads": "num_attention_heads",
        "num_layers": "num_layers",
        "in_dim": "in_channels",
        "out_dim": "out_channels",
    },
    **{"freq_dim": "freq_dim", "ffn_dim": "ffn_dim", "dim": "dim", "audio_window": "audio_window"},
    **{"intermediate_dim": "audio_hidden_dim", "output_dim": "audio_dim", "context_tokens": "audio_tokens"},
}
# Config entries that are not model arguments: an error names any other value
NATIVE_CONSTANTS = {
    **{"text_len": TEXT_TOKENS, "patch_size": [1, 2, 2], "window_size": [-1, -1], "vae_scale": 4},
    **{"qk_norm": True, "cross_attn_norm": True, "norm_input_visual": True, "norm_output_audio": True},
}
CONSTANTS = {
    **{"patch_size": [1, 2, 2], "qk_norm": "rms_norm_across_heads", "cross_attn_norm": True},
    **{"added_kv_proj_dim": None, "rope_max_seq_len": 1024, "pos_embed_seq_len": None},
}
VAE_CONSTANTS = {
    **{"in_channels": 3, "out_channels": 3, "z_dim": 16, "patch_size": None, "is_residual": False, "attn_scales": []},
    **{"dim_mult": [1, 2, 4, 4], "temperal_downsample": [False, True, True]},
    **{"scale_factor_temporal": 4, "scale_factor_spatial": 8},
}


def config_sizes(folder: Path, names: Collection[str] = ()) -> dict[str, int]:
    """The sizes in a config.json, read under Wan-native names or `names`, returned under the model's argument names."""
    sizes = {NATIVE_SIZES.get(name, name): size for name, size in read_sizes(folder, {*names, *NATIVE_SIZES}).items()}
    if "dim" in sizes:
        if "num_attention_heads" not in sizes:
            raise CheckpointError(f"{folder}/config.json lacks num_heads; download it again")
        sizes["attention_head_dim"] = sizes.pop("dim") // sizes["num_attention_heads"]
    return sizes
