"""How an adapter or a merged model is loaded, runtime by runtime, as a model card says it."""

from lora_cli import adapter, runtimes
from lora_cli.adapter import Adapter
from lora_cli.reports import RuntimeReport
from lora_cli.runtimes import Produced

# ADAPTER and MODEL stand for the folder of the card.
_BLOCKS = {
    "PEFT": """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{base}"{revision})
base = AutoModelForCausalLM.from_pretrained("{base}"{revision})
model = PeftModel.from_pretrained(base, "ADAPTER")
```""",
    "vLLM": """```sh
vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules tuned=ADAPTER
```""",
    "llama.cpp": """```sh
lora export ADAPTER --format gguf-lora --output adapter.gguf
llama-server -m base.gguf --lora adapter.gguf
```""",
    "MLX": """```sh
lora export ADAPTER --format mlx --output ADAPTER-mlx
mlx_lm.generate --model {base} --adapter-path ADAPTER-mlx --prompt "..."
```""",
    "Ollama": """```sh
lora export ADAPTER --format gguf-lora --output adapter.gguf
printf 'FROM ./base.gguf\\nADAPTER ./adapter.gguf\\n' > Modelfile
ollama create tuned
```""",
}
_MLX = """```sh
mlx_lm.generate --model {base} --adapter-path ADAPTER --prompt "..."
```"""
WHOLE = {
    "merged": """Wherever its base loads, as an ordinary model:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("MODEL")
model = AutoModelForCausalLM.from_pretrained("MODEL")
```

```sh
vllm serve MODEL
mlx_lm.generate --model MODEL --prompt "..."
```""",
    "onnx": """It gives the logits of whole sequences in float32; it keeps no cache, so it answers slowly.

```python
import numpy, onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("MODEL")
session = onnxruntime.InferenceSession("MODEL/model.onnx")
inputs = tokenizer(["..."], return_tensors="np")
wanted = {name: inputs[name].astype(numpy.int64) for name in ("input_ids", "attention_mask")}
(logits,) = session.run(["logits"], wanted)
```""",
}


def text(kind: str, base: str, read: Adapter, produced: Produced) -> str:
    """Return the section of a card. `kind` is peft, mlx, merged or onnx; of runtimes that cannot load it, why not."""
    if kind in WHOLE:
        return WHOLE[kind]
    revision = f', revision="{read.revision}"' if read.revision else ""
    named = {"base": base, "revision": revision, "rank": runtimes.vllm_rank(produced.rank)}
    if kind == "mlx":
        return _MLX.format(**named)
    reports = runtimes.verdicts(produced)
    parts = [f"### {report.name}\n\n{_BLOCKS[report.name].format(**named)}" for report in reports if report.loads]
    if others := [_why_not(report) for report in reports if not report.loads]:
        parts.append("### Others\n\n" + "\n".join(others))
    if read.chat_templates:
        parts.append(
            f"Its rows were written with the chat template beside it, `{adapter.TEMPLATE}`. Where the base has "
            "another, give this one: `tokenizer.chat_template = ...` in Python, `--chat-template` for vLLM, "
            "`--chat-template-file` for llama-server."
        )
    parts.append("Merged into its base (`lora merge ADAPTER --output MODEL`) it loads wherever the base does.")
    return "\n\n".join(parts)


def _why_not(report: RuntimeReport) -> str:
    return f"- {report.name}: {'not known' if report.loads is None else 'no'}; {report.note}."
