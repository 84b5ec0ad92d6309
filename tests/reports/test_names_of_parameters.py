"""Which parameters decay, by the names that models give them: huggingface/transformers#42754, #38922 and #35927.

There, norms were known by too few of their names, and "norm" was then to be looked for as a whole word only.
"""

from __future__ import annotations

import pytest
import torch
from cases import peer
from torch import nn

from fusedopt.groups import param_groups

# Of each model: what decays (+) and what does not (-), as path:class of the module that holds it. One of each kind.
MODELS = """
# BERT
+ embeddings.word_embeddings.weight:Embedding embeddings.position_embeddings.weight:Embedding
  embeddings.token_type_embeddings.weight:Embedding encoder.layer.0.attention.self.query.weight:Linear
- embeddings.LayerNorm.weight:LayerNorm embeddings.LayerNorm.bias:LayerNorm
  encoder.layer.0.attention.self.query.bias:Linear
# GPT-2
+ transformer.wte.weight:Embedding transformer.wpe.weight:Embedding transformer.h.0.attn.c_attn.weight:Conv1D
  transformer.h.0.attn.c_proj.weight:Conv1D transformer.h.0.mlp.c_fc.weight:Conv1D lm_head.weight:Linear
- transformer.h.0.ln_1.weight:LayerNorm transformer.h.0.ln_1.bias:LayerNorm transformer.h.0.attn.c_attn.bias:Conv1D
  transformer.h.0.attn.c_proj.bias:Conv1D transformer.h.0.mlp.c_fc.bias:Conv1D transformer.ln_f.weight:LayerNorm
  transformer.ln_f.bias:LayerNorm
# T5
+ shared.weight:Embedding encoder.embed_tokens.weight:Embedding encoder.block.0.layer.0.SelfAttention.q.weight:Linear
- encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight:Embedding
  encoder.block.0.layer.0.layer_norm.weight:T5LayerNorm encoder.final_layer_norm.weight:T5LayerNorm
# Llama
+ model.embed_tokens.weight:Embedding model.layers.0.self_attn.q_proj.weight:Linear
- model.layers.0.input_layernorm.weight:LlamaRMSNorm model.layers.0.post_attention_layernorm.weight:LlamaRMSNorm
  model.norm.weight:LlamaRMSNorm
# Qwen3
+ model.embed_tokens.weight:Embedding model.layers.0.self_attn.q_proj.weight:Linear
- model.layers.0.self_attn.q_norm.weight:Qwen3RMSNorm model.layers.0.self_attn.k_norm.weight:Qwen3RMSNorm
  model.layers.0.input_layernorm.weight:Qwen3RMSNorm model.layers.0.post_attention_layernorm.weight:Qwen3RMSNorm
  model.norm.weight:Qwen3RMSNorm
# Gemma 3
+ model.embed_tokens.weight:Gemma3TextScaledWordEmbedding model.layers.0.self_attn.q_proj.weight:Linear
- model.layers.0.self_attn.q_norm.weight:Gemma3RMSNorm model.layers.0.self_attn.k_norm.weight:Gemma3RMSNorm
  model.layers.0.input_layernorm.weight:Gemma3RMSNorm model.layers.0.post_attention_layernorm.weight:Gemma3RMSNorm
  model.layers.0.pre_feedforward_layernorm.weight:Gemma3RMSNorm
  model.layers.0.post_feedforward_layernorm.weight:Gemma3RMSNorm model.norm.weight:Gemma3RMSNorm
# DeepSeek-V3
+ model.embed_tokens.weight:Embedding model.layers.0.self_attn.q_a_proj.weight:Linear
  model.layers.3.mlp.experts.gate_up_proj:DeepseekV3Experts model.layers.3.mlp.experts.down_proj:DeepseekV3Experts
  model.layers.3.mlp.gate.weight:DeepseekV3TopkRouter
- model.layers.0.self_attn.q_a_layernorm.weight:DeepseekV3RMSNorm
  model.layers.0.self_attn.kv_a_layernorm.weight:DeepseekV3RMSNorm
  model.layers.0.input_layernorm.weight:DeepseekV3RMSNorm
  model.layers.0.post_attention_layernorm.weight:DeepseekV3RMSNorm model.norm.weight:DeepseekV3RMSNorm
# Mamba
+ backbone.embeddings.weight:Embedding backbone.layers.0.mixer.A_log:MambaMixer backbone.layers.0.mixer.D:MambaMixer
  backbone.layers.0.mixer.conv1d.weight:Conv1d backbone.layers.0.mixer.in_proj.weight:Linear
- backbone.layers.0.norm.weight:MambaRMSNorm backbone.layers.0.mixer.conv1d.bias:Conv1d
  backbone.layers.0.mixer.dt_proj.bias:Linear backbone.norm_f.weight:MambaRMSNorm
# CLIP
+ logit_scale:CLIPModel text_model.embeddings.token_embedding.weight:Embedding
  text_model.embeddings.position_embedding.weight:Embedding
  text_model.encoder.layers.0.self_attn.k_proj.weight:Linear
  vision_model.embeddings.class_embedding:CLIPVisionEmbeddings vision_model.embeddings.patch_embedding.weight:Conv2d
- text_model.encoder.layers.0.self_attn.k_proj.bias:Linear text_model.encoder.layers.0.layer_norm1.weight:LayerNorm
  text_model.encoder.layers.0.layer_norm1.bias:LayerNorm text_model.final_layer_norm.weight:LayerNorm
  text_model.final_layer_norm.bias:LayerNorm vision_model.pre_layrnorm.weight:LayerNorm
  vision_model.pre_layrnorm.bias:LayerNorm vision_model.post_layernorm.weight:LayerNorm
  vision_model.post_layernorm.bias:LayerNorm
# ViT
+ embeddings.cls_token:ViTEmbeddings embeddings.position_embeddings:ViTEmbeddings
  embeddings.patch_embeddings.projection.weight:Conv2d layers.0.attention.q_proj.weight:Linear
- embeddings.patch_embeddings.projection.bias:Conv2d layers.0.attention.q_proj.bias:Linear
  layers.0.layernorm_before.weight:LayerNorm layers.0.layernorm_before.bias:LayerNorm
  layers.0.layernorm_after.weight:LayerNorm layers.0.layernorm_after.bias:LayerNorm layernorm.weight:LayerNorm
  layernorm.bias:LayerNorm
# Swin
+ embeddings.patch_embeddings.projection.weight:Conv2d encoder.layers.0.blocks.0.attention.q_proj.weight:Linear
- embeddings.patch_embeddings.projection.bias:Conv2d embeddings.norm.weight:LayerNorm embeddings.norm.bias:LayerNorm
  encoder.layers.0.blocks.0.attention.q_proj.bias:Linear
  encoder.layers.0.blocks.0.attention.relative_position_bias.relative_position_bias_table:SwinRelativePositionBias
  encoder.layers.0.blocks.0.layernorm_before.weight:LayerNorm
  encoder.layers.0.blocks.0.layernorm_before.bias:LayerNorm
  encoder.layers.0.blocks.0.layernorm_after.weight:LayerNorm encoder.layers.0.blocks.0.layernorm_after.bias:LayerNorm
  layernorm.weight:LayerNorm layernorm.bias:LayerNorm
# BEiT
+ embeddings.cls_token:BeitEmbeddings embeddings.patch_embeddings.projection.weight:Conv2d
  layers.0.lambda_1:BeitLayer layers.0.attention.q_proj.weight:Linear
- embeddings.patch_embeddings.projection.bias:Conv2d layers.0.attention.q_proj.bias:Linear
  layers.0.layernorm_before.weight:LayerNorm layers.0.layernorm_before.bias:LayerNorm
  layers.0.layernorm_after.weight:LayerNorm layers.0.layernorm_after.bias:LayerNorm
  layers.0.relative_position_bias.relative_position_bias_table:BeitRelativePositionBias
  pooler.layernorm.weight:LayerNorm pooler.layernorm.bias:LayerNorm
# ConvNeXt V2
+ embeddings.patch_embeddings.weight:Conv2d encoder.stages.0.layers.0.dwconv.weight:Conv2d
  encoder.stages.0.layers.0.pwconv1.weight:Linear
- embeddings.patch_embeddings.bias:Conv2d embeddings.layernorm.weight:ConvNextV2LayerNorm
  embeddings.layernorm.bias:ConvNextV2LayerNorm encoder.stages.0.layers.0.dwconv.bias:Conv2d
  encoder.stages.0.layers.0.pwconv1.bias:Linear encoder.stages.0.layers.0.grn.weight:ConvNextV2GRN
  encoder.stages.0.layers.0.grn.bias:ConvNextV2GRN encoder.stages.1.downsampling_layer.0.weight:ConvNextV2LayerNorm
  encoder.stages.1.downsampling_layer.0.bias:ConvNextV2LayerNorm layernorm.weight:LayerNorm layernorm.bias:LayerNorm
# ResNet
+ embedder.embedder.convolution.weight:Conv2d
- embedder.embedder.normalization.weight:BatchNorm2d embedder.embedder.normalization.bias:BatchNorm2d
# wav2vec 2.0
+ masked_spec_embed:Wav2Vec2Model feature_extractor.conv_layers.0.conv.weight:Conv1d
  feature_projection.projection.weight:Linear
- feature_extractor.conv_layers.0.layer_norm.weight:GroupNorm
  feature_extractor.conv_layers.0.layer_norm.bias:GroupNorm feature_projection.layer_norm.weight:LayerNorm
  feature_projection.layer_norm.bias:LayerNorm feature_projection.projection.bias:Linear
  encoder.layers.0.final_layer_norm.weight:LayerNorm encoder.layers.0.final_layer_norm.bias:LayerNorm
# Conformer
+ masked_spec_embed:Wav2Vec2ConformerModel feature_extractor.conv_layers.0.conv.weight:Conv1d
  feature_projection.projection.weight:Linear encoder.layers.0.conv_module.pointwise_conv1.weight:Conv1d
  encoder.layers.0.conv_module.depthwise_conv.weight:Conv1d
- feature_extractor.conv_layers.0.layer_norm.weight:GroupNorm
  feature_extractor.conv_layers.0.layer_norm.bias:GroupNorm feature_projection.layer_norm.weight:LayerNorm
  feature_projection.layer_norm.bias:LayerNorm feature_projection.projection.bias:Linear
  encoder.layers.0.ffn1_layer_norm.weight:LayerNorm encoder.layers.0.ffn1_layer_norm.bias:LayerNorm
  encoder.layers.0.self_attn_layer_norm.weight:LayerNorm encoder.layers.0.self_attn_layer_norm.bias:LayerNorm
  encoder.layers.0.self_attn.pos_bias_u:Wav2Vec2ConformerSelfAttention
  encoder.layers.0.self_attn.pos_bias_v:Wav2Vec2ConformerSelfAttention
  encoder.layers.0.conv_module.batch_norm.weight:BatchNorm1d encoder.layers.0.conv_module.batch_norm.bias:BatchNorm1d
  encoder.layers.0.final_layer_norm.weight:LayerNorm encoder.layers.0.final_layer_norm.bias:LayerNorm
# MPNet
+ embeddings.word_embeddings.weight:Embedding embeddings.position_embeddings.weight:Embedding
  encoder.layer.0.attention.attn.q.weight:Linear
- embeddings.LayerNorm.weight:LayerNorm embeddings.LayerNorm.bias:LayerNorm
  encoder.layer.0.attention.attn.q.bias:Linear encoder.relative_attention_bias.weight:Embedding
# DETR
+ level_embed:DeformableDetrModel backbone.model.embedder.embedder.convolution.weight:Conv2d
  input_proj.0.0.weight:Conv2d query_position_embeddings.weight:Embedding
  encoder.layers.0.self_attn.sampling_offsets.weight:Linear
- input_proj.0.0.bias:Conv2d encoder.layers.0.self_attn.sampling_offsets.bias:Linear
  encoder.layers.0.self_attn_layer_norm.weight:LayerNorm encoder.layers.0.self_attn_layer_norm.bias:LayerNorm
  encoder.layers.0.final_layer_norm.weight:LayerNorm encoder.layers.0.final_layer_norm.bias:LayerNorm
  decoder.layers.0.encoder_attn_layer_norm.weight:LayerNorm decoder.layers.0.encoder_attn_layer_norm.bias:LayerNorm
# gpt-oss
+ embed_tokens.weight:Embedding layers.0.self_attn.sinks:GptOssAttention layers.0.self_attn.q_proj.weight:Linear
  layers.0.mlp.router.weight:GptOssTopKRouter layers.0.mlp.experts.gate_up_proj:GptOssExperts
  layers.0.mlp.experts.down_proj:GptOssExperts
- layers.0.self_attn.q_proj.bias:Linear layers.0.mlp.router.bias:GptOssTopKRouter
  layers.0.mlp.experts.gate_up_proj_bias:GptOssExperts layers.0.mlp.experts.down_proj_bias:GptOssExperts
  layers.0.input_layernorm.weight:GptOssRMSNorm layers.0.post_attention_layernorm.weight:GptOssRMSNorm
  norm.weight:GptOssRMSNorm
# torchvision's ResNet
+ conv1.weight:Conv2d layer1.0.downsample.0.weight:Conv2d fc.weight:Linear
- bn1.weight:BatchNorm2d bn1.bias:BatchNorm2d layer1.0.downsample.1.weight:BatchNorm2d fc.bias:Linear
# timm's EfficientNet
+ conv_stem.weight:Conv2d blocks.0.0.conv_dw.weight:Conv2d classifier.weight:Linear
- bn1.weight:BatchNormAct2d bn1.bias:BatchNormAct2d blocks.0.0.se.conv_reduce.bias:Conv2d
# OpenAI's Whisper
+ encoder.positional_embedding:AudioEncoder encoder.blocks.0.attn.query.weight:Linear
- encoder.blocks.0.attn.query.bias:Linear encoder.blocks.0.attn_ln.weight:LayerNorm
  encoder.blocks.0.mlp_ln.bias:LayerNorm encoder.ln_post.weight:LayerNorm
# BEiT of timm
+ cls_token:Beit blocks.0.gamma_1:Block blocks.0.attn.qkv.weight:Linear
- blocks.0.attn.q_bias:Attention blocks.0.attn.v_bias:Attention blocks.0.attn.relative_position_bias_table:Attention
  fc_norm.weight:LayerNorm fc_norm.bias:LayerNorm
# Transformer Engine
+ layers.0.self_attention.layernorm_qkv.weight:LayerNormLinear layers.0.layernorm_mlp.fc1_weight:LayerNormMLP
- layers.0.self_attention.layernorm_qkv.layer_norm_weight:LayerNormLinear
  layers.0.self_attention.layernorm_qkv.bias:LayerNormLinear layers.0.layernorm_mlp.layer_norm_weight:LayerNormMLP
  layers.0.layernorm_mlp.fc1_bias:LayerNormMLP
"""


def table() -> dict[str, tuple[list[str], list[str]]]:
    models = {}
    for text in MODELS.split("# ")[1:]:
        name, _, rest = text.partition("\n")
        decaying, _, kept = rest.partition("\n-")
        models[name] = (decaying.removeprefix("+").split(), kept.split())
    return models


def named(name: str) -> nn.Module:
    """A module without anything in it, of a class of this name: a subclass of torch's where that has one."""
    base = getattr(nn, name, nn.Module)
    return type(name, (base,), {"__init__": nn.Module.__init__})()


def build(entries: list[str]) -> nn.Module:
    """A model with the parameters of these paths, in modules of these classes."""
    root = nn.Module()
    for entry in entries:
        path, _, class_name = entry.partition(":")
        *outer, own, name = ["", *path.split(".")]
        module = root
        for part in outer[1:]:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        if own:
            if own not in module._modules:
                module.add_module(own, named(class_name))
            module = module._modules[own]
        module.register_parameter(name, nn.Parameter(torch.ones(2)))
    return root


def decaying(model: nn.Module) -> set[str]:
    return {name for group in param_groups(model, 0.1) if group["weight_decay"] for name, _ in group["params"]}


@pytest.mark.parametrize("model", table())
def test_models(model: str) -> None:
    expected, kept = table()[model]
    assert expected
    assert kept
    assert decaying(build(kept + expected)) == {entry.partition(":")[0] for entry in expected}


def test_twenty_models() -> None:
    assert len(table()) >= 20


@pytest.mark.parametrize("config", ["Bert", "T5", "Qwen3", "GPT2", "Mamba", "Swin"])
def test_transformers_models_of_today(config: str) -> None:
    """All parameters: what has one dimension or a name with "bias" does not decay, but for scales."""
    transformers = peer("transformers")
    with torch.device("meta"):  # so that sizes do not matter
        model = getattr(transformers, f"{config}Model")(getattr(transformers, f"{config}Config")())
    expected = {n for n, p in model.named_parameters() if (p.ndim > 1 or n.endswith(".D")) and "bias" not in n}
    assert decaying(model) == expected


NORMS = """
    attn_norm layernorm_2 RMSNorm ln_1 ln_f LayerNorm BatchNorm2d GroupNormAct T5LayerNorm LlamaRMSNorm norm1 q_norm
    post_attention_layernorm input_layernorm norm_f group_norm final_layer_norm FrozenBatchNorm2d InstanceNorm ScaleNorm
    CRMSNorm bn1 bn normalization normalizer Normalize LayerNormFp32 norms layerNorm pre_layrnorm MyRmsNORM ConvNorm
"""
OTHERS = "normal_head denorm unnormalized Normal normalized abnormal in1 linear NormalHead unnorm lnx"


@pytest.mark.parametrize("name", NORMS.split())
def test_norms(name: str) -> None:
    """As the name of a module, of its class, and of a parameter."""
    assert decaying(build([f"{name}.weight:Custom"])) == set()
    assert decaying(build([f"x.weight:{name}"])) == set()
    assert decaying(build([f"x.{name}_weight:Custom"])) == set()


@pytest.mark.parametrize("name", OTHERS.split())
def test_no_norms(name: str) -> None:
    assert decaying(build([f"{name}.weight:Custom"])) == {f"{name}.weight"}
    assert decaying(build([f"x.weight:{name}"])) == {"x.weight"}
    assert decaying(build([f"x.{name}_weight:Custom"])) == {f"x.{name}_weight"}


@pytest.mark.parametrize(
    "name", ["bias", "bias_ih_l0", "in_proj_bias", "q_bias", "qbias", "pos_bias_u", "Bias", "bias_table"]
)
def test_biases(name: str) -> None:
    assert decaying(build([f"x.{name}:Custom"])) == set()


@pytest.mark.parametrize("name", ["biased", "unbiased_scale", "dibiasing"])
def test_no_biases(name: str) -> None:
    assert decaying(build([f"x.{name}:Custom"])) == {f"x.{name}"}


def test_a_table_of_biases_is_one_and_a_matrix_that_makes_them_is_none() -> None:
    model = build(["relative_attention_bias.weight:Embedding", "pair_bias.weight:Linear", "bias_conv.weight:Conv2d"])
    assert decaying(model) == {"pair_bias.weight", "bias_conv.weight"}


def test_a_matrix_is_one_whatever_it_is_called() -> None:
    entries = ["norm_head.weight:Linear", "x.weight:LayerNormLinear", "norm_out.weight:WeightNormConv1d"]
    entries += ["norm_embedding.weight:Embedding"]
    assert decaying(build(entries)) == {entry.partition(":")[0] for entry in entries}


@pytest.mark.parametrize("module", [nn.LSTM(8, 8), nn.GRUCell(8, 8), nn.MultiheadAttention(8, 2, add_bias_kv=True)])
def test_modules_of_torch(module: nn.Module) -> None:
    assert decaying(module) == {name for name, _ in module.named_parameters() if "weight" in name}


def test_parametrizations() -> None:
    """Both parameters of a weight norm decay; a bias or a norm's weight that is parametrized does not."""
    model = nn.ModuleDict({"linear": nn.Linear(4, 4), "scale": nn.LayerNorm(4), "old": nn.Linear(4, 4)})
    nn.utils.parametrizations.weight_norm(model["linear"])
    nn.utils.parametrize.register_parametrization(model["linear"], "bias", nn.Identity())
    nn.utils.parametrize.register_parametrization(model["scale"], "weight", nn.Identity())
    model["old"].weight_g, model["old"].weight_v = nn.Parameter(torch.ones(4, 1)), nn.Parameter(torch.ones(4, 4))
    weight = "linear.parametrizations.weight.original"
    assert decaying(model) == {f"{weight}0", f"{weight}1", "old.weight", "old.weight_g", "old.weight_v"}
    assert decaying(model["linear"]) == {name.partition(".")[2] for name in (f"{weight}0", f"{weight}1")}


def test_lists_lend_their_names() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(named("Custom") for _ in range(2))
            self.others = nn.ModuleList(named("Custom") for _ in range(2))
            for module in (*self.norms, *self.others):
                module.register_parameter("weight", nn.Parameter(torch.ones(2)))
            self.biases = nn.ParameterList([torch.ones(2)])
            self.weights = nn.ParameterList([torch.ones(2, 2)])
            self.both = nn.ParameterDict({"bias": torch.ones(2), "weight": torch.ones(2, 2)})

    expected = {"others.0.weight", "others.1.weight", "weights.0", "both.weight"}
    assert decaying(Holder()) == expected
