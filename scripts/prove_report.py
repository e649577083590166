"""Prove `lora report` in a browser: a run of 10,000 steps, on a phone and a screen, in light and dark.

python scripts/prove_report.py [RUN ...] [--shots FOLDER] [--browser /usr/bin/chromium]

Without RUN a run directory is made by the program's own writers. Asserted: the page is below 3 MB, is built within 10 s
and loaded within 2 s, asks for nothing outside itself, and is no wider than 360 pixels where the screen is not.
"""

import argparse
import json
import math
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lora_cli import config_file, metrics, resume, run_dir, storage
from lora_cli.config import RunConfig
from lora_cli.records import DataCounts, Estimate, Evaluated, Forgetting, SourceCounts, Start, StepDone
from lora_cli.report import report
from lora_cli.run_dir import RunDir

STEPS, EVERY = 10_000, 250
MOST_BYTES, MOST_BUILDING, MOST_LOADING = 3_000_000, 10.0, 2.0
SCREENS = {"phone": (360, 800), "screen": (1280, 900)}
# What the page itself says once it is loaded, into its title; put in only for this.
PROBE = """<script>addEventListener("load", () => setTimeout(() => {
const picture = document.querySelector(".chart svg[data-x]"), place = picture.getBoundingClientRect();
const at = {clientX: place.left + place.width / 2, clientY: place.top + place.height / 2};
picture.dispatchEvent(new PointerEvent("pointermove", at));
document.title = JSON.stringify({width: document.documentElement.scrollWidth, seen: innerWidth,
  hover: document.querySelector(".hover").innerText.split("\\n"),
  asked: performance.getEntriesByType("resource").map((one) => one.name)});
}, 0))</script>"""


def main() -> None:
    """Make the page, look at it, print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--shots", type=Path, help="where the screenshots go")
    parser.add_argument("--browser", default="/usr/bin/chromium")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        runs = asked.runs or [made(RunDir(folder / "ten-thousand"))]
        began = time.perf_counter()
        page = folder / "report.html"
        report(runs, page)
        found: dict[str, Any] = {"built": round(time.perf_counter() - began, 2), "bytes": page.stat().st_size}
        found["loaded"] = loading(page, asked.browser)
        for name, (width, height) in SCREENS.items():
            found[name] = looked_at(page, asked.browser, width, height)
            for scheme in ("light", "dark"):
                shot(page, asked.browser, width, height, scheme, (asked.shots or folder) / f"{name}-{scheme}.png")
    print(json.dumps(found))
    assert found["bytes"] < MOST_BYTES
    assert found["built"] < MOST_BUILDING
    assert found["loaded"] < MOST_LOADING
    for name in SCREENS:
        assert found[name]["asked"] == [], name
        assert "step" in found[name]["hover"][0], name
        assert found[name]["width"] <= found[name]["seen"], name


def made(run: RunDir) -> Path:
    """Write a run of many steps, with a hole, a loss that is no number, and a spike."""
    chance = random.Random(0)
    config = RunConfig.model_validate(
        {
            "model": "some/model",
            "data": {"train": "rows.jsonl"},
            "eval": {"forgetting_budget": 0.2},
            "output_dir": str(run.path),
        }
    )
    storage.make_folder(run.path)
    environment = {"micro_batch_tokens": 4096, "torch": "2.10", "device": "cpu", "base_fingerprint": "0" * 32}
    resume.create(run, config, environment)
    start = Start(STEPS, 4_884_480, 139_399_488, {"train": counts()}, ["train: 3 rows repeat another row."], {})
    resume.write_start(run, start, [])
    lines = [measured(0, 3.1, True)]
    for step in range(1, STEPS + 1):
        loss = 1.1 + 2 * math.exp(-step / 1500) + chance.gauss(0, 0.15) + (4.0 if step == 7003 else 0.0)
        if not 4000 <= step < 4100:
            lines.append(taken(step, math.nan if step == 2000 else loss, chance))
        if step % EVERY == 0:
            lines.append(measured(step, 1.2 + 1.9 * math.exp(-step / 1500) + 2e-9 * (step - 6000) ** 2, False))
    # Written at once: one by one is what training does, and here takes longer than the rest.
    storage.write_file(run.metrics, "".join(f"{line}\n" for line in lines))
    run_dir.write_status(run, "stopped", step=STEPS, reason="asked to stop")
    assert len(metrics.read(run)) == len(lines)
    assert config_file.load(run.config) == config
    return run.path


def counts() -> DataCounts:
    """What a set of rows may hold."""
    histogram = [round(2000 * math.exp(-(((number - 6) / 4) ** 2))) for number in range(24)]
    source = SourceCounts("rows.jsonl", "messages", 20_000, 20_000, [])
    return DataCounts(
        20_000, 20_000, 5_000_000, 1_500_000, 0, 0, 0, [], [180, 400, 700, 960], [60, 120, 200, 300], histogram,
        3, 0, 0, 0, 0, 0, 0, [source],
    )  # fmt: skip


def taken(step: int, loss: float, chance: random.Random) -> str:
    """A step's line."""
    norm, seconds = math.exp(chance.gauss(-0.5, 0.4)), 0.3 + chance.random() / 10
    rate = 3e-4 * min(step / 300, 0.5 * (1 + math.cos(math.pi * step / STEPS)))
    return line("step", StepDone(step, step / 1250, loss, None, 1200, 4000, rate, norm, seconds))


def measured(step: int, loss: float, is_base: bool) -> str:
    """A validation's line."""
    rise = 0.0 if is_base else 0.25 * (1 - math.exp(-step / 3000))
    forgetting = Forgetting(
        Estimate(rise, rise - 0.02, rise + 0.02, 16), 4.05, 4064, Estimate(2 * rise, None, None, 1), 900
    )
    best = None if is_base else min(step, 6000)
    record = Evaluated(step, step / 1250, loss, 9000, 0.4 + rise, not is_base, best, 3, 4.0, forgetting, rise <= 0.2)
    return line("evaluated", record)


def line(event: str, record: StepDone | Evaluated) -> str:
    """A record as it stands in metrics.jsonl."""
    from lora_cli.records import as_json

    return json.dumps({"event": event, **as_json(record)})


# --- the browser ---


def shown(page: Path, browser: str, width: int, height: int, *more: str) -> str:
    """Open a page without a window; return what is asked for on stdout."""
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *more]
        command += [f"--user-data-dir={profile}", f"--window-size={width},{height}", page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def loading(page: Path, browser: str, times: int = 3) -> float:
    """Return the seconds the page takes: those of a browser that opens it, less those of one with an empty page."""
    empty = page.with_name("empty.html")
    empty.write_text("<!doctype html><title>empty</title>", encoding="utf-8")
    taken = dict.fromkeys((page, empty), math.inf)
    for each in [page, empty] * times:
        began = time.perf_counter()
        dom = shown(each, browser, 1280, 900, "--dump-dom")
        assert each == empty or '<div class="hover"' in dom, "the policy stops the page's own script"
        taken[each] = min(taken[each], time.perf_counter() - began)
    return round(max(taken[page] - taken[empty], 0.0), 2)


def looked_at(page: Path, browser: str, width: int, height: int) -> dict[str, Any]:
    """Return how wide the page is, and what it asked for.

    It is looked at inside a frame of the width, as a window without a screen is never narrower than 500 pixels.
    """
    probed = page.with_name("probed.html")
    text = page.read_text(encoding="utf-8")
    policy = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
    probed.write_text(policy.sub("", text).replace("</head>", f"{PROBE}</head>"), encoding="utf-8")
    outside = page.with_name("frame.html")
    outside.write_text(
        f'<body><iframe src="probed.html" width="{width}" height="{height}"></iframe><script>'
        'addEventListener("load", () => setTimeout(() => {'
        "document.body.dataset.found = frames[0].document.title }, 500))"
        "</script>",
        encoding="utf-8",
    )
    dom = shown(
        outside, browser, 1400, height, "--dump-dom", "--allow-file-access-from-files", "--virtual-time-budget=9000"
    )
    found = re.search(r'data-found="([^"]+)"', dom)
    assert found is not None, dom[:2000]
    values: dict[str, Any] = json.loads(found[1].replace("&quot;", '"'))
    return values


def shot(page: Path, browser: str, width: int, height: int, scheme: str, to: Path) -> None:
    """Take a picture of the whole page; a narrow one inside a frame."""
    tall = height * 8
    number = {"dark": 0, "light": 1}[scheme]
    inside = page.with_name("shot.html")
    inside.write_text(
        '<meta name="color-scheme" content="light dark"><style>body{margin:0}iframe{border:0;display:block}</style>'
        f'<iframe src="{page.name}" width="{width}" height="{tall}"></iframe>',
        encoding="utf-8",
    )
    to.parent.mkdir(parents=True, exist_ok=True)
    settings = f"--blink-settings=preferredColorScheme={number}"
    shown(inside, browser, max(width, 500), tall, settings, f"--screenshot={to}", "--virtual-time-budget=3000")


if __name__ == "__main__":
    main()
