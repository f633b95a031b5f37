"""OpenAI-compatible HTTP server over a `Service`: an ASGI app with a chat page at `/`."""
