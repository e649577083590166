"""Loading: what transformers loads, bit for bit, in the memory of what is loaded."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from conftest import save_base

from lora_cli import loading, model
from lora_cli.config import ModelConfig

CPU = torch.device("cpu")
KINDS = ("llama", "qwen2", "qwen3", "gpt2", "gemma", "gemma2", "mixtral", "granite", "cohere", "mamba", "bloom")
IN_PIECES = set(KINDS) - {"mixtral"}  # whose experts are stored one by one
OTHER: dict[str, torch.dtype] = {"float32": torch.bfloat16, "bfloat16": torch.float32}


def ours(folder: Path, dtype: Any) -> Any:
    """A model as it is loaded here, with the attention it came with."""
    config = ModelConfig(path=str(folder), dtype=dtype)
    loaded = model.load_model(model.read_header(config), config, CPU)
    loaded.module.set_attn_implementation(loaded.own_attention)
    return loaded.module


def read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tensors that are read in pieces from here on, in very small ones."""
    names: list[str] = []
    read = loading.read_pieces

    def counted(places: Any) -> Any:
        names.extend(places)
        return read(places)

    monkeypatch.setattr(loading, "read_pieces", counted)
    monkeypatch.setattr(loading, "_PIECE", 100)
    return names


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_read_in_pieces_is_the_one_transformers_loads(
    kind: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Bit for bit, all parameters, buffers and logits, from files of the other dtype; tied weights are tied."""
    base = save_base(kind, tmp_path / "base", OTHER[dtype], shard="20KB")
    names = read_in_pieces(monkeypatch)
    mine = ours(base, dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))

    assert bool(names) == (kind in IN_PIECES)
    for wanted, found in (
        (theirs.named_parameters(), mine.named_parameters()),
        (theirs.named_buffers(), mine.named_buffers()),
    ):
        expected, got = dict(wanted), dict(found)
        assert expected.keys() == got.keys()
        for name, tensor in expected.items():
            assert tensor.dtype == got[name].dtype, name
            assert torch.equal(tensor, got[name]), name
    assert not any(each.requires_grad for each in mine.parameters())
    assert not any(each.training for each in mine.modules())
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.equal(mine(input_ids=ids).logits, theirs(input_ids=ids).logits)
    assert mine.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert mine.config.to_dict() == theirs.config.to_dict()


def test_what_is_stored_as_it_is_wanted_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On a CPU: nothing is copied, so that processes share it."""
    base = save_base("llama", tmp_path / "base")
    names = read_in_pieces(monkeypatch)
    ours(base, "float32")

    assert names == []


def test_generation_settings_and_their_absence(tmp_path: Path):
    """generation_config.json is read where it is; without it they are those of config.json."""
    base = save_base("llama", tmp_path / "base")
    for settings in ('{"eos_token_id": [2, 7], "temperature": 0.7, "do_sample": true}', "{", None):
        (base / "generation_config.json").unlink(missing_ok=True)
        if settings is not None:
            (base / "generation_config.json").write_text(settings)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(base)

        assert ours(base, "bfloat16").generation_config.to_dict() == theirs.generation_config.to_dict()


def test_two_different_weights_that_should_be_one(tmp_path: Path):
    """Files that hold both of two tied weights, and not the same, are read as transformers reads them."""
    base = save_base("llama", tmp_path / "base")
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    safetensors.torch.save_file(tensors, base / "model.safetensors", {"format": "pt"})
    mine = ours(base, "bfloat16")

    assert torch.equal(mine.lm_head.weight, tensors["lm_head.weight"].bfloat16())
    assert torch.equal(mine.model.embed_tokens.weight, tensors["model.embed_tokens.weight"].bfloat16())


def test_pieces_come_from_anywhere(tmp_path: Path):
    """Whoever has the pieces can give them: what is read and what is done with it are apart."""
    base = save_base("qwen2", tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    with loading.parameters_on_meta():
        module = transformers.AutoModelForCausalLM.from_config(theirs.config)
    given = [
        loading.Piece(name, begin, begin + 1, tensor[begin : begin + 1])
        for name, tensor in theirs.named_parameters()
        for begin in range(len(tensor))
    ]
    loading.fill(module, given, torch.float32, CPU)

    assert all(torch.equal(tensor, module.get_parameter(name)) for name, tensor in theirs.named_parameters())
