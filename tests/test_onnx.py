"""A merged model as an ONNX graph, with ONNX Runtime as the judge."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TOKENS, our_logits, write_adapter

from lora_cli import export, lora, manifest, tuned
from lora_cli.config import LoraConfig
from lora_cli.errors import AdapterError, SurroundingsError
from lora_cli.formats import onnx_graph

pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

IDS = torch.tensor([TOKENS])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merging_in_place_gives_the_same_logits(kind: str, model_folder: Callable[[str], str], tmp_path: Path):
    """Every layer is the base's own class again, with the adapter in its weight."""
    write_adapter(model_folder(kind), tmp_path / "adapter", LoraConfig(rank=4, alpha=8))
    loaded = tuned.load(tuned.find(tmp_path / "adapter"), torch.device("cpu"), "float32")
    lora.merge_in_place(loaded.module)
    loaded.module.set_attn_implementation("eager")

    assert not list(lora.lora_layers(loaded.module))
    with torch.no_grad():
        merged = loaded.module(input_ids=IDS, use_cache=False).logits[0]
    assert torch.allclose(merged, our_logits(tmp_path / "adapter"), atol=1e-5)


def test_onnx_runtime_gives_our_logits(
    model_folder: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """A graph for any length, its tokenizer beside it; logits that differ by a thousandth are refused."""
    base = model_folder("gpt2")
    write_adapter(base, tmp_path / "adapter", LoraConfig(rank=4, alpha=8))
    notes = export.export(tmp_path / "adapter", "onnx", tmp_path / "onnx").notes
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / onnx_graph.GRAPH)
    (logits,) = session.run(None, {"input_ids": IDS.numpy(), "attention_mask": torch.ones_like(IDS).numpy()})

    assert torch.allclose(torch.from_numpy(logits)[0], our_logits(tmp_path / "adapter"), atol=1e-4)
    assert "differ by at most" in notes[0]
    assert capsys.readouterr().out == ""
    assert manifest.problems_in(tmp_path / "onnx") == []
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "onnx" / name).read_bytes() == (Path(base) / name).read_bytes()

    example = onnx_graph._example(3, 9, tuned.load(tuned.find(tmp_path / "adapter"), torch.device("cpu"), "float32"))
    (right,) = session.run(None, {name: tensor.numpy() for name, tensor in example.items()})
    with pytest.raises(AdapterError, match=r"logits of \(3, 9\) tokens differ from base \+ adapter"):
        onnx_graph._difference(tmp_path / "onnx", example, torch.from_numpy(right) * 1.001)


def test_a_missing_extra_is_named(model_folder: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Before anything is written: exit 3 and the command that installs it."""
    write_adapter(model_folder("llama"), tmp_path / "adapter", LoraConfig(rank=2))
    monkeypatch.setattr(onnx_graph, "_NEEDED", ("onnx", "no_such_package"))
    with pytest.raises(
        SurroundingsError, match=r"needs no_such_package, not installed here: pip install 'lora-cli\[onnx\]'"
    ):
        export.export(tmp_path / "adapter", "onnx", tmp_path / "onnx")

    assert not (tmp_path / "onnx").exists()
