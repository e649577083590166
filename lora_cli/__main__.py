"""`python -m lora_cli` is the same program as `lora`, so that launchers such as torchrun can start it."""

from lora_cli.cli import main

if __name__ == "__main__":
    main()
