"""`lora report`: one page that needs nothing else, whatever state its runs are in, and whatever their texts say."""

import csv
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet
import pytest
from conftest import Invoke, write_adapter

from lora_cli import charts, config_file, curves, metrics_table, origins, run_dir
from lora_cli.config import LoraConfig
from lora_cli.errors import AdapterError, InputError
from lora_cli.markup import tag
from lora_cli.records import Estimate, Forgetting, TrialEnded, as_json
from lora_cli.report import report
from lora_cli.reports import Comparison, EvalReport, ScanPoint, ScanReport
from lora_cli.run_dir import RunDir
from lora_cli.run_reports import Curve
from lora_cli.search_dir import SearchDir
from lora_cli.search_reports import AgainstFullReport, Knob, SensitivityReport, Side, TuneReport

HOSTILE = '</script><img src=x onerror="alert(1)">\u202e&amp;'
VOID = {"meta", "br", "img", "link", "input"}


class Page(HTMLParser):
    """What a browser would see: elements, ids, texts; every element must be closed in its turn."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open = list[str]()
        self.tags = list[tuple[str, dict[str, str | None]]]()
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if self.open[-1:] not in (["script"], ["style"]) else ""

    def all(self, name: str) -> list[dict[str, str | None]]:
        """The attributes of the elements of a name."""
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.fixture
def run(undisturbed: Path, tmp_path: Path) -> Path:
    """A finished run of twelve steps."""
    return Path(shutil.copytree(undisturbed, tmp_path / "runs" / "first", ignore=shutil.ignore_patterns("evaluations")))


def estimate(value: float) -> Estimate:
    return Estimate(value, value - 0.1, value + 0.1, 8)


def evaluate(run: Path, said: str, budget: float | None = 0.1) -> None:
    """Leave in a run what `lora eval --scan` leaves."""
    forgetting = Forgetting(estimate(0.2), 4.0, 400, estimate(0.3), 90)
    points = [ScanPoint(g, estimate(3 - g), estimate(-g), 0.4, forgetting) for g in (0.0, 0.5, 1.0)]
    found = EvalReport(
        adapter=run / "adapter",
        data="heldout.jsonl",
        rows=8,
        targets=90,
        answers=1,
        figures={"loss": Comparison(estimate(3.0), estimate(2.0), estimate(-1.0), "better")},
        forgetting=forgetting,
        tasks={},
        scan=ScanReport(points, 1.0, 0.5, budget, 0.5),
        samples=[],
        saved=None,
    )
    values = as_json(found)
    del values["samples"]
    (run / "evaluations").mkdir()
    (run / "evaluations" / "adapter-heldout.json").write_text(json.dumps(values))
    sample = {"row": "heldout.jsonl:1", "prompt": said, "expected": said, "base": said, "tuned": said}
    (run / "evaluations" / "adapter-heldout.samples.jsonl").write_text(json.dumps(sample) + "\n")


# --- where values come from ---


def test_every_value_has_an_origin(tmp_path: Path):
    """The file and its line, the override in its words, the default, or what goes with the method."""
    path = tmp_path / "there.yaml"
    path.write_text("model: some/model\nlora:\n  method: full\ndata:\n  train: a.jsonl\noutput_dir: runs/x\n")
    overrides = ["data.validation=0.2", "train.early_stopping={patience: 2}"]
    found = origins.of(config_file.load(path, overrides), path, overrides)

    assert found["model.path"] == "there.yaml:1"
    assert found["lora.method"] == "there.yaml:3"
    assert found["data.validation"] == "override data.validation=0.2"
    assert found["train.early_stopping.patience"].startswith("override train.early_stopping=")
    assert found["train.early_stopping.min_delta"] == found["seed"] == "default"
    assert found["train.learning_rate"] == found["model.dtype"] == origins.METHOD


def test_a_run_keeps_where_its_values_came_from(make_config: Callable[..., Path], tmp_path: Path, invoke: Invoke):
    """Continued by its own config, all is as it was; a key that changes has a new origin, and no number another."""
    config, place = make_config(**{"train.max_steps": 4}), RunDir(tmp_path / "run")
    assert invoke("train", config, "train.epochs=1")[0] == 0
    first = run_dir.read_start(place)
    before = place.start.read_bytes()
    (tmp_path / "run" / "run.json").write_text("{}")  # as if it had been killed at the end
    assert invoke("train", place.config)[0] == 0
    kept = place.start.read_bytes()
    assert invoke("train", config, "train.epochs=1", "train.max_steps=5", "--override")[0] == 0
    last = run_dir.read_start(place)

    assert first is not None
    assert last is not None
    assert first.origins["train.epochs"] == "override train.epochs=1"
    assert first.origins["train.max_steps"] == "config.yaml:1"
    assert (first.total_steps, first.data["train"].rows, first.data["validation"].rows) == (4, 32, 8)
    assert kept == before
    assert last.origins == first.origins | {"train.max_steps": "override train.max_steps=5"}


# --- the page of one run ---


def test_the_page_of_a_run_needs_nothing_else(run: Path):
    """Every section is there and named; nothing is loaded, and the only script is known by its hash."""
    evaluate(run, "Name a colour.")
    made = report([run])
    seen = Page(run / "report.html")
    titles = {each["id"] for each in seen.all("section")}

    assert made.output == run / "report.html"
    assert titles == {"summary", "curves", "evaluation", "data", "config", "environment"}
    assert {f"#{title}" for title in titles} == {link["href"] for link in seen.all("a")}
    assert all("src" not in attributes for _, attributes in seen.tags)
    assert not seen.all("link")
    assert len(seen.all("script")) == 1
    (policy,) = [one["content"] for one in seen.all("meta") if one.get("http-equiv")]
    assert str(policy).startswith("default-src 'none'; style-src 'sha256-")
    assert all(svg.get("aria-label") for svg in seen.all("svg") if not svg.get("aria-hidden"))
    assert len(seen.all("caption")) == len(seen.all("table"))
    assert not [said for said in ("Name a colour.", "Learned against forgotten", "knee") if said not in seen.text]


def test_the_summary_says_what_the_files_say(run: Path, invoke: Invoke):
    """Losses, the best step, how it stands, and the commands that follow; the same as JSON."""
    code, out, _ = invoke("report", run, "--json")
    values = json.loads(out)
    (only,) = values["runs"]
    finished = run_dir.read_finished(RunDir(run))
    assert finished is not None
    text = Page(run / "report.html").text

    assert code == 0
    assert values["output"] == str(run / "report.html")
    assert only["best"]["step"] == finished.best_step
    assert only["status"] == "finished"
    assert f"from {finished.base_loss:.4f} (base) to {finished.best_loss:.4f}" in text
    assert f"of step {finished.best_step} is kept" in text
    assert only["next"][0] == f"lora eval {run}"
    assert [s["value"] for s in only["settings"] if s["key"] == "lora.rank"] == ["4"]
    assert only["curves"]["loss"]["steps"] == list(range(1, 13))


def test_nothing_of_a_run_is_markup(run: Path):
    """Rows, answers, names, config values, reasons: all are text, and what turns letters around is spelt out."""
    place = run.rename(run.with_name("<b>&first"))
    evaluate(place, HOSTILE)
    config = place / "config.yaml"
    lines = config.read_text().splitlines()
    named = [f"  train: '{HOSTILE}'" if line.startswith("  train: ") else line for line in lines]
    config.write_text("\n".join(named).replace("\u202e", "") + "\n")
    status = json.loads((place / "run.json").read_text())
    (place / "run.json").write_text(json.dumps(status | {"reason": HOSTILE}))
    report([place])
    seen = Page(place / "report.html")

    assert len(seen.all("script")) == 1
    assert not seen.all("img")
    assert not [name for name, attributes in seen.tags if any(key.startswith("on") for key in attributes)]
    assert seen.text.count("<img src=x") >= 6
    assert "\u202e" not in (place / "report.html").read_text()
    assert "<b>&first" in seen.text


def test_secrets_are_hidden(run: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch):
    """On the page and in the JSON, by their form or as the value of a variable that is named as one."""
    monkeypatch.setenv("MY_API_KEY", "correct-horse-battery")
    evaluate(run, "hf_" + "a" * 30 + " and correct-horse-battery")
    _, out, _ = invoke("report", run, "--json")
    whole = out + (run / "report.html").read_text()

    assert "a" * 30 not in whole
    assert "correct-horse" not in whole
    assert whole.count("[hidden] and [hidden]") == 8


def test_a_run_without_origins_says_unknown(run: Path):
    """Of a run of an earlier version the counts and origins are not known, and everything else is there."""
    (run / "start.json").unlink()
    report([run])
    text = Page(run / "report.html").text

    assert "unknown" in text
    assert "were not written down" in text


def stopped(run: Path) -> None:
    (run / "run.json").write_text(json.dumps({"format": 1, "status": "stopped", "step": 6, "reason": "asked to"}))


def barely_begun(run: Path) -> None:
    for name in ("metrics.jsonl", "run.json", "start.json", "environment.json"):
        (run / name).unlink()


def full_of_holes(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "probe.json").write_text('{"tried": [3, "a"], "chosen": "x"}')
    kept = [*lines[:3], *lines[6:], '{"event": "step", "step": 99, "loss": NaN, "tokens": "x"}', '{"event": "st']
    (run / "metrics.jsonl").write_text("\n".join([*kept, '{"event": "evaluated", "step": 99}']))


def damaged(run: Path) -> None:
    for name in ("run.json", "start.json", "environment.json", "probe.json"):
        (run / name).write_text('{"tried": 3, "data": [')


@pytest.mark.parametrize(
    ("leave", "says"),
    [
        (stopped, "It was stopped after 12 of 12 steps: asked to."),
        (barely_begun, "It has not begun to train."),
        (full_of_holes, "metrics.jsonl: epoch"),
        (damaged, "start.json"),
    ],
)
def test_a_run_of_any_state_has_a_page(run: Path, leave: Callable[[Path], None], says: str):
    """What is there is shown, what cannot be read is named, and the way on is given."""
    leave(run)
    report([run])
    text = Page(run / "report.html").text

    assert says in text
    assert f"lora train {run}/config.yaml" in text or leave is full_of_holes


# --- what RUN may be, and where the page goes ---


def test_a_checkpoint_stands_for_its_run(run: Path):
    """So does the adapter in it."""
    checkpoint = max((run / "checkpoints").iterdir())

    assert report([checkpoint]).output == report([run / "adapter"]).output == run / "report.html"


def test_what_is_no_run_is_explained_at_once(run: Path, tmp_path: Path, model_folder: Callable[[str], str]):
    """An adapter without its run, a folder, a name that is nearly right: all in one error, and nothing is written."""
    write_adapter(model_folder("llama"), tmp_path / "alone", LoraConfig(rank=4))
    with pytest.raises(AdapterError) as caught:
        report([run, tmp_path / "alone", tmp_path, run.with_name("frist")])

    assert [problem.split(": ")[1][:22] for problem in caught.value.problems] == [
        "is an adapter without ", "is neither a run direc", "does not exist. Did yo",
    ]  # fmt: skip
    assert f"Did you mean {run}?" in caught.value.problems[2]
    assert not (run / "report.html").exists()


def test_only_a_page_of_ours_is_replaced(run: Path, tmp_path: Path, invoke: Invoke):
    """Another file stays as it is."""
    other = tmp_path / "notes.html"
    other.write_text("<p>mine</p>")
    with pytest.raises(InputError, match="was not written by lora report"):
        report([run], other)
    report([run])
    (run / "report.html").write_text((run / "report.html").read_text()[:500])
    code, out, _ = invoke("report", run)

    assert other.read_text() == "<p>mine</p>"
    assert (code, out) == (0, f"Wrote {run / 'report.html'}.\n")
    assert (run / "report.html").read_text().endswith("</html>\n")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_only_a_table_of_ours_is_replaced(run: Path, tmp_path: Path, kind: str):
    """Training data may end with .csv too."""
    other = tmp_path / f"train.{kind}"
    other.write_text("prompt,completion\na,b\n")
    with pytest.raises(InputError, match="was not written by lora report"):
        report([run], table=other)
    for _ in range(2):
        report([run], table=tmp_path / f"table.{kind}")

    assert other.read_text() == "prompt,completion\na,b\n"


@pytest.mark.parametrize("option", ["--output", "--metrics"])
def test_a_folder_that_is_missing_is_said_before_anything_is_written(
    run: Path, tmp_path: Path, invoke: Invoke, option: str
):
    """With both files asked for, neither is there alone."""
    code, _, err = invoke("report", run, option, tmp_path / "none" / "x.csv")

    assert (code, f"the folder {tmp_path / 'none'} does not exist" in err) == (2, True)
    assert not (run / "report.html").exists()


def test_answers_that_are_damaged_are_passed_over(run: Path):
    """A line that is no object is none of them; the others are shown."""
    evaluate(run, "Name a colour.")
    samples = run / "evaluations" / "adapter-heldout.samples.jsonl"
    samples.write_text("null\n[]\n" + samples.read_text())
    (found,) = report([run]).runs

    assert [sample.prompt for sample in found.evaluations[0].samples] == ["Name a colour."]


def test_an_evaluation_that_cannot_be_read_hides_no_other(run: Path):
    """It is named in a warning; the others are shown."""
    evaluate(run, "Name a colour.")
    (run / "evaluations" / "adapter-other.json").write_text("{}")
    (found,) = report([run]).runs

    assert [len(found.evaluations), len(found.warnings)] == [1, 1]
    assert "adapter-other.json" in found.warnings[0]


def test_commands_of_a_page_can_be_pasted(run: Path, tmp_path: Path):
    """Also where the run's folder has a space in its name."""
    place = run.rename(tmp_path / "my run")
    report([place])
    text = Page(place / "report.html").text

    assert f"lora eval '{place}' adds this" in text
    assert f"lora eval {place}" not in text


def test_a_report_imports_no_torch(run: Path):
    """Nor what pulls it in."""
    program = (
        "import sys; from lora_cli.cli import main\ntry: main()\nfinally: "
        "print(sorted({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program, "report", run], capture_output=True, text=True, check=True)

    assert done.stdout.splitlines()[-1] == "[]"


# --- several runs ---


def test_runs_are_compared(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Curves over each other, a row a run, and of the config only what differs."""
    monkeypatch.chdir(tmp_path)
    other = Path(shutil.copytree(run, tmp_path / "others" / "first"))
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("dropout: 0.1", "dropout: 0.2").replace("runs/first", "x"))
    environment = json.loads((other / "environment.json").read_text())
    (other / "environment.json").write_text(json.dumps(environment | {"torch": "2.99"}))
    made = report([run, other, run])
    seen = Page(Path("report.html"))

    assert [one.name for one in made.runs] == [str(run), str(other)]  # the same last part: by their paths
    assert [(one.key, one.values) for one in made.settings] == [("lora.dropout", ["0.1", "0.2"])]
    assert [(one.key, one.values[1]) for one in made.surroundings] == [("torch", "2.99")]
    assert "by tokens read" in seen.text
    overlaid = [one for one in seen.all("g") if one.get("data-name") == str(other)]
    assert len(overlaid) >= 6


# --- searches ---


def trial(number: int, rate: float, loss: float | None, state: str = "finished") -> TrialEnded:
    values = {"train.learning_rate": rate, "lora.method": "lora" if number % 2 else "rslora"}
    return TrialEnded(number, values, state, loss, None, 0.0, 4, 4, 100, 1.0, 0.5)


def side(method: str) -> Side:
    return Side(method, 3e-4, 10, 1000, 10**9, 0.5, estimate(2.0), estimate(-1.0))


SEARCHES = {
    "tune": TuneReport(
        [trial(0, 1e-3, 2.5), trial(1, 1e-2, 2.1), trial(2, 1e-1, None, "diverged"), trial(3, 3e-2, 2.3, "pruned")],
        1, [], 0, None, None, Path("tune.json"),
    ),
    "sensitivity": SensitivityReport(
        2.0, 0.05, 3, [Knob("lora.rank", 8, [4, 16], [0.1, None], True)], ["lora.dropout"], Path("t.svg"), Path("t")
    ),
    "against-full": AgainstFullReport(
        "rows", 90, side("lora"), side("full"), estimate(0.9), estimate(0.02), Path("t.json")
    ),
}  # fmt: skip
SHOWN = {
    "tune": ["Search: 4 trials", "Best so far", "validation loss over its value", "diverged", "the best"],
    "sensitivity": ["One knob at a time", "mean of 3 seeds", "training stopped"],
    "against-full": ["LoRA reaches 90.0% [80.0%, 100.0%] of the full run's gain", "1.0 GB"],
}


@pytest.mark.parametrize("kind", sorted(SEARCHES))
def test_a_search_is_shown_beside_its_run_and_alone(run: Path, kind: str):
    """By the run's folder, and by the search's own."""
    place = SearchDir(run.with_name(f"first-{kind}"))
    place.path.mkdir()
    shutil.copy(run / "config.yaml", place.config)
    place.report.write_text(json.dumps(as_json(SEARCHES[kind])))
    beside, alone = report([run]), report([place.path])
    texts = [Page(Path(str(made.output))).text for made in (beside, alone)]

    assert alone.output == place.path / "report.html"
    assert [len(made.searches) for made in (beside, alone)] == [1, 1]
    assert not [said for said in SHOWN[kind] if any(said not in text for text in texts)]


def test_the_rates_that_were_tried_are_drawn(run: Path):
    """From probe.json; one at which training stopped breaks the line."""
    tried = [{"rate": 1e-4 * 3**n, "loss": None if n == 3 else 3 - n / 4, "steps": 8} for n in range(4)]
    (run / "probe.json").write_text(json.dumps({"format": 1, "tried": tried, "chosen": 7e-4}))
    report([run])
    seen = Page(run / "report.html")
    (rates,) = [one for one in seen.all("g") if one.get("data-name") == "tried"]

    assert rates["data-values"] == "0.0001:3;0.0003:2.75;0.0009:2.5"
    assert "chosen 0.0007" in seen.text


def test_a_search_that_came_to_nothing_yet_is_an_error(run: Path):
    """It says so, and writes no page."""
    place = SearchDir(run.with_name("first-tune"))
    (place.path / "trials").mkdir(parents=True)
    shutil.copy(run / "config.yaml", place.config)

    with pytest.raises(AdapterError, match="has not come to anything yet"):
        report([place.path])


def test_the_run_that_one_stands_in(run: Path, monkeypatch: pytest.MonkeyPatch):
    """A point names it as well, and it is called by its folder's name."""
    monkeypatch.chdir(run)

    assert [one.name for one in report([Path()]).runs] == ["first"]
    assert (run / "report.html").exists()


# --- curves and pictures ---


def test_thinning_loses_no_extreme_and_no_gap():
    """Of each part of the steps first, lowest, highest and last stay; a curve that is short stays whole."""
    chance = random.Random(1)
    values: list[float | None] = [chance.gauss(0, 1) for _ in range(10_000)]
    values[5003], values[7777], values[1234] = 99.0, -99.0, None
    whole = Curve(list(range(10_000)), list(range(10_000)), values)
    thin = curves.thinned(whole, 100)
    kept = dict(zip(thin.steps, thin.values, strict=True))

    assert len(thin.steps) <= 501
    assert (kept[5003], kept[7777], kept[1234]) == (99.0, -99.0, None)
    assert {0, 9_999} <= kept.keys()
    assert list(thin.steps) == sorted(thin.steps)
    for bucket in range(100):
        part = [value for value in values[100 * bucket : 100 * bucket + 100] if value is not None]
        left = [value for step, value in kept.items() if step // 100 == bucket and value is not None]
        assert (min(part), max(part)) == (min(left), max(left))
    short = Curve([1, 2], [3, 4], [0.5, 0.25])
    assert curves.thinned(short) == short


def test_smoothing_is_the_mean_around_a_step():
    """A straight line stays one, up to its ends."""
    line = Curve(list(range(500)), [0] * 500, [2.0 * step for step in range(500)])

    assert curves.smoothed(line).values == pytest.approx(line.values)
    jumping = Curve(list(range(500)), [0] * 500, [float(step % 2) for step in range(500)])
    assert curves.smoothed(jumping).values[250] == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("low", "high", "log", "names"),
    [
        (0.0, 10_000.0, False, ["0", "2,000", "4,000", "6,000", "8,000", "10,000"]),
        (1.31, 1.42, False, ["1.32", "1.34", "1.36", "1.38", "1.4", "1.42"]),
        (1e-4, 1e-1, True, ["0.0001", "0.001", "0.01", "0.1"]),
        (2e-5, 9e-5, True, ["2e-5", "5e-5"]),
    ],
)
def test_ticks_are_round(low: float, high: float, log: bool, names: list[str]):
    """Few digits, evenly apart."""
    assert [name for _, name in charts.ticks(charts.Axis("", low, high, log))] == names


def test_a_line_is_broken_where_nothing_is_known():
    """No line is drawn over a gap, and a point between two gaps is still seen."""
    series = charts.Series("a", [(0, 1.0), (1, 2.0), (2, None), (3, 1.0), (4, None), (5, 2.0), (6, 1.0)], 0)
    drawn = charts.plot([series], charts.axis("x", [0, 6]), charts.axis("y", [1, 2]), "about").text
    path = drawn.split(' d="')[1].split('"')[0]

    assert [letter for letter in path if letter.isalpha()] == ["M", "L", "M", "h", "M", "L"]


def test_text_is_escaped_where_it_goes_into_an_element():
    """As content and as an attribute; markup stays markup."""
    assert tag("p", "<&", tag("b", '"'), title='"<').text == '<p title="&quot;&lt;">&lt;&amp;<b>&quot;</b></p>'


# --- the table ---


def test_all_measurements_as_one_table(run: Path, tmp_path: Path, invoke: Invoke):
    """The same rows and columns as CSV and as Parquet, a row a record, with its run's name."""
    other = Path(shutil.copytree(run, tmp_path / "second"))
    asked = ("report", run, other, "--output", tmp_path / "report.html", "--metrics")
    assert invoke(*asked, tmp_path / "m.csv")[0] == invoke(*asked, tmp_path / "m.parquet")[0] == 0
    rows = list(csv.DictReader((tmp_path / "m.csv").read_text().splitlines()))
    table = pyarrow.parquet.read_table(tmp_path / "m.parquet").to_pylist()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

    assert list(rows[0]) == list(table[0]) == list(metrics_table.COLUMNS)
    assert len(rows) == len(table) == 2 * len(records)
    assert [row["run"] for row in table] == ["first"] * len(records) + ["second"] * len(records)
    assert [row["loss"] for row in table[: len(records)]] == [record["loss"] for record in records]
    assert [float(row["loss"]) for row in rows] == [row["loss"] for row in table]
    code, _, err = invoke(*asked, tmp_path / "m.xlsx")
    assert (code, ".csv or .parquet" in err) == (2, True)
