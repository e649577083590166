"""What a user sees: the live panel, tables that fold, plain lines without a terminal, ASCII where that is all."""

import io
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Invoke
from rich.console import Console
from terminal import resize, watch

from lora_cli import config_file, console, metrics, stand_ins, tables
from lora_cli.curve import Series, plot
from lora_cli.errors import in_lines
from lora_cli.interrupt import StopRequest
from lora_cli.panel import RunPanel
from lora_cli.records import DataCounts, Estimate, Evaluated, Forgetting, Started, StepDone, TrialEnded
from lora_cli.run_dir import RunDir
from lora_cli.search_panel import SearchPanel
from lora_cli.standing import SearchStanding, Standing
from lora_cli.tables import Fitting
from lora_cli.train import train

COLOUR = re.compile(r"\x1b\[(?:[\d;]*;)?(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])[;m]")
COUNTS = DataCounts(40, 40, 900, 300, 0, 0, 0, (), (20, 30, 30, 30), (9, 9, 9, 9), (40,), 0, 0, 0, 0, 0, 0, 0, ())


def started(step: int = 0, before: tuple[StepDone | Evaluated, ...] = ()) -> Started:
    """The start of a run of 40 steps with a budget of forgetting."""
    return Started(step, 40, 20, COUNTS, COUNTS, 100, 1000, "packed", 3, 0.05, before)


def step(number: int, loss: float) -> StepDone:
    """A step of a tenth of a second."""
    return StepDone(number, number / 20, loss, None, 30, 90, 3e-4, 1.0, 0.1)


def evaluated(number: int, loss: float, rise: float | None = None, patience: int = 3) -> Evaluated:
    """A validation pass that is the best so far, unless it is the base's."""
    found = None
    if rise is not None:
        found = Forgetting(Estimate(rise, None, None, 9), 4.0, 500, Estimate(0.1, None, None, 9), 50)
    return Evaluated(number, number / 20, loss, 50, 0.5, number > 0, number or None, patience, 0.2, found, None)


def after(*events: Started | StepDone | Evaluated) -> Standing:
    """Where a run stands after some events."""
    standing = Standing()
    for event in events:
        standing.take(event)
    return standing


def drawn(panel: RunPanel | SearchPanel | Fitting, columns: int, rows: int = 40, encoding: str = "utf-8") -> list[str]:
    """The lines that a console of a size shows."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", newline="\n")
    Console(file=stream, width=columns, height=rows, force_terminal=True, color_system=None).print(panel)
    stream.seek(0)
    return [line.rstrip() for line in stream.read().splitlines()]


# --- the curve ---


def test_a_curve_goes_through_its_points():
    """A falling line ends in the corners, marks lie over it, and both axes say what they reach to."""
    lines = plot([Series([(0, 2.0), (10, 1.0)]), Series([(0, 2.0), (5, 2.0)], "o")], 30, 7, True, ("step", "loss"))

    assert lines[0] == "2.0000 |o--.      o"
    assert lines[4].startswith("1.0000 |")
    assert lines[4].endswith("'--.")
    assert [lines[5][:8], lines[6].split()] == ["  loss +", ["0", "step", "10"]]
    assert (len(lines), max(map(len, lines))) == (7, 30)
    for column in range(8, 30):  # a line has no gaps
        assert any(line[column : column + 1].strip() for line in lines[:5]), column


@pytest.mark.parametrize("ascii", [True, False])
@pytest.mark.parametrize(
    "points", [[], [(1.0, math.nan)], [(0.0, math.inf), (1.0, 2.0)], [(3.0, 1.0)] * 2, [(0.0, -1e300), (1.0, 1e300)]]
)
def test_a_curve_of_what_is_missing_or_not_finite(points: list[tuple[float, float]], ascii: bool):
    """It has its size whatever there is to draw, and in ASCII nothing else."""
    lines = plot([Series(points), Series(points, "o")], 40, 6, ascii)

    assert len(lines) == 6
    assert "\n".join(lines).isascii() == ascii


# --- the panel ---


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("size", [(60, 20), (60, 24), (99, 30), (100, 20), (120, 50), (300, 80), (59, 20), (49, 30)])
def test_a_panel_fits_every_terminal(size: tuple[int, int], encoding: str):
    """No line is cut or too long, it leaves a row for what is above it, and below 20 rows or 50 columns is a bar."""
    before = (evaluated(0, 2.4, 0.0), *(step(n, 2.4 - n / 30) for n in range(1, 31)), evaluated(30, 1.5, 0.021, 2))
    lines = drawn(RunPanel(after(started(30, before), step(31, 1.4))), *size, encoding)
    text = "\n".join(lines)

    assert max(map(len, lines)) <= size[0]
    assert len(lines) < size[1]
    if size[0] < 50:
        assert len(lines) == 1
        return
    facts = ("step 31/40", "epoch 1.55 of 2", "0:01 left", "1.5000 at step 30, base 2.4000", "2 of 3", "3.00e-04")
    for fact in (*facts, "+0.0210 of 0.05", "900 tokens/s", "validation loss", "peak", "training loss"):
        assert fact in text
    marks = ("o", ".") if encoding == "ascii" else ("●", "⠒")
    assert all(mark in text for mark in marks)


def test_a_panel_of_few_rows_is_a_bar():
    """Where there is no room for a curve the line says step, losses, speed and the time left."""
    (line,) = drawn(RunPanel(after(started(), evaluated(0, 2.4), step(1, 2.5))), 80, 19)

    assert re.fullmatch(r"step 1/40 \S+\s+loss 2\.5000  val 2\.4000  0:\d\d left  900 tok/s", line)


def test_a_panel_of_what_is_not_known_yet_or_not_finite():
    """Nothing is measured yet, and what is going on is said; then a loss is not a number: both are drawn."""
    waiting = drawn(RunPanel(after(started())), 80)
    assert any("step 0/40" in line for line in waiting)
    assert any(re.fullmatch(r" *validation +of the base, being measured", line) for line in waiting)
    lines = drawn(RunPanel(after(started(), evaluated(0, math.nan, math.nan), step(1, math.nan))), 80)
    assert any(line.split() == ["training", "loss", "not", "finite"] for line in lines)


def test_a_budget_that_is_passed_is_said_in_words():
    """The bar of forgetting is full, and its figure says that it is over."""
    text = "\n".join(drawn(RunPanel(after(started(), step(20, 2.0), evaluated(20, 1.9, 0.07))), 120))

    assert "+0.0700 of 0.05, over" in text


def test_the_smoothed_loss_is_that_of_many_steps():
    """Losses that jump around 2 are smoothed towards it, the first ones too, and a long run keeps few points."""
    standing = Standing()
    standing.take(Started(0, 9000, 3000, COUNTS, None, 1, 2, "", None, None, ()))
    for number in range(1, 9001):
        standing.take(step(number, 2.0 + (-1) ** number))

    assert all(abs(loss - 2.0) < 0.1 for number, loss in standing.smooth if number > 20)
    assert len(standing.smooth) <= 2048
    assert (standing.smooth[0][0], standing.smooth[-1][0]) == (1, 9000)


def test_time_left_counts_validation():
    """Steps of 0.1 s, and of 0.2 s each validation of ten steps, take 0.12 s each."""
    standing = after(started(), *(step(n, 2.0) for n in range(1, 11)), evaluated(10, 1.9))

    assert standing.left == pytest.approx(30 * 0.12)


def test_a_panel_of_a_search():
    """The best trials come first, with the one under way and how many ended otherwise."""
    search = SearchStanding(5)
    for number, (state, loss) in enumerate([("finished", 2.0), ("pruned", 3.0), ("finished", 1.5)]):
        values = {"train.learning_rate": 0.001 * (number + 1), "lora.rank": 8}
        search.take(TrialEnded(number, values, state, loss, None, 0.0, 10, 10, 900, 1.0, 0.9))
    search.take(started())
    search.take(step(3, 1.9))

    for columns in (60, 120):
        lines = drawn(SearchPanel(search), columns)
        assert "trial 4 of 5  1 pruned  best 1.5000 (trial 2)" in lines
        assert [line.split()[:2] for line in lines[2:4]] == [["2", "1.5000"], ["0", "2.0000"]]
        assert lines[-1].startswith("step 3/40 ")
        assert max(map(len, lines)) <= columns


def test_a_run_that_goes_on_knows_what_was_measured_before(
    invoke: Invoke, make_config: Callable[..., Path], tmp_path: Path
):
    """The curve of a continued run begins where the run did, and its best is that of before."""
    config = make_config(**{"train.epochs": 1})
    invoke("train", config)
    longer = config_file.load(config, ["train.epochs=2"])
    begun = next(event for event in train(longer, StopRequest(), override=True) if isinstance(event, Started))
    standing = after(begun)

    assert begun.step == 8
    assert [number for number, _ in standing.smooth] == list(range(1, 9))
    assert [number for number, _ in standing.validation] == [0, 2, 4, 6, 8]
    assert (standing.base, standing.best) == (begun.before[0], begun.before[-1])


# --- real terminals ---


SETTINGS = {"train.epochs": 1, "eval.general": None, "eval.general_tokens": 512, "eval.forgetting_budget": 0.5}


def test_a_run_in_a_wide_terminal(make_config: Callable[..., Path], tmp_path: Path):
    """A panel stands below the lines while it trains; a table is there in its place when it is done."""
    seen = watch(["train", make_config(**SETTINGS)], 120)
    text = seen.screen.text()
    panels = [frame for frame in seen.screen.frames if "training loss, smoothed" in frame]

    assert (seen.code, seen.screen.cursor) == (0, True)
    assert any("of 0.5" in panel and "patience left" in panel and "●" in panel for panel in panels)
    assert max(len(panel.split("smoothed")) for panel in panels) == 2  # one at a time
    assert "training loss, smoothed" not in text
    assert [line.split(":")[0] for line in text.splitlines() if "validation loss" in line][:2] == [
        "base model",
        "step 2",
    ]
    assert COLOUR.search(seen.raw)
    for line in ("Done: all steps taken.", f"lora merge {tmp_path}/run --output {tmp_path}/run-merged", "perplexity"):
        assert line in seen.plain
    assert max(len(line) for line in seen.plain.split("Done: ")[1].splitlines() if str(tmp_path) not in line) <= 120


def test_ctrl_c_in_a_narrow_terminal_without_colours_and_unicode(make_config: Callable[..., Path]):
    """In ASCII, resized on its way, stopped by Ctrl-C: one last panel stays, the cursor is back, no colour was used."""
    sizes = iter([(100, 30), (60, 30)])

    def react(text: str, child: int, terminal: int) -> None:
        if re.search(r"step [3-9]/", text) and (size := next(sizes, None)):
            resize(terminal, *size)
        elif re.search(r"step [6-9]/", text) and "^C" not in text:
            os.write(terminal, b"\x03")

    environment = {"NO_COLOR": "1", "PYTHONIOENCODING": "ascii"}
    config = make_config(**{**SETTINGS, "train.epochs": 60})
    seen = watch(["train", config], 60, 30, environment=environment, react=react)
    text = seen.screen.text()

    assert (seen.code, seen.screen.cursor) == (130, True)
    assert "stopped on request after step" in text
    assert "Continue with: lora train" in text
    assert (seen.raw.isascii(), COLOUR.search(seen.raw)) == (True, None)
    assert "| o" in text or "|o" in text


# --- every command at sixty columns ---


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Results are drawn as in a terminal of sixty columns."""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    before, console.out.width = console.out.width, 60
    yield
    console.out.width = before


def too_wide(out: str, folder: Path) -> list[str]:
    """The lines of more than sixty columns, except for those that hold what is to be copied whole."""
    return [line for line in out.splitlines() if len(line) > 60 and str(folder)[:20] not in line]


def test_results_fold_at_sixty_columns(
    narrow: None, invoke: Invoke, make_config: Callable[..., Path], undisturbed: Path, tmp_path: Path
):
    """check, eval, a scan, scale, merge, export: no line is wider, each ends with what comes next."""
    config = make_config(**{"data.test": 4})
    (tmp_path / "rows.txt").write_text("The sky is blue. " * 40)
    general = ["--general", str(tmp_path / "rows.txt")]
    commands: list[tuple[list[object], str]] = [
        (["check", config], "lora train"),
        (["eval", undisturbed, "--scan", "--answers", "2", *general], "lora chat"),
        (["scale", undisturbed, "--gain", "0.5", "--output", tmp_path / "half", *general], "lora eval"),
        (["merge", undisturbed, "--output", tmp_path / "merged"], "vllm serve"),
        (["export", undisturbed, "--format", "peft", "--output", tmp_path / "peft"], "vllm serve"),
    ]
    for command, following in commands:
        code, out, err = invoke(*command)
        assert (code, too_wide(out, tmp_path.parent.parent)) == (0, []), err
        after_next = out[out.index("\nNext:\n") :]
        assert f"  {following} " in after_next


def test_a_search_and_a_look_at_the_knobs_fold_at_sixty_columns(
    narrow: None, invoke: Invoke, make_config: Callable[..., Path], tmp_path: Path
):
    """The tables of `lora tune` become blocks; the best stands first, in words."""
    config = make_config(**{"train.max_steps": 4, "eval.per_epoch": 1, "save.per_epoch": 1})
    code, out, err = invoke("tune", config, "--trials", "2")
    assert (code, too_wide(out, tmp_path.parent.parent)) == (0, []), err
    assert "the best" in out
    assert "\nNext:\n  lora eval " in out
    assert re.search(r"trial 0: .*validation loss", err)


def test_text_of_others_is_shown_and_not_obeyed(capsys: pytest.CaptureFixture[str]):
    """Controls of eight bits too, and what turns letters around; spaces and joiners of all languages are text."""
    harmless = "Ça va\u00a0? 東京\u3000駅 می\u200cخواهم \U0001f468\u200d\U0001f469"
    assert in_lines(f"{harmless}\n\tx") == f"{harmless}\n\tx"
    assert in_lines("\x1b[2J\x9b2J\r\u202e\x07") == "\\x1b[2J\\x9b2J\\r\\u202e\\x07"
    console.say("\x9b2J")
    tables.show(["a", "b"], [["\x1b[2J", "one\ntwo"]])
    assert capsys.readouterr().out.split() == ["\\x9b2J", "a", "b", "\\x1b[2J", "one\\ntwo"]


def test_a_table_that_does_not_fit_is_blocks():
    """At its width it is a table, one column less and each row has its own lines; nothing is cut."""
    table = Fitting(["", "base", "adapter"], [["loss", "1.25 [1.20, 1.30]", "0.75 [0.70, 0.80]"]])

    assert drawn(table, 42)[1].split()[0] == "loss"
    assert len(drawn(table, 42)) == 2
    assert drawn(table, 41) == ["loss", "  base     1.25 [1.20, 1.30]", "  adapter  0.75 [0.70, 0.80]"]


# --- without a terminal ---


def test_quiet_says_only_what_warns(invoke: Invoke, make_config: Callable[..., Path], tmp_path: Path):
    """Without warnings nothing is on stderr, results are on stdout; going on is news, a foreign folder a warning."""
    config = make_config(**{"train.epochs": 1})
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Say {n}: ", "completion": f"It is {n}."}) + "\n" for n in range(40))
    )
    run = tmp_path / "run"
    commands = (["check", config], ["train", config], ["eval", run, "--answers", "0"])
    for command in commands:
        loud, quiet = (invoke(*command, *more) for more in ([], ["--quiet"]))
        assert (quiet[0], quiet[2]) == (0, "")
        assert len(quiet[1]) > 200
        assert loud[2] or command[0] == "check"

    half = ["scale", run, "--gain", "0.5", "--general", "false", "--output", tmp_path / "half"]
    code, out, err = invoke(*half, "--quiet")
    assert (code, "gain 0.5" in out, err) == (0, True, "")

    (run / "checkpoints" / "checkpoint-7").mkdir()
    code, _, err = invoke("train", config, "train.epochs=2", "--override", "--quiet")
    assert code == 0
    assert "checkpoint-7: is no checkpoint of this program" in err
    assert "Continuing after step" not in err
    assert "validation loss" not in err


def test_forced_colours_draw_no_panel_into_a_file(
    invoke: Invoke, make_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    """FORCE_COLOR asks for colours, not for a cursor that moves where there is none."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    code, _, err = invoke("train", make_config(**{"train.max_steps": 2}))

    assert (code, "\x1b[?25l" in err, "\x1b[2K" in err) == (0, False, False)
    assert "step 2/2 " in err


def test_every_character_has_a_stand_in():
    """What a stream's encoding does not have is written in ASCII, lone surrogates too; what it has stays as it is."""
    for encoding, expected in (("ascii", "caf\\xe9 - | +- ... -> \\ud800"), ("latin-1", "café - | ± ... -> \\ud800")):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        stand_ins.use(stream)
        stream.write("café ─ │ ± … → \ud800")
        stream.seek(0)
        assert stream.read() == expected


def test_json_is_exact_where_only_ascii_is_shown(monkeypatch: pytest.MonkeyPatch):
    """Escapes of JSON stand for what the encoding does not have, not our stand-ins."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    console.print_json({"path": "é…"})
    stream.seek(0)

    assert json.loads(stream.read()) == {"path": "é…"}


def test_the_end_of_a_run_is_made_of_its_metrics(invoke: Invoke, undisturbed: Path):
    """Tokens, and token accuracy of base and best, are those of metrics.jsonl; a damaged line is left out."""
    code, out, _ = invoke("train", undisturbed / "config.yaml")
    measured = metrics.read_measured(RunDir(undisturbed))
    tokens = sum(record.tokens for record in measured if isinstance(record, StepDone))
    passes = [record for record in measured if isinstance(record, Evaluated)]
    best = min(passes, key=lambda record: record.loss)
    row = next(line for line in out.splitlines() if line.strip().startswith("token accuracy"))

    assert code == 0
    assert "12 steps in 0:0" in out
    assert re.search(rf" with validation; {tokens:,} tokens, [\d,]+ a second without it\.", out)
    assert row.split()[2:4] == [f"{passes[0].token_accuracy:.1%}", f"{best.token_accuracy:.1%}"]
