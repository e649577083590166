"""`lora`: fine-tune Hugging Face language models with LoRA, from one YAML file; from Python by `lora_cli.api`."""

__version__ = "0.1.0"
