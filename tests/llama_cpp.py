"""llama.cpp itself, as the wheel xllamacpp carries it: what a GGUF file must give the same numbers in."""

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xllamacpp

_KEPT: list[Any] = []  # a server that goes while its thread is still beginning waits for it for ever


class LlamaCpp:
    """One model in llama.cpp's server, in this process, as exact as it gets.

    By default its key-value cache and its flash attention round to float16, which moves log probabilities ten times as
    far.
    """

    def __init__(self, model: Path, adapter: Path | None = None, context: int = 512) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx = context
        params.n_parallel = 1
        params.cpuparams.n_threads = 1
        params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.warmup = False
        params.verbosity = -1
        params.use_jinja = True
        if adapter is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self.server = xllamacpp.Server(params)
        _KEPT.append(self.server)

    def continuation(self, prompt: Sequence[int], count: int) -> list[int]:
        """Continue token ids greedily by at most `count` tokens."""
        return list(self._complete(prompt, count)["tokens"])

    def likely(self, prompt: Sequence[int]) -> dict[int, float]:
        """Return the log probabilities of the ten most likely next tokens.

        They are only given with whole characters, so that a letter is forced; they are taken before it is.
        """
        letter = self.tokenize("a", add_special=False)[-1]
        (step,) = self._complete(prompt, 1, logit_bias=[[letter, 1000.0]])["completion_probabilities"]
        return {top["id"]: top["logprob"] for top in step["top_logprobs"]}

    def _complete(self, prompt: Sequence[int], count: int, **options: Any) -> Any:
        asked = {"n_predict": count, "temperature": 0.0, "n_probs": 10, "cache_prompt": False, "return_tokens": True}
        return self._post("/completion", {"prompt": list(prompt), **asked, **options})

    def chat(self, messages: Sequence[dict[str, str]], count: int) -> tuple[str, int]:
        """Answer a conversation greedily, by the chat template in the file; return also the prompt's tokens."""
        answer = self.server.handle_chat_completions(
            {"messages": list(messages), "max_tokens": count, "temperature": 0.0, "cache_prompt": False}
        )
        assert "choices" in answer, answer
        return str(answer["choices"][0]["message"]["content"]), int(answer["usage"]["prompt_tokens"])

    def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        """Return a text's tokens, special ones parsed."""
        answer = self._post("/tokenize", {"content": text, "add_special": add_special, "parse_special": True})
        return list(answer["tokens"])

    def apply_template(self, messages: Sequence[dict[str, str]]) -> str:
        """Return a conversation as text, by the chat template in the file."""
        return str(self._post("/apply-template", {"messages": list(messages)})["prompt"])

    def _post(self, path: str, values: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.server.listening_address + path, json.dumps(values).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)
