"""What ask and plan do: a model, a plan and hosts for a document and a question."""
