"""Prefill verbs, ask and plan: a model, a plan and hosts for a document and a question."""
