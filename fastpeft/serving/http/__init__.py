"""The server: OpenAI's completions and chat endpoints over HTTP."""
