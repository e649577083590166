"""What other runtimes load: one file a format, GGUF in a few."""
