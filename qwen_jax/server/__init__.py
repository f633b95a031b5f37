"""An OpenAI-compatible HTTP server over a `Service`: an ASGI app, and the chat page at `/`."""
