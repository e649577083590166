"""Capture what every command shows: docs/screens.md and the pictures beside it.

    python scripts/screens.py MODEL [--only NAME ...] [--out docs] [--keep FOLDER]

Each command runs in a terminal of its own (a pty, read by a terminal emulator), one after another in an empty folder,
on the quickstart's rows and a small model: a short run from the first config to an answer. What stands on the screen
when the command has ended is kept as text; of `lora train` and `lora tune` also what stood there on the way. The report
is opened in headless Chromium, at a desktop's and at a phone's width, light and dark. Needs `pyte`, which
the tests' packages hold, and `chromium` on the path.
"""

import argparse
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fcntl import ioctl
from pathlib import Path

import pyte

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "configs" / "quickstart"
SHORT = (
    "train.max_steps=24 train.epochs=1 train.batch_size=2 train.learning_rate=1e-3 data.validation=16 "
    "eval.per_epoch=40 eval.general_tokens=1024 save.per_epoch=40"
)


@dataclass(frozen=True)
class Screen:
    """A command, and when its screen is looked at: at its end, and when `glimpse` (a pattern) stands on it."""

    name: str
    title: str
    command: str
    columns: int = 100
    glimpse: str | None = None
    typed: Sequence[str] = field(default=())  # lines, each typed when a prompt waits for it
    stop: str | None = None  # a pattern at which it is told to end
    height: int = 300  # of a terminal with all of the output on it


ASKED = "My parcel 7731 has not arrived and I want my money back."
FIRST, SECOND = f"lora train train.yaml {SHORT}", f"lora train train.yaml {SHORT} seed=1 output_dir=runs/second"
SEARCH = f"lora tune train.yaml {SHORT} eval.general=false tune.budget=0.5 tune.trials=5"
EVAL = "lora eval runs/first --data heldout.jsonl --answers"
CHAT = "lora chat runs/first --temperature 0"
SCREENS = (
    Screen("help", "The commands", "lora --help"),
    Screen("doctor", "Is this machine ready?", "lora doctor"),
    Screen("init", "A first config", "lora init train.yaml --model MODEL --data train.jsonl"),
    Screen("check", "What would happen", "lora check train.yaml"),
    Screen("error", "A mistake", "lora train train.yaml lora.rnk=8 train.learning_rate=fast"),
    Screen("train", "A run on its way, and at its end", FIRST, glimpse=r"1\d/24", height=40),
    Screen("train-60", "The same at 60 columns", SECOND, 60, r"1\d/24", height=40),
    Screen("eval", "Base and adapter side by side", f"{EVAL} 8", 110),
    Screen("scan", "What it learns and forgets at other strengths", f"{EVAL} 0 --scan", 110),
    Screen("chat", "Talking to it", CHAT, typed=(ASKED, "/base", "/exit"), height=60),
    Screen("prompt", "One answer, for a pipe", f"{CHAT} --prompt 'The app crashes when I open settings.'"),
    Screen("scale", "The adapter at another strength", "lora scale runs/first --gain 0.8 --output milder"),
    Screen("merge", "One model, verified", "lora merge runs/first --output merged"),
    Screen("export", "For llama.cpp", "lora export runs/first --format gguf --output model.gguf"),
    Screen("serve", "An endpoint to try it out", "lora serve runs/first --port 8321", stop="8321"),
    Screen("tune", "A search", SEARCH, glimpse="trial 3", height=40),
    Screen("report", "The report", "lora report runs/first runs/second --output report.html"),
    Screen("version", "Versions", "lora version"),
)


def run(screen: Screen, folder: Path, model: str) -> Iterator[str]:
    """Run a command in a terminal; iterate over what stands on the screen at its glimpse and at its end."""
    seen, stream = pyte.Screen(screen.columns, screen.height), pyte.ByteStream()
    stream.attach(seen)
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        environment = os.environ | {"TERM": "xterm-256color", "HF_HUB_OFFLINE": "1", "PATH": _path()}
        os.execvpe("bash", ["bash", "-c", screen.command.replace("MODEL", model)], environment)
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", screen.height, screen.columns, 0, 0))
    typed, looked, told, quiet_since = list(screen.typed), screen.glimpse is None, screen.stop is None, time.monotonic()
    while True:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                data = os.read(terminal, 1 << 16)
            except OSError:  # the other side is closed
                break
            stream.feed(data)
            quiet_since = time.monotonic()
        now = "\n".join(seen.display)
        if not looked and screen.glimpse and re.search(screen.glimpse, now):
            looked = True
            yield _text(seen)
        if not told and screen.stop and re.search(screen.stop, now):
            told = True
            os.kill(pid, signal.SIGINT)
        if typed and time.monotonic() - quiet_since > 2 and _text(seen).endswith("\n>"):
            os.write(terminal, f"{typed.pop(0)}\n".encode())
            quiet_since = time.monotonic()
    os.waitpid(pid, 0)
    yield _text(seen)


def _path() -> str:
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def _text(seen: pyte.Screen) -> str:
    """Return the screen without the space around what stands on it."""
    return "\n".join(line.rstrip() for line in seen.display).strip("\n")


def photograph(report: Path, out: Path) -> Iterator[str]:
    """Take pictures of a report; iterate over their names."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("chromium is not on the path; no picture of the report was taken.")
    for name, size, dark in (("desktop", "1280,2400", 0), ("phone", "390,2400", 0), ("dark", "1280,1400", 1)):
        target = out / "screens" / f"report-{name}.png"
        target.parent.mkdir(exist_ok=True)
        settings = [
            f"--window-size={size}",
            f"--screenshot={target}",
            f"--blink-settings=preferredColorScheme={1 - dark}",
        ]
        subprocess.run(
            [chromium, "--headless", "--no-sandbox", "--hide-scrollbars", *settings, report.as_uri()],
            check=True, capture_output=True,
        )  # fmt: skip
        yield f"screens/{target.name}"


HEAD = """# Every command's screen

Made by `python scripts/screens.py models/SmolLM2-135M-Instruct`: a short run on the quickstart's rows, each command in
a terminal of its own. Colours are not shown."""


def prepare(folder: Path, model: Path) -> None:
    """Put the model and the rows into the folder where commands are typed."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / model.name).exists():
        (folder / model.name).symlink_to(model)
    for name in ("train.jsonl", "heldout.jsonl"):
        shutil.copy(DATA / name, folder / name)


def section(screen: Screen, folder: Path, model: str, out: Path) -> str:
    """Run a command, and return what the page says of it."""
    shown = [
        text.replace(str(folder), "~/project").replace(str(Path.home()), "~") for text in run(screen, folder, model)
    ]
    parts = [f"## {screen.title}", f"`{screen.command.replace('MODEL', model)}`"]
    parts += [f"```text\n{text}\n```" for text in shown]
    if screen.name == "report":
        parts += [f"![The report]({name})" for name in photograph(folder / "report.html", out)]
    return "\n\n".join(parts)


def main() -> None:
    """Run all, or those that are named, and write the page; sections of others stay as they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--only", nargs="*", default=[screen.name for screen in SCREENS], help="names")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    parser.add_argument("--keep", type=Path, help="the folder to work in, which stays")
    arguments = parser.parse_args()
    page, model = arguments.out / "screens.md", arguments.model.resolve()
    before = page.read_text(encoding="utf-8").split("\n\n## ")[1:] if page.exists() else []
    sections = {text.partition("\n")[0]: f"## {text.strip()}" for text in before}
    with tempfile.TemporaryDirectory() as made:
        folder = arguments.keep or Path(made)
        prepare(folder, model)
        for screen in SCREENS:
            if screen.name in arguments.only:
                print(screen.command, file=sys.stderr)
                sections[screen.title] = section(screen, folder, model.name, arguments.out)
            listed = [sections[one.title] for one in SCREENS if one.title in sections]
            page.write_text("\n\n".join([HEAD, *listed]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
