"""The HTTP side: OpenAI's completions on the engine. It never waits for the engine, nor the engine for it."""
