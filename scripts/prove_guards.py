"""Prove that the test of each row of docs/silent-traps.md fails when what it guards is switched off.

    python scripts/prove_guards.py [ROW ...]     all rows, or some; exit 1 if anything is not proven

A proof is a copy of the package with one change, the test of that row run on it, and its failure. Without a change all
tests have to pass, and the table and the list below have to have the same rows. The libraries are imported once; each
proof is a process forked after that, which imports its own copy of the package.
"""

import contextlib
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as the tests have it; the libraries are imported before these are

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "silent-traps.md"
SECONDS = 120  # for one proof
ALSO = 0  # an edit that belongs to the one above: only together do they switch the guard off

# Row, file, old text, new text. Several edits of one row are several proofs.
EDITS = [
    # what is trained
    (1, "dataset", "kept = dataset.targets > 0", "kept = dataset.targets >= 0"),
    (2, "dataset", 'config.too_long == "error"', "False"),
    (3, "dataset", "int(dataset.whole_targets.sum()) -", "int(fitting.targets.sum()) -"),
    (4, "data_reader", "min(config.max_length, header.max_positions or config.max_length)", "config.max_length"),
    (5, "examples", "((len(prompt), len(prompt)", "((0, len(prompt)"),
    (6, "spans", "render(row, index, prompt=True)", "render(row, index, prompt=False)"),
    (7, "spans", "if self.template.marks_generation:", "if True:"),
    (8, "spans", "if self.template.marks_generation:", "if False:"),
    (9, "spans", "return between.removeprefix(closing) + answer", "return between + answer"),
    (10, "spans", "between.startswith(closing)", "True"),
    (11, "batches", "if label != IGNORED:", "if label not in (IGNORED, 2):"),
    (12, "spans", "if not end:", "if False:"),
    (ALSO, "examples", "ids[end - 1] not in self.added_ids", "False"),
    (13, "examples", "if ids and ids[-1] == self", "if False and ids[-1] == self"),
    (14, "examples", "add_special_tokens=special)", "add_special_tokens=True)"),
    (ALSO, "examples", "ids[0] == ids[1] == bos", "False"),
    (15, "examples", "ids[0] == ids[1] == bos", "False"),
    (16, "examples", "self._backend.no_truncation()", "pass"),
    (17, "examples", "(Flag.NONE if exact else Flag.LOSSY)", "Flag.NONE"),
    (18, "examples", "if across and (apart", "if False and (apart"),
    (19, "conversation", "return weight != 0 and train is not False", "return True"),
    # thinking
    (20, "spans", "return empty.end() if empty else 0", "return 0"),
    (21, "spans", "together is not None and whole.text.startswith(before + answer)", "together is not None"),
    (ALSO, "examples", "ids[end - 1] not in self.added_ids", "False"),
    (22, "fidelity", '("reasoning", thought)', '("reasoning", "")'),
    (23, "spans", "return 0 if thought else len(closed), answer", "return 0, answer"),
    # chat templates
    (24, "fidelity", "if said in prompt:", 'if said in prompt or message.role == "system":'),
    (25, "chat_template", "messages = _merged(messages)", "pass"),
    (26, "spans", "require_parts(body, message)", "pass"),
    (27, "session", "prepared.template.files(*adapter.TEMPLATES)", "{}"),
    (28, "chat_template", "return _TODAY.sub(", "return source or _TODAY.sub("),
    (29, "notices", "if not template.repeats:", "if False:"),
    (30, "data_reader", "if templated and self.template is None:", "if False:"),
    (31, "chat_template", '"<|im_end|>" not in tokenizer.get_vocab()', "False"),
    (32, "limits", "if threading.current_thread() is threading.main_thread():", "if False:"),
    (33, "limits", "resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))", "pass"),
    # control tokens
    (34, "examples", "broken = count > 0 and", "broken = False and"),
    (35, "control_tokens", "_role_markers(template, added_tokens(tokenizer)) if template", "set() if template"),
    (36, "data_reader", "share > 0.5", "share > 1.5"),
    (37, "examples", "if broken else (ids, offsets)", "if True else (ids, offsets)"),
    # tools and parts
    (38, "conversation", 'not isinstance(function.get("arguments"), str)', "True"),
    (39, "conversation", "value = parse_json(value)", "value = list(value)"),
    (40, "fidelity", '(("tool call", name)', '(("tool call", "")'),
    (41, "chat_template", "self._dated_with_tools if row.tools", "self._dated if row.tools"),
    (42, "conversation", 'isinstance(p, dict) and p.get("type") == "text"', "isinstance(p, dict)"),
    (43, "conversation", 'if role == "function_call":', "if False:"),
    (44, "fidelity", "        if names:\n", "        if False:\n"),
    (45, "fidelity", "if lost := next(", "if lost := None and next("),
    (46, "fidelity", "if said in prompt:", 'if said in prompt or message.role == "tool":'),
    (47, "examples", "Flag.WITHOUT_TOOLS if left_out", "Flag.NONE if left_out"),
    (48, "data_file", "for key, inner in value.items() if inner is not None}", "for key, inner in value.items()}"),
    # rows and files
    (49, "data", 'problems.append(f"{self.file.place(number)}{row.problem}")', "pass"),
    (50, "data_file", "if len(row) != len(pairs):", "if False:"),
    (51, "data_file", ", parse_constant=_no_constant", ""),
    (52, "data", "format=format or detect_format(first, reader.named)", "format=format"),
    (53, "data", "if (close := difflib.get_close_matches(key, list(map(str, row)), n=1))", "if (close := [])"),
    (54, "data", 'if {"chosen", "rejected"} <= row.keys()', "if False"),
    (55, "data", "if not completion.strip():", "if False:"),
    (56, "conversation", 'if not any(m.role == "assistant" for m in messages):', "if False:"),
    (ALSO, "conversation", "if not any(m.trained for m in messages):", "if False:"),
    (57, "conversation", "        text.encode()\n", '        text.encode("utf-8", "ignore")\n'),
    (58, "data", "if missing := [name for name in self.fields.values()", "if missing := [name for name in ()"),
    (ALSO, "data", "{k: row[v] for", "{k: row.get(v) for"),
    (59, "data", "if row.get(name) is None or row[name] != row[name]:", "if name not in row:"),
    (60, "conversation", "if not system:", "if True:"),
    (61, "conversation", 'text_of(part, "text")', 'str(part.get("text"))'),
    (62, "conversation", "if role not in known and", "if role in known and"),
    (63, "data", "if named <= _read_by(name)", "if True"),
    (64, "sources", 'p.name[0] != "."', "True"),
    (65, "sources", 'if set(split) & set("[+"):', "if False:"),
    (
        66,
        "data_file",
        "        if len(set(names)) < len(names):\n            twice",
        "        if False:\n            twice",
    ),
    (67, "data", "if name not in read]", "if name not in row]"),
    (68, "examples", "Flag.BLANK if blank", "Flag.NONE if blank"),
    (69, "data_file", "line = line.removeprefix(codecs.BOM_UTF8)", "pass"),
    (70, "data_file", "if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):", "if False:"),
    (71, "data_file", "if len(set(names)) < len(names) or", "if"),
    (71, "data_file", '";" in names[0]', "False"),
    (72, "data_file", "row if found == len(names) else Broken(wrong)", "row"),
    (73, "data_file", "csv.field_size_limit(LONGEST_LINE)", "pass"),
    (74, "data_file", "EOFError() | ", "EOFError():\n                return True\n            case "),
    # split
    (75, "dataset", "if not overlap.prompts or config.allow_overlap:", "if True:"),
    (76, "dataset", "np.flatnonzero(same_row | same_prompt)", "np.flatnonzero(same_row)"),
    (77, "dataset", 'keys = dataset.column("prompt_keys")[first]', "keys = np.arange(len(first))"),
    (78, "dataset", 'keys = dataset.column("group_keys")[first]', "keys = np.arange(len(first))"),
    (79, "prepare", "[sets.train, replay] if replay else [sets.train]", "[sets.train]"),
    (80, "examples", 'm.extra.get("tool_calls"))', "m.extra)"),
    (81, "held_out", "if before not in (None, held_out.fingerprint()):", "if False:"),
    (82, "dataset", "duplicates=len(keys) - len(np.unique(keys))", "duplicates=0"),
    (83, "dataset", "if not 0 < count < len(first):", "if False:"),
    # mixing, batches and order
    (84, "dataset", "float(replay.lengths.sum())", "(tokens * len(replay) / len(train))"),
    (85, "batches", "(epoch * some + index) % part.count", "index"),
    (86, "batches", "return max(1, int", "return max(0, int"),
    (87, "attention", "x.split(segments.lengths, dim=2)", "x.split([sum(segments.lengths)], dim=2)"),
    (ALSO, "layout", "return agree(together[0], logits, module.dtype)", "return True"),
    (96, "fused", "return x.is_meta or agree(ours(x), theirs, x.dtype)", "return True"),
    (88, "step", "counts / targets", "counts / part.targets / len(examples)"),
    (89, "loss", "self.targets + other.targets", "max(self.targets, other.targets)"),
    (90, "batches", 'derive_seed(seed, "order", epoch)', 'derive_seed(seed, "order", 0)'),
    # kept tokens, processes, resuming
    (91, "corpus", "content = reader.file.digest()", "content = reader.file.name"),
    (91, "corpus", "tokenizer.backend_tokenizer.to_str()", "None"),
    (91, "corpus", "None if template is None else asdict(template)", "None"),
    (91, "corpus", '"rows": [reader.format,', '"rows": [None,'),
    (91, "corpus", "dict(reader.fields),", "None,"),
    (91, "corpus", '"controls": encoder.keep_controls', '"controls": None'),
    (92, "corpus", "(problems := manifest.problems_in(folder))", "(problems := [])"),
    (93, "corpus", "if reader.file.digest() != content:", "if False:"),
    (94, "parallel", "except BrokenProcessPool:", "except BrokenProcessPool:\n        return"),
    (95, "resume", "    if changed:\n", "    if False:\n"),
    (97, "ends", "if not twins:", "if True:"),
    # evaluation and forgetting
    (
        98,
        "intervals",
        "if not len(sums):\n        return Estimate(None, None, None, 0)",
        "if not len(sums):\n        return Estimate(0.0, 0.0, 0.0, 0)",
    ),
    (99, "intervals", "return sums.shape[1] == 2 and bool(", "return False and bool("),
    (
        100,
        "evaluate",
        "if not isinstance(examples, Dataset):\n        return np.arange",
        "if True:\n        return np.arange",
    ),
    (101, "checkpoint", "excess = max(0.0, forgetting - budget)", "excess = 0.0 * max(0.0, forgetting - budget)"),
    (102, "loss", "self.total.detach() - self.penalty", "self.total.detach()"),
    (103, "scoring", "if lost := [", "if lost := [] and ["),
    (104, "prepare", 'dataset.require_no_overlap(dataset.find_overlap(trained_on, test), config.data, "test")', "pass"),
    (105, "loop", "checkpoint.load_trained(chosen, self.model.module)\n", "pass\n"),
    (106, "adapter_folder", "_whole(other * gain) for pattern", "_whole(other) for pattern"),
    # merging
    (107, "merge", "if over and not force:", "if False:"),
    (108, "merge", "agreement.effect / 2)", 'float("inf"))'),
    (109, "merge", "adapter.WEIGHTS) in merged:", "adapter.WEIGHTS) in ():"),
    (110, "merge", 'if getattr(first.header.config, "quantization_config", None):', "if False:"),
    (111, "tensor_file", "if end != size:", "if False:"),
    (112, "merged_folder", "_require_finite(name, rounded)", "pass"),
    (113, "adapter", 'problems.append(f"{adapter.folder}: adapts {path}, {what}.")', "pass"),
    (114, "weights", 'problems.append(f"{path}: is adapted, and', 'str(f"{path}: is adapted, and'),
    # exports
    (115, "formats/gguf_architecture", "halves.transpose(1, 2).flatten(0, 2)", "halves.flatten(0, 2)"),
    (
        116,
        "formats/gguf_export",
        "found.rows(adapter.lora_B[path] * adapter.scales[path])",
        "found.rows(adapter.lora_B[path])",
    ),
    (117, "formats/mlx_adapter", "up = adapter.lora_B[path] * adapter.scales[path]", "up = adapter.lora_B[path]"),
    (
        118,
        "formats/gguf_pre_tokenizer",
        "not in PRE_TOKENIZERS:",
        'not in PRE_TOKENIZERS:\n        return "gpt-2"\n    if False:',
    ),
    (119, "formats/gguf_file", "if not _within(got, meant, tensor.kind):", "if False:"),
    (120, "formats/gguf_architecture", "if problems := list(_problems(config, architecture)):", "if problems := []:"),
    (121, "formats/ollama", "if frame.expand(messages) != _render(template, messages):", "if False:"),
    (122, "formats/mlx_adapter", "if theta is None or", "if True or"),
    # disturbed runs, several processes, strangers
    (123, "resume", "if is_changed(found) and not override:", "if False:"),
    (
        124,
        "resume",
        "if fixed := [change for change in found if change.rule is OnResume.FIXED]:",
        "if fixed := list[Change]():",
    ),
    (125, "resume", "before[key] != environment.get(key)]", "False]"),
    (126, "run_dir", "if not isinstance(written, int) or written > FORMAT:", "if not isinstance(written, int):"),
    (127, "train", "is_held = is_main and run.path.is_dir()", "is_held = False"),
    (128, "checkpoint", "    metrics.keep(run)\n", ""),
    (129, "train", '            room.require_writable(run.path, "output_dir")\n', "            pass\n"),
    (130, "train", "        _require_room(config, run, prepared)\n", "        pass\n"),
    (131, "distributed", "for item in items[self.rank :: self.size])", "for item in items)"),
    (132, "lora_linear", "keys = next((keys for keys in self.tokens.keys if len(keys) == rows), None)", "keys = None"),
    (133, "loop", "self.world.add_up(self.lanes.gradients)", "pass"),
    (134, "step", "not (checked and not math.isfinite(float(lane.gradients.norm())))", "True"),
    (135, "loop", "self._require_sound(number, loss.mean, summed)", "pass"),
    (136, "metrics", '(evaluated or record["event"] == "step")', "True"),
    (137, "checkpoint", "state.evaluated = numbers.evaluated", "state.evaluated = True"),
    (138, "loop", "self.losses.extend(self.world.from_main(losses[-WINDOW:]))", "pass"),
    (139, "limits", "signal.setitimer(signal.ITIMER_PROF, 2 * seconds + 0.1)", "pass"),
    (140, "names", 'if part in ("", ".", ".."):', "if False:"),
    (141, "run_dir", "names.iter_links_out(run.path)", "()"),
    (142, "errors", "one_line(redact(problem)) for problem in problems", "one_line(problem) for problem in problems"),
    (143, "config_checks", 'pinned = re.fullmatch(r"[0-9a-f]{40}", model.revision or "")', "pinned = True"),
    (144, "remote_code", 'if "--" in json.dumps(named):', "if False:"),
    (145, "tuned", "if section.trust_remote_code and base is None:", "if False:"),
    (146, "adapter", "    _require_sane(folder / WEIGHTS)\n", ""),
    (147, "notices", "if counts.secrets:", "if False:"),
    (148, "model", "    base_folder.require_whole(header.folder)\n", ""),
    (149, "manifest", "if not problems and text !=", "if False and text !="),
    (150, "strict_yaml", "Dumper=_Dumper, sort_keys", "Dumper=yaml.SafeDumper, sort_keys"),
    (151, "adapter", "if said != rank:", "if False:"),
    (152, "examples", "(largest := max(ids, default=0)) >= self.vocabulary", "(largest := 0) > 0"),
    # several processes, parts and few bits of a base
    (153, "distributed", "if self.in_step and 0 < len(items)", "if False and 0 < len(items)"),
    (154, "step", "(part.total * (counts / targets)).backward()", "(part.total / targets).backward()"),
    (155, "heartbeat", "if silent > SILENT and count >= 0:", "if False:"),
    (156, "heartbeat", "if self.unanswered > SILENT:", "if False:"),
    (157, "launcher", "(rank, failure.exitcode) for rank", "(rank, 1) for rank"),
    (158, "generate", "world.gather(list(answers.items()))", "[list(answers.items())]"),
    (159, "memory", "return int(whole + sum(of_block) / shared)", "return int(whole + sum(of_block))"),
    (160, "distributed", "return free // processes", "return free"),
    (161, "attention", "parts = [number] if segment.prefix is None else [segment.prefix, number]", "parts = [number]"),
    (
        162,
        "quantised",
        "shape=torch.Size([2 * self.packed.numel()])",
        "shape=torch.Size((self.out_features, self.in_features))",
    ),
    (163, "merged_folder", " and name not in weights.quantised and", " and"),
    (
        164,
        "model",
        'if config.quantization is not None and getattr(parsed, "quantization_config", None):',
        "if False:",
    ),
    (165, "model", " or any(len({places[name] for name in names}) > 1 for names in tied)", ""),
    (166, "session", 'config.train.model_copy(update={"max_steps": steps})', "config.train"),
    # variants of LoRA, full fine-tuning, searches
    (167, "optim", "increment_version(list(parameters.values()))", "None"),
    (168, "lora_linear", "bias = self.base.bias if self.magnitude is None else None", "bias = self.base.bias"),
    (169, "lora_linear", "torch.cat([self.lora_B, -self.start_up], 1)", "torch.cat([self.lora_B, self.start_up], 1)"),
    (170, "adapter_folder", "_whole(config.alpha * more)", "_whole(config.alpha)"),
    (171, "space", "if key not in known:", "if False:"),
    (172, "study", 'derive_seed(self._seed, "tune", trial.number)', 'derive_seed(self._seed, "tune")'),
    (173, "sensitivity", "any(abs(change or 0.0) > noise for change in changes)", "True"),
    (174, "step", "mean if mean > base_loss + _LOST else None", "None"),
    (175, "notices", "if _FAR > rate / usual > 1 / _FAR:", "if True:"),
    (176, "full", "return self.tuned if gain else self.base", "return self.tuned"),
    (177, "loss", "of_weight.addmm_(exponentials.T, x * scale)", "pass"),
    (178, "loss", "*(pull.head or (weight, bias))", "weight, bias"),
    (179, "config", '{"learning_rate": FULL_LEARNING_RATE}', "{}"),
    # what people see and touch
    (180, "convert", "        if key not in done:", "        if key not in done and value is not None:"),
    (181, "peers/trainer", "(parts or 1)) * source.processes", "(parts or 1))"),
    (182, "peers/base_and_adapter", "math.sqrt(abs(r)) if dora and rslora else 1", "1"),
    (183, "columns", "found = find(first_row(train))", "found: dict[str, tuple[Any, str]] = {}"),
    (184, "survey", "        if memory.fits is not False:\n            return\n", "        return\n"),
    (
        185,
        "data_config",
        "BeforeValidator(path_to_section, json_schema_input_type=Text | SourceConfig)",
        "BeforeValidator(path_to_section)",
    ),
    (186, "prompts", "_THOUGHT if think else {}", "{}"),
    (187, "decoding", "            self._cache.crop(-extra)", "            pass"),
    (188, "speaker", "                self.decoder.forget()\n", ""),
    (189, "text_stream", "(whole and text.endswith(_HALF)) or ", ""),
    (190, "markup", "return escape(in_lines(redact(text)))", "return in_lines(redact(text))"),
    (191, "curves", "min(known)[1], max(known)[1], ", ""),
    (192, "report", "if not is_ours:", "if False:"),
    (193, "resume", "{**start.origins, **kept}", "{**kept, **start.origins}"),
    (194, "tracking", 'and record["step"] <= started.step', 'and record["step"] < 0'),
    (195, "trackers/recorder", "except BaseException as error:", "except KeyError as error:"),
    (196, "self_test", "passed=learned and difference", "passed=difference"),
    (
        197,
        "console",
        "return err.is_terminal and not err.is_dumb_terminal and sys.stderr.isatty()",
        "return err.is_terminal",
    ),
    (198, "stand_ins", "stream.reconfigure(errors=ERRORS)", 'stream.reconfigure(errors="strict")'),
    (199, "follower", "if event.warns or not self._quiet:", "if event.text:"),
    (
        200,
        "metrics",
        "record = record.get(key) if isinstance(record, Mapping) else None",
        "record = record.get(column)",
    ),
    (201, "session", "Interrupted | GeneratorExit | KeyboardInterrupt", "Interrupted | GeneratorExit"),
    (202, "ending", "_exit(Problem(1, [bug], log))", "sys.exit(1)"),
    (203, "convert", '    return f"# {one_line(text)}"', '    return f"# {text}"'),
    (204, "speaker", "        self._attached = None", "        pass"),
    (
        205,
        "api",
        "    yield from tracking.tracked(training.train(config, stop or StopRequest(), override), config)",
        "    yield from training.train(config, stop or StopRequest(), override)",
    ),
]


@dataclass(frozen=True)
class Proof:
    """A row of the table, its test, and the edits (file, old text, new text) that switch its guard off."""

    row: int
    test: str
    edits: Sequence[tuple[str, str, str]]


# --- in a process of its own ---


class Answer:
    """What became of each test, listened to as a plugin of pytest; a parametrised one is one test."""

    def __init__(self) -> None:
        self.code = 0  # of pytest
        self.passed: set[str] = set()
        self.failed: dict[str, str] = {}  # and what was said first

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = report.nodeid.split("[")[0]
        if report.failed:
            said = report.longrepr.reprcrash.message if report.when == "call" else f"broken in {report.when}"
            self.failed.setdefault(name, said.splitlines()[0])
        elif report.when == "call" and report.passed:
            self.passed.add(name)


def run_tests(folder: Path, tests: Sequence[str], sender: Any) -> None:
    """Run tests on the package of a folder, and send an Answer."""
    with (folder / "output.txt").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(folder)
    (folder / "tmp").mkdir()
    os.environ |= {"PYTHONPATH": str(folder), "TMPDIR": str(folder / "tmp"), "HF_HUB_OFFLINE": "1"}
    sys.path.insert(0, str(folder))
    tempfile.tempdir = None  # look for it again
    import pytest

    answer = Answer()
    answer.code = int(pytest.main(["-p", "no:cacheprovider", *tests], plugins=[answer]))
    files = {Path(module.__file__ or "") for name, module in sys.modules.items() if name.split(".")[0] == "lora_cli"}
    if not all(file.is_relative_to(folder / "lora_cli") for file in files):
        answer.code = 99  # another copy of the package was tested
    sender.send(answer)


# --- all of them ---


def copy_package(folder: Path, proof: Proof | None) -> None:
    """Copy the package and its tests, with the edits of a proof. Raises ValueError when an edit does not fit."""
    for name in ("lora_cli", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "pyproject.toml", folder / "pyproject.toml")
    for file, old, new in proof.edits if proof else ():
        path = folder / "lora_cli" / f"{file}.py"
        text = path.read_text(encoding="utf-8")
        if (count := text.count(old)) != 1:
            raise ValueError(f"{file}.py holds {old!r} {count} times, not once")
        path.write_text(text.replace(old, new), encoding="utf-8")


def problem_of(proof: Proof | None, tests: Sequence[str], answer: Answer | None) -> str:
    """Return why an answer proves nothing; "" where it does. Without a proof, every test has to pass."""
    if answer is None:
        return f"died, or gave no answer in {SECONDS} s"
    if proof is None:
        return ", ".join(sorted({*answer.failed, *(set(tests) - answer.passed)}))
    failed = answer.code == 1 and set(answer.failed) == {proof.test} and "broken in" not in answer.failed[proof.test]
    return "" if failed else f"did not fail: exit code {answer.code}, {answer.failed}"


def read_proofs() -> list[Proof]:
    """Return the proofs, each with the test that the table names. Raises SystemExit where table and list disagree."""
    rows = re.findall(r"^\| (\d+) \|.*\| `([^`]+)` \|$", TABLE.read_text(encoding="utf-8"), re.MULTILINE)
    tests = {int(number): test for number, test in rows}
    proofs: list[Proof] = []
    for row, file, old, new in EDITS:
        if row == ALSO:
            last = proofs.pop()
            proofs.append(Proof(last.row, last.test, [*last.edits, (file, old, new)]))
        else:
            proofs.append(Proof(row, tests.get(row, ""), [(file, old, new)]))
    listed = {proof.row for proof in proofs}
    if listed != tests.keys() or len(rows) != len(tests) or sorted(tests) != list(range(1, len(tests) + 1)):
        sys.exit(f"{TABLE.name}, misnumbered or unlike the list in the rows {sorted(listed ^ tests.keys())}")
    return proofs


def main(wanted: set[int]) -> int:
    """Prove all rows, or the wanted ones; return the exit status."""
    proofs = [proof for proof in read_proofs() if not wanted or proof.row in wanted]
    for library in ("torch", "transformers", "datasets", "peft", "pytest"):
        __import__(library)
    context = multiprocessing.get_context("fork")
    everything = sorted({proof.test for proof in proofs})
    waiting: list[Proof | None] = [None, *proofs]
    running: dict[Any, tuple[Proof | None, Any]] = {}
    wrong = 0

    def tell(proof: Proof | None, answer: Answer | None, problem: str) -> None:
        name = f"{proof.row:2} {proof.test.split('::')[-1]}" if proof else f"   all {len(everything)} tests, unchanged"
        said = answer.failed[proof.test][:70] if proof and answer and not problem else "pass"
        print(f"{name}: {'NOT PROVEN: ' + problem if problem else said}", flush=True)

    with tempfile.TemporaryDirectory(prefix="prove-guards-") as place:
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 1):
                proof = waiting.pop(0)
                folder = Path(place) / str(len(waiting))
                try:
                    copy_package(folder, proof)
                except ValueError as error:
                    tell(proof, None, str(error))
                    wrong += 1
                    continue
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=run_tests, args=(folder, [proof.test] if proof else everything, sender)
                )
                process.start()
                sender.close()
                running[receiver] = proof, process
            ready: Any
            for ready in connection.wait(list(running), SECONDS) or list(running):
                proof, process = running.pop(ready)
                answer = None
                with contextlib.suppress(EOFError):
                    answer = ready.recv() if ready.poll() else None
                process.kill() if answer is None else process.join()
                problem = problem_of(proof, everything, answer)
                tell(proof, answer, problem)
                wrong += bool(problem)
    print(f"{wrong} not proven" if wrong else f"{len(proofs)} guards proven")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(set(map(int, sys.argv[1:]))))
