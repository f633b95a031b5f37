"""Conversations as token ids: ChatML, chat templates and tool-call formats, on a tokenizer only."""
