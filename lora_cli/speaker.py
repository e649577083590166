"""One base in memory and the results it speaks for: a conversation goes in, the text of an answer comes out."""

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import torch

from lora_cli import adapter, lora, tuned, tuning
from lora_cli.chat_reports import FinishReason, Said
from lora_cli.conversation import Message
from lora_cli.decoding import Decoder, never
from lora_cli.distributed import memory_error
from lora_cli.ends import end_tokens
from lora_cli.errors import AdapterError, SurroundingsError
from lora_cli.generate import Sampling
from lora_cli.prompts import Prompts
from lora_cli.text_stream import TextStream, iter_pieces
from lora_cli.tuned import AnyResult, Result

USUAL = Sampling(temperature=0.7, top_p=0.95)
LONGEST = 512  # tokens of an answer where nobody says, and no more than half of the model's positions


@dataclass(frozen=True)
class Manner:
    """How to answer. `max_new_tokens` null is LONGEST; `stops` end an answer and are left out of it.

    `think` asks for reasoning first, as rows with reasoning are trained; else an answer without is asked for.
    """

    sampling: Sampling = USUAL
    max_new_tokens: int | None = None
    gain: float = 1.0
    stops: Sequence[str] = ()
    think: bool = False


class Answer:
    """An answer under way: iterating over it yields its text as it comes, and `said` tells afterwards what it was."""

    def __init__(
        self, speaker: "Speaker", prompt: Sequence[int], left_out: int, most: int, manner: Manner, voice: int
    ) -> None:
        self._speaker = speaker
        self._prompt = prompt
        self._left_out = left_out
        self._most = most
        self._manner = manner
        self._voice = voice
        self._times = [time.perf_counter()]
        self._reused = 0
        self._ended = False
        self._pieces: list[str] = []

    def pieces(self, stopped: Callable[[], bool] = never) -> Generator[str, None, None]:
        """Iterate over the text; `stopped` is asked before every token, and ends it. One answer at a time."""
        self._times = [time.perf_counter()]
        stream = TextStream(self._speaker.tokenizer, self._manner.stops)
        tokens = self._tokens(stopped)
        with self._speaker.speaking(self._voice, self._manner.gain):
            for piece in iter_pieces(stream, tokens):
                self._pieces.append(piece)
                yield piece
        self._ended |= stream.stopped

    def _tokens(self, stopped: Callable[[], bool]) -> Iterator[int]:
        """Iterate over the answer's tokens, its end token aside."""
        decoder = self._speaker.decoder
        for token in decoder.decode(self._prompt, self._manner.sampling, self._most, stopped):
            self._times.append(time.perf_counter())
            self._reused = decoder.reused
            if token in decoder.ends:
                self._ended = True
                return
            yield token

    @property
    def said(self) -> Said:
        """What was said so far, and how fast."""
        began, *times = self._times
        reason: FinishReason = "stop" if self._ended else "length" if len(times) == self._most else "interrupted"
        seconds = times[-1] - began if times else time.perf_counter() - began
        return Said(
            text="".join(self._pieces),
            finish_reason=reason,
            prompt_tokens=len(self._prompt),
            reused_tokens=self._reused,
            left_out_turns=self._left_out,
            tokens=len(times),
            first_seconds=times[0] - began if times else None,
            seconds=seconds,
            tokens_per_second=(len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None,
            gain=self._manner.gain,
        )


class Speaker:
    """Answers for one result, or for several of the same base, switched as they are asked."""

    def __init__(self, results: Sequence[AnyResult], device: torch.device, dtype: str | None = None) -> None:
        """Load the base once. Raises AdapterError where the results are not of one base, or one does not fit it."""
        _require_one_base(results)
        self.model = tuned.load(results[0], device, dtype)
        self.model.module.set_attn_implementation(self.model.own_attention)  # which knows caches
        lora.set_dropout(self.model.module, None)
        self.tokenizer = results[0].header.tokenizer
        self.decoder = Decoder(self.model, end_tokens(self.model, self.tokenizer))
        self.prompts = [Prompts(result) for result in results]
        self._results = results
        self._attached: int | None = 0  # the result whose adapter is on the base; null: none is whole
        self._cached_for = (0, 1.0)  # the result and the gain that the cache is of
        for voice in (*range(1, len(results)), 0) if len(results) > 1 else ():
            self._attach(voice)  # one that does not fit is found now, not when it is asked for

    def answer(self, messages: Sequence[Message], manner: Manner = Manner(), voice: int = 0) -> Answer:
        """Return the answer to a conversation, not begun yet. Raises InputError.

        Where the model has too few positions for all of it, the oldest turns are left out, and `said` tells how many.
        """
        room = self._room(manner)
        prompt, left_out = self.prompts[voice].fitted(messages, room, manner.think)
        return Answer(self, prompt, left_out, room, manner, voice)

    def go_on(self, text: str, manner: Manner = Manner(), voice: int = 0) -> Answer:
        """Return the continuation of a text, not begun yet. Raises InputError."""
        prompt, room = self.prompts[voice].of_text(text), self._room(manner)
        self.prompts[voice].require_fit(prompt, room)
        return Answer(self, prompt, 0, room, manner, voice)

    def _room(self, manner: Manner) -> int:
        """Return how many tokens an answer may have."""
        positions = self.prompts[0].max_positions
        return manner.max_new_tokens or (min(LONGEST, positions // 2) if positions else LONGEST)

    @contextlib.contextmanager
    def speaking(self, voice: int, gain: float) -> Iterator[None]:
        """Run a block with a result at a gain; the cache of another one is dropped."""
        try:
            if self._attached != voice and gain:
                self._attach(voice)
            if self._cached_for != (cached_for := (voice if gain else 0, gain)):
                self.decoder.forget()
                self._cached_for = cached_for
            with tuning.gain(self.model.module, gain):
                yield
        except (RuntimeError, MemoryError) as error:
            if memory_error(error) is None:
                raise
            raise SurroundingsError(
                f"memory ran out: {str(error)[:200]}", "Ask for less, or begin anew.", state="No answer was kept."
            ) from error

    def _attach(self, voice: int) -> None:
        """Put a result's adapter on the base in the place of the one that is there."""
        result = self._results[voice]
        assert isinstance(result, Result), "several results are adapters"
        self._attached = None  # what fails here leaves the base alone, which is nobody's answer
        tuning.remove(self.model.module)
        adapter.attach(self.model.module, result.adapter)
        lora.set_dropout(self.model.module, None)
        self._attached = voice


def _require_one_base(results: Sequence[AnyResult]) -> None:
    """Raise AdapterError where results cannot share a base in memory."""
    if len(results) == 1:
        return
    first, problems = results[0], []
    for result in results:
        if not isinstance(result, Result):
            problems.append(f"{result.folder}: is a whole model, which shares no base; name it alone.")
        elif result.base_fingerprint != first.base_fingerprint:
            problems.append(
                f"{result.folder}: is for another base ({result.base.path}) than {first.folder} ({first.base.path})."
            )
        elif result.base.quantization != first.base.quantization:
            problems.append(
                f"{result.folder}: its base is quantised another way ({result.base.quantization}) than that of "
                f"{first.folder} ({first.base.quantization})."
            )
    if problems:
        raise AdapterError(*problems, state="No weights were read.")
