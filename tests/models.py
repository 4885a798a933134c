"""Small random models of every causal class of transformers, built from their configurations."""

import copy
import dataclasses

import torch
import transformers

VOCABULARY = 97
# What every configuration gets where it has a field of that name.
SMALL = (
    dict.fromkeys(("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input"), VOCABULARY)
    | dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "emb_dim", "word_embed_proj_dim", "embedding_size"), 64
    )
    | dict.fromkeys(("input_embedding_size", "output_embedding_size"), 64)
    | dict.fromkeys(
        ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size"), 96
    )
    | dict.fromkeys(
        ("dense_intermediate_size", "intermediate_size_mlp", "dim_ff", "dff", "d_inner", "n_inner"), 96
    )
    | dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2
    )
    | dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), 2)
    | dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), 4)
    | dict.fromkeys(
        ("encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"), 4
    )
    | dict.fromkeys(("attention_heads", "num_heads", "linear_num_heads"), 4)
    | dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2)
    | dict.fromkeys(("head_dim", "dim_head", "kv_channels", "d_head"), 16)
    | dict.fromkeys(
        ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len", "n_ctx"), 512
    )
    | dict.fromkeys(("context_length", "max_source_positions"), 512)
    | dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4)
    | dict.fromkeys(("num_experts_per_tok", "moe_k", "top_k_experts"), 2)
    | dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32
    )
    | dict.fromkeys(("shared_intermediate_size", "moe_shared_expert_intermediate_size"), 32)
    | dict.fromkeys(("n_group", "topk_group", "n_groups"), 1)
    | dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "adapter_rank"), 16)
    | dict(qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, rotary_dim=8)
    | dict.fromkeys(("index_head_dim", "indexer_head_dim"), 16)
    | dict.fromkeys(("index_n_heads", "indexer_n_heads"), 2)
    | dict(
        mamba_n_heads=4, mamba_d_head=32, mamba_d_state=8, state_size=8, ssm_state_size=8, mamba_num_heads=4
    )
    | dict(mamba_head_dim=16, mamba_d_ssm=128, n_mamba_heads=2, mamba_chunk_size=16, chunk_size=16)
    | dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 4)
    | dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 16)
    | dict.fromkeys(
        ("bos_token_id", "eos_token_id", "pad_token_id", "unk_index", "pad_index", "bos_index", "eos_index"),
        0,
    )
    | dict.fromkeys(("decoder_start_token_id", "eod_token_id", "sep_token_id"), 0)
    | dict.fromkeys(
        ("hidden_size_per_layer_input", "laurel_rank", "router_hidden_size", "relative_max_distance"), 16
    )
)
# Layers of a small model whose configuration lists kinds of layers: each kind that the class has by default, in turn.
LAYERS = 4
WINDOW = 16
VISION = dict(
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=32,
    patch_size=16,
)
# What single classes need beyond it.
CHANGES = {
    "AXK2ForCausalLM": dict(index_topk=512),
    "BambaForCausalLM": dict(attn_layer_indices=[1], num_hidden_layers=2),
    "BigBirdForCausalLM": dict(attention_type="original_full"),
    "BigBirdPegasusForCausalLM": dict(attention_type="original_full"),
    "CohereCompassForCausalLM": dict(
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters=dict.fromkeys(
            ("sliding_attention", "full_attention"),
            dict(rope_type="default", rope_theta=1e4, mrope_section=[3, 3, 2]),
        ),
    ),
    "DbrxForCausalLM": dict(
        attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8.0),
        ffn_config=dict(hidden_size=64, ffn_hidden_size=32, moe_num_experts=4),
    ),
    "DeepseekV2ForCausalLM": dict(first_k_dense_replace=1),
    "Dots1ForCausalLM": dict(n_shared_experts=1),
    "GPTNeoForCausalLM": dict(attention_types=[[["global", "local"], 1]], window_size=WINDOW),
    "Gemma3nForCausalLM": dict(num_kv_shared_layers=0, activation_sparsity_pattern=[0.0] * 4),
    "GitForCausalLM": dict(vision_config=VISION),
    "Gemma3ForConditionalGeneration": dict(vision_config=VISION, mm_tokens_per_image=4),
    "Gemma4ForCausalLM": dict(global_head_dim=16),
    "Gemma4ForConditionalGeneration": dict(vision_config=None, audio_config=None, global_head_dim=16),
    "Gemma4UnifiedForCausalLM": dict(global_head_dim=32),
    "Gemma4UnifiedForConditionalGeneration": dict(vision_config=None, audio_config=None, global_head_dim=32),
    "GotOcr2ForConditionalGeneration": dict(
        vision_config=dict(
            hidden_size=32,
            output_channels=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=64,
            mlp_dim=32,
            window_size=2,
            global_attn_indexes=[0],
        )
    ),
    "GraniteMoeHybridForCausalLM": dict(layer_types=["mamba", "attention"]),
    "InklingForCausalLM": dict(vocab_size=97),
    "JambaForCausalLM": dict(attn_layer_period=2, attn_layer_offset=1),
    "KimiLinearForCausalLM": dict(layer_types=["linear_attention", "full_attention"] * 2),
    "Lfm2MoeForCausalLM": dict(layer_types=["conv", "full_attention"] * 2, num_dense_layers=1),
    "Lfm2ForCausalLM": dict(layer_types=["conv", "full_attention"] * 2),
    "LongcatFlashForCausalLM": dict(
        num_key_value_heads=4, head_dim=8, zero_expert_num=2, num_layers=2, moe_topk=2
    ),
    "Mamba2ForCausalLM": dict(num_heads=4, head_dim=32),
    "MllamaForCausalLM": dict(cross_attention_layers=[]),
    "ModernBertDecoderForCausalLM": dict(local_attention=2 * WINDOW),
    "MoshiForCausalLM": dict(sliding_window=512),  # one pass does not see its window, a cache does
    "MusicgenForCausalLM": dict(num_codebooks=1),
    "MusicgenMelodyForCausalLM": dict(num_codebooks=1),
    "Phi4MultimodalForCausalLM": dict(
        vision_config=VISION,
        audio_config=dict(
            hidden_size=32,
            intermediate_size=32,
            num_blocks=1,
            num_attention_heads=2,
            ext_pw_out_channel=32,
            nemo_conv_channels=32,
        ),
    ),
    "Qwen4ExpForCausalLM": dict(indexer_kv_heads=1, indexer_budget=64, indexer_compress_ratio=4),
    "RecurrentGemmaForCausalLM": dict(num_hidden_layers=3, attention_window_size=WINDOW),
    "ReformerModelWithLMHead": dict(is_decoder=True, axial_pos_embds=False),
    "RoCBertForCausalLM": dict(
        is_decoder=True,
        enable_pronunciation=False,
        enable_shape=False,
        pronunciation_vocab_size=9,
        shape_vocab_size=9,
    ),
    "Zamba2ForCausalLM": dict(layers_block_type=["mamba", "hybrid"] * 2, num_hidden_layers=4),
    "ZambaForCausalLM": dict(layers_block_type=["mamba", "hybrid"] * 2, num_hidden_layers=4),
    "XmodForCausalLM": dict(is_decoder=True, default_language="en_XX"),
    "ZayaForCausalLM": dict(num_experts_per_tok=1),
    "xLSTMForCausalLM": dict(num_heads=4, qk_dim_factor=1.0),
}
# Classes that no small model is built of, and why.
NOT_BUILT = {
    "BltForCausalLM": "four models in one; its patcher needs bytes",
    "CsmDepthDecoderForCausalLM": "decodes the codebooks of one audio frame, 33 tokens at most",
    "Gemma3nForConditionalGeneration": "needs timm; its text model is Gemma3nForCausalLM",
    "Gemma4AssistantForCausalLM": "drafts for another model and reads its cache",
    "Gemma4UnifiedAssistantForCausalLM": "drafts for another model and reads its cache",
}


def names():
    """Every causal language model class of transformers, by name."""
    ends = "ForCausalLM", "LMHeadModel"
    mapped = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    found = {name for name in dir(transformers) if name.endswith(ends)} | set(mapped)
    return sorted(found - {"AutoModelForCausalLM"})


def small_config(config_class, changes):
    """A configuration of a few thousand parameters: `SMALL`, as many layers as it takes to have each kind, and `changes`."""
    fields = {field.name: field.default for field in dataclasses.fields(config_class)}
    values = {name: value for name, value in SMALL.items() if name in fields}
    if "text_config" in fields:
        text = config_class.sub_configs["text_config"]
        if text is transformers.AutoConfig:
            text = type(config_class().get_text_config())
        inner = {name: changes[name] for name in changes if name not in fields}
        values["text_config"] = small_config(text, inner).to_dict()
        changes = {name: changes[name] for name in changes if name in fields}
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        values["num_key_value_heads"] = values[
            "num_attention_heads"
        ]  # latent attention has a key for each head
    if fields.get("sliding_window") is not None:
        values["sliding_window"] = WINDOW
    if "layer_types" in fields and "layer_types" not in changes:
        kinds = list(dict.fromkeys(config_class().layer_types or ()))
        if len(kinds) > 1:
            values["layer_types"] = (kinds * LAYERS)[:LAYERS]
    kinds = (values | changes).get("layer_types")
    if kinds:
        values["num_hidden_layers"] = len(kinds)
    return config_class(**values | changes)


FULL, SLIDING = "full_attention", "sliding_attention"
MIXED = dict(layer_types=[FULL, SLIDING] * 2, sliding_window=WINDOW)
QWEN = dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)
NTK = dict(max_position_embeddings=32, rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=4.0))


def longrope(original):
    factors = dict(short_factor=[1.0] * 8, long_factor=[4.0] * 8)
    return dict(rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=original, **factors)


def rotated(kind, **parameters):
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=1e4, **parameters))


# Encoders, unless they are told to decode.
BIDIRECTIONAL = """
    BertGenerationDecoder BertLMHeadModel BigBirdForCausalLM CamembertForCausalLM Data2VecTextForCausalLM
    ElectraForCausalLM ErnieForCausalLM MegatronBertForCausalLM RemBertForCausalLM RoFormerForCausalLM
    RobertaForCausalLM RobertaPreLayerNormForCausalLM XLMRobertaForCausalLM XLMRobertaXLForCausalLM
""".split()
# Configurations beside those that a class has by default: {class: {variant: changes}}.
VARIANTS = {
    "AfmoeForCausalLM": {"no window": dict(layer_types=[FULL] * 2)},
    "Cohere2ForCausalLM": {"no window": dict(layer_types=[FULL] * 2)},
    "CohereForCausalLM": {"query-key norm": dict(use_qk_norm=True)},
    "Dots1ForCausalLM": {"window": MIXED},
    "Exaone4ForCausalLM": {"no window": dict(layer_types=[FULL] * 2)},
    "FalconForCausalLM": {"alibi": dict(alibi=True)},
    "GPT2LMHeadModel": {
        "scaled by layer": dict(scale_attn_by_inverse_layer_idx=True),
        "unscaled": dict(scale_attn_weights=False),
        "upcast": dict(reorder_and_upcast_attn=True),
        "cross-attention": dict(add_cross_attention=True),
    },
    "GPTBigCodeForCausalLM": {"MHA": dict(multi_query=False)},
    "Gemma2ForCausalLM": {
        "strong softcap": dict(attn_logit_softcapping=0.1),
        "no softcap": dict(attn_logit_softcapping=None),
        "no window": dict(layer_types=[FULL] * 2),
    },
    "Gemma3ForCausalLM": {
        "no window": dict(layer_types=[FULL] * 2),
        "softcap": dict(attn_logit_softcapping=2.0),
        "bidirectional": dict(use_bidirectional_attention=True),
    },
    "Gemma3nForCausalLM": {"shared layers": dict(num_kv_shared_layers=2)},
    "Gemma4ForCausalLM": {
        "shared layers": dict(num_kv_shared_layers=2),
        "no window": dict(layer_types=[FULL] * 2),
    },
    "GptOssForCausalLM": {"no window": dict(layer_types=[FULL] * 2)},
    "GraniteSWAForCausalLM": {"no window": dict(layer_types=[FULL] * 2)},
    "LagunaForCausalLM": {"window": MIXED},
    "Llama4ForCausalLM": {"no chunks": dict(layer_types=[FULL] * 2)},
    "LlamaForCausalLM": {
        "MHA": dict(num_key_value_heads=4),
        "MQA": dict(num_key_value_heads=1),
        "bias": dict(attention_bias=True),
        "wide heads": dict(head_dim=32),
        "linear rotation": rotated("linear", factor=4.0),
        "llama3 rotation": rotated(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
        "yarn rotation": rotated("yarn", factor=4.0, original_max_position_embeddings=32),
        "dynamic NTK": NTK,
        "dynamic NTK, unused": dict(rope_parameters=NTK["rope_parameters"]),
    },
    "MellumForCausalLM": {"window": MIXED},
    "MllamaForCausalLM": {"cross-attention": dict(cross_attention_layers=[1])},
    "MinistralForCausalLM": {"mixed": MIXED},
    "MistralForCausalLM": {"no window": dict(sliding_window=None), "wide window": dict(sliding_window=4096)},
    "MixtralForCausalLM": {"window": dict(sliding_window=WINDOW)},
    "ModernBertDecoderForCausalLM": {"no window": dict(layer_types=[FULL] * 2)},
    "OPTForCausalLM": {
        "projected": dict(word_embed_proj_dim=32),
        "norm after": dict(do_layer_norm_before=False, word_embed_proj_dim=64),
    },
    "Olmo3ForCausalLM": {"no window": dict(layer_types=[FULL] * 2)},
    "OlmoForCausalLM": {"clipped": dict(clip_qkv=0.5)},
    "PersimmonForCausalLM": {"no query-key norm": dict(qk_layernorm=False)},
    "Phi3ForCausalLM": {
        "window": dict(sliding_window=WINDOW),
        "longrope": dict(rope_parameters=longrope(32), original_max_position_embeddings=32),
        "longrope, unused": dict(rope_parameters=longrope(512), original_max_position_embeddings=512),
    },
    "PhiForCausalLM": {"query-key norm": dict(qk_layernorm=True)},
    "PhimoeForCausalLM": {"window": dict(sliding_window=WINDOW)},
    "Qwen2ForCausalLM": {"window": QWEN, "all windows": QWEN | dict(max_window_layers=0)},
    "Qwen2MoeForCausalLM": {"window": QWEN},
    "Qwen3ForCausalLM": {"window": QWEN},
    "Qwen3MoeForCausalLM": {"window": dict(use_sliding_window=True, sliding_window=WINDOW)},
    "SmolLM3ForCausalLM": {
        "window": dict(use_sliding_window=True, sliding_window=WINDOW, layer_types=[FULL, SLIDING] * 2)
    },
    "StableLmForCausalLM": {
        "query-key norm": dict(qk_layernorm=True),
        "parallel": dict(use_parallel_residual=True),
    },
    "Starcoder2ForCausalLM": {"window": dict(sliding_window=WINDOW)},
    "VaultGemmaForCausalLM": {"strong softcap": dict(attn_logit_softcapping=0.1)},
} | {name: {"decoder": dict(is_decoder=True)} for name in BIDIRECTIONAL}


# Models that are no causal language models, which must be refused as well.
OTHERS = {
    "BartForConditionalGeneration": {},
    "BertModel": {},
    "T5ForConditionalGeneration": dict(d_kv=16, d_ff=96, num_layers=2, num_decoder_layers=2),
    "ViTModel": VISION,
    "WhisperForConditionalGeneration": {},
}
PEFT = "PEFT, wrapped first", "PEFT, enabled first"
# Matrices are multiplied by this, so that attention picks tokens: what eviction changes must show, rounding must not.
SCALE = 3.0


def rows():
    """(class, variant) of every configuration that is built; the variant "" is the class's own."""
    built = [name for name in names() if name not in NOT_BUILT]
    own = [(name, variant) for name in built for variant in ("", *VARIANTS.get(name, ()))]
    return own + [("LlamaForCausalLM", variant) for variant in PEFT] + [(name, "") for name in OTHERS]


def build(name, variant=""):
    """A model of class `name` with random weights, float32, in evaluation mode."""
    model_class = getattr(transformers, name)
    changes = CHANGES.get(name, {}) | OTHERS.get(name, {}) | VARIANTS.get(name, {}).get(variant, {})
    torch.manual_seed(0)
    model = (
        model_class(small_config(model_class.config_class, copy.deepcopy(changes)))
        .eval()
        .requires_grad_(False)
    )
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.mul_(SCALE)
        elif parameter_name.endswith("sinks"):
            parameter.fill_(2.0)  # strong enough to be missed
    return model
