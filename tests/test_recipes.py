"""The recipes for machines: what `lora check` says they take is what arithmetic by hand says, and it fits."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import transformers
from conftest import Invoke, build_tokenizer, conversation, write_rows
from test_init import PURPOSES

ROOT = Path(__file__).resolve().parents[1]
PLACE, DOC, PAPER = (
    ROOT / "lora_cli" / "recipes",
    ROOT / "docs" / "scaling.md",
    ROOT / "scripts" / "simulate_scaling.py",
)


def llama(vocabulary: int, hidden: int, inner: int, blocks: int, heads: int, kv_heads: int) -> Any:
    """A model of Llama's family, head and embedding apart."""
    return transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
    )


def qwen(vocabulary: int, hidden: int, inner: int, blocks: int, heads: int, kv_heads: int, tied: bool = False) -> Any:
    """A model of Qwen 2.5's family: biases on query, key and value."""
    return transformers.Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=32768,
        tie_word_embeddings=tied,
    )


class Recipe(NamedTuple):
    """The shape a recipe is for, its processes, what it takes by hand (bytes), and what one device has."""

    shape: Any
    processes: int
    base: float
    adapter: float
    in_flight: float
    activations: float
    device: float


# By hand, from the models' cards. Weights of a block: q and o, k and v, gate, up and down. nf4: 0.516 bytes a weight.
# Adapter: 16 bytes x rank x (in + out) of each layer. Activations: tokens x (what a block keeps, times blocks and 2 or
# 4 more that pass; or, computed again, each block's input and 3 blocks), and a chunk of 512 rows of logits. A block
# keeps of a token: 5 vectors of the hidden size, query and attention's output among them, k and v, gate and up. On a
# CPU two forwards run at a time, and no logits are kept.
RECIPES = {
    "laptop": Recipe(
        qwen(151936, 896, 4864, 24, 14, 2, tied=True),
        1,
        base=4 * (151936 * 896 + 24 * (2 * 896 * 896 + 2 * 896 * 128 + 3 * 896 * 4864 + 1152 + 2 * 896) + 896),
        adapter=16 * 16 * 24 * (2 * (896 + 896) + 2 * (896 + 128) + 3 * (896 + 4864)),
        in_flight=0,
        activations=2 * 1024 * (24 + 4) * 4 * (5 * 896 + 2 * 128 + 2 * 4864),
        device=8e9,
    ),
    "gpu-24gb-8b-nf4": Recipe(
        llama(128256, 4096, 14336, 32, 32, 8),
        1,
        base=2 * 2 * 128256 * 4096 + 0.516 * 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336),
        adapter=16 * 16 * 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)),
        in_flight=2 * 4096 * 14336,
        activations=8192 * 2 * (32 * 4096 + 3 * (5 * 4096 + 2 * 1024 + 2 * 14336)) + 512 * 128256 * 8,
        device=24e9,
    ),
    "gpu-80gb-14b": Recipe(
        qwen(152064, 5120, 13824, 48, 40, 8),
        1,
        base=2 * (2 * 152064 * 5120 + 48 * (2 * 5120 * 5120 + 2 * 5120 * 1024 + 3 * 5120 * 13824)),
        adapter=16 * 32 * 48 * (2 * (5120 + 5120) + 2 * (5120 + 1024) + 3 * (5120 + 13824)),
        in_flight=0,
        activations=4096 * 2 * (48 + 2) * (5 * 5120 + 2 * 1024 + 2 * 13824) + 512 * 152064 * 8,
        device=80e9,
    ),
    "gpu-80gb-32b-nf4": Recipe(
        qwen(152064, 5120, 27648, 64, 40, 8),
        1,
        base=2 * 2 * 152064 * 5120 + 0.516 * 64 * (2 * 5120 * 5120 + 2 * 5120 * 1024 + 3 * 5120 * 27648),
        adapter=16 * 32 * 64 * (2 * (5120 + 5120) + 2 * (5120 + 1024) + 3 * (5120 + 27648)),
        in_flight=2 * 5120 * 27648,
        activations=8192 * 2 * (64 * 5120 + 3 * (5 * 5120 + 2 * 1024 + 2 * 27648)) + 512 * 152064 * 8,
        device=80e9,
    ),
    "gpus-8x80gb-70b-sharded": Recipe(
        llama(128256, 8192, 28672, 80, 64, 8),
        8,
        base=2 * 2 * 128256 * 8192 + 2 * 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672) / 8,
        adapter=16 * 16 * 80 * (2 * (8192 + 8192) + 2 * (8192 + 1024) + 3 * (8192 + 28672)),
        in_flight=2 * 2 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672),
        activations=4096 * 2 * (80 * 8192 + 3 * (5 * 8192 + 2 * 1024 + 2 * 28672)) + 512 * 128256 * 8,
        device=80e9,
    ),
    "two-nodes-70b": Recipe(
        llama(128256, 8192, 28672, 80, 64, 8),
        16,
        base=2 * 2 * 128256 * 8192 + 2 * 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672) / 16,
        adapter=16 * 16 * 80 * (2 * (8192 + 8192) + 2 * (8192 + 1024) + 3 * (8192 + 28672)),
        in_flight=2 * 2 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672),
        activations=4096 * 2 * (80 * 8192 + 3 * (5 * 8192 + 2 * 1024 + 2 * 28672)) + 512 * 128256 * 8,
        device=40e9,
    ),
}
_USABLE = 0.9  # of a device; the rest is the allocator's gaps


def test_every_recipe_is_here():
    """Every recipe is one for a machine, counted below, or one for a purpose, tried in test_init."""
    assert {path.stem for path in PLACE.glob("*.yaml")} == set(RECIPES) | set(PURPOSES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_takes_what_it_should_and_fits(
    name: str, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Base, adapter, in flight to 2 %, activations to 20 %, all on the device it is named for; and documented so."""
    monkeypatch.setattr("torch.get_num_threads", lambda: 4)
    recipe = RECIPES[name]
    folder = tmp_path / "model"
    recipe.shape.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    rows = write_rows(tmp_path / "rows.jsonl", [conversation(number) for number in range(40)])
    shutil.copy(PLACE / f"{name}.yaml", tmp_path / "recipe.yaml")
    given = [f"model.path={folder}", f"data.train={rows}", *(["model.device=cpu"] if name == "laptop" else [])]
    code, out, said = invoke("check", tmp_path / "recipe.yaml", *given, "--nproc", recipe.processes, "--json")
    assert code == 0, said
    memory = json.loads(out)["memory"]

    for part in ("base", "adapter", "in_flight"):
        assert memory[part] == pytest.approx(getattr(recipe, part), rel=0.02), part
    assert memory["activations"] == pytest.approx(recipe.activations, rel=0.2)
    parts = ("base", "adapter", "activations", "in_flight", "process")
    assert memory["total"] == sum(memory[part] for part in parts) < _USABLE * recipe.device
    cells = next(line for line in DOC.read_text().splitlines() if line.startswith(f"| `{name}`")).split("|")[2:-1]
    assert [int(cell.replace(",", "")) for cell in cells[:2]] == [recipe.processes, memory["tokens"]]
    assert [float(cell) for cell in cells[2:]] == pytest.approx(
        [memory[part] / 1e9 for part in (*parts, "total")], abs=0.1
    )


def test_the_paper_and_the_check_agree():
    """All that a GPU holds but the activations, divided, quantised and plain: as by hand above, to 2 %."""
    paper = runpy.run_path(str(PAPER))
    shapes = {shape.name.split()[0]: shape for shape in paper["SHAPES"]}
    for size, name, mode, rank in (
        ("70", "gpus-8x80gb-70b-sharded", "sharded", 16),
        ("8", "gpu-24gb-8b-nf4", "nf4", 16),
        ("14", "gpu-80gb-14b", "replicated", 32),
    ):
        recipe = RECIPES[name]
        plan = paper["Plan"](shapes[size], mode, recipe.processes, batch=128, length=512, rank=rank)
        by_hand = recipe.base + recipe.adapter + recipe.in_flight + (1 << 30)
        base = plan.memory(again=True) - plan.tokens * (
            shapes[size].blocks * 2 * shapes[size].hidden + 3 * shapes[size].kept
        )
        assert base == pytest.approx(by_hand + 512 * shapes[size].vocabulary * 8, rel=0.02)


def test_the_paper_counts_operations_as_a_step_has_them():
    """8 B on one GPU: 4 operations a weight of the blocks, 6 of the adapter, causal attention, the head at targets."""
    paper = runpy.run_path(str(PAPER))
    plan = paper["Plan"](paper["SHAPES"][4], "replicated", 1, batch=1024, length=512, rank=16)
    weights = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    adapter = 16 * 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    operations = 4 * weights + 6 * adapter + 3 * 32 * 2 * 512 * 4096 + 4 / 3 * 128256 * 4096

    assert plan.seconds == pytest.approx(operations * 1e6 / (0.4 * 989e12), rel=1e-3)


def test_the_tables_of_the_paper_are_what_it_prints():
    """Every line of the two tables stands in the document, by the command that is named there."""
    arguments = ["--sizes", "1", "8", "32", "70", "405"]
    printed = subprocess.check_output([sys.executable, str(PAPER), *arguments], text=True)
    lines = [line for line in printed.splitlines() if line.startswith("|")]

    assert len(lines) == 2 * (2 + 5 * 4)
    assert f"simulate_scaling.py {' '.join(arguments)}" in " ".join(DOC.read_text().split())
    assert set(lines) <= set(DOC.read_text().splitlines())
