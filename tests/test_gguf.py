"""A GGUF file becomes the model and the tokenizer that were written to it."""

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lightning_modules.weights.gguf import main

gguf = pytest.importorskip("gguf", reason="needs pip install -e '.[gguf]'")

BYTES = sorted(ByteLevel.alphabet())
TOKENS = [*BYTES, "12", "ab", "<|im_end|>"]
EOS = len(TOKENS) - 1
LLAMA = LlamaConfig(
    vocab_size=len(TOKENS),
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    max_position_embeddings=64,
)
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name):
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    index, _, inner = name.removeprefix("model.layers.").partition(".")
    return f"blk.{index}.{NAMES[inner.removesuffix('.weight')]}.weight"


def write(file, splitting, architecture="llama"):
    """Write a random model as llama.cpp's converter does, with query and key rows in the order of GGML's rotation."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LLAMA).eval()
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(LLAMA.num_hidden_layers)
    writer.add_context_length(LLAMA.max_position_embeddings)
    writer.add_embedding_length(LLAMA.hidden_size)
    writer.add_feed_forward_length(LLAMA.intermediate_size)
    writer.add_head_count(LLAMA.num_attention_heads)
    writer.add_head_count_kv(LLAMA.num_key_value_heads)
    writer.add_layer_norm_rms_eps(LLAMA.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(LLAMA.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * EOS + [3])
    writer.add_token_merges(["1 2", "a b"])
    writer.add_eos_token_id(EOS)
    writer.add_bos_token_id(EOS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_((parameter + 0.1 * torch.randn_like(parameter)).bfloat16())
            values = parameter.float()
            heads = {"q": LLAMA.num_attention_heads, "k": LLAMA.num_key_value_heads}.get(name.split("_proj")[0][-1])
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                values = values.view(heads, 2, -1, LLAMA.hidden_size).transpose(1, 2).reshape(values.shape)
            writer.add_tensor(gguf_name(name), values.numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.parametrize(("splitting", "pieces"), [("smollm", ["1", "2", "Ġ", "ab"]), ("gpt-2", ["12", "Ġ", "ab"])])
def test_model_and_tokenizer_are_those_of_the_file(tmp_path, capsys, splitting, pieces):
    model = write(tmp_path / "tiny.gguf", splitting)
    folder = tmp_path / "folder"
    assert main([str(tmp_path / "tiny.gguf"), str(folder)]) == 0
    assert capsys.readouterr().out.strip() == f"start.language_model={folder} tokenizer={folder}"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("12 ab") == pieces
    assert tokenizer("12 ab<|im_end|>")["input_ids"][-1] == tokenizer.eos_token_id == EOS
    ids = torch.tensor([[5, 9, 250, 3, 100]])
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    assert not hasattr(again.config, "quantization_config")


def test_what_would_be_read_wrongly_is_refused(tmp_path, capsys):
    write(tmp_path / "tiny.gguf", "viking")
    for arguments, message in [
        (["tiny.gguf", "new"], "tokenizer.ggml.pre is viking, only smollm"),
        (["none.gguf", "new"], "none.gguf: no such file. Give a GGUF file."),
        (["tiny.gguf", "."], "exists already. Give a new folder."),
    ]:
        assert main([str(tmp_path / argument) for argument in arguments]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF but no more")
    assert main([str(tmp_path / "damaged.gguf"), str(tmp_path / "new")]) == 2
    assert "damaged.gguf: cannot be read" in capsys.readouterr().err
