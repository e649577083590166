"""Measure the preparation of data: memory, the second start, and tokens a second beside TRL's on the same file.

    python scripts/bench_data.py scale MODEL [--rows 1000000]   `lora check` twice on short rows; their memory
    python scripts/bench_data.py peer MODEL [--rows 50000]      pairs of preparation, ours and TRL's (needs .[bench])

MODEL is the folder of a model with a chat template, such as models/SmolLM2-135M-Instruct. TRL runs with one process and
with as many as there are processors; its better run of each pair counts.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = (
    "river stone cloud light paper engine garden window number letter music colour winter morning table answer silver "
    "mountain little quick bright simple early open under over between water city house road north"
)


def make_rows(path: Path, count: int) -> None:
    """Write short conversations: a question of 4 to 12 words, an answer of 3 to 14, no two the same."""
    choose, words = random.Random(0), WORDS.split()
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            asked = f"Question {number}: {' '.join(choose.choices(words, k=choose.randint(4, 12)))}?"
            said = " ".join(choose.choices(words, k=choose.randint(3, 14))).capitalize() + "."
            prompt, completion = {"role": "user", "content": asked}, {"role": "assistant", "content": said}
            file.write(json.dumps({"prompt": [prompt], "completion": [completion]}) + "\n")


def memory(process: int) -> tuple[int, int]:
    """Return (shared memory counted once, counted in each process) of a process and its children, in bytes."""
    pss = rss = 0
    children = subprocess.run(["pgrep", "-P", str(process)], capture_output=True, text=True, check=False).stdout
    for number in (process, *map(int, children.split())):
        try:
            lines = Path(f"/proc/{number}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        values = {line.split()[0]: int(line.split()[1]) * 1024 for line in lines[1:]}
        pss, rss = pss + values["Pss:"], rss + values["Rss:"]
    return pss, rss


def watched(command: list[str], environment: dict[str, str]) -> tuple[float, int, int]:
    """Run a command; return its seconds and the peaks of its memory."""
    began = time.monotonic()
    pss = rss = 0
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            now = memory(process.pid)
            pss, rss = max(pss, now[0]), max(rss, now[1])
            time.sleep(0.25)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return time.monotonic() - began, pss, rss


def scale(model: str, rows: int, folder: Path) -> None:
    """Run `lora check` twice on a large file: the first makes the tokens, the second finds them kept."""
    make_rows(folder / "rows.jsonl", rows)
    config = folder / "config.yaml"
    config.write_text(f"model: {model}\ndata: {{train: {folder}/rows.jsonl}}\noutput_dir: {folder}/run\n")
    environment = os.environ | {"LORA_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    times = []
    for name in ("first", "second"):
        seconds, pss, rss = watched([sys.executable, "-m", "lora_cli", "check", str(config)], environment)
        times.append(seconds)
        print(
            f"{name} start: {seconds:.1f} s, peak {pss / 2**30:.2f} GiB "
            f"({rss / 2**30:.2f} GiB where shared memory counts in each process)"
        )
    print(f"{rows:,} rows: the second start is {times[0] / times[1]:.1f} times faster")


def prepare_ours(model: str, data: str) -> tuple[float, int]:
    """Return the seconds and tokens of one preparation by lora, nothing kept before."""
    from lora_cli.config import ModelConfig
    from lora_cli.data_config import DataConfig
    from lora_cli.data_reader import DataReader, run_to_end
    from lora_cli.model import read_header

    config = DataConfig(train=data)
    reader = DataReader(config, read_header(ModelConfig(path=model)))
    began = time.perf_counter()
    _, counts = run_to_end(reader.held_out(config.sources[0]))
    return time.perf_counter() - began, counts.tokens


def prepare_trl(model: str, data: str, processes: int | None) -> tuple[float, int]:
    """Return the seconds and tokens of one preparation by TRL's SFTTrainer, with a model of one small layer."""
    import datasets
    import transformers
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    tiny = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(tokenizer), **shape))
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder, dataset_num_proc=processes, max_length=None, use_cpu=True, report_to=[], bf16=False
        )
        began = time.perf_counter()
        rows = datasets.load_dataset("json", data_files=data, split="train", cache_dir=folder)
        trainer = SFTTrainer(model=tiny, args=settings, train_dataset=rows, processing_class=tokenizer)
        seconds = time.perf_counter() - began
        return seconds, sum(map(len, trainer.train_dataset["input_ids"]))


def peer(model: str, rows: int, folder: Path, pairs: int) -> None:
    """Prepare the same file with ours and with TRL's in turn, each in a process of its own."""
    make_rows(folder / "rows.jsonl", rows)
    ratios = []
    for pair in range(pairs):
        speeds = {}
        for name in ("ours", "trl-1", f"trl-{os.cpu_count()}"):
            environment = os.environ | {
                "LORA_CACHE": str(folder / f"cache-{pair}"),
                "HF_HUB_OFFLINE": "1",
                "HF_DATASETS_CACHE": str(folder / f"hf-{name}-{pair}"),
            }
            command = [sys.executable, __file__, "one", model, "--name", name, "--data", str(folder / "rows.jsonl")]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr[-2000:])
            seconds, tokens = json.loads(done.stdout.splitlines()[-1])
            speeds[name] = tokens / seconds
            shutil.rmtree(folder / f"hf-{name}-{pair}", ignore_errors=True)
        ours = speeds.pop("ours")
        best = max(speeds, key=lambda name: speeds[name])
        ratios.append(ours / speeds[best])
        print(
            f"pair {pair + 1}: ours {ours:,.0f} tokens/s, {best} {speeds[best]:,.0f}, ratio {ratios[-1]:.2f}",
            flush=True,
        )
    print(f"median of {pairs} paired ratios: {statistics.median(ratios):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["scale", "peer", "one"])
    parser.add_argument("model")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.what == "one":
        who, _, processes = given.name.partition("-")
        one = (
            prepare_ours(given.model, given.data)
            if who == "ours"
            else prepare_trl(given.model, given.data, None if processes == "1" else int(processes))
        )
        print(json.dumps(one))
        return
    with tempfile.TemporaryDirectory(prefix="lora-bench-") as folder:
        if given.what == "scale":
            scale(given.model, given.rows or 1_000_000, Path(folder))
        else:
            peer(given.model, given.rows or 50_000, Path(folder), given.pairs)


if __name__ == "__main__":
    main()
