"""Text generation with the engine: load a model, chat sessions, threaded service, detokenizer."""
