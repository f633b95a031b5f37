"""Text generation on top of the engine: loading a model, chat sessions, a threaded service."""
