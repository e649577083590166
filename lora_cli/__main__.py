"""Where the program begins, as `lora` and as `python -m lora_cli`, so that launchers such as torchrun can start it."""

import sys

from lora_cli import heap


def main() -> None:
    """Run a command; one that trains with memory held for it."""
    if sys.argv[1:2] in (["train"], ["tune"]):
        heap.restart_without_caches()
    from lora_cli import cli

    cli.main()


if __name__ == "__main__":
    main()
