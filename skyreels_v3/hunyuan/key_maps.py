"""State dict keys of V1's checkpoints and LoRAs, and the config values that are accepted."""

from __future__ import annotations

from skyreels_v3.checkpoints.key_maps import IDENTITY, KeyMap, rename_layers

TEXT_TOKENS = 256  # per prompt, at most

# HunyuanVideo's own names and ComfyUI's -> HunyuanTransformer3DModel. `final_layer.adaLN_modulation.1` is left out: its
# shift and scale halves are swapped (`SWAPPED`), so LoRAs cannot be applied to it.
_EMBEDDING = {r"(?:mlp\.0|in_layer|linear_1)": "linear_1", r"(?:mlp\.2|out_layer|linear_2)": "linear_2"}
_REFINER_LAYERS = {
    r"self_attn[_.]qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    **{r"self_attn[_.]proj": "attn.to_out.0", "norm1": "norm1", "norm2": "norm2"},
    **{r"mlp\.(?:fc1|0)": "ff.net.0.proj", r"mlp\.(?:fc2|2)": "ff.net.2", r"adaLN_modulation\.1": "norm_out.linear"},
}
_SINGLE_LAYERS = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    **{"linear2": "proj_out", r"modulation\.lin(?:ear)?": "norm.linear"},
    **{r"(?:q_norm|norm\.query_norm)": "attn.norm_q", r"(?:k_norm|norm\.key_norm)": "attn.norm_k"},
}


def _stream(name: str, projections: tuple[str, ...], norms: str, output: str, suffix: str = "") -> KeyMap:
    """One stream of the double blocks: the layers for the video's tokens, or those for the text's."""
    layers = {
        r"attn[_.]qkv": tuple(f"attn.{projection}" for projection in projections),
        r"attn[_.]proj": f"attn.{output}",
        r"attn(?:_q_norm|\.norm\.query_norm)": f"attn.{norms}q",
        r"attn(?:_k_norm|\.norm\.key_norm)": f"attn.{norms}k",
        r"mod\.lin(?:ear)?": f"norm1{suffix}.linear",
        r"mlp\.(?:fc1|0)": f"ff{suffix}.net.0.proj",
        r"mlp\.(?:fc2|2)": f"ff{suffix}.net.2",
    }
    return rename_layers(f"double_blocks.#.{name}_", "transformer_blocks.#.", layers)


NATIVE_TRANSFORMER: KeyMap = (
    *rename_layers("", "", {r"img_in\.proj": "x_embedder.proj", r"final_layer\.linear": "proj_out"}),
    *rename_layers("time_in.", "time_text_embed.timestep_embedder.", _EMBEDDING),
    *rename_layers("guidance_in.", "time_text_embed.guidance_embedder.", _EMBEDDING),
    *rename_layers("vector_in.", "time_text_embed.text_embedder.", _EMBEDDING),
    *rename_layers("txt_in.", "context_embedder.", {"input_embedder": "proj_in"}),
    *rename_layers("txt_in.t_embedder.", "context_embedder.time_text_embed.timestep_embedder.", _EMBEDDING),
    *rename_layers("txt_in.c_embedder.", "context_embedder.time_text_embed.text_embedder.", _EMBEDDING),
    *rename_layers(
        "txt_in.individual_token_refiner.blocks.#.",
        "context_embedder.token_refiner.refiner_blocks.#.",
        _REFINER_LAYERS,
    ),
    *_stream("img", ("to_q", "to_k", "to_v"), "norm_", "to_out.0"),
    *_stream("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "norm_added_", "to_add_out", "_context"),
    *rename_layers("single_blocks.#.", "single_transformer_blocks.#.", _SINGLE_LAYERS),
)

_FINAL_MODULATION = "final_layer.adaLN_modulation.1."
SWAPPED = {f"{_FINAL_MODULATION}{parameter}" for parameter in ("weight", "bias")}
NATIVE_CHECKPOINT: KeyMap = (
    *rename_layers(_FINAL_MODULATION.removesuffix("1."), "norm_out.", {"1": "linear"}),
    *NATIVE_TRANSFORMER,
)

# Llama and CLIP may be stored alone, or as part of the full model that they were trained in, with its head
LLAMA: KeyMap = (
    (r"lm_head\..+|(?:.+\.)?rotary_emb\.inv_freq", None),
    (r"model\.(.+)", r"\1"),
    *IDENTITY,
)
CLIP: KeyMap = (
    (r"text_projection\..+|(?:text_model\.)?embeddings\.position_ids", None),
    (r"text_model\.(.+)", r"\1"),
    *IDENTITY,
)

# Config entries that are not model arguments: an error names any other value
TRANSFORMER_CONSTANTS = {"image_condition_type": None, "patch_size": 2, "patch_size_t": 1, "qk_norm": "rms_norm"}
VAE_CONSTANTS = {
    **{"in_channels": 3, "out_channels": 3, "latent_channels": 16},
    **{"spatial_compression_ratio": 8, "temporal_compression_ratio": 4},
}
