"""Ten networks of timm and transformers as their authors draw them, and each with a fault."""

import pytest
import timm
import torch
import transformers
from tools.calibrate import random_direction

from initlab import trace

PICTURES = {  # name: side of the pictures, a weight that its next feels
    "resnet18": (64, None),
    "vit_tiny_patch16_224": (224, "blocks.1.mlp.fc1"),
    "convnext_atto": (64, "stages.1.blocks.0.mlp.fc1"),
    "mobilenetv3_small_050": (64, None),
    "nf_resnet26": (64, None),  # it standardises its weights
}
SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 100}
SMALL |= {"intermediate_size": 128}
GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 100}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 3, "num_heads": 4, "vocab_size": 100}
TEXTS = {  # class: what its configuration says, a weight that its next feels
    "GPT2LMHeadModel": (
        {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 100},
        "h.1.mlp.c_fc",
    ),
    "BertModel": (SMALL, "encoder.layer.1.intermediate.dense"),
    "LlamaForCausalLM": (SMALL | {"num_key_value_heads": 2}, "layers.1.self_attn.v_proj"),
    "MixtralForCausalLM": (
        SMALL | {"num_local_experts": 3, "num_key_value_heads": 2},
        "layers.1.self_attn.v_proj",
    ),
    "T5EncoderModel": (T5, "block.1.layer.1.DenseReluDense.wi"),
}


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def judge(net, x):
    return trace(net, x, loss=lambda output: random_direction(first(output)))


def check(net, x, layer):
    rows = judge(net, x)
    assert rows.problems() == []
    if layer is not None:
        full = next(n for n, _ in net.named_modules() if n.endswith(layer))
        net.get_submodule(full).weight.data.mul_(100)
        assert [p.layer for p in judge(net, x).problems()][:1] == [full]
    return rows


@pytest.mark.parametrize("name", PICTURES)
def test_networks_of_timm(name):
    side, layer = PICTURES[name]
    torch.manual_seed(0)
    net = timm.create_model(name)
    check(net, torch.randn(2, 3, side, side), layer)


@pytest.mark.parametrize("name", TEXTS)
def test_networks_of_transformers(name):
    options, layer = TEXTS[name]
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    net = kind(kind.config_class(**options))
    rows = check(net, {"input_ids": torch.randint(100, (4, 12))}, layer)
    names = {n for e in rows for w in e.weights for n in w.names}
    tables = "position", "wpe", "token_type", "relative"
    large = {n for n, p in net.named_parameters() if p.dim() > 1}
    assert not {n for n in large - names if not any(t in n for t in tables)}
