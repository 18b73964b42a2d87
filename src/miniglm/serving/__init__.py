"""The server: a chat page and an OpenAI-compatible API on one model (docs/serving.md)."""
