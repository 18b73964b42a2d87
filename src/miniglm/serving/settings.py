"""Every limit of the server, in one place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server takes before it refuses; an error names the limit that was met.

    Attributes:
        slots: sequences that run at once.
        queue: sequences that wait for a slot; with more, 429.
        per_client: requests that one client may have open at once; with more, 429.
        max_tokens: tokens that a request may ask for.
        max_choices: answers to one prompt (`n`), and prompts of one completion request.
        max_body: bytes of a request.
        max_prompt_characters: characters of all messages, or of a prompt.
        max_messages: messages of a conversation.
        max_stop: stop strings.
        max_stop_characters: characters of one of them.
        max_logprobs: the most probable tokens that are reported at each place.
        request_seconds: for a whole request, its answer included.
        header_seconds: for a connection to send its request.
        write_seconds: for a client to read what was sent to it.
        connections: open at once.
        shutdown_seconds: for what runs, once the server is told to end.
    """

    slots: int = 32
    queue: int = 128
    per_client: int = 256
    max_tokens: int = 1024
    max_choices: int = 8
    max_body: int = 1_000_000
    max_prompt_characters: int = 100_000
    max_messages: int = 256
    max_stop: int = 4
    max_stop_characters: int = 64
    max_logprobs: int = 20
    request_seconds: float = 120.0
    header_seconds: float = 10.0
    write_seconds: float = 30.0
    connections: int = 2048
    shutdown_seconds: float = 8.0
