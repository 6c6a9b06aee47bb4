"""Prompts: documents, questions and chat templates as token ids."""
