"""What runs inside each contender's process: it loads, then takes one training step for each line that comes in.

    python scripts/bench_contenders.py NAME JOB.json SETTING

Each step is answered by one line of JSON: {"seconds", "tokens", "loss", "peak_rss", "peak_device"}, the first line says
that it is ready. NAME is a contender (ours, hf, trl, litgpt), or check or profile, which answer once. SETTING is the
micro-batch, in examples; in tokens for ours. bench_step.py writes JOB.json and starts this file; LitGPT lives in an
environment without the other libraries, so each function imports its own.
"""

import functools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Job = dict[str, Any]
Row = dict[str, list[int]]  # input_ids, labels
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32  # of the frozen base, as lora's `dtype: auto`
# Ours, and ours with one setting changed.
VARIANTS: dict[str, dict[str, Any]] = {
    "ours": {},
    "unshared": {"share_prefixes": False},
    "compiled": {"compile": True},
    "recomputed": {"activation_checkpointing": True},
}


def peak_rss() -> int:
    """Return the largest resident memory that this process has had, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


class Turns:
    """The contender's end of the line to the driver."""

    def __init__(self, job: Job) -> None:
        self.tokens = iter([sum(len(row["input_ids"]) for row in rows) for rows in rows_of_steps(job)])
        self.began = 0.0
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print goes to the log

    def answer(self, **values: Any) -> None:
        """Send one line."""
        print(json.dumps(values), file=self.answers, flush=True)

    def ready(self) -> None:
        """Say that everything is loaded, and wait for the first step."""
        self.answer(peak_rss=peak_rss())
        self.wait()

    def wait(self) -> None:
        """Wait until a step is asked for; end with the driver."""
        if not sys.stdin.readline():
            os._exit(0)
        self.began = time.perf_counter()

    def done(self, loss: float, seconds: float | None = None, tokens: int | None = None) -> None:
        """Answer a step, and wait for the next one."""
        if ON_GPU:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.began if seconds is None else seconds
        due = next(self.tokens)
        peak_device = torch.cuda.max_memory_allocated() if ON_GPU else 0
        self.answer(
            seconds=seconds, tokens=tokens or due, loss=float(loss), peak_rss=peak_rss(), peak_device=peak_device
        )
        self.wait()


def rows_of_steps(job: Job) -> list[list[Row]]:
    """Return the rows of each step, in the order in which they are drawn."""
    return [[job["rows"][index] for index in step] for step in job["steps"]]


def padded(rows: list[Row], key: str, filler: int) -> Tensor:
    """Return one column of some rows as a matrix, filled up on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row[key]) for row in rows], True, filler)


# --- ours ---


class Examples:
    """Rows as the examples of lora's loop."""

    def __init__(self, job: Job) -> None:
        import numpy as np

        from lora_cli.examples import Example

        self.keys = job["keys"]
        self.examples = [Example(tuple(row["input_ids"]), tuple(row["labels"]), "") for row in job["rows"]]
        self.lengths = np.array([len(example) for example in self.examples])

    def __len__(self) -> int:
        return len(self.examples)

    def column(self, name: str) -> Any:
        """Return what rows with the same prompt have in common."""
        import numpy as np

        return np.array(self.keys)

    def __getitem__(self, index: int) -> Any:
        return self.examples[index]


def load_ours(job: Job, dtype: str = "auto") -> Any:
    """Load the base model as `lora train` does; no tokenizer is needed."""
    import transformers

    from lora_cli.config import ModelConfig
    from lora_cli.model import ModelHeader, load_model

    folder = Path(job["model"])
    header = ModelHeader(folder, transformers.AutoConfig.from_pretrained(folder), None, None)  # type: ignore[arg-type]
    return load_model(header, ModelConfig(path=job["model"], dtype=dtype), DEVICE)


def build_loop(job: Job, tokens: str, name: str = "ours") -> Any:
    """Build the loop of `lora train` over the job's rows, without validation."""
    from lora_cli.adapter_folder import Origin
    from lora_cli.batches import Mixture, Part
    from lora_cli.config import RunConfig
    from lora_cli.dataset import TrainingSet
    from lora_cli.interrupt import StopRequest
    from lora_cli.loop import Loop
    from lora_cli.run_dir import RunDir

    train = {
        "epochs": 1,
        "batch_size": len(job["steps"][0]),
        "learning_rate": job["learning_rate"],
        "schedule": "constant",
        "warmup_ratio": 0.0,
        "micro_batch_tokens": tokens if tokens == "auto" else int(tokens),
        "order": job["order"],
    } | VARIANTS[name]
    config = RunConfig(
        model=job["model"],
        lora={key: job[key] for key in ("rank", "alpha", "dropout")},
        data={"train": "rows", "validation": 0},
        train=train,
        save={"per_epoch": 1},
        seed=job["seed"],
        output_dir=job["folder"],
    )
    examples: Any = Examples(job)
    training = TrainingSet(examples, Mixture((Part(0, len(job["rows"])),)))
    origin = Origin(job["model"], None, "", {})
    run = RunDir(Path(job["folder"]))
    return Loop(config, run, load_ours(job), training, None, None, origin, StopRequest(), tokens_of(tokens))


def tokens_of(setting: str) -> int:
    """Return the tokens of a forward."""
    from lora_cli.memory import tokens_worth_it

    return tokens_worth_it(DEVICE) if setting == "auto" else int(setting)


def run_ours(job: Job, turns: Turns, tokens: str, name: str = "ours") -> None:
    """Take steps with lora's own loop; the adapter it starts with is written down for the others."""
    import safetensors.torch

    from lora_cli import lora
    from lora_cli.records import StepDone

    loop = build_loop(job, tokens, name)
    start = {path: parameter.detach() for path, parameter in lora.trainable(loop.model.module).items()}
    safetensors.torch.save_file(start, job["start"])
    turns.ready()
    for event in loop:
        if isinstance(event, StepDone):
            turns.done(event.loss, event.seconds, event.tokens)


# --- transformers' Trainer and TRL's, with PEFT ---


def load_base(job: Job) -> Any:
    """Load the base model in transformers' own way."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=DTYPE)


def peft_config(job: Job) -> Any:
    """Return PEFT's settings for the adapter of the job."""
    import peft

    shape = {"r": job["rank"], "lora_alpha": job["alpha"], "lora_dropout": job["dropout"]}
    return peft.LoraConfig(**shape, target_modules="all-linear", task_type="CAUSAL_LM")


def adapter_of(model: Any) -> dict[str, torch.nn.Parameter]:
    """Return the adapter's parameters of a PEFT model, by the names they have here."""
    return {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }


@torch.no_grad()
def set_adapter(model: Any, values: dict[str, Tensor]) -> None:
    """Give a PEFT model the adapter of ours."""
    theirs = adapter_of(model)
    assert theirs.keys() == values.keys(), "the same layers are adapted"
    for name, value in values.items():
        theirs[name].copy_(value)


def settings(job: Job, micro_batch: int) -> dict[str, Any]:
    """Return the training arguments that Trainer and SFTTrainer share; a step is logged as it ends."""
    batch_size = len(job["steps"][0])
    return {
        "output_dir": job["folder"],
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": batch_size // micro_batch,
        "max_steps": len(job["steps"]),
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "sequential",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": not ON_GPU,
        "dataloader_pin_memory": ON_GPU,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would write another number for a loss that is not finite
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": job["seed"],
    }


def run_trainer(trainer: Any, job: Job, turns: Turns) -> None:
    """Let a trainer run, stopping it between steps; it starts with our adapter where that is known."""
    import safetensors.torch
    import transformers

    class Pause(transformers.TrainerCallback):
        """Wait for the driver before each step."""

        def on_train_begin(self, *args: Any, **options: Any) -> None:
            turns.ready()

        def on_log(self, *args: Any, logs: dict[str, float], **options: Any) -> None:
            if "loss" in logs:  # of the step: the mean over its trained tokens
                turns.done(logs["loss"])

    if Path(job["start"]).exists():
        set_adapter(trainer.model, safetensors.torch.load_file(job["start"]))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(Pause())
    trainer.train()


def run_hf(job: Job, turns: Turns, micro_batch: str) -> None:
    """Take steps with transformers' Trainer over a PEFT model."""
    import peft
    import transformers

    def collate(rows: list[Row]) -> dict[str, Tensor]:
        ids = padded(rows, "input_ids", 0)
        lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
        mask = (torch.arange(ids.shape[1])[None] < lengths).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": padded(rows, "labels", -100)}

    rows = [row for step in rows_of_steps(job) for row in step]
    model = peft.get_peft_model(load_base(job), peft_config(job))
    arguments = transformers.TrainingArguments(**settings(job, int(micro_batch)))
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)
    run_trainer(trainer, job, turns)


def run_trl(job: Job, turns: Turns, micro_batch: str) -> None:
    """Take steps with TRL's SFTTrainer, whose default loss never holds the logits of a whole batch.

    Rows that are tokens already are trained as a whole, whatever `completion_mask` says, unless they bring `labels`.
    """
    import datasets
    import tokenizers
    import transformers
    import trl

    datasets.disable_progress_bars()
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")
    rows = datasets.Dataset.from_list([row for step in rows_of_steps(job) for row in step])
    arguments = trl.SFTConfig(**settings(job, int(micro_batch)), max_length=None)
    trainer = trl.SFTTrainer(
        model=load_base(job),
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=peft_config(job),
    )
    run_trainer(trainer, job, turns)


# --- LitGPT ---


def load_litgpt(job: Job) -> Any:
    """Build LitGPT's model with LoRA in every linear layer of its blocks, from the same base weights."""
    import safetensors.torch
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama, copy_weights_qwen_2_5

    folder = Path(job["model"])
    shape = json.loads((folder / "config.json").read_text())
    qwen = shape["model_type"] == "qwen2"
    parts = ("query", "key", "value", "projection", "mlp")
    config = Config(
        name=folder.name,
        block_size=max(len(row["input_ids"]) for row in job["rows"]),
        n_layer=shape["num_hidden_layers"],
        n_embd=shape["hidden_size"],
        vocab_size=shape["vocab_size"],
        padded_vocab_size=shape["vocab_size"],
        norm_class_name="RMSNorm",
        norm_eps=shape["rms_norm_eps"],
        parallel_residual=False,
        n_head=shape["num_attention_heads"],
        n_query_groups=shape["num_key_value_heads"],
        head_size=shape.get("head_dim"),
        attn_bias=qwen,
        rope_base=(shape.get("rope_parameters") or shape)["rope_theta"],
        rotary_percentage=1.0,
        intermediate_size=shape["intermediate_size"],
        bias=False,
        mlp_class_name="LLaMAMLP",
        lora_r=job["rank"],
        lora_alpha=job["alpha"],
        lora_dropout=job["dropout"],
        **{f"lora_{part}": True for part in parts},
    )
    model = GPT(config)
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        copy = copy_weights_qwen_2_5 if qwen else copy_weights_hf_llama
        copy(config, {}, weights, safetensors.torch.load_file(file), dtype=DTYPE)
    missing = model.load_state_dict(weights, strict=False, assign=True).missing_keys  # assigned: tied, as in the file
    assert all("lora_" in name for name in missing), missing
    mark_only_lora_as_trainable(model)
    return model.to(DEVICE).train()


def run_litgpt(job: Job, turns: Turns, micro_batch: str) -> None:
    """Take steps in the manner of `fit` in litgpt/finetune/lora.py, with clipping and the fused optimizer added."""
    from litgpt.utils import chunked_cross_entropy

    torch.manual_seed(job["seed"])
    model, size = load_litgpt(job), int(micro_batch)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=job["learning_rate"], weight_decay=0.0, fused=True)
    turns.ready()
    for rows in rows_of_steps(job):
        total, targets = torch.zeros((), device=DEVICE), 0
        for begin in range(0, len(rows), size):
            group = rows[begin : begin + size]
            ids, labels = padded(group, "input_ids", 0).to(DEVICE), padded(group, "labels", -100).to(DEVICE)
            logits = model(ids, lm_head_chunk_size=128)
            logits[-1] = logits[-1][..., :-1, :]
            loss = chunked_cross_entropy(logits, labels[..., 1:])
            (loss / (len(rows) // size)).backward()  # `fit` takes the mean of the micro-batches' means
            count = sum(label != -100 for row in group for label in row["labels"][1:])
            total += loss.detach() * count  # what is reported is the mean over the step's tokens, as by the others
            targets += count
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        turns.done(float(total) / targets)


# --- what is asked once ---


def check(job: Job, turns: Turns, tokens: str) -> None:
    """Compare the gradients of the summed loss of some rows, ours packed, PEFT's row by row.

    Both in float64: in float32 rounding alone reaches 1e-5 in a deep model, whichever way its rows are laid out.
    """
    import peft

    from lora_cli import lora
    from lora_cli.batches import micro_batches
    from lora_cli.config import LoraConfig
    from lora_cli.forward import form, lay_out, share_inputs, target_loss
    from lora_cli.fused import fuse

    global DTYPE
    DTYPE, job["dropout"] = torch.float64, 0.0
    rows = rows_of_steps(job)[0][:8]
    examples = Examples({"rows": rows, "keys": []}).examples
    ours = load_ours(job, "float32")
    lora.apply_lora(ours.module, LoraConfig(rank=job["rank"], alpha=job["alpha"]), job["seed"])
    ours.module.double()
    share_inputs(ours)
    fuse(ours.module)
    torch.manual_seed(job["seed"])
    for name, parameter in lora.trainable(ours.module).items():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.02)
    budget = tokens_of(tokens)
    total = 0.0
    for groups in micro_batches(examples, budget, form(ours), share=True):
        part = target_loss(ours, lay_out(ours, groups, examples))
        part.total.backward()
        total += float(part.total.detach())
    adapter = lora.trainable(ours.module)

    reference = peft.get_peft_model(load_base(job).to(DEVICE), peft_config(job)).eval()
    set_adapter(reference, {name: parameter.detach() for name, parameter in adapter.items()})
    for norm in reference.modules():  # their own forward, and the loss's, would round to float32 in between
        if hasattr(norm, "variance_epsilon"):
            options = {"normalized_shape": norm.weight.shape, "weight": norm.weight, "eps": norm.variance_epsilon}
            norm.forward = functools.partial(torch.nn.functional.rms_norm, **options)
    expected = 0.0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]).to(DEVICE), torch.tensor(row["labels"][1:]).to(DEVICE)
        loss = torch.nn.functional.cross_entropy(reference(input_ids=ids).logits[0, :-1], labels, reduction="sum")
        loss.backward()
        expected += float(loss.detach())
    errors = {
        name: float((adapter[name].grad - theirs.grad).norm() / theirs.grad.norm())
        for name, theirs in adapter_of(reference).items()
    }
    worst = max(errors, key=lambda name: errors[name])
    turns.answer(gradients=len(errors), error=errors[worst], worst=worst, loss_error=abs(total / expected - 1))


GROUPS = {  # looked for, in this order, in an operator's name and in those of the operators that called it
    "optimizer": ("Optimizer.step", "adam", "foreach", "clip_grad", "linalg_vector_norm"),
    "head and loss": ("HeadLoss", "log_softmax", "cross_entropy", "nll_loss"),
    "attention": ("attention", "Attention"),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "elementwise and norms": (
        *("aten::" + name for name in ("mul", "add", "div", "neg", "pow", "rsqrt", "mean", "sum", "silu", "sigmoid")),
        *("aten::" + name for name in ("cat", "copy_", "sub", "exp", "where", "bernoulli", "native_dropout", "fill_")),
    ),
}


def group_of(event: Any) -> str:
    """Return the group of an operator; one of lora's own functions or of the optimizer owns what it calls."""
    chain = [event.name]
    while event := event.cpu_parent:
        chain.append(event.name)
    for group, names in GROUPS.items():
        looked_at = chain[:1] if names[0].startswith("aten::") else chain
        if any(name in called for called in looked_at for name in names):
            return group
    return "other"


def profile(job: Job, turns: Turns, tokens: str) -> None:
    """Take one step to warm up and one under torch.profiler; answer the seconds of each group of operators.

    The profiler sees its own thread only: forwards that run side by side are taken one after the other, as one of them
    runs.
    """
    from torch.profiler import ProfilerActivity

    loop = build_loop(job, tokens)
    torch.set_num_threads(max(1, torch.get_num_threads() // len(loop.lanes)))
    loop.lanes = loop.lanes.alone()
    events: Iterator[Any] = iter(loop)
    next(events)
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if ON_GPU else [ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        step = next(events)
    seconds: dict[str, float] = {}
    for event in profiler.events():
        took = event.self_device_time_total if ON_GPU else event.self_cpu_time_total
        seconds[group_of(event)] = seconds.get(group_of(event), 0.0) + took / 1e6
    turns.answer(seconds=seconds, step=step.seconds)


def main() -> None:
    name, path, setting = sys.argv[1:]
    if name in VARIANTS:  # as `lora train` begins
        from lora_cli.heap import restart_without_caches

        restart_without_caches()
    job = json.loads(Path(path).read_text())
    functions: dict[str, Any] = {name: functools.partial(run_ours, name=name) for name in VARIANTS}
    functions |= {"hf": run_hf, "trl": run_trl, "litgpt": run_litgpt, "check": check, "profile": profile}
    functions[name](job, Turns(job), setting)


if __name__ == "__main__":
    main()
