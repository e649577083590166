"""`lora export --format ollama`: a folder with a GGUF file and the Modelfile that tells Ollama how to talk to it."""
