"""Key maps, as tables: what the published files call a weight, and what our models and the libraries call it.

A map is a tuple of (pattern, target) pairs. A checkpoint key belongs to the first pattern that matches all of it; the
target may use the pattern's groups. A tuple of targets means that the tensor holds several weights, stacked in equal
parts along its first axis. Target None drops the key: known, and not part of the model that is loaded.
"""

from __future__ import annotations

import re

Target = str | tuple[str, ...] | None
KeyMap = tuple[tuple[str, Target], ...]

IDENTITY: KeyMap = ((r"(.+)", r"\1"),)

# Wan-native DiT (extension and avatar checkpoints) -> SkyReelsTransformer3DModel.
_BLOCK = r"blocks\.(\d+)\."
NATIVE_TRANSFORMER: KeyMap = (
    (r"patch_embedding\.(.+)", r"patch_embedding.\1"),
    (r"text_embedding\.0\.(.+)", r"condition_embedder.text_embedder.linear_1.\1"),
    (r"text_embedding\.2\.(.+)", r"condition_embedder.text_embedder.linear_2.\1"),
    (r"time_embedding\.0\.(.+)", r"condition_embedder.time_embedder.linear_1.\1"),
    (r"time_embedding\.2\.(.+)", r"condition_embedder.time_embedder.linear_2.\1"),
    (r"time_projection\.1\.(.+)", r"condition_embedder.time_proj.\1"),
    (r"img_emb\.proj\.0\.(.+)", r"condition_embedder.image_embedder.norm1.\1"),
    (r"img_emb\.proj\.1\.(.+)", r"condition_embedder.image_embedder.ff.net.0.proj.\1"),
    (r"img_emb\.proj\.3\.(.+)", r"condition_embedder.image_embedder.ff.net.2.\1"),
    (r"img_emb\.proj\.4\.(.+)", r"condition_embedder.image_embedder.norm2.\1"),
    (r"audio_proj\.proj1\.(.+)", r"audio_projection.first_frame.\1"),
    (r"audio_proj\.proj1_vf\.(.+)", r"audio_projection.later_frames.\1"),
    (r"audio_proj\.proj2\.(.+)", r"audio_projection.shared.\1"),
    (r"audio_proj\.proj3\.(.+)", r"audio_projection.to_tokens.\1"),
    (r"audio_proj\.norm\.(.+)", r"audio_projection.norm.\1"),
    (_BLOCK + r"self_attn\.([qkv])\.(.+)", r"blocks.\1.attn1.to_\2.\3"),
    (_BLOCK + r"self_attn\.o\.(.+)", r"blocks.\1.attn1.to_out.0.\2"),
    (_BLOCK + r"self_attn\.norm_([qk])\.(.+)", r"blocks.\1.attn1.norm_\2.\3"),
    (_BLOCK + r"cross_attn\.([qkv])\.(.+)", r"blocks.\1.attn2.to_\2.\3"),
    (_BLOCK + r"cross_attn\.o\.(.+)", r"blocks.\1.attn2.to_out.0.\2"),
    (_BLOCK + r"cross_attn\.norm_([qk])\.(.+)", r"blocks.\1.attn2.norm_\2.\3"),
    (_BLOCK + r"cross_attn\.([kv])_img\.(.+)", r"blocks.\1.attn2.add_\2_proj.\3"),
    (_BLOCK + r"cross_attn\.norm_k_img\.(.+)", r"blocks.\1.attn2.norm_added_k.\2"),
    (_BLOCK + r"audio_cross_attn\.q_linear\.(.+)", r"blocks.\1.attn_audio.to_q.\2"),
    (
        _BLOCK + r"audio_cross_attn\.kv_linear\.(.+)",
        (r"blocks.\1.attn_audio.to_k.\2", r"blocks.\1.attn_audio.to_v.\2"),
    ),
    (_BLOCK + r"audio_cross_attn\.proj\.(.+)", r"blocks.\1.attn_audio.to_out.0.\2"),
    (_BLOCK + r"norm3\.(.+)", r"blocks.\1.norm2.\2"),
    (_BLOCK + r"norm_x\.(.+)", r"blocks.\1.norm_audio.\2"),
    (_BLOCK + r"ffn\.0\.(.+)", r"blocks.\1.ffn.net.0.proj.\2"),
    (_BLOCK + r"ffn\.2\.(.+)", r"blocks.\1.ffn.net.2.\2"),
    (_BLOCK + r"modulation", r"blocks.\1.scale_shift_table"),
    (r"head\.head\.(.+)", r"proj_out.\1"),
    (r"head\.modulation", r"scale_shift_table"),
)

# HunyuanVideo's own names and ComfyUI's -> HunyuanTransformer3DModel. `final_layer.adaLN_modulation.1` is not among
# them: its halves, shift and scale, come in the other order there.
_DOUBLE, _SINGLE = r"double_blocks\.(\d+)\.", r"single_blocks\.(\d+)\."
_REFINER = r"txt_in\.individual_token_refiner\.blocks\.(\d+)\."
_REFINED = r"context_embedder.token_refiner.refiner_blocks.\1."
_FIRST, _SECOND = r"(?:mlp\.0|in_layer|linear_1)\.(.+)", r"(?:mlp\.2|out_layer|linear_2)\.(.+)"


def _hunyuan_stream(name: str, attention: tuple[str, ...], norms: str, end: str) -> KeyMap:
    """One stream of the blocks of two: the layers of the video's tokens, or of the text's."""
    place, ours = _DOUBLE + name, r"transformer_blocks.\1."
    context = "" if name == "img" else "_context"
    return (
        (place + r"_attn[_.]qkv\.(.+)", tuple(rf"{ours}attn.{part}.\2" for part in attention)),
        (place + r"_attn[_.]proj\.(.+)", rf"{ours}attn.{end}.\2"),
        (place + r"_attn(?:_q_norm|\.norm\.query_norm)\.(.+)", rf"{ours}attn.{norms}q.\2"),
        (place + r"_attn(?:_k_norm|\.norm\.key_norm)\.(.+)", rf"{ours}attn.{norms}k.\2"),
        (place + r"_mod\.lin(?:ear)?\.(.+)", rf"{ours}norm1{context}.linear.\2"),
        (place + r"_mlp\.(?:fc1|0)\.(.+)", rf"{ours}ff{context}.net.0.proj.\2"),
        (place + r"_mlp\.(?:fc2|2)\.(.+)", rf"{ours}ff{context}.net.2.\2"),
    )


NATIVE_HUNYUAN: KeyMap = (
    (r"img_in\.proj\.(.+)", r"x_embedder.proj.\1"),
    (r"time_in\." + _FIRST, r"time_text_embed.timestep_embedder.linear_1.\1"),
    (r"time_in\." + _SECOND, r"time_text_embed.timestep_embedder.linear_2.\1"),
    (r"guidance_in\." + _FIRST, r"time_text_embed.guidance_embedder.linear_1.\1"),
    (r"guidance_in\." + _SECOND, r"time_text_embed.guidance_embedder.linear_2.\1"),
    (r"vector_in\." + _FIRST, r"time_text_embed.text_embedder.linear_1.\1"),
    (r"vector_in\." + _SECOND, r"time_text_embed.text_embedder.linear_2.\1"),
    (r"txt_in\.input_embedder\.(.+)", r"context_embedder.proj_in.\1"),
    (r"txt_in\.t_embedder\." + _FIRST, r"context_embedder.time_text_embed.timestep_embedder.linear_1.\1"),
    (r"txt_in\.t_embedder\." + _SECOND, r"context_embedder.time_text_embed.timestep_embedder.linear_2.\1"),
    (r"txt_in\.c_embedder\." + _FIRST, r"context_embedder.time_text_embed.text_embedder.linear_1.\1"),
    (r"txt_in\.c_embedder\." + _SECOND, r"context_embedder.time_text_embed.text_embedder.linear_2.\1"),
    (_REFINER + r"self_attn[_.]qkv\.(.+)", tuple(_REFINED + rf"attn.to_{part}.\2" for part in "qkv")),
    (_REFINER + r"self_attn[_.]proj\.(.+)", _REFINED + r"attn.to_out.0.\2"),
    (_REFINER + r"norm([12])\.(.+)", _REFINED + r"norm\2.\3"),
    (_REFINER + r"mlp\.(?:fc1|0)\.(.+)", _REFINED + r"ff.net.0.proj.\2"),
    (_REFINER + r"mlp\.(?:fc2|2)\.(.+)", _REFINED + r"ff.net.2.\2"),
    (_REFINER + r"adaLN_modulation\.1\.(.+)", _REFINED + r"norm_out.linear.\2"),
    *_hunyuan_stream("img", ("to_q", "to_k", "to_v"), "norm_", "to_out.0"),
    *_hunyuan_stream("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "norm_added_", "to_add_out"),
    (
        _SINGLE + r"linear1\.(.+)",
        tuple(
            rf"single_transformer_blocks.\1.{part}.\2" for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        ),
    ),
    (_SINGLE + r"linear2\.(.+)", r"single_transformer_blocks.\1.proj_out.\2"),
    (_SINGLE + r"(?:q_norm|norm\.query_norm)\.(.+)", r"single_transformer_blocks.\1.attn.norm_q.\2"),
    (_SINGLE + r"(?:k_norm|norm\.key_norm)\.(.+)", r"single_transformer_blocks.\1.attn.norm_k.\2"),
    (_SINGLE + r"modulation\.lin(?:ear)?\.(.+)", r"single_transformer_blocks.\1.norm.linear.\2"),
    (r"final_layer\.linear\.(.+)", r"proj_out.\1"),
)

# Wan-native UMT5 encoder -> transformers.UMT5EncoderModel.
NATIVE_TEXT_ENCODER: KeyMap = (
    (r"token_embedding\.weight", r"shared.weight"),
    (_BLOCK + r"norm1\.weight", r"encoder.block.\1.layer.0.layer_norm.weight"),
    (_BLOCK + r"attn\.([qkvo])\.weight", r"encoder.block.\1.layer.0.SelfAttention.\2.weight"),
    (
        _BLOCK + r"pos_embedding\.embedding\.weight",
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    (_BLOCK + r"norm2\.weight", r"encoder.block.\1.layer.1.layer_norm.weight"),
    (_BLOCK + r"ffn\.gate\.0\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wi_0.weight"),
    (_BLOCK + r"ffn\.fc1\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wi_1.weight"),
    (_BLOCK + r"ffn\.fc2\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wo.weight"),
    (r"norm\.weight", r"encoder.final_layer_norm.weight"),
)

# transformers' own files may hold the tied token embedding once or twice.
TRANSFORMERS_TEXT_ENCODER: KeyMap = ((r"encoder\.embed_tokens\.weight", r"shared.weight"), *IDENTITY)

# A Llama or a CLIP may be stored alone, or as a part of the model that it was trained in, with that one's head.
LLAMA: KeyMap = (
    (r"lm_head\..+", None),
    (r"(?:.+\.)?rotary_emb\.inv_freq", None),
    (r"model\.(.+)", r"\1"),
    *IDENTITY,
)
CLIP: KeyMap = (
    (r"text_projection\..+", None),
    (r"(?:text_model\.)?embeddings\.position_ids", None),
    (r"text_model\.(.+)", r"\1"),
    *IDENTITY,
)

# Wan-native CLIP -> transformers.CLIPVisionModel. The file holds the text tower as well, which no task uses.
_LAYER = r"visual\.transformer\.(\d+)\."
NATIVE_IMAGE_ENCODER: KeyMap = (
    (r"visual\.cls_embedding", r"embeddings.class_embedding"),
    (r"visual\.pos_embedding", r"embeddings.position_embedding.weight"),
    (r"visual\.patch_embedding\.weight", r"embeddings.patch_embedding.weight"),
    (r"visual\.pre_norm\.(.+)", r"pre_layrnorm.\1"),
    (r"visual\.post_norm\.(.+)", r"post_layernorm.\1"),
    (_LAYER + r"norm([12])\.(.+)", r"encoder.layers.\1.layer_norm\2.\3"),
    (
        _LAYER + r"attn\.to_qkv\.(.+)",
        (
            r"encoder.layers.\1.self_attn.q_proj.\2",
            r"encoder.layers.\1.self_attn.k_proj.\2",
            r"encoder.layers.\1.self_attn.v_proj.\2",
        ),
    ),
    (_LAYER + r"attn\.proj\.(.+)", r"encoder.layers.\1.self_attn.out_proj.\2"),
    (_LAYER + r"mlp\.0\.(.+)", r"encoder.layers.\1.mlp.fc1.\2"),
    (_LAYER + r"mlp\.2\.(.+)", r"encoder.layers.\1.mlp.fc2.\2"),
    (r"visual\.head|textual\..+|log_scale", None),
)

# transformers' wav2vec2 files: older ones spell the weight norm differently, pre-training heads may be there.
_POSITIONS = "encoder.pos_conv_embed.conv.parametrizations.weight.original"
TRANSFORMERS_AUDIO_ENCODER: KeyMap = (
    (r"encoder\.pos_conv_embed\.conv\.weight_g", f"{_POSITIONS}0"),
    (r"encoder\.pos_conv_embed\.conv\.weight_v", f"{_POSITIONS}1"),
    (r"quantizer\..+|project_(?:hid|q)\..+", None),
    *IDENTITY,
)


def _native_vae() -> KeyMap:
    """Wan-native VAE -> diffusers.AutoencoderKLWan. The decoder's stages are numbered through in the native file."""
    residual = (
        (r"residual\.0\.gamma", "norm1.gamma"),
        (r"residual\.2\.(.+)", r"conv1.\1"),
        (r"residual\.3\.gamma", "norm2.gamma"),
        (r"residual\.6\.(.+)", r"conv2.\1"),
        (r"shortcut\.(.+)", r"conv_shortcut.\1"),
    )
    pairs: list[tuple[str, Target]] = [(r"conv1\.(.+)", r"quant_conv.\1"), (r"conv2\.(.+)", r"post_quant_conv.\1")]
    for part in ("encoder", "decoder"):
        pairs += [
            (rf"{part}\.conv1\.(.+)", rf"{part}.conv_in.\1"),
            (rf"{part}\.head\.0\.gamma", f"{part}.norm_out.gamma"),
            (rf"{part}\.head\.2\.(.+)", rf"{part}.conv_out.\1"),
            (rf"{part}\.middle\.1\.(.+)", rf"{part}.mid_block.attentions.0.\1"),
        ]
        places = [(r"middle\.0", "mid_block.resnets.0"), (r"middle\.2", "mid_block.resnets.1")]
        if part == "encoder":
            places += [(rf"downsamples\.{i}", f"down_blocks.{i}") for i in range(11)]
        else:
            # three residual blocks and an upsampler make a stage
            places += [(rf"upsamples\.{i}", f"up_blocks.{i // 4}.resnets.{i % 4}") for i in range(15) if i % 4 != 3]
            places += [(rf"upsamples\.{i}", f"up_blocks.{i // 4}.upsamplers.0") for i in (3, 7, 11)]
        for native, ours in places:
            pairs += [(rf"{part}\.{native}\.{old}", f"{part}.{ours}.{new}") for old, new in residual]
            pairs.append((rf"{part}\.{native}\.((?:resample|time_conv)\..+)", rf"{part}.{ours}.\1"))
    return tuple(pairs)


NATIVE_VAE: KeyMap = _native_vae()

# Names in a Wan-native config.json -> arguments of SkyReelsTransformer3DModel; None: no argument of ours, but only
# this value is understood (see NATIVE_CONSTANTS) or the tensors say it.
NATIVE_CONFIG: dict[str, str | None] = {
    "num_heads": "num_attention_heads",
    "num_layers": "num_layers",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "freq_dim": "freq_dim",
    "ffn_dim": "ffn_dim",
    "eps": "eps",
    "audio_window": "audio_window",
    "intermediate_dim": "audio_hidden_dim",
    "output_dim": "audio_dim",
    "context_tokens": "audio_tokens",
    "dim": None,
    "text_dim": None,
    "model_type": None,
}

# Knobs that exist in configs and that the code does not turn: any other value is refused by name.
NATIVE_CONSTANTS: dict[str, object] = {
    "text_len": 512,
    "patch_size": [1, 2, 2],
    "qk_norm": True,
    "cross_attn_norm": True,
    "window_size": [-1, -1],
    "norm_input_visual": True,
    "norm_output_audio": True,
    "vae_scale": 4,
}
DIFFUSERS_CONSTANTS: dict[str, object] = {
    "patch_size": [1, 2, 2],
    "added_kv_proj_dim": None,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "pos_embed_seq_len": None,
}
WAN_VAE_CONSTANTS: dict[str, object] = {
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "is_residual": False,
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": None,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
}
HUNYUAN_CONSTANTS: dict[str, object] = {
    "image_condition_type": None,
    "patch_size": 2,
    "patch_size_t": 1,
    "qk_norm": "rms_norm",
}
HUNYUAN_VAE_CONSTANTS: dict[str, object] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "spatial_compression_ratio": 8,
    "temporal_compression_ratio": 4,
}


def translate(key: str, key_map: KeyMap) -> Target:
    """The target of `key`, groups filled in; raises KeyError when no pattern matches."""
    for pattern, target in key_map:
        if match := re.fullmatch(pattern, key):
            if isinstance(target, tuple):
                return tuple(match.expand(part) for part in target)
            return None if target is None else match.expand(target)
    raise KeyError(key)


def invert(key_map: KeyMap) -> KeyMap:
    """The map from our names back to the checkpoint's; stacked weights and dropped keys have no way back.

    Each pattern's groups become references in the new target, each target's references the groups they stand for.
    """
    inverse: list[tuple[str, Target]] = []
    for pattern, target in reversed(key_map):  # plain names after spellings that are also known
        if not isinstance(target, str):
            continue
        groups = re.findall(r"\((?!\?:)(?:[^()]|\([^()]*\))*\)", pattern)
        back, template = target.replace(".", r"\."), pattern
        for number, group in enumerate(groups, start=1):
            back = back.replace(rf"\{number}", group)
            template = template.replace(group, rf"\{number}", 1)
        inverse.append((back, template.replace(r"\.", ".")))
    return tuple(inverse)


def part(key_map: KeyMap, number: int) -> KeyMap:
    """The entries of stacked weights alone, each with its target of that number."""
    stacked = ((pattern, target) for pattern, target in key_map if isinstance(target, tuple))
    return tuple((pattern, target[number]) for pattern, target in stacked if number < len(target))


def restore(key: str, inverse: KeyMap) -> str:
    """A model's key in the words of its checkpoint; a key that `inverse` has no way back for stays as it is."""
    try:
        return str(translate(key, inverse))
    except KeyError:
        return key
