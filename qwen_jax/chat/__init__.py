"""Conversations as token ids: ChatML, chat templates, tool-call formats. Needs only a tokenizer."""
